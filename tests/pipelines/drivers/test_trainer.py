"""What starts beside the workers of a group."""

import pytest
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipelines.drivers.trainer import Trainer


@pytest.mark.parametrize("is_embedded", [True, False])
def test_no_dataset_manager_and_a_cleaner_only_where_a_dashboard_tells_it_of_a_death(
    is_embedded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAE_RAY_EMBEDDED", "1" if is_embedded else "")
    callbacks = Trainer(lambda: None)._create_default_callbacks()
    kinds = [type(each) for each in callbacks]
    assert kinds.count(PlacementGroupCleanerCallback) == (0 if is_embedded else 1)
    assert kinds.count(DatasetsCallback) == 0
    assert len(kinds) > 3
