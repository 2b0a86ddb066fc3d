"""What a classifier predicts of a split: hits for its accuracy, and the class of every image for comparisons."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mae_core.state import pack, unpack
from pipelines.feed.micro_batch import MicroBatch
from pipelines.runs.folder import RunFolder
from pipelines.worker.rank import Rank

_FILE = "predictions/{split}.safetensors"


@dataclass(frozen=True)
class Predicted:
    """Ascending sample ids [n] of the images of a split that could be decoded, with true and predicted class."""

    ids: Tensor
    labels: Tensor
    classes: Tensor


@dataclass
class Tally:
    """Predictions of this rank; every rank must add micro-batches of the same number and size."""

    rank: Rank
    counts: Tensor = field(init=False)
    _ids: list[Tensor] = field(default_factory=list)
    _labels: list[Tensor] = field(default_factory=list)
    _classes: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(3, dtype=torch.float64, device=self.rank.device)

    def add(self, logits: Tensor, batch: MicroBatch) -> None:
        """Add logits [n classes] of a micro-batch; placeholders and samples that cannot be decoded have weight 0."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits, weights = best == batch.labels[:, None], batch.weights
        sums = [(hits[:, 0] * weights).sum(), (hits.any(1) * weights).sum(), weights.sum()]
        self.counts += torch.stack(sums).double()
        self._ids.append(torch.where(weights > 0, batch.ids, -1))
        self._labels.append(batch.labels)
        self._classes.append(best[:, 0])

    def accuracy(self, split: str) -> dict[str, float]:
        """Sum the hits over ranks; return SPLIT/top1 and SPLIT/top5 in percent. Every rank must call it."""
        top1, top5, total = self.rank.sum(self.counts).tolist()
        return {f"{split}/top1": 100 * top1 / max(1, total), f"{split}/top5": 100 * top5 / max(1, total)}

    def write(self, folder: RunFolder, split: str) -> None:
        """Write the predictions of all ranks to the run folder. Every rank must call it."""
        parts = [torch.cat(part) for part in (self._ids, self._labels, self._classes)]
        ids, labels, classes = (torch.cat(self.rank.gather(part)) for part in parts)
        if self.rank.is_main:
            order = torch.argsort(ids, stable=True)
            order = order[ids[order] >= 0]
            found = {"ids": ids[order], "labels": labels[order], "classes": classes[order]}
            folder.storage.write(_FILE.format(split=split), pack(found))


def read_predicted(folder: RunFolder, split: str) -> Predicted:
    """Read what `write` wrote."""
    return Predicted(**unpack(folder.storage.read(_FILE.format(split=split))))
