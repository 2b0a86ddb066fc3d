"""Executions hold every task once, and each may start when the one before has as many tasks left as run at a time."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.feed.executions import Executions


@given(num_tasks=st.integers(1, 3000), max_running=st.integers(1, 200))
def test_every_task_is_in_one_execution_and_every_execution_but_the_first_is_started_by_the_one_before(
    num_tasks: int, max_running: int
) -> None:
    executions = Executions.of(num_tasks, max_running)
    started, execution, seen = {0}, 0, []
    while tasks := executions.tasks(execution):
        assert execution in started
        seen += tasks
        following = [executions.next_after(task) for task in tasks]
        started.update(following)
        assert set(following) <= {0, execution + 1}
        assert sum(map(bool, following)) == (max_running if tasks.stop < num_tasks else 0)
        execution += 1
    assert seen == list(range(num_tasks))
    assert started == set(range(execution))
    assert execution == executions.count


def test_a_long_run_is_planned_in_short_parts() -> None:
    """800 epochs of a billion images in windows of 8,192."""
    executions = Executions.of(800 * 122_071, 16)
    assert len(executions.tasks(0)) == 128
    assert executions.tasks(700_000).start == 128 * 700_000
