"""`mae neighbours`: nearest neighbours of embeddings, how often they share a label, and near-duplicates.

1. Read all embeddings, centre or whiten them, and scale each to length 1: inner products are then cosines.
2. Search k + 1 neighbours of every image with faiss and take the image itself out.
3. Go through the images in the order test, val, train and by id: an image above the threshold of one that is kept is a
   near-duplicate, any other is kept (a greedy choice, which needs no clusters).

All embeddings are in memory as float32, twice while the index is built.
"""

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mae_core.errors import UserError
from pipelines.config import NeighboursConfig
from pipelines.embedding.embed import MANIFEST
from pipelines.embedding.inputs import records_of
from pipelines.embedding.lists import write_list
from pipelines.embedding.run import Results, read_results
from pipelines.images.decode import preview
from pipelines.pictures.neighbour_figures import Found, neighbour_figure
from pipelines.storage import Storage, open_storage

if TYPE_CHECKING:
    import faiss

log = logging.getLogger(__name__)

_TABLE, _LIST, _PICTURE, _RESULT = "neighbours.parquet", "duplicates.txt", "neighbours.png", "neighbours.json"
_QUERIES_AT_A_TIME = 4096
# Pairs above the threshold that one search may return: with a low threshold, all of them.
_MOST_PAIRS = 2**25
_KEPT_FIRST = {"test": 0, "val": 1, "train": 2}
_PICTURED_NEIGHBOURS = 8
_MANY_DUPLICATES = 0.2
# faiss suggests 4 to 16 times the root of the number of vectors, and 30 to 256 vectors a list to train with.
_LISTS_PER_ROOT, _FEWEST_PER_LIST, _LISTS_PROBED = 4, 39, 32
_INDEX_SEED = 1234
# Directions with a smaller share of the largest variance are rounding noise.
_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class _Set:
    """All embeddings, of length 1, with what is known of their images."""

    table: pa.Table
    vectors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.vectors)


def neighbours(uri: str, config: NeighboursConfig) -> dict[str, Any]:
    """Write the neighbours of every embedded image, a picture and a list of near-duplicates; return the measures.

    Raises UserError if the URI holds no complete embeddings, or if the images for the picture are gone.
    """
    storage = open_storage(uri)
    target = open_storage(config.out) if config.out else storage
    results = read_results(storage, MANIFEST, "mae embed SOURCE OUT")
    found = _read(storage, results, config.transform)
    if len(found) < 2:
        raise UserError(f"{uri} has {len(found)} embedding, which has no neighbours; embed more images")
    k = min(config.k, len(found) - 1)
    index = _index(found.vectors, config.index)
    rows, scores = _search(index, found.vectors, k)
    _write_table(target, found.table, rows, scores)
    duplicates, num_pairs = _duplicates(index, found, config.duplicates_above)
    if len(duplicates) > _MANY_DUPLICATES * len(found):
        log.warning(
            "%d of %d images are near-duplicates above %g, which is more than a dataset has: look at %s and try a "
            "higher --duplicates-above",
            len(duplicates), len(found), config.duplicates_above, target.join(_PICTURE),
        )  # fmt: skip
    names = found.table["source"]
    num_listed = write_list(target, _LIST, [names[i].as_py() for i in duplicates])
    target.write(_PICTURE, _picture(results, found, rows, scores, config))
    result = {
        "embeddings": storage.uri,
        "model": results.model,
        "num_images": len(found),
        "k": k,
        "knn_accuracy": _accuracy(found.table, rows),
        "mean_score": float(scores[:, 0].mean()),
        "duplicates_above": config.duplicates_above,
        "num_duplicate_pairs": num_pairs,
        "num_duplicates": num_listed,
        "duplicates": target.join(_LIST),
        "neighbours": target.join(_TABLE),
        "picture": target.join(_PICTURE),
    }
    target.write(_RESULT, json.dumps(result, indent=1).encode() + b"\n")
    return result


def _read(storage: Storage, results: Results, transform: str) -> _Set:
    parts = [pq.read_table(pa.BufferReader(storage.read(found.path))) for found in results.tables]
    table = pa.concat_tables(parts)
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table["embedding"].chunks])
    vectors = flat.reshape(len(table), -1).astype(np.float32)
    if transform != "none":
        vectors -= vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    if transform == "whiten":
        vectors = _whitened(vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _Set(table.drop_columns(["embedding"]), vectors / np.maximum(lengths, 1e-12))


def _whitened(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotate centred vectors to their principal axes and scale each to variance 1, but for those of almost none."""
    count, width = vectors.shape
    if count <= width:
        raise UserError(f"whitening {width} features needs more than {count} images; try --transform centre")
    variances, axes = np.linalg.eigh(np.cov(vectors, rowvar=False, dtype=np.float64).reshape(width, width))
    scale = np.maximum(variances, _LEAST_VARIANCE * variances.max()) ** -0.5
    return vectors @ (axes * scale).astype(np.float32)


def _index(vectors: NDArray[np.float32], kind: str) -> "faiss.Index":
    import faiss

    count, width = vectors.shape
    exact = faiss.IndexFlatIP(width)
    if kind == "exact":
        index: Any = exact
    else:
        num_lists = max(1, min(int(_LISTS_PER_ROOT * count**0.5), count // _FEWEST_PER_LIST))
        index = faiss.IndexIVFFlat(exact, width, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.nprobe = _INDEX_SEED, min(_LISTS_PROBED, num_lists)
        index.train(vectors)
    index.add(vectors)
    return index


def _search(index: Any, vectors: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return rows [n k] and scores [n k] of the neighbours, the nearest first, without the image itself."""
    rows, scores = np.empty((len(vectors), k), np.int64), np.empty((len(vectors), k), np.float32)
    for start in range(0, len(vectors), _QUERIES_AT_A_TIME):
        stop = min(start + _QUERIES_AT_A_TIME, len(vectors))
        score, row = index.search(vectors[start:stop], k + 1)
        own = row == np.arange(start, stop)[:, None]
        # Among equal images, others may take all places, and the image itself none.
        own[~own.any(axis=1), -1] = True
        rows[start:stop] = row[~own].reshape(-1, k)
        scores[start:stop] = score[~own].reshape(-1, k)
    return rows, scores


def _write_table(target: Storage, table: pa.Table, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
    k, ids = rows.shape[1], table["id"].to_numpy()
    near = np.where(rows >= 0, ids[rows], -1)
    columns = {
        "neighbours": pa.FixedSizeListArray.from_arrays(pa.array(near.reshape(-1)), k),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), k),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    file = pa.BufferOutputStream()
    pq.write_table(table, file, compression="ZSTD")
    target.write(_TABLE, file.getvalue().to_pybytes())


def _duplicates(index: Any, found: _Set, above: float) -> tuple[list[int], int]:
    """Return the rows of near-duplicates, and the number of pairs above the threshold."""
    ranks = np.array([_KEPT_FIRST.get(split, 3) for split in found.table["split"].to_pylist()])
    order = np.lexsort((found.table["id"].to_numpy(), ranks))
    is_kept, num_pairs = np.zeros(len(found), dtype=bool), 0
    dropped: list[int] = []
    step = max(1, min(_QUERIES_AT_A_TIME, _MOST_PAIRS // len(found)))
    for start in range(0, len(order), step):
        chunk = order[start : start + step]
        limits, _, near = index.range_search(found.vectors[chunk], above)
        for i, row in enumerate(chunk):
            others = near[limits[i] : limits[i + 1]]
            num_pairs += len(others) - int((others == row).any())
            # Only images that come earlier in the order are kept so far.
            if is_kept[others].any():
                dropped.append(int(row))
            else:
                is_kept[row] = True
    return sorted(dropped), num_pairs // 2


def _accuracy(table: pa.Table, rows: NDArray[np.int64]) -> float | None:
    """Return the share of labelled images, in percent, whose label most of their neighbours have, the nearest on a tie.

    Every image is left out of its own neighbours. None without two labels.
    """
    labels = table["label"].combine_chunks().dictionary_encode()
    codes = np.asarray(labels.indices.fill_null(-1))
    if len(labels.dictionary) < 2:
        return None
    near = np.where(rows >= 0, codes[rows], -1)
    votes = np.zeros((len(rows), len(labels.dictionary)), np.float64)
    for place in range(rows.shape[1]):
        voting = near[:, place] >= 0
        # The nearer of two neighbours counts slightly more, which decides ties only.
        votes[voting, near[voting, place]] += 1 + 1e-6 * (rows.shape[1] - place)
    labelled = (codes >= 0) & (votes.max(axis=1) > 0)
    return float(100 * (votes.argmax(axis=1) == codes)[labelled].mean())


def _picture(
    results: Results, found: _Set, rows: NDArray[np.int64], scores: NDArray[np.float32], config: NeighboursConfig
) -> bytes:
    """Draw queries, spaced evenly over all images, each with its nearest neighbours."""
    queries = np.unique(np.linspace(0, len(found) - 1, min(config.queries, len(found))).round().astype(int))
    shown = rows[queries, : min(rows.shape[1], _PICTURED_NEIGHBOURS)]
    ids, table = found.table["id"].to_numpy(), found.table
    wanted = {int(ids[row]) for row in {*queries.tolist(), *shown.ravel().tolist()} if row >= 0}
    try:
        images = {
            record.id: preview(record.content, record.orientation)
            for record in records_of(config.source or results.source, sorted(wanted), results.identity["input"])
            if isinstance(record.content, bytes)
        }
    except FileNotFoundError as error:
        raise UserError(f"{error}; the picture needs the images: give their place by --source") from None

    def tile(row: int, score: float | None = None) -> Found:
        values = table.slice(row, 1).to_pylist()[0]
        return Found(images[values["id"]], values["label"], values["source"], score)

    drawn = [
        [tile(int(query)), *(tile(int(row), float(score)) for row, score in zip(near, scores[query]) if row >= 0)]
        for query, near in zip(queries, shown)
    ]
    accuracy = _accuracy(table, rows)
    said = "" if accuracy is None else f", leave-one-out accuracy {accuracy:.1f} %"
    return neighbour_figure(f"{len(found)} images: queries and their nearest neighbours by cosine{said}", drawn)
