"""From a bucket of images to a champion with classifiers, and back: the commands, and what is killed meanwhile."""

import io
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster, Outcome, is_rank_alive
from processes import until
from registry_state import registry_state
from services import Service

MODEL = "mae-vit_nano_patch4"
CLASSIFIER = f"{MODEL}-classifier"
_PER_CLASS = {"train": 150, "test": 20}
_AWAY_S = 5.0
"""Seconds for which a killed server stays away."""
_PRETRAIN = (
    *("--preset", "nano", "--data.uri", "s3://mae/prepared", "--output", "s3://mae/runs"),
    *("--model.image-px", "28", "28", "--model.channels", "1"),
    *("--data.batch", "64", "--data.micro-batch", "32", "--data.window", "512", "--optim.warmup-epochs", "1"),
    *("--checkpoint.every-epochs", "1", "--compute.spread"),
)
_PROMOTE = (
    *("promote", f"{MODEL}@candidate", "--to", "champion", "--gate", "gate.yaml"),
    *("--data", "s3://mae/prepared", "--output", "s3://mae/runs"),
)


class WalkFailed(Exception):
    """A step did not end as it should; the message has the end of what the command said."""


@dataclass(frozen=True)
class Fault:
    """A server that is killed in the middle of a step, and started again some seconds later."""

    server: Service
    is_due: Callable[[], object]
    due: str


class Walk:
    """One walk on a cluster that runs; with or without faults."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None], *, disturbed: bool) -> None:
        self._cluster, self._say, self._disturbed = cluster, say, disturbed
        self.timings_s: dict[str, float] = {}
        self.faults: list[str] = []

    def walk(self) -> dict[str, Any]:
        """Take all steps; return what the registry holds in the end. Raises WalkFailed."""
        cluster = self._cluster
        self._step("images go to a bucket", self._upload)
        self._step(
            "prepare them",
            lambda: self._job("prepare", "s3://mae/images", "s3://mae/prepared", "--val-fraction", "0.3"),
        )
        self._step("pretrain the first", lambda: self._pretrain("first", 6, kill=cluster.postgres))
        self._step("promote the first", lambda: self._promote(is_passed=True))
        self._step("hand the first over", lambda: self._hand_over(1, with_faults=self._disturbed))
        self._step(
            "pretrain the second, badly",
            lambda: self._pretrain("second", 6, "--optim.base-lr", "4", kill=cluster.mlflow),
        )
        self._step("refuse the second", lambda: self._promote(is_passed=False))
        self._step("pretrain the third, longer", lambda: self._pretrain("third", 10, kill=cluster.store))
        self._step("promote the third", lambda: self._promote(is_passed=True))
        self._step("hand the third over", lambda: self._hand_over(3))
        self._step("roll back to the first", self._roll_back)
        return self._step("read the registry", self._read)

    def _step(self, name: str, action: Callable[[], Any]) -> Any:
        self._say(f"{len(self.timings_s) + 1:2} {name}")
        begin_s = time.monotonic()
        found = action()
        self.timings_s[name] = time.monotonic() - begin_s
        self._say(f"   took {self.timings_s[name]:.0f} s")
        return found

    def _upload(self) -> None:
        """Put the bundled sample, or the first images of each of its classes, into the bucket as one tar file."""
        store = self._cluster.store.client()
        store.put_object(Bucket="mae", Key="images/sample.tar", Body=_tar_of_sample())

    def _pretrain(self, name: str, epochs: int, *options: str, kill: Service) -> None:
        words = ("pretrain", "--name", name, "--epochs", str(epochs), *_PRETRAIN, *options)
        self._job(*words, fault=Fault(kill, lambda: self._has_checkpoint(name), "the first checkpoint"))

    def _promote(self, *, is_passed: bool) -> None:
        outcome = self._job(*_PROMOTE, status=0 if is_passed else 1)
        said = [line for line in outcome.text.splitlines() if line.startswith(("prepared/", "not met", "models:/"))]
        for line in said:
            self._say(f"   {line}")
        if not any("moved from" in line if is_passed else "is refused by" in line for line in said):
            raise WalkFailed(f"the gate did not decide as it should:\n{outcome.text[-2000:]}")

    def _hand_over(self, version: int, *, with_faults: bool = False) -> None:
        """Wait until the reconciler has had both classifiers of the champion trained."""
        reconciler = self._cluster.reconciler
        if not reconciler.pids():
            reconciler.start()
        if with_faults:
            worker = self._cluster.worker

            def is_training_there() -> bool:
                return self._has_checkpoint("whole-") and is_rank_alive(worker)

            self._inflict(Fault(worker, is_training_there, "a classifier's checkpoint"))
            self._inflict(Fault(reconciler, lambda: True, "that"))
        until(lambda: self._num_classifiers(version) == 2, f"two classifiers; see {reconciler.log}", 1800)

    def _roll_back(self) -> None:
        """Return to the first champion; draw from what the newest classifier was made."""
        picture = str(self._cluster.folder / "lineage.png")
        for words in (
            ("rollback", MODEL, "--to", "champion", "--why", "the demo returns"),
            ("lineage", f"{CLASSIFIER}@candidate", "--out", picture),
        ):
            self._say(f"   mae {' '.join(words)}")
            outcome = self._cluster.mae(*words)
            if outcome.status:
                raise WalkFailed(f"mae {words[0]} ended with status {outcome.status}:\n{outcome.text[-2000:]}")
            for line in outcome.text.splitlines():
                if line.startswith(("models:/", "version ", "made by ")):
                    self._say(f"   {line}")

    def _read(self) -> dict[str, Any]:
        self._cluster.reconciler.stop()
        found = registry_state(self._cluster.mlflow.url, self._cluster.store.client())
        _check(found)
        return found

    def _job(self, *words: str, status: int = 0, fault: Fault | None = None) -> Outcome:
        """Run a command of `mae` as a job of the cluster; inflict the fault meanwhile."""
        self._say(f"   mae {' '.join(words)}")
        with self._cluster.running(self._cluster.submitted(*words)) as process:
            if fault is not None and self._disturbed:
                self._inflict(fault, alive=lambda: process.poll() is None)
            outcome = self._cluster.outcome(process)
        if outcome.status != status:
            raise WalkFailed(f"mae {words[0]} ended with status {outcome.status}:\n{outcome.text[-4000:]}")
        return outcome

    def _inflict(self, fault: Fault, alive: Callable[[], bool] = lambda: True) -> None:
        """Kill the server as soon as the fault is due, and start it again."""
        until(fault.is_due, fault.due, 900, alive=alive)
        if not alive():
            raise WalkFailed(f"the command had ended before {fault.server.name} was killed; give it more epochs")
        self._say(f"   after {fault.due}: SIGKILL for {fault.server.name} with all its processes")
        fault.server.kill()
        time.sleep(_AWAY_S)
        fault.server.start()
        fault.server.wait()
        self._say(f"   {fault.server.name} is back")
        self.faults.append(fault.server.name)

    def _has_checkpoint(self, run: str) -> bool:
        names = self._cluster.store.names("mae", f"runs/{run}")
        return any("/checkpoints/" in name and name.endswith("/manifest.json") for name in names)

    def _num_classifiers(self, version: int) -> int:
        """Return how many classifiers the registry has whose backbone is this version."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        url = self._cluster.mlflow.url
        with suppress(MlflowException):
            found = MlflowClient(url, url).search_model_versions(f"name = '{CLASSIFIER}'")
            return sum(dict(one.tags).get("mae.parent") == f"models:/{MODEL}/{version}" for one in found)
        return 0


def _check(state: dict[str, Any]) -> None:
    """Check what does not depend on another walk. Raises WalkFailed."""
    wanted = {MODEL: {"candidate": 3, "champion": 1}, CLASSIFIER: {"candidate": 4}}
    aliases = {name: model["aliases"] for name, model in state.items()}
    versions = {name: sorted(model["versions"]) for name, model in state.items()}
    moves = [(move["kind"], move["version"]) for move in state[MODEL]["moves"]["champion"]]
    if (aliases, versions) != (wanted, {MODEL: [1, 2, 3], CLASSIFIER: [1, 2, 3, 4]}):
        raise WalkFailed(f"the registry has aliases {aliases} and versions {versions}")
    if moves != [("promote", 1), ("promote", 3), ("rollback", 1)]:
        raise WalkFailed(f"the champion's history is {moves}")


def _tar_of_sample() -> bytes:
    archive = zipfile.ZipFile(Path(__file__).parents[2] / "pipelines/sample/fashion-mnist-sample.zip")
    file, seen = io.BytesIO(), dict[tuple[str, ...], int]()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            split, *_ = where = tuple(member.filename.split("/")[:2])
            seen[where] = seen.get(where, 0) + 1
            if member.is_dir() or seen[where] > _PER_CLASS.get(split, 0):
                continue
            header = tarfile.TarInfo(member.filename)
            header.size = member.file_size
            tar.addfile(header, io.BytesIO(archive.read(member)))
    return file.getvalue()
