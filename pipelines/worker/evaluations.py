"""Evaluate the encoder beside its training: rank 0 hands weights over, and a Ray actor of low priority does the rest.

1. After every `evaluate.every_epochs`, training copies the encoder's weights, or shares the copy of a checkpoint.
2. A thread of rank 0 passes them to the actor, one copy at a time. If the actor is still busy, the newest copy waits,
   and a copy that waited before is dropped: its step is left out.
3. The thread writes the values into the run folder under the weights' step, once for each step, and the driver
   delivers them to MLflow. A restarted group goes on after the newest of these steps.

An error, or the end of the actor, leaves out one evaluation and is logged; training never sees it.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.normalization import Normalization
from pipelines.config import PretrainConfig
from pipelines.console import log_to_driver
from pipelines.dataset.manifest import Manifest
from pipelines.evaluation.periodic import PeriodicEvaluator
from pipelines.runs.metrics import Evaluations
from pipelines.storage import Storage

log = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19
_START_S = 300.0
"""After this time, an actor that has not started is mentioned."""

_SHOWN = {"linear_top1": "linear probe {:.2f} %", "knn_top1": "kNN {:.2f} %", "rankme": "RankMe {:.2f}"}


class Evaluator(Protocol):
    """Evaluates weights elsewhere."""

    def evaluate(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Return the metrics of an encoder with these weights. Any exception leaves out this evaluation."""
        ...

    def close(self) -> None:
        """Abandon the current evaluation, if any, and free everything; the next one starts again."""
        ...


class EvaluationQueue:
    """Pass weights to an evaluator, one copy at a time, while training continues. Use it as a context manager."""

    def __init__(self, evaluator: Evaluator, storage: Storage, *, num_due: int, wait_s: float) -> None:
        """Start the thread. `num_due` is the number of evaluations of the whole run."""
        self._evaluator, self._record = evaluator, Evaluations(storage)
        self._num_due, self._wait_s = num_due, wait_s
        self._newest = self._newest_recorded()
        self._waiting: tuple[int, Mapping[str, Tensor]] | None = None
        self._is_busy = self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, name="evaluations", daemon=True).start()

    def __enter__(self) -> "EvaluationQueue":
        return self

    def __exit__(self, *failure: object) -> None:
        with self._changed:
            self._is_closed, self._waiting = True, None
            self._changed.notify_all()
        self._evaluator.close()

    def wants(self, step: int) -> bool:
        """Return whether this step, or a later one, has not been evaluated or queued."""
        return step > self._newest

    def put(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Queue the encoder's weights after a step, on the CPU, and return at once. They must not change any more."""
        with self._changed:
            if self._waiting:
                log.info(
                    "the evaluation of step %d is left out: an earlier one has not ended, and step %d is newer",
                    self._waiting[0],
                    step,
                )
            self._waiting, self._newest = (step, tensors), step
            self._changed.notify_all()

    def finish(self) -> dict[str, Any]:
        """Wait for the evaluations that have not ended, at most `wait_s`; return what the run found.

        The values are those of the last evaluated step.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None and not self._is_busy, self._wait_s):
                log.warning(
                    "the last evaluation has not ended within evaluate.wait_s %g s and is left out; to evaluate the "
                    "model, run `mae probe`",
                    self._wait_s,
                )
        try:
            steps = self._record.steps()
            values = {"step": steps[-1]} | self._record.read(steps[-1]) if steps else {}
        except (OSError, ValueError) as error:
            log.warning("the evaluations could not be read, and the result lacks them: %s", error)
            return {}
        counts = {"done": len(steps), "left_out": max(0, self._num_due - len(steps))}
        return counts | {key.removeprefix("evaluate/"): value for key, value in values.items()}

    def _newest_recorded(self) -> int:
        try:
            return max(self._record.steps(), default=0)
        except OSError as error:
            log.warning("the evaluations so far could not be listed: %s", error)
            return 0

    def _serve(self) -> None:
        while self._serve_one():
            pass
        self._evaluator.close()

    def _serve_one(self) -> bool:
        """Evaluate the weights that wait and release their memory; return False once the queue is closed."""
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting is not None or self._is_closed)
            if self._waiting is None:
                return False
            (step, tensors), self._waiting, self._is_busy = self._waiting, None, True
        self._evaluate(step, tensors)
        return True

    def _evaluate(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Evaluate the weights and write their values. Log any error instead of raising it."""
        started_s = time.monotonic()
        try:
            found = self._evaluator.evaluate({name: tensor.numpy() for name, tensor in tensors.items()})
            found["duration_s"] = round(time.monotonic() - started_s, 3)
            if not self._record.add(step, {f"evaluate/{name}": value for name, value in found.items()}):
                log.info("step %d has been evaluated before; its values stay", step)
        except Exception as error:
            if not self._is_closed:
                log.warning(
                    "the evaluation of step %d failed and is left out; training continues: %s", step, _cause(error)
                )
                self._evaluator.close()
        else:
            shown = ", ".join(text.format(found[name]) for name, text in _SHOWN.items() if name in found)
            log.info("step %d evaluated in %.1f s: %s", step, found["duration_s"], shown)


class EvaluationActor:
    """A `PeriodicEvaluator` in a Ray actor, which is started for the first evaluation and after each failure."""

    def __init__(self, config: PretrainConfig, pixels: Normalization, manifest: Manifest) -> None:
        self._arguments = config, pixels, manifest
        self._gpu = config.evaluate.gpu
        self._actor: Any = None

    def evaluate(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Evaluate the weights in the actor. Raises what it raised, or RayError if it ended."""
        import ray

        actor = self._actor or self._start()
        return ray.get(actor.evaluate.remote(tensors))

    def close(self) -> None:
        """Kill the actor, if there is one."""
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)

    def _start(self) -> Any:
        """Start the actor and wait for it. It requests no CPU, since other work may hold all of them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        place: Any = {"num_gpus": 1, "scheduling_strategy": "DEFAULT"} if self._gpu else {"scheduling_strategy": here}
        remote: Any = ray.remote(EvaluationProcess)
        self._actor = actor = remote.options(num_cpus=0, **place).remote(*self._arguments)
        if not ray.wait([actor.__ray_ready__.remote()], timeout=_START_S)[0]:
            missing = "a GPU that no worker holds (evaluate.gpu)" if self._gpu else "its process to start"
            log.warning("the evaluation has waited %g s for %s; training continues", _START_S, missing)
        return actor


class EvaluationProcess:
    """What runs in the actor's process. It fails in `evaluate` alone: Ray prints the trace of a failed constructor."""

    def __init__(self, config: PretrainConfig, pixels: Normalization, manifest: Manifest) -> None:
        log_to_driver()
        os.nice(_LOWEST_PRIORITY)
        torch.set_num_threads(config.evaluate.threads)
        self._arguments = config, pixels, manifest
        self._evaluator: PeriodicEvaluator | None = None

    def evaluate(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Return the metrics of an encoder with these weights; choose the images first, if this is the first call."""
        self._evaluator = self._evaluator or PeriodicEvaluator(*self._arguments)
        return self._evaluator.evaluate(tensors)


def encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the encoder of a masked autoencoder's tensors, under the encoder's own names."""
    return {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}


def _cause(error: Exception) -> str:
    """Return the last line of an error, which holds the cause; Ray's wrapping precedes it."""
    text = str(error).strip()
    if "died unexpectedly" in text:
        return "its process died or was killed, perhaps for its memory use (see dmesg on its node)"
    return text.splitlines()[-1].strip() if text else type(error).__name__
