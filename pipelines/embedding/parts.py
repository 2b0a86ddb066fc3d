"""Compute one part: read, decode and resize its images, pass them through a model in batches, write one Parquet file.

1. One thread reads and decodes a few batches ahead.
2. The model takes a batch while the next ones are decoded. Results stay on its device until the part ends.
3. The table is written, then the summary that makes the part count.

A batch is the readable images among `batch` consecutive ones. The price of that fixed plan: the last batch of a
part may be short, and a batch with unreadable images is smaller.
"""

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.config import Size
from mae_core.errors import UserError
from mae_core.normalization import ValueRange
from pipelines.embedding.inputs import Part, Reader, Record
from pipelines.images.decode import ImageArray, input_view
from pipelines.prepare.quarantine import Quarantine
from pipelines.prepare.workfolder import WorkFolder
from pipelines.storage import Storage

log = logging.getLogger(__name__)

_BATCHES_AHEAD = 2
Forward = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""From images [batch height width channels] and ids [batch] to one row of values per image, by column."""


class Measure(Protocol):
    """What is computed of images."""

    @property
    def image_px(self) -> Size: ...

    @property
    def channels(self) -> int: ...

    @property
    def values(self) -> ValueRange | None:
        """How values become float32 from 0 to 1; None for uint8 images."""
        ...

    def load(self, weights: bytes, device: torch.device) -> Forward:
        """Build the model on a device."""
        ...

    def column(self, name: str, values: NDArray[Any]) -> pa.Array:
        """Convert the values of all images of a part to a column."""
        ...

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the Parquet schema."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an actor needs to compute any part."""

    reader: Reader
    work: WorkFolder
    target: Storage
    measure: Measure
    batch: int
    max_pixels: int
    threads: int
    decoders: int
    gpu: bool


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """Result of computing one part."""

    number: int
    num_found: int
    num_rows: int
    """Images with values; the others are in quarantine."""
    reasons: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    sha256: str = ""
    """Digest of the table; empty if no image of the part is readable."""

    @property
    def num_bad(self) -> int:
        return sum(self.reasons.values())

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "PartSummary":
        return cls(**json.loads(content))


class PartWorker:
    """Computes parts with one copy of the model; runs as a Ray actor, or in this process."""

    def __init__(self, plan: Plan, weights: bytes | Any) -> None:
        if not isinstance(weights, bytes):
            import ray

            weights = ray.get(weights)
        torch.set_num_threads(plan.threads)
        self._plan = plan
        self._device = torch.device("cuda" if plan.gpu else "cpu")
        self._forward = _Halving(plan.measure.load(weights, self._device), plan.batch)
        self._decoders = ThreadPoolExecutor(plan.decoders)
        # Two parts are computed at a time, so that one is read and decoded while the other is written.
        self._lock = threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        """Compute the part and record its summary; return its counts and the largest batch that fits."""
        plan = self._plan
        part = Part.from_json(plan.work.listing(int(row["number"])))
        summary = self._compute(part)
        plan.work.put(summary)
        return {
            "number": part.number,
            "num_bad": summary.num_bad,
            "num_found": part.num_rows,
            "batch": self._forward.fits,
        }

    def _compute(self, part: Part) -> PartSummary:
        plan, quarantine = self._plan, Quarantine()
        kept: list[Record] = []
        values: list[dict[str, Tensor]] = []
        for records, views in self._batches(part):
            for record, view in zip(records, views):
                if isinstance(view, str):
                    content = record.content if isinstance(record.content, bytes) else b""
                    quarantine.add(record.name, view, content)
            whole = [(record, view) for record, view in zip(records, views) if not isinstance(view, str)]
            if whole:
                # The encoded images are no longer needed.
                kept += [record._replace(content=b"") for record, _ in whole]
                values.append(self._values([record.id for record, _ in whole], [view for _, view in whole]))
        quarantine.write(plan.target, part.quarantine)
        num_bytes, sha256 = self._write(part, kept, values) if kept else (0, "")
        return PartSummary(
            number=part.number,
            num_found=part.num_rows,
            num_rows=len(kept),
            reasons=quarantine.reasons,
            num_bytes=num_bytes,
            sha256=sha256,
        )

    def _batches(self, part: Part) -> Iterator[tuple[list[Record], list[ImageArray | str]]]:
        """Yield `batch` consecutive images at a time, decoded; a reason stands for an image that cannot be."""
        records = self._plan.reader.records(part)
        waiting: deque[tuple[list[Record], list[Future[ImageArray | str]]]] = deque()
        while True:
            while len(waiting) <= _BATCHES_AHEAD and (batch := list(islice(records, self._plan.batch))):
                waiting.append((batch, [self._decoders.submit(self._view, record) for record in batch]))
            if not waiting:
                return
            batch, views = waiting.popleft()
            yield batch, [view.result() for view in views]

    def _view(self, record: Record) -> ImageArray | str:
        """Return the image as evaluation sees it, or why it cannot be read."""
        plan, orientation = self._plan, record.orientation
        try:
            if isinstance(record.content, ValueError):
                raise record.content
            measure = plan.measure
            size = measure.channels, measure.image_px
            return input_view(record.content, *size, measure.values, orientation, plan.max_pixels)
        except ValueError as error:
            return str(error)

    def _values(self, ids: list[int], views: list[ImageArray]) -> dict[str, Tensor]:
        images, numbers = torch.from_numpy(np.stack(views)), torch.tensor(ids, dtype=torch.int64)
        with self._lock, torch.inference_mode():
            return self._forward(images.to(self._device), numbers.to(self._device))

    def _write(self, part: Part, kept: list[Record], values: list[dict[str, Tensor]]) -> tuple[int, str]:
        """Write the part's table; return its size and sha256."""
        measure = self._plan.measure
        columns: dict[str, pa.Array] = {
            "id": pa.array([record.id for record in kept], pa.int64()),
            "source": pa.array([record.name for record in kept], pa.string()),
            "split": pa.array([part.split] * len(kept), pa.string()),
            "label": pa.array([record.label for record in kept], pa.string()),
        }
        for name in values[0]:
            columns[name] = measure.column(name, torch.cat([found[name] for found in values]).cpu().numpy())
        file = pa.BufferOutputStream()
        table = pa.table(columns).replace_schema_metadata(measure.metadata)
        described = ["id", "source", "split", "label"]
        # Values of a network do not compress, and their minima say nothing.
        pq.write_table(
            table,
            file,
            compression={name: "ZSTD" if name in described else "NONE" for name in table.column_names},  # pyright: ignore[reportArgumentType] -- a codec a column is allowed
            use_dictionary=["split", "label"],  # pyright: ignore[reportArgumentType]
            write_statistics=described,  # pyright: ignore[reportArgumentType]
        )
        content = file.getvalue().to_pybytes()
        self._plan.target.write(part.table, content)
        return len(content), hashlib.sha256(content).hexdigest()


class _Halving:
    """Passes batches to a model; one that does not fit in the GPU's memory is halved, and so are all later ones."""

    def __init__(self, forward: Forward, batch: int) -> None:
        self._forward, self.fits = forward, batch

    def __call__(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Return the values of all images. Raises UserError if not even one fits."""
        found: list[dict[str, Tensor]] = []
        at = 0
        while at < len(images):
            try:
                found.append(self._forward(images[at : at + self.fits], ids[at : at + self.fits]))
                at += self.fits
            except torch.OutOfMemoryError as error:
                if self.fits == 1:
                    raise UserError(
                        f"one image of {'x'.join(map(str, images.shape[1:3]))} px does not fit in the GPU's memory "
                        f"({str(error).splitlines()[0]}); use a larger GPU, or leave --gpu out"
                    ) from None
                self.fits = max(1, min(self.fits, len(images)) // 2)
                # Blocks that the failed attempt cached are too small for what comes next.
                torch.cuda.empty_cache()
        return {name: torch.cat([values[name] for values in found]) for name in found[0]}
