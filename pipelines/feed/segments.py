"""Segments of a feed, as they are sent to data tasks: steps of an epoch plan, and the transform of every sample.

Must not import torch, since Ray's own processes import this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mae_core.config import AugmentConfig, Size
from mae_core.normalization import ValueRange
from pipelines.dataset.row_groups import RowGroups
from pipelines.feed.plan import EpochPlan

if TYPE_CHECKING:
    from pipelines.feed.windows import Window


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How a sample becomes part of a micro-batch; random only in training, keyed by the seed."""

    train: bool
    image_px: Size
    channels: int
    augment: AugmentConfig
    seed: int
    crops: int = 1
    """Training views made of each decoded image."""
    values: ValueRange | None = None
    """How values become float32 from 0 to 1; None for uint8 images, which stay so."""


@dataclass(frozen=True, kw_only=True)
class FeedSegment:
    """Steps [first_step, last_step) of a plan over one prepared dataset; steps count over all epochs."""

    dataset_uri: str
    plan: EpochPlan
    transform: Transform
    first_step: int
    last_step: int

    @cached_property
    def row_groups(self) -> RowGroups:
        """Reader of the shards, shared by all windows that this process reads."""
        return RowGroups(self.dataset_uri)

    def plan_of(self, window: int) -> EpochPlan:
        """Return the plan of a window, counted over all epochs."""
        return self.plan

    @property
    def first_window(self) -> int:
        """The window of first_step, counted over all epochs."""
        return self._window_of(self.first_step)

    @property
    def num_windows(self) -> int:
        if self.last_step <= self.first_step:
            return 0
        return self._window_of(self.last_step - 1) - self.first_window + 1

    @property
    def micro_batch_bytes(self) -> int:
        """Size of one micro-batch's images."""
        height_px, width_px = self.transform.image_px
        image_values = height_px * width_px * self.transform.channels
        return self.plan.micro_batch * self.transform.crops * image_values * (1 if self.transform.values is None else 4)

    def open_window(self, window: int, ranks: Sequence[int] | None = None) -> "Window":
        """Read a window, counted over all epochs; with `ranks`, only what these ranks train on."""
        from pipelines.feed.windows import Window

        return Window(self, window, ranks)

    def _window_of(self, step: int) -> int:
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        return epoch * self.plan.windows_per_epoch + within // self.plan.steps_per_window
