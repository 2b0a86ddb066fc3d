"""What an encoder is worth while it is pretrained: a linear probe, RankMe and perhaps kNN on a fixed subset.

The images are read, decoded and normalized by the code of the feed, in the evaluation view. Nothing is random but the
choice of images, so that equal weights have equal values.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.augment import pixels_to_input
from mae_core.classifier import features
from mae_core.config import ClassifierConfig, parse_arch
from mae_core.encoder import build_encoder
from mae_core.errors import UserError
from mae_core.linear_probe import fit_linear_probe
from mae_core.neighbours import knn_probabilities
from mae_core.normalization import Normalization
from mae_core.rankme import rankme
from pipelines.config import PretrainConfig
from pipelines.dataset.manifest import Manifest
from pipelines.evaluation.models import device_of
from pipelines.evaluation.subset import choose_subset
from pipelines.feed.micro_batch import window_micro_batches
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform
from pipelines.storage import open_storage

log = logging.getLogger(__name__)

_BATCH = 64
_KEPT_BYTES = 2**30
"""Decoded images of a subset that are kept in memory; those of a larger one are read again for every evaluation."""
_WINDOW_BYTES = 2**28
"""Row groups, encoded, that are in memory while a subset is read."""
_WEIGHT_DECAY = 1e-2
_QUERIES = 256


class PeriodicEvaluator:
    """Evaluate an encoder again and again, with other weights, on the images that config and seed choose."""

    def __init__(self, config: PretrainConfig, pixels: Normalization, manifest: Manifest) -> None:
        """Choose the images and build the encoder. Raises UserError if there is no GPU but the config asks for one."""
        model = config.model
        self._config, self._pixels = config.evaluate, pixels
        self._num_classes = len(manifest.classes)
        self._device = device_of(gpu=config.evaluate.gpu)
        self._vit = build_encoder(parse_arch(model.arch), model.image_px, model.channels, norm_eps=model.norm_eps)
        self._vit.requires_grad_(False).eval().to(self._device)
        storage = open_storage(config.data.uri)
        subset = choose_subset(manifest, storage, config.evaluate.images, seed=config.seed)
        self._fitted = SubsetImages(config, pixels, manifest, "train", subset.fitted)
        self._held_out = None
        if subset.held_out is not None:
            self._held_out = SubsetImages(config, pixels, manifest, subset.held_out_split, subset.held_out)

    def evaluate(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Return the metrics of an encoder with these weights, by name; accuracies are in percent.

        Raises UserError if no image can be decoded, if a shard is damaged, or if the features are not finite.
        """
        self._vit.load_state_dict({name: torch.tensor(values) for name, values in tensors.items()})
        fitted, labels = self._encoded(self._fitted)
        found = {"rankme": rankme(fitted)}
        if self._held_out is None:
            return found
        queries, truth = self._encoded(self._held_out)
        probe = fit_linear_probe(fitted, labels, num_classes=self._num_classes, weight_decay=_WEIGHT_DECAY)
        found["linear_top1"] = _accuracy(probe(queries, torch.ones(len(queries), device=self._device)), truth)
        if self._config.knn:
            found["knn_top1"] = _accuracy(self._votes(queries, fitted, labels), truth)
        return found

    @torch.no_grad()
    def _encoded(self, images: "SubsetImages") -> tuple[Tensor, Tensor]:
        """Return features [n d] and labels [n] of the images that could be decoded."""
        found, labels = [], []
        for pixels, known in images.batches():
            inputs = pixels_to_input(pixels.to(self._device), self._pixels)
            found.append(features(self._vit, inputs, self._config.pool).float())
            labels.append(known)
        if not found:
            raise UserError(f"no image of the evaluation's subset of split {images.split!r} can be decoded")
        return torch.cat(found), torch.cat(labels).to(self._device)

    def _votes(self, queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
        defaults = ClassifierConfig()
        votes = [
            knn_probabilities(
                some,
                bank,
                labels,
                num_classes=self._num_classes,
                num_neighbours=min(defaults.num_neighbours, len(bank)),
                temperature=defaults.temperature,
            )
            for some in queries.split(_QUERIES)
        ]
        return torch.cat(votes)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return 100 * float((scores.argmax(1) == labels).double().mean())


class SubsetImages:
    """The images of a subset in the evaluation view, decoded once if they are few enough to be kept."""

    def __init__(
        self, config: PretrainConfig, pixels: Normalization, manifest: Manifest, split: str, index: Index
    ) -> None:
        model, self.split = config.model, split
        num_groups = int(np.count_nonzero(index.group_counts()))
        group_bytes = manifest.splits[split].num_bytes / len(index.group)
        # A window holds the row groups of all its images: where images are scattered, it must have few.
        per_window = _WINDOW_BYTES * index.num_samples / max(1.0, num_groups * group_bytes)
        plan = EpochPlan(
            index=index,
            seed=config.seed,
            batch=_BATCH,
            micro_batch=_BATCH,
            num_workers=1,
            window=int(min(max(per_window, 1), index.num_samples)),
            shuffle=False,
        )
        transform = Transform(
            train=False,
            image_px=model.image_px,
            channels=model.channels,
            augment=config.augment,
            seed=config.seed,
            values=pixels.values,
        )
        self._segment = FeedSegment(
            dataset_uri=config.data.uri, plan=plan, transform=transform, first_step=0, last_step=plan.steps_per_epoch
        )
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._is_kept = self._segment.micro_batch_bytes * plan.steps_per_epoch <= _KEPT_BYTES

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels [n height width channels], uint8 or from 0 to 1, and labels [n]; leave out unreadable images."""
        if not self._is_kept:
            return self._read()
        if self._kept is None:
            self._kept = list(self._read())
        return iter(self._kept)

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        for window in range(self._segment.num_windows):
            for batch in window_micro_batches(self._segment, window):
                real = batch.weights > 0
                if real.any():
                    yield batch.images[real], batch.labels[real]
