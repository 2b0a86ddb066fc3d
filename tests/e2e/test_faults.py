"""Pretraining through faults other than kills.

They are a worker out of memory, more failures than allowed, a gradient that is not finite, and faults of all kinds at
twenty random moments of one run. Kills and a hung worker are in test_resume.py.
"""

import json
import random
import re

import psutil
import pytest

from tests.e2e.driving import MAE, Place, exit_status, ranks, started, wait_for, wait_for_step
from tests.waiting import let_pass

pytestmark = [
    pytest.mark.timeout(2400),
    pytest.mark.ray,
    pytest.mark.slow,
]

STALL_S = 30.0
"""On a busy machine ranks may stand apart for longer than a few seconds without a fault."""

WIDE = {"model": {"decoder_width": 512}, "data": {"micro_batch": 32}}
"""Activations of megabytes, so large that each step maps memory for them."""


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, str]:
    """Run without faults; return the digests of the weights."""
    finished = place.run(place.command("undisturbed", **WIDE))
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["failures"] == 0
    return place.weights("undisturbed")


@pytest.mark.long
def test_more_failures_than_allowed_end_the_run_with_the_cause_and_a_checkpoint_that_goes_on(
    place: Place, undisturbed: dict[str, str]
) -> None:
    """The first is a worker without memory, the second one that is killed."""
    # Pieces of 128 KiB and above, the activations, are mapped and go back when freed, so that every step must ask for
    # them again; with an arena a thread, they could lie in address space that was reserved before the limit.
    strict = Place.of(place.folder, place.dataset, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="131072")
    folder = place.run_folder("failing")
    with started(place.command("failing", **WIDE, compute={"max_failures": 1}), strict) as driver:
        wait_for_step(place, "failing", 9, driver)
        rank = random.SystemRandom().choice(ranks(driver))
        rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms // 2,) * 2)
        wait_for(folder.read_failures, "the first failure", place, driver)
        # Torch says what it lacked; where a small piece is refused first, C++ ends the process.
        assert re.search("ran out of memory|perhaps for its memory", folder.read_failures()[0])
        wait_for_step(place, "failing", place.newest("failing") + 5, driver)
        random.SystemRandom().choice(ranks(driver)).kill()
        assert exit_status(driver) == 1
    assert len(folder.read_failures()) == 2
    (said,) = [line for line in place.log.splitlines() if line.startswith("mae: failed: ")]
    assert re.search(r"the process of rank \d died without an error", said)
    assert said.endswith("allows; rerun the same command to resume from the newest checkpoint")
    assert 0 < folder.checkpoints.latest_step() < 90
    finished = place.run(place.command("failing", **WIDE))
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["failures"] == 2
    assert place.weights("failing") == undisturbed


@pytest.mark.long
def test_a_gradient_that_is_no_number_ends_the_run_at_once_with_the_sample_ids(place: Place) -> None:
    ended = place.run(place.command("nan", optim={"base_lr": 1e30}, compute={"num_workers": 1}))
    assert ended.returncode == 1
    cause = ended.stderr.strip().splitlines()[-1]
    assert cause.startswith("mae: failed: the gradient is not finite at step")
    assert cause.endswith("try a lower optim.base_lr, or --compute.on-nan skip")
    (named,) = place.run_folder("nan").storage.list("bad_steps")
    ids = json.loads(place.run_folder("nan").storage.read(named[0]))["ids"]
    assert all(str(i) in cause for i in ids)
    assert "resuming" not in ended.stderr, "starting again would not help"
    listed = place.run([*MAE, "runs", str(place.folder / "runs" / "nan"), "--json"])
    (row,) = json.loads(listed.stdout)["runs"]
    assert row["state"] == "failed"
    assert "not finite" in row["error"]


@pytest.mark.long
def test_faults_at_twenty_random_moments_change_nothing(place: Place) -> None:
    """One worker killed, all killed, one stopped, the driver killed with everything: five times each."""
    longer = {"epochs": 60, "compute": {"max_failures": 100, "stall_s": STALL_S}}
    undisturbed = place.run(place.command("long-undisturbed", **longer))
    assert undisturbed.returncode == 0, undisturbed.stderr
    command, chance, moments = place.command("long", **longer), random.SystemRandom(), []
    for _ in range(5):
        with started(command, place) as driver:
            for fault in ("one", "all", "stop", "driver"):
                step = wait_for_step(place, "long", place.newest("long") + chance.randint(5, 25), driver)
                let_pass(chance.uniform(0, 0.2))
                moments.append((step, fault))
                members = ranks(driver)
                if fault == "one":
                    chance.choice(members).kill()
                elif fault == "all":
                    for rank in members:
                        rank.kill()
                elif fault == "stop":
                    chance.choice(members).suspend()
    assert place.run_folder("long").read_result() is None, f"the run was over before the faults: {moments}"
    finished = place.run(command)
    assert finished.returncode == 0, finished.stderr
    assert place.weights("long") == place.weights("long-undisturbed"), moments
