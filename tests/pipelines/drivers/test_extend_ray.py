"""An extension continues with the weights and the optimizer state in which a run ended, as its child, bit for bit."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import OptimConfig
from mae_core.state import unpack
from pipelines.config import (
    PretrainConfig,
    RegisterConfig,
    TrackingConfig,
)
from pipelines.runs.folder import RunFolder
from pipelines.runs.listing import list_runs
from pipelines.runs.metrics import read_points
from tests.digest import tensors_digest
from tests.new_mlflow import new_mlflow
from tests.pipelines.drivers.small import pretraining, working_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = "mae-vit_pico_patch7"
STEPS_PER_EPOCH = 4
CHANGES = {"epochs": 2, "optim.decay_share": 0.5, "name": "longer"}


@dataclass(frozen=True)
class Place:
    """A folder of runs: `short`, two epochs at a constant rate, and `longer`, which adds two with a decay."""

    folder: Path
    config: PretrainConfig
    short: dict[str, Any]
    longer: dict[str, Any]

    def run(self, name: str) -> RunFolder:
        return RunFolder(str(self.folder / "runs" / name))

    def state(self, name: str) -> dict[str, str]:
        """Digest of every file of the run's last checkpoint, optimizer and all."""
        checkpoint = self.run(name).checkpoints.latest()
        assert checkpoint is not None
        return {file: tensors_digest(unpack(content)) for file, content in checkpoint.files.items()}

    def losses(self, name: str) -> dict[int, float]:
        storage = self.run(name).storage
        found = [point for path, _ in storage.list("metrics") for point in read_points(storage.read(path), path)]
        return {point.step: point.value for point in found if point.key == "train/loss"}


@pytest.fixture(scope="module")
def place(few_prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from mlflow import MlflowClient

    from pipelines import extension_of, pretrain

    folder = tmp_path_factory.mktemp("extend")
    with working_in(folder):
        config = pretraining(
            folder,
            few_prepared,
            "short",
            output="runs",  # where the name of a run is looked up
            optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.0, schedule="constant", decay_share=0.0),
            tracking=TrackingConfig(log_every_steps=1, pictures_every_epochs=1000),
        )
        short = pretrain(config)
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        for tag, value in (("mae.licence", "CC-BY-NC-4.0"), ("mae.origin", "https://example.org")):
            client.set_model_version_tag(MODEL, short["model"].rsplit("/", 1)[1], tag, value)
        yield Place(folder, config, short, pretrain(extension_of("short", CHANGES)))


def test_the_first_checkpoint_is_the_last_of_the_run(place: Place) -> None:
    end = place.config.epochs * STEPS_PER_EPOCH
    first, last = place.run("longer").checkpoints.load(end), place.run("short").checkpoints.load(end)
    assert first.files == last.files
    assert {name.split("/")[0] for name in unpack(first.files["optimizer.safetensors"])} >= {"exp_avg", "exp_avg_sq"}
    assert place.state("longer") != place.state("short")
    assert place.longer["steps"] == 2 * end


def test_a_constant_rate_that_is_extended_equals_one_longer_run(place: Place) -> None:
    """Two epochs, and two more of which one decays, are four of which one decays: every loss, weight and moment."""
    from pipelines import pretrain

    optim = dataclasses.replace(place.config.optim, decay_share=0.25)
    pretrain(dataclasses.replace(place.config, name="whole", epochs=4, optim=optim))
    assert place.state("longer") == place.state("whole")
    whole = place.losses("whole")
    assert place.losses("short") | place.losses("longer") == whole
    assert len(whole) == 4 * STEPS_PER_EPOCH


def test_the_extension_is_a_child_of_the_run(place: Place) -> None:
    from pipelines.drivers.register import register
    from pipelines.registry import open_tracking
    from pipelines.weights.model_card import origin_of

    tracking = open_tracking("mae")
    run = tracking.client.get_run(place.longer["run_id"])
    wanted = {
        "mae.extends": place.run("short").storage.uri,
        "mae.extends_run_id": place.short["run_id"],
        "mae.first_epoch": "2",
        "mae.backbone": place.short["model"],
    }
    assert wanted.items() <= run.data.tags.items()
    assert (run.data.params["optim.schedule"], run.data.params["optim.decay_share"]) == ("constant", "0.5")
    version = tracking.resolve(place.longer["model"])
    assert version.name == MODEL
    assert version.tags["mae.parent"] == place.short["model"] == place.longer["parent"]
    assert (version.tags["mae.licence"], version.tags["mae.origin"]) == ("CC-BY-NC-4.0", "https://example.org")
    assert [step.id for step in tracking.lineage(place.longer["model"])][:4] == [
        place.longer["model"],
        place.longer["run_id"],
        place.short["model"],
        place.short["run_id"],
    ]
    assert not {"extend", "output"} & origin_of(tracking, version).recipe.keys()
    by_hand = tracking.resolve(register("runs/longer@12", RegisterConfig())["model"])
    inherited = ("mae.parent", "mae.licence", "mae.origin")
    assert [by_hand.tags[tag] for tag in inherited] == [version.tags[tag] for tag in inherited]
    (listed,) = (status for status in list_runs("runs") if status.run == "longer")
    assert (listed.state, listed.extends, listed.step, listed.total_steps) == ("finished", "short", 16, 16)


def test_another_registry_gets_licence_and_origin_from_the_run_folder(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.drivers.register import register
    from pipelines.registry import open_tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_mlflow(tmp_path))
    version = open_tracking("mae").resolve(register("runs/longer", RegisterConfig())["model"])
    assert (version.tags["mae.licence"], version.tags["mae.origin"]) == ("CC-BY-NC-4.0", "https://example.org")
    assert "mae.parent" not in version.tags, "the version that it came from is not in this registry"


def test_the_same_command_repeats_the_outcome(place: Place) -> None:
    from pipelines import extension_of, pretrain

    assert pretrain(extension_of("short", CHANGES)) == place.longer


@pytest.mark.long
@pytest.mark.parametrize("kept", [1, 2])
def test_an_interrupted_extension_ends_with_the_same_weights(place: Place, kept: int) -> None:
    """Killed before a checkpoint of its own, or after the first."""
    from pipelines import extension_of, pretrain

    before = place.state("longer")
    forget_end(place.run("longer"), kept)
    again = pretrain(extension_of("short", CHANGES))
    assert place.state("longer") == before
    assert {key for key in again if again[key] != place.longer[key]} <= {"duration_s", "goodput"}


@pytest.mark.long
def test_an_extension_never_starts_from_random_weights(place: Place) -> None:
    """The first checkpoint is damaged and there is no other: the run stops, and the next command copies it again."""
    from pipelines import extension_of, pretrain
    from pipelines.drivers.launch import RunFailed

    run, before = place.run("longer"), place.state("longer")
    forget_end(run, 1)
    (step,) = run.checkpoints.steps()
    (path,) = [path for path, _ in run.storage.list(f"checkpoints/step-{step:010d}") if "/model-" in path]
    content = run.storage.read(path)
    run.storage.write(path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunFailed, match=r"not even the first one.*rerun the same command to copy it again"):
        pretrain(extension_of("short", CHANGES))
    assert run.checkpoints.steps() == []
    pretrain(extension_of("short", CHANGES))
    assert place.state("longer") == before


@pytest.mark.long
def test_a_warm_restart_rises_from_the_rate_at_which_the_run_ended(place: Place) -> None:
    from pipelines import extension_of, pretrain

    changes = {"epochs": 2, "optim.schedule": "cosine", "optim.warmup_epochs": 1, "name": "restarted"}
    outcome = pretrain(extension_of("longer", changes))
    storage = place.run("restarted").storage
    points = [point for path, _ in storage.list("metrics") for point in read_points(storage.read(path), path)]
    rates = [point.value for point in points if point.key == "lr"]
    peak = 1e-3 * 64 / 256
    assert rates == pytest.approx(
        [peak * share for share in (0, 0.25, 0.5, 0.75, 1, 0.853553, 0.5, 0.146447)], rel=1e-5
    )
    assert outcome["steps"] == 6 * STEPS_PER_EPOCH
    assert outcome["parent"] == place.longer["model"]


def forget_end(run: RunFolder, kept: int) -> None:
    """Bring the run back to what it was when it had only so many checkpoints."""
    for step in run.checkpoints.steps()[kept:]:
        run.checkpoints.discard(step)
    for path, _ in run.storage.list():
        if path.startswith("export/") or path in ("result.json", "outcome.json"):
            run.storage.delete(path)
