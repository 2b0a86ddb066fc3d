"""What every execution of Ray Data in this project has set, and what Ray Data 2.60 lacks: rest while it has to wait."""

import time
from typing import TYPE_CHECKING, Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_FIRST_REST_S, _LONGEST_REST_S = 0.001, 0.05


def configure(dataset: Any) -> None:
    """Set what holds for every dataset here: no progress bar, no limit on waiting, rest while nothing changes.

    Ray Data ends an execution whose blocks nobody takes for 30 minutes, as during a long fit of a probe, or in which
    one block takes that long, as from slow storage. A worker that hangs is found by `compute.stall_s`.
    """
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1
    dataset.context.custom_execution_callback_classes = [RestWhileNothingChanges]


class RestWhileNothingChanges(ExecutionCallback):
    """Lets an execution that waits for its consumer sleep between the steps of its scheduling loop.

    Ray Data 2.60 waits in `ray.wait` for its tasks to have output. If all of them have some, and nobody takes the
    blocks before it, this returns at once: the loop takes a whole core as long as the consumer is the slower side, as
    in any training that is not short of data (findings/ray_data_execution_spins_while_its_consumer_is_slow.sh).
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] = ()
        self._rest_s = _FIRST_REST_S

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Sleep if the step neither got, started nor gave anything: 1 ms at first, up to 50 ms after more such steps.

        Ray Data itself notices a finished task after 100 ms at most.
        """
        seen = tuple(
            (
                operator.metrics.num_tasks_submitted,
                operator.metrics.num_tasks_finished,
                operator.metrics.num_task_outputs_generated,
                state.output_queue_bytes(),
            )
            for operator, state in (executor._topology or {}).items()
        )
        if seen != self._seen:
            self._seen, self._rest_s = seen, _FIRST_REST_S
            return
        time.sleep(self._rest_s)
        self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
