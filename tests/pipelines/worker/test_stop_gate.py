"""Ranks that are told to stop do so after the same unit of work, wherever each is. The shared table is Ray's."""

import itertools
import random
import threading

import pytest

from pipelines.runs.stopping import StopRequest
from pipelines.worker.stop_gate import StopGate, StopRequested
from tests.waiting import join, let_pass

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray4")]

WORLD = 3


def stopped_after(request: StopRequest, group: str, num_free_units: int, chance: random.Random) -> list[int]:
    """Let the ranks of a group work until they are stopped; return how many units each has done.

    The first units end in a collective, as those of training do; then `num_free_units` have none, as in an evaluation.
    """
    collective = threading.Barrier(WORLD)
    done = [0] * WORLD
    pauses_s = [[chance.uniform(0, 0.004) for _ in range(97)] for _ in range(WORLD)]

    def work(index: int) -> None:
        with StopGate(request, group, index, WORLD, poll_every_s=0.01) as gate:
            try:
                for unit in itertools.count():
                    gate.enter()
                    let_pass(pauses_s[index][unit % 97])
                    if unit % (20 + num_free_units) < 20:
                        collective.wait()
                    done[index] += 1
            except StopRequested:
                collective.wait()  # Every rank gets here, as to the collective after the last unit.

    ranks = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(WORLD)]
    for rank in ranks:
        rank.start()
    let_pass(chance.uniform(0, 0.3))
    request.make()
    for rank in ranks:
        join(rank)
    return done


@pytest.mark.parametrize("num_free_units", [0, 30])
def test_all_ranks_stop_after_the_same_unit(num_free_units: int) -> None:
    for seed in range(6):
        done = stopped_after(StopRequest.new(), "group", num_free_units, random.Random(seed))
        assert len(set(done)) == 1, f"seed {seed}: {done}"
        assert done[0] > 0


def test_a_group_that_starts_after_the_request_does_nothing_even_if_an_earlier_one_did() -> None:
    request = StopRequest.new()
    assert stopped_after(request, "first", 0, random.Random(0))[0] > 0
    assert stopped_after(request, "restarted", 0, random.Random(0)) == [0, 0, 0]


def test_a_request_allows_time_only_to_groups_that_work() -> None:
    request = StopRequest.new()
    assert request.make_and_allow(25.0) == 0.0
    stopped_after(request, "group", 0, random.Random(0))
    assert request.make_and_allow(25.0) == 25.0


def test_a_request_to_some_groups_is_made_with_that_to_all_and_stops_no_other() -> None:
    every = StopRequest.new()
    one, other = every.for_some(), every.for_some()
    one.report_work()
    assert (every.is_work_reported(), other.is_work_reported()) == (True, False)
    one.make()
    assert (one.is_made(), every.is_made(), other.is_made()) == (True, False, False)
    every.make()
    assert (other.is_made(), other.is_made_alone()) == (True, False)
