"""Ray Train's trainer without processes that have nothing to do."""

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# What TorchTrainer adds to this class is TorchConfig, which imports torch here and in the controller.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.cluster import is_embedded


class Trainer(DataParallelTrainer):
    """A trainer whose groups start without a dataset manager and, if Ray is embedded, without a cleaner.

    The manager hands out the datasets that a trainer is given; ranks open feeds of their own. The cleaner frees what a
    controller that died had reserved. It learns of the death from the dashboard, which an embedded Ray does not have,
    and each group waits for its process to start.
    """

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback) if is_embedded() else (DatasetsCallback,)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, without)]
