"""Chapters hold every task once, and each may be begun when the one before has as many tasks left as run at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.feed.chapters import Chapters, begin, begun, is_under_way


@given(num_tasks=st.integers(1, 3000), at_a_time=st.integers(1, 200))
def test_every_task_is_in_one_chapter_and_every_chapter_but_the_first_is_begun_by_the_one_before(
    num_tasks: int, at_a_time: int
) -> None:
    chapters = Chapters.of("key", num_tasks, at_a_time)
    begun, chapter, seen = {0}, 0, []
    while tasks := chapters.tasks(chapter):
        assert chapter in begun
        seen += tasks
        following = [chapters.next_after(task) for task in tasks]
        begun.update(following)
        assert set(following) <= {0, chapter + 1}
        assert sum(map(bool, following)) == (at_a_time if tasks.stop < num_tasks else 0)
        chapter += 1
    assert seen == list(range(num_tasks))
    assert begun == set(range(chapter))


def test_a_long_run_is_planned_in_short_parts() -> None:
    """800 epochs of a billion images in windows of 8,192."""
    chapters = Chapters.of("key", 800 * 122_071, 16)
    assert len(chapters.tasks(0)) == 128
    assert chapters.tasks(700_000).start == 128 * 700_000


@pytest.mark.ray
def test_what_was_begun_is_known_in_every_process(ray4: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def look(turn: int) -> int:
        return begun("known", turn)

    assert [ray.get(look.remote(turn)) for turn in (0, 1)] == [0, 1], "before anything was begun"
    begin("known", 4)
    begin("known", 7)
    assert [ray.get(look.remote(turn)) for turn in (0, 1)] == [4, 7]
    assert begun("other", 0) == 0


@pytest.mark.ray
def test_a_chapter_is_under_way_when_its_last_task_has_started(ray4: None) -> None:
    chapters = Chapters.of("moving", 300, 1)
    for task in (*range(127), *range(128, 255)):
        chapters.started(task)
    assert not is_under_way("moving", 0)
    chapters.started(127)
    assert is_under_way("moving", 0)
    assert not is_under_way("moving", 1)
