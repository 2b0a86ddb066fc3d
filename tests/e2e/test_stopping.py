"""Every command that is stopped says where it stands and leaves no process; the same command ends as if undisturbed.

`mae pretrain` is stopped in `test_resume.py`, `mae sweep` in `tests/tune/test_sweep.py`, a job of Ray in
`tests/infra/test_two_nodes.py`, and Ray while it starts in `tests/pipelines/test_cluster.py`.
"""

import hashlib
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mae_core.config import ModelConfig
from mae_core.state import unpack
from pipelines import sample
from pipelines.config import PrepareConfig
from pipelines.runs.folder import RunFolder
from tests.backbones import export_random
from tests.digest import tensors_digest
from tests.e2e.driving import MAE, Place, exit_status, prepare_here, ranks, started, stop, wait_for
from tests.waiting import KILLED_DEADLINE_S, let_pass

pytestmark = [pytest.mark.timeout(1200), pytest.mark.ray, pytest.mark.slow]

CLASSIFIER = """--backbone random:vit_pico_patch7 --name tiny --epochs 60 --data.uri prepared --data.batch 32
    --data.micro-batch 16 --data.window 32 --optim.warmup-epochs 0 --compute.num-workers 1 --compute.data-tasks 1
    --tracking.log-every-steps 1 --checkpoint.every-epochs 30 --eval-every-epochs 60 --output"""


def files(out: Path) -> dict[str, str]:
    """sha256 of every file."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def weights(out: Path) -> dict[str, str]:
    """Digest of every file of the last checkpoint."""
    checkpoint = RunFolder(str(out / "tiny")).checkpoints.latest()
    assert checkpoint is not None
    return {name: tensors_digest(unpack(content)) for name, content in checkpoint.files.items()}


@dataclass(frozen=True)
class Case:
    """A command whose last word is the folder that it writes into."""

    words: str
    begun: str
    """Files in that folder of which there is one as soon as some of the work is done."""
    said: str
    """How it says where it stands, as a regular expression."""
    results: Callable[[Path], dict[str, str]] = files


CASES = {
    "prepare": Case(
        "prepare --rows-per-shard 10 --rows-per-group 5 images",
        "**/part-*.parquet",
        r"stopped with \d+ of 2\d slices done(, and \d+ pieces? of the others)?",
    ),
    "embed": Case(
        "embed --model backbone --batch 5 --rows-per-part 5 prepared",
        "parts/*.parquet",
        r"stopped with \d+ of 4\d parts done",
    ),
    "finetune": Case(f"finetune {CLASSIFIER}", "*/metrics/*", r"tiny stopped at step \d+ of 3\d\d", weights),
    "probe": Case(
        f"probe --optim.base-lr 1 {CLASSIFIER}", "*/metrics/*", r"tiny stopped at step \d+ of 3\d\d", weights
    ),
}


@pytest.fixture(scope="module")
def home(place: Place) -> Place:
    """Return the place with 210 images of ten classes, a dataset of them and a backbone."""
    images = sample.unpack(place.folder / "images")
    shutil.rmtree(images / "test")
    for path in (path for folder in (images / "train").iterdir() for path in sorted(folder.iterdir())[21:]):
        path.unlink()
    options = PrepareConfig(rows_per_shard=48, rows_per_group=16)
    prepare_here(images, place.folder / "prepared", options)
    (place.folder / "backbone").mkdir()
    model = ModelConfig(arch="vit_pico_patch7", image_px=(28, 28), channels=1, decoder_depth=1, decoder_width=16)
    export_random(place.folder / "backbone", model)
    return place


def wait_for_work(home: Place, name: str, out: Path, driver: psutil.Process) -> None:
    wait_for(lambda: list(out.glob(CASES[name].begun)), f"some work of {name}", home, driver)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "prepare" else pytest.mark.long) for name in CASES]
)
def test_a_stopped_command_says_where_it_stands_and_the_same_one_ends_as_if_undisturbed(home: Place, name: str) -> None:
    case, out, undisturbed = CASES[name], home.folder / f"{name}-stopped", home.folder / f"{name}-undisturbed"
    words = [*MAE, *shlex.split(case.words)]
    number = signal.SIGINT if name == "embed" else signal.SIGTERM
    with started([*words, out.name], home) as driver:
        wait_for_work(home, name, out, driver)
        said = stop(home, driver, number).splitlines()
    first, last = [line for line in said if line.startswith("mae:")]
    assert first == f"mae: {number.name}: stopping in order; a second one ends at once"
    again = re.escape(shlex.join(["mae", *words[len(MAE) :], out.name]))
    assert re.fullmatch(f"mae: {case.said}; to resume: {again}", last)
    assert said[-1] == last
    for folder in (out, undisturbed):
        done = home.run([*words, folder.name])
        assert done.returncode == 0, done.stderr
    assert case.results(out)
    assert case.results(out) == case.results(undisturbed)


@pytest.mark.long
def test_a_second_signal_ends_a_command_whose_workers_hang_at_once_with_all_processes(home: Place) -> None:
    out = home.folder / "ended"
    with started([*MAE, *shlex.split(CASES["finetune"].words), out.name], home) as driver:
        wait_for_work(home, "finetune", out, driver)
        begin, family = len(home.log), driver.children(recursive=True)
        for rank in ranks(driver):
            rank.suspend()
        driver.send_signal(signal.SIGTERM)
        wait_for(lambda: "a second one ends at once" in home.log[begin:], "the first signal", home, driver)
        let_pass(0.6)
        driver.send_signal(signal.SIGINT)
        assert exit_status(driver) == 128 + signal.SIGINT
        assert not psutil.wait_procs(family, timeout=KILLED_DEADLINE_S)[1]
    said = [line for line in home.log[begin:].splitlines() if line.startswith("mae:")]
    assert said == ["mae: SIGTERM: stopping in order; a second one ends at once"]
