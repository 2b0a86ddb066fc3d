"""What the processes of a feed tell each other arrives, whoever asks."""

import pytest

from pipelines.feed.channel import FeedChannel
from pipelines.feed.data_task import FeedWork, blocks_of
from pipelines.feed.executions import Executions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray4")]


def test_a_selected_execution_is_known_in_every_process() -> None:
    import ray

    @ray.remote(num_cpus=0)
    def look(dataset: int) -> int:
        return FeedChannel("known").selected(dataset)

    assert [ray.get(look.remote(dataset)) for dataset in (0, 1)] == [0, 1], "before anything was selected"
    FeedChannel("known").select(4)
    FeedChannel("known").select(7)
    assert [ray.get(look.remote(dataset)) for dataset in (0, 1)] == [4, 7]
    assert FeedChannel("other").selected(0) == 0


def test_all_tasks_of_an_execution_have_started_when_its_last_one_has() -> None:
    import ray

    channel, executions = FeedChannel("moving"), Executions.of(300, 1)
    work = FeedWork(channel=channel, executions=executions, segments=ray.put([]), stops=[], ranks=(0,), store_bytes=0)

    def start(task: int) -> None:
        with pytest.raises(IndexError):  # There is no segment to read: starting is all that counts here.
            next(blocks_of(work, task))

    for task in (*range(127), *range(128, 255)):
        start(task)
    assert not channel.all_started(0)
    start(127)
    assert channel.all_started(0)
    assert not channel.all_started(1)
