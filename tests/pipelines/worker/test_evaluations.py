"""Training hands weights over and never waits: the newest wait, older ones are left out, errors stay here."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from mae_core.errors import UserError
from pipelines.runs.metrics import Evaluations
from pipelines.storage import Storage, open_storage
from pipelines.worker.evaluations import EvaluationQueue, encoder_tensors
from tests.waiting import EVENT_DEADLINE_S, wait_until


class Gated:
    """Evaluates each copy of weights once the gate is open; a value of 13 is refused."""

    def __init__(self) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self.num_closed = 0

    def evaluate(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        self.started.set()
        assert self.gate.wait(EVENT_DEADLINE_S)
        if tensors["w"][0] == 13:
            raise UserError("first line\n13 is no weight; try another")
        return {"rankme": float(tensors["w"][0])}

    def close(self) -> None:
        self.num_closed += 1


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value])}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "run"))


def queue_of(storage: Storage, evaluator: Gated, wait_s: float = EVENT_DEADLINE_S, num_due: int = 4) -> EvaluationQueue:
    return EvaluationQueue(evaluator, storage, num_due=num_due, wait_s=wait_s)


def test_while_an_evaluation_lasts_the_newest_weights_wait_and_those_between_are_left_out(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = Gated()
    with caplog.at_level(logging.INFO), queue_of(storage, evaluator) as queue:
        queue.put(10, weights(1))
        assert evaluator.started.wait(EVENT_DEADLINE_S)
        for step in (20, 30, 40):
            queue.put(step, weights(step / 10))
        evaluator.gate.set()
        found = queue.finish()
    assert Evaluations(storage).steps() == [10, 40]
    assert [Evaluations(storage).read(step)["evaluate/rankme"] for step in (10, 40)] == [1, 4]
    assert {key: found[key] for key in ("done", "left_out", "step", "rankme")} == {
        "done": 2,
        "left_out": 2,
        "step": 40,
        "rankme": 4,
    }
    assert [m for m in caplog.messages if "left out" in m] == [
        "the evaluation of step 20 is left out: an earlier one has not ended, and step 30 is newer",
        "the evaluation of step 30 is left out: an earlier one has not ended, and step 40 is newer",
    ]


def test_an_error_leaves_out_one_evaluation_and_starts_the_evaluator_again(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = Gated()
    evaluator.gate.set()
    with caplog.at_level(logging.INFO), queue_of(storage, evaluator, num_due=2) as queue:
        queue.put(10, weights(13))
        wait_until(lambda: evaluator.num_closed, "the failure of step 10")
        queue.put(20, weights(2))
        found = queue.finish()
    assert Evaluations(storage).steps() == [20]
    assert (found["done"], found["left_out"]) == (1, 1)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().endswith("is left out; training continues: 13 is no weight; try another")


def test_an_evaluation_that_never_ends_is_given_up_and_closed(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = Gated()
    with caplog.at_level(logging.INFO), queue_of(storage, evaluator, wait_s=0.0) as queue:
        queue.put(10, weights(1))
        assert evaluator.started.wait(EVENT_DEADLINE_S)
        found = queue.finish()
    assert found == {"done": 0, "left_out": 4}
    assert evaluator.num_closed
    assert "has not ended within evaluate.wait_s 0 s" in caplog.text
    evaluator.gate.set()


def test_a_restarted_run_goes_on_after_the_newest_evaluated_step(storage: Storage) -> None:
    evaluator = Gated()
    evaluator.gate.set()
    with queue_of(storage, evaluator) as queue:
        queue.put(10, weights(1))
        queue.finish()
    with queue_of(storage, evaluator) as again:
        assert [step for step in (5, 10, 15) if again.wants(step)] == [15]
        again.put(15, weights(2))
        assert not again.wants(15)
        assert again.finish()["done"] == 2


def test_a_step_keeps_its_first_values(storage: Storage) -> None:
    record = Evaluations(storage)
    assert record.add(10, {"evaluate/rankme": 1.5})
    assert not record.add(10, {"evaluate/rankme": 2.5})
    assert record.read(10) == {"evaluate/rankme": 1.5}


def test_weights_of_the_encoder_are_chosen_under_its_own_names() -> None:
    tensors = {name: torch.zeros(1) for name in ("encoder.norm.weight", "decoder.norm.weight", "mask_token")}
    assert list(encoder_tensors(tensors)) == ["norm.weight"]
