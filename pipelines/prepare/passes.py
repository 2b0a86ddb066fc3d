"""The passes of a preparation: every slice is written as a Ray task, and again without duplicates where it has some.

Bad images are counted meanwhile, and too many of them end a pass early.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from mae_core.errors import UserError
from pipelines.prepare.assembly import total_values
from pipelines.prepare.pieces import cut_pieces
from pipelines.prepare.quarantine import MIN_BAD_TO_STOP, quarantined, refuse_bad
from pipelines.prepare.tasks import SliceTasks, unwrapped
from pipelines.prepare.values import refuse_empty, refuse_fraction

log = logging.getLogger(__name__)

Task: TypeAlias = Callable[[dict[str, Any]], dict[str, int]]


class Passes:
    """Both passes over the slices of a preparation, and what stops them."""

    def __init__(self, tasks: SliceTasks, num_found: int) -> None:
        self._tasks, self._work, self._target = tasks, tasks.work, tasks.target
        self._config, self._kind, self._num_found = tasks.config, tasks.kind, num_found
        self._num_bad = 0

    def first_pass(self, sizes: Sequence[int]) -> None:
        """Write every slice, duplicates included. Raises UserError early if too many images are bad.

        `sizes` has the number of entries of each slice.
        """
        from pipelines.cluster import task_slots

        done = self._work.done()
        if done:
            log.info("resuming: %d of %d slices are done", len(done), len(sizes))
        todo = {number: size for number, size in enumerate(sizes) if number not in done}
        written = self._work.pieces()
        # Sums of other values are of floating point, so that they would depend on the pieces.
        is_cut = todo and self._kind.is_plain and self._config.tile_px is None
        cut_up = cut_pieces(todo, task_slots(), written) if is_cut else {}
        rows = [{"number": n, "start": 0, "stop": 0} for n in todo if n not in cut_up]
        rows += [
            {"number": n, "start": piece.start, "stop": piece.stop}
            for n, pieces in cut_up.items()
            for piece in pieces
            if piece not in written.get(n, ())
        ]
        self._run(self._tasks.write, rows)
        self._run(self._tasks.join, [{"number": n, "starts": [p.start for p in cut_up[n]]} for n in sorted(cut_up)])

    def refuse_bad(self) -> None:
        """Raise UserError if no image is readable, or if more are bad than `max_bad` allows."""
        num_bad = 0
        reasons: dict[str, int] = {}
        for summary in self._work.summaries():
            num_bad += summary.num_bad
            for reason, count in summary.reasons.items():
                reasons[reason] = reasons.get(reason, 0) + count
        if num_bad == self._num_found:
            first = next(quarantined(self._target))
            self._target.delete_tree()
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            uri = self._tasks.place.storage.uri
            raise UserError(
                f"no readable image among the {num_bad} files of {uri} ({counts}); check them, such as "
                f"{first['source']} ({first['reason']})"
            )
        refuse_bad(self._target, num_bad, self._num_found, self._config.max_bad)

    def refuse_fraction(self, source: str) -> None:
        """Raise UserError if no value range is chosen where one is needed; the target is then empty again.

        It is also raised for a channel without data.
        """
        if self._kind.is_plain:
            return
        total, train = (total_values(self._work.summaries(), split) for split in (None, "train"))
        assert total is not None, "an image was read"
        try:
            refuse_empty(train or total, source, "training image" if train else "image")
            refuse_fraction(total, source, self._config)
        except UserError:
            # What is there was made with another config than what will be asked for.
            self._target.delete_tree()
            raise

    def second_pass(self, skip: Mapping[int, Collection[int]]) -> None:
        """Rewrite every slice that holds duplicates, omitting those at positions `skip`."""
        done = self._work.done(again=True)
        todo = [{"number": n, "skip": sorted(skip[n])} for n in sorted(skip) if n not in done]
        if todo:
            self._work.begin_second_pass()
        self._run(self._tasks.drop, todo)

    def count_bad(self, num_bad: int) -> None:
        """Count bad images of one more slice. Raises UserError early if there are too many."""
        self._num_bad += num_bad
        if self._num_bad > MIN_BAD_TO_STOP:
            refuse_bad(self._target, self._num_bad, self._num_found, self._config.max_bad)

    def _run(self, task: Task, rows: Sequence[dict[str, Any]]) -> None:
        self._num_bad = 0
        for counts in _run_tasks(task, rows):
            self.count_bad(counts["num_bad"])


def _run_tasks(task: Task, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, int]]:
    """Run one Ray task per row; yield their counts in order of completion."""
    if not rows:
        return
    import ray.data
    from ray.exceptions import RayError

    from pipelines.cluster import task_limit
    from pipelines.ray_data import configure

    # Ray Data warns of a limit that its tasks cannot reach.
    limit = task_limit()
    limit = None if limit is None else min(limit, len(rows))
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(task, concurrency=limit)
    configure(dataset)
    try:
        yield from dataset.iter_rows()
    except RayError as error:
        raise unwrapped(error) from error
