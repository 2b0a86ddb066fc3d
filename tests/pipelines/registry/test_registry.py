"""The registry on a real sqlite MLflow, and on a real server that is killed and restarted."""

import base64
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_core.errors import UserError
from pipelines.bench.ports import free_port
from pipelines.dataset.manifest import Manifest, Split
from pipelines.registry import (
    Tracking,
    TrackingUnreachable,
    open_tracking,
    refuse_local_tracking,
    register_backbone,
    register_classifier,
)
from pipelines.registry.points import Point, PointSender
from pipelines.registry.runs import Run, commit_tags, flatten
from pipelines.registry.versions import check_location
from pipelines.runs.followers import MetricFollower
from pipelines.runs.metrics import MetricSpool
from pipelines.storage import open_storage
from tests.new_mlflow import new_mlflow
from tests.waiting import (
    COMMAND_DEADLINE_S,
    EVENT_DEADLINE_S,
    KILLED_DEADLINE_S,
    REQUEST_DEADLINE_S,
    join,
    let_pass,
    wait_until,
)

# SQLAlchemy 2.1 deprecates what MLflow 3.17 uses, on first use.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

MANIFEST = Manifest(
    channels=1, image_px=(28, 28), classes=["a", "b"], splits={"train": Split(num_rows=8, num_bytes=1, shards=[])},
    num_found=10, num_ok=10, num_quarantined=0, num_duplicates=0, quarantine_reasons={}, mean=[0.3], std=[0.35],
    config={}, source_digest="", digest="d" * 64,
)  # fmt: skip
SAMPLED = "system/cpu_utilization_percentage"
MODEL = {"arch": "vit_pico_patch4", "image_px": [28, 28], "channels": 1}
PIXELS = {"mean": [0.3], "std": [0.35]}


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory) -> str:
    """One database for all tests: making its schema costs seconds."""
    return new_mlflow(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def tracking(sqlite_uri, monkeypatch, request) -> Iterator[Tracking]:
    """Open an experiment of the test's own, and finish the runs that the test leaves open."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)
    started, start = [], Run.start

    def noted(run: Run, *arguments: Any) -> None:
        started.append(run)
        start(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "start", noted)
        yield open_tracking(request.node.name[:60])
    for run in started:
        with suppress(UserError):
            run.finish(limit_s=REQUEST_DEADLINE_S)


@pytest.fixture(scope="session")
def encoder() -> bytes:
    from safetensors.torch import save

    from mae_core.config import parse_arch
    from mae_core.encoder import build_encoder, export_tensors

    vit = build_encoder(parse_arch(MODEL["arch"]), (28, 28), 1)
    return save({name: tensor.contiguous() for name, tensor in export_tensors(vit).items()})


@pytest.fixture(scope="session")
def backbone_files(encoder) -> dict[str, bytes]:
    config = {"kind": "backbone", "model": MODEL, "pixels": PIXELS}
    return {"encoder.safetensors": encoder, "mae.safetensors": b"all of it", "config.json": json.dumps(config).encode()}


@pytest.fixture(scope="session")
def classifier_files() -> dict[str, bytes]:
    from safetensors.torch import save

    from mae_core.classifier import build_classifier
    from mae_core.config import ClassifierConfig, parse_arch

    network = build_classifier(parse_arch(MODEL["arch"]), (28, 28), 1, 2, ClassifierConfig())
    config = {"kind": "classifier", **MODEL, "classes": ["cat", "dog"], "pixels": PIXELS}
    config["classifier"] = {"method": "finetune", "pool": "avg"}
    return {"classifier.safetensors": save(network.state_dict()), "config.json": json.dumps(config).encode()}


def png(height_px: int, width_px: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height_px, width_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def points(first: int, last: int, key: str = "loss") -> list[Point]:
    return [Point(key, 1 / step, step, 1_700_000_000_000 + step) for step in range(first, last + 1)]


def history(tracking: Tracking, run_id: str, key: str = "loss") -> list[int]:
    return [metric.step for metric in tracking.client.get_metric_history(run_id, key)]


def wait_for_samples(tracking: Tracking, run_id: str, count: int) -> None:
    """Wait until so many further samples of this machine are stored."""
    before = len(history(tracking, run_id, SAMPLED))
    wait_until(lambda: len(history(tracking, run_id, SAMPLED)) >= before + count, f"{count} samples of this machine")


class TestWhichMlflow:
    def test_without_a_uri_it_is_a_file_in_this_folder(self, tmp_path, monkeypatch):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.chdir(tmp_path)
        tracking = open_tracking("mae")
        run = tracking.run("a", "pretrain", {})
        (tmp_path / "x.json").write_text("{}")
        run.log_file(tmp_path / "x.json")
        run.finish()
        (tmp_path / "x.json").unlink()
        assert (tmp_path / "mae-mlflow" / "mlflow.db").is_file()
        assert list((tmp_path / "mae-mlflow" / "artifacts").rglob("x.json"))
        assert [path.name for path in tmp_path.iterdir()] == ["mae-mlflow"]
        assert "MLFLOW_TRACKING_URI" not in os.environ
        assert tracking.ui_command == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mae-mlflow/mlflow.db"

    def test_a_server_that_does_not_answer_is_named_with_the_remedy_but_no_password(self, monkeypatch):
        address = f"127.0.0.1:{free_port()}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@{address}")
        with pytest.raises(ValueError, match=rf"MLflow at http://{address} does not respond; start it") as caught:
            open_tracking("mae")
        assert isinstance(caught.value, ConnectionError)
        assert "secret" not in str(caught.value)

    def test_a_server_that_fails_is_named(self, monkeypatch):
        with fake_server(b"HTTP/1.1 503 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            with pytest.raises(TrackingUnreachable, match="503"):
                open_tracking("mae")

    @pytest.mark.parametrize("uri", ["./mlruns", "file:///x", "postgresql://u:secret@h/db", "databricks", "http://"])
    def test_any_other_uri_is_refused(self, monkeypatch, uri):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match="neither a server nor a sqlite file") as caught:
            open_tracking("mae")
        assert "secret" not in str(caught.value)

    @pytest.mark.slow
    def test_a_deleted_experiment_is_refused_with_the_remedy(self, tracking):
        tracking.client.delete_experiment(tracking.experiment_id)
        with pytest.raises(ValueError, match="mlflow experiments restore"):
            open_tracking(tracking.experiment)

    @pytest.mark.parametrize("address", ["auto", "ray://head:10001", "10.0.0.7:6379", "raycluster-head-svc:6379"])
    def test_a_local_file_beside_a_remote_cluster_is_refused(self, monkeypatch, address):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/mlflow.db")
        with pytest.raises(ValueError, match="start `mlflow server` and set MLFLOW_TRACKING_URI"):
            refuse_local_tracking(address)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
        refuse_local_tracking(address)

    @pytest.mark.parametrize(
        "address", [None, "", "local", "127.0.0.1:6379", "localhost:6379", "ray://127.0.0.1:10001"]
    )
    def test_a_local_file_is_refused_beside_a_remote_cluster_and_accepted_beside_local_ray(self, monkeypatch, address):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/mlflow.db")

        def is_accepted(address):
            try:
                refuse_local_tracking(address)
            except UserError:
                return False
            return True

        assert [is_accepted("10.0.0.7:6379"), is_accepted(address)] == [False, True]

    def test_importing_the_registry_does_not_import_mlflow(self):
        code = "import pipelines.registry, pipelines.runs.metrics, sys; sys.exit('mlflow' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class TestRuns:
    def test_a_restarted_driver_finds_its_run(self, tracking):
        first = tracking.run("night-7", "pretrain", {"epochs": 2}, dataset=MANIFEST, dataset_uri="/data/x")
        first.finish("FAILED")
        again = tracking.run("night-7", "pretrain", {"epochs": 3, "seed": 1}, dataset=MANIFEST, dataset_uri="/data/x")
        found = tracking.client.get_run(again.id)
        assert again.id == first.id
        assert found.info.status == "RUNNING"
        assert found.data.params == {"epochs": "2", "seed": "1"}
        assert len(found.inputs.dataset_inputs) == 1
        again.finish()
        assert tracking.client.get_run(again.id).info.status == "FINISHED"
        assert tracking.run("night-8", "pretrain", {}).id != first.id

    def test_another_key_is_another_run_whatever_it_is_called(self, tracking):
        old = tracking.run("night-7", "pretrain", {}, key="first")
        old.log_points(points(1, 3))
        old.finish()
        new = tracking.run("night-7", "pretrain", {}, key="second")
        assert new.id != old.id
        assert "loss" not in new.last_steps()
        assert tracking.run("night-7", "pretrain", {}, key="second").id == new.id
        assert tracking.known_run(old.id).name == "night-7"

    def test_a_run_says_what_it_is_and_what_it_read(self, tracking):
        parent = tracking.run("sweep", "sweep", {})
        run = tracking.run("a", "trial", {}, tags={"x": "y"}, dataset=MANIFEST, dataset_uri="s3://b/x", parent=parent)
        found = tracking.client.get_run(run.id)
        assert found.data.tags["mae.kind"] == "trial"
        assert found.data.tags["x"] == "y"
        assert found.data.tags["mlflow.parentRunId"] == parent.id
        assert found.data.tags["mae.dataset_digest"] == MANIFEST.digest
        assert found.info.run_name == "a"
        (dataset,) = (i.dataset for i in found.inputs.dataset_inputs)
        assert (dataset.name, dataset.digest, dataset.source_type) == ("x", "d" * 36, "s3")

    def test_the_commit_is_that_of_this_checkout(self):
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        assert commit_tags().get("mlflow.source.git.commit", "") == head.stdout.strip()

    def test_parameters_are_flat_short_and_without_secrets(self):
        flat = flatten({"a": {"b": 1, "c": {}}, "l": [1, 2], "u": "s3://k:pw@host/p?X-Sig=1", "long": "x" * 9000})
        assert flat == {"a.b": "1", "a.c": "{}", "l": "[1, 2]", "u": "s3://host/p", "long": "x" * 6000}
        (key,) = flatten({"k" * 300: 1})
        assert len(key) <= 250

    def test_many_points_arrive_once_in_order_even_if_sent_twice(self, tracking):
        run = tracking.run("a", "pretrain", {})
        run.log_points(points(1, 2500))
        run.log_points(points(2000, 2500))
        run.log_points([Point("nan", float("nan"), 1, 5), Point("nan", float("nan"), 1, 5)])
        run.finish()
        assert history(tracking, run.id) == list(range(1, 2501))
        assert run.last_steps()["loss"] == 2500
        assert len(history(tracking, run.id, "nan")) == 1

    def test_this_machine_is_sampled(self, tracking, monkeypatch):
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
        ids = []
        for _ in range(2):
            run = tracking.run("a", "pretrain", {})
            ids.append(run.id)
            wait_for_samples(tracking, run.id, 2)
            run.finish()
        assert ids[0] == ids[1]
        steps = history(tracking, ids[0], SAMPLED)
        assert len(steps) >= 4
        assert steps == list(range(len(steps)))

    def test_files_stay_within_the_run(self, tracking, tmp_path):
        run = tracking.run("a", "pretrain", {})
        (tmp_path / "x.json").write_text("{}")
        run.log_file(tmp_path / "x.json", "tables")
        assert [a.path for a in tracking.client.list_artifacts(run.id, "tables")] == ["tables/x.json"]
        for folder in ("../x", "/etc"):
            with pytest.raises(ValueError, match="outside the run"):
                run.log_file(tmp_path / "x.json", folder)

    def test_a_name_that_a_search_cannot_hold_is_refused(self, tracking):
        with pytest.raises(ValueError, match="run name"):
            tracking.run("it's", "pretrain", {})


class TestOutages:
    def test_points_survive_an_outage_in_order_and_once(self):
        sent: list[Point] = []
        failures = iter([ConnectionError("no route"), TimeoutError("slow"), None])

        def send(batch):
            if error := next(failures, None):
                raise error
            sent.extend(batch)

        sender = PointSender(send)
        sender.add(points(1, 10))
        sender.add(points(11, 1500))
        sender.flush(30)
        sender.close()
        assert [point.step for point in sent] == list(range(1, 1501))

    def test_flush_says_how_many_points_wait(self):
        def send(batch):
            raise ConnectionError("no route")

        sender = PointSender(send)
        sender.add(points(1, 3))
        with pytest.raises(TrackingUnreachable, match="3 metric points are waiting"):
            sender.flush(0.05)
        assert sender.num_waiting == 3
        sender.close()

    def test_what_mlflow_refuses_is_an_error_and_not_an_outage(self, tracking):
        run = tracking.run("a", "pretrain", {})
        run.log_points([Point("bad\nkey", 1.0, 1, 1)])
        with pytest.raises(ValueError, match="refused metric points"):
            run.flush(30)
        with pytest.raises(ValueError, match="refused metric points"):
            run.log_points(points(1, 1))


class TestModels:
    def test_a_backbone_registers_resolves_and_comes_back(self, tracking, backbone_files, tmp_path):
        run = tracking.run("p", "pretrain", {})
        ref = register_backbone(run, backbone_files, "mae-a", description="d", tags={"loss": "0.5"})
        assert (ref.uri, ref.run_id) == ("models:/mae-a/1", run.id)
        assert tracking.resolve("models:/mae-a@candidate") == tracking.resolve("models:/mae-a/1") == ref
        files = tracking.fetch(ref, tmp_path / "x")
        assert {name: path.read_bytes() for name, path in files.items()} == backbone_files
        assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted(backbone_files)
        assert ref.tags["loss"] == "0.5"

    def test_the_same_files_of_a_run_register_once_and_others_as_the_next_version(self, tracking, backbone_files):
        run = tracking.run("p", "pretrain", {})
        first = register_backbone(run, backbone_files, "mae-b")
        assert register_backbone(run, backbone_files, "mae-b") == first
        second = register_backbone(run, {**backbone_files, "mae.safetensors": b"more"}, "mae-b")
        assert (first.version, second.version) == (1, 2)
        assert tracking.resolve("models:/mae-b@candidate") == second
        register_backbone(run, backbone_files, "mae-b")
        assert tracking.resolve("models:/mae-b@candidate") == second

    def test_killed_before_the_version_exists_no_name_points_to_anything(self, tracking, backbone_files, monkeypatch):
        run = tracking.run("p", "pretrain", {})
        first = register_backbone(run, backbone_files, "mae-c")

        def killed(*args, **kwargs):
            raise KeyboardInterrupt

        for step in ("log_model_artifacts", "finalize_logged_model", "create_model_version"):
            with monkeypatch.context() as patch:
                patch.setattr(run.client, step, killed)
                with pytest.raises(KeyboardInterrupt):
                    register_backbone(run, {**backbone_files, "mae.safetensors": b"more"}, "mae-c")
            assert tracking.resolve("models:/mae-c@candidate") == first
            assert len(tracking.client.search_model_versions("name = 'mae-c'")) == 1

    def test_killed_before_the_alias_moved_the_same_call_moves_it(self, tracking, backbone_files, monkeypatch):
        run = tracking.run("p", "pretrain", {})
        with monkeypatch.context() as patch:
            patch.setattr("pipelines.registry.models._move_alias", lambda *_: {}["killed"])
            with pytest.raises(KeyError):
                register_backbone(run, backbone_files, "mae-d")
        assert register_backbone(run, backbone_files, "mae-d").version == 1
        assert tracking.resolve("models:/mae-d@candidate").version == 1

    def test_lineage_walks_from_a_classifier_to_the_commit(self, tracking, backbone_files, classifier_files):
        pretrain = tracking.run("p", "pretrain", {}, dataset=MANIFEST, dataset_uri="/d")
        backbone = register_backbone(pretrain, backbone_files, "mae-e")
        finetune = tracking.run("f", "finetune", {})
        finetune.log_model_input(backbone)
        finetune.log_model_input(backbone)
        classifier = register_classifier(finetune, classifier_files, backbone)
        assert classifier.name == "mae-e-classifier"
        steps = tracking.lineage("models:/mae-e-classifier@candidate")
        assert [(step.kind, step.id) for step in steps] == [
            ("model version", "models:/mae-e-classifier/1"),
            ("run", finetune.id),
            ("model version", "models:/mae-e/1"),
            ("run", pretrain.id),
            ("dataset", MANIFEST.digest),
            ("commit", commit_tags().get("mlflow.source.git.commit", "unknown")),
        ]
        assert [m.model_id for m in tracking.client.get_run(finetune.id).inputs.model_inputs] == [backbone.model_id]
        assert json.loads(classifier.tags["classes"]) == ["cat", "dog"]
        assert [step.kind for step in tracking.lineage("models:/mae-e/1")] == [
            "model version",
            "run",
            "dataset",
            "commit",
        ]

    def test_licence_and_origin_reach_the_last_classifier(self, tracking, backbone_files, classifier_files):
        tags = {"mae.licence": "CC-BY-NC-4.0", "mae.origin": "https://example.org/mae"}
        imported = register_backbone(tracking.run("i", "import", {}), backbone_files, "mae-l", tags=tags)
        further = register_backbone(tracking.run("p", "pretrain", {}), backbone_files, "mae-l2", parent=imported)
        classifier = register_classifier(tracking.run("f", "finetune", {}), classifier_files, further)
        assert tags.items() <= classifier.tags.items()
        versions = [step for step in tracking.lineage(classifier.uri) if step.kind == "model version"]
        assert [step.id for step in versions] == [classifier.uri, further.uri, imported.uri]
        for step in versions:
            assert (step.facts["licence"], step.facts["origin"]) == tuple(tags.values())

    def test_unknown_models_say_what_there_is(self, tracking, backbone_files):
        run = tracking.run("p", "pretrain", {})
        register_backbone(run, backbone_files, "mae-vit_pico")
        for uri, message in {
            "models:/mae-vit_pic@candidate": "did you mean mae-vit_pico",
            "models:/mae-vit_pico@champion": r"no alias @champion; its aliases are @candidate \(version 1\)",
            "models:/mae-vit_pico/7": "no version 7; .* newest version is 1",
            "models:/mae-vit_pico/latest": "neither models:/NAME@ALIAS nor",
            "models:/../../etc/passwd": "neither models:/NAME@ALIAS nor",
            "mae-vit_pico": "neither models:/NAME@ALIAS nor",
        }.items():
            with pytest.raises(ValueError, match=message):
                tracking.resolve(uri)

    def test_files_are_checked_before_anything_is_made(self, tracking, backbone_files):
        run = tracking.run("p", "pretrain", {})
        for files, message in [
            ({"config.json": b"{}"}, "encoder.safetensors is missing"),
            ({**backbone_files, "../x.json": b""}, "not a plain file name"),
            ({**backbone_files, "x.pkl": b""}, "does not allow"),
        ]:
            with pytest.raises(ValueError, match=message):
                register_backbone(run, files, "mae-f")
        with pytest.raises(ValueError, match="model name"):
            register_backbone(run, backbone_files, "a/b")
        with pytest.raises(ValueError, match=r"set tracking\.name"):
            register_classifier(run, {"classifier.safetensors": b"", "config.json": b"{}"}, None)

    def test_a_file_changed_behind_the_registrys_back_is_named(self, tracking, backbone_files, tmp_path):
        ref = register_backbone(tracking.run("p", "pretrain", {}), backbone_files, "mae-g")
        stored = Path(tracking.client.get_logged_model(ref.model_id).artifact_location, "artifacts/encoder.safetensors")
        stored.write_bytes(stored.read_bytes()[:-1] + b"x")
        with pytest.raises(ValueError, match=r"encoder\.safetensors of models:/mae-g/1 has sha256"):
            tracking.fetch(ref, tmp_path / "x")
        assert not (tmp_path / "x" / "encoder.safetensors").exists()

    def test_versions_and_files_from_elsewhere_are_refused(self, tracking, backbone_files, tmp_path):
        client = tracking.client
        ref = register_backbone(tracking.run("p", "pretrain", {}), backbone_files, "mae-h")
        client.create_registered_model("foreign")
        client.create_model_version("foreign", "file:///etc", tags={"sha256.passwd": "0" * 64})
        with pytest.raises(ValueError, match="was not registered by `mae`"):
            tracking.resolve("models:/foreign/1")
        for name in ("../../x", "/etc/passwd", "a/b", "..", ".", ""):
            with pytest.raises(ValueError, match="not a plain file name"):
                tracking.fetch(dataclasses.replace(ref, sha256={name: "0" * 64}), tmp_path / "x")
        assert list((tmp_path / "x").iterdir()) == []

    @pytest.mark.parametrize(
        ("location", "server", "allowed"),
        [
            ("mlflow-artifacts:/1/models/m-1/artifacts", "http://h:5000", True),
            ("mlflow-artifacts://h:5000/1/models", "http://u:p@h:5000", True),
            ("s3://bucket/x", "http://h:5000", True),
            ("/a/b", "sqlite:////a/db", True),
            ("/a/b", "http://h:5000", False),
            ("file:///etc", "http://h:5000", False),
            ("mlflow-artifacts://other/1", "http://h:5000", False),
            ("http://169.254.169.254/latest", "http://h:5000", False),
            ("mlflow-artifacts:/1/../../etc", "http://h:5000", False),
            ("mlflow-artifacts:/1/%2e%2e/etc", "http://h:5000", False),
            ("/a/../etc", "sqlite:////a/db", False),
            ("file://host/etc", "sqlite:////a/db", False),
            ("ftp://h/x", "sqlite:////a/db", False),
        ],
    )
    def test_only_places_that_the_server_owns_are_read(self, location, server, allowed):
        if allowed:
            assert check_location(location, server, "x") is None
            return
        with pytest.raises(ValueError, match="outside what the tracking server owns"):
            check_location(location, server, "x")


SERVE = """
import io, sys, numpy as np, pandas as pd, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
images = [open(path, "rb").read() for path in sys.argv[2:]]
table = model.predict(pd.DataFrame({"image": images}))
for other in (images, np.array(images, dtype=object)):
    assert model.predict(other).equals(table)
for path in (sys.argv[2:3], pd.DataFrame({"image": sys.argv[2:3]})):
    try:
        model.predict(path)
    except Exception as error:
        assert "the text '0.png', but the model takes the bytes of an image file" in str(error), error
    else:
        raise AssertionError("a path is no image")
print(table.to_json())
assert not {"ray", "pipelines"} & set(sys.modules)
"""


@pytest.mark.slow
class TestPackagedModel:
    """In a folder and a process that have neither this package's pipelines nor pickle."""

    def serve(self, tracking: Tracking, uri: str, folder: Path, *images: bytes) -> dict[str, dict[str, object]]:
        for i, image in enumerate(images):
            (folder / f"{i}.png").write_bytes(image)
        environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking.uri, "MLFLOW_REGISTRY_URI": tracking.uri}
        environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""}
        command = [sys.executable, "-c", SERVE, uri, *(f"{i}.png" for i in range(len(images)))]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def test_a_backbone_embeds_as_the_encoder_does_with_nothing_masked(self, tracking, backbone_files, tmp_path):
        import torch
        from safetensors.torch import load

        from mae_core.augment import pixels_to_input
        from mae_core.config import parse_arch
        from mae_core.encoder import build_encoder, encode
        from mae_core.normalization import Normalization
        from pipelines.images.decode import decode, evaluation_view

        register_backbone(tracking.run("p", "pretrain", {}), backbone_files, "mae-i")
        images = [png(28, 28), png(60, 40)]
        found = self.serve(tracking, "models:/mae-i@candidate", tmp_path, *images)
        vit = build_encoder(parse_arch(MODEL["arch"]), (28, 28), 1).eval()
        vit.load_state_dict(load(backbone_files["encoder.safetensors"]))
        views = np.stack([evaluation_view(decode(image, 1), (28, 28)) for image in images])
        with torch.inference_mode():
            tokens = encode(
                vit, pixels_to_input(torch.from_numpy(views), Normalization(mean=(0.3,), std=(0.35,))), None
            )
        embedded = np.array([[found[str(c)][str(r)] for c in range(64)] for r in range(2)])
        np.testing.assert_allclose(embedded, tokens[:, 1:].mean(1).numpy(), atol=1e-5)

    def test_a_classifier_names_the_class(self, tracking, classifier_files, tmp_path):
        run = tracking.run("f", "finetune", {})
        register_classifier(run, classifier_files, None, "mae-j-classifier")
        found = self.serve(tracking, "models:/mae-j-classifier/1", tmp_path, png(28, 28))
        assert found["label"]["0"] in ("cat", "dog")
        assert 0.5 <= float(found["score"]["0"]) <= 1  # pyright: ignore[reportArgumentType]

    def test_a_served_classifier_answers_tables_and_arrays_and_says_what_is_wrong(
        self, tracking, classifier_files, tmp_path
    ):
        from mlflow.models import Model

        ref = register_classifier(tracking.run("served", "finetune", {}), classifier_files, None, "mae-k-classifier")
        images = [base64.b64encode(png(height, 28, height)).decode() for height in (28, 40, 60)]
        with scoring(tracking.uri, "models:/mae-k-classifier/1", tmp_path) as ask:
            status, answer = ask({"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}})
            rows = answer["predictions"]
            assert (status, [set(row) for row in rows]) == (200, [{"label", "score"}] * 3)
            assert all(row["label"] in ("cat", "dog") and 0.5 <= row["score"] <= 1 for row in rows)
            for form in ({"inputs": images}, {"instances": images}, {"dataframe_records": [{"i": i} for i in images]}):
                assert ask(form) == (200, answer)
            for wrong, said in (
                (
                    base64.b64encode(b"no image at all").decode(),
                    "image 1 cannot be read (not a known image format); send",
                ),
                (base64.b64encode(png(28, 28)[:99]).decode(), "image 1 cannot be read (damaged image: "),
                ("/home/me/cat.png", "image 1 is the text '/home/me/cat.png', but the model takes the bytes"),
                ("", "image 1 is the text '', but"),
            ):
                status, answer = ask({"inputs": [images[0], wrong]})
                assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), answer
                assert answer["message"].startswith(said)
            # What the model's own example asks is answered.
            folder = Path(tracking.client.get_logged_model(ref.model_id).artifact_location)
            assert ask(json.loads((folder / "serving_input_example.json").read_text()))[0] == 200
            assert [column.type.name for column in Model.load(str(folder)).signature.inputs] == ["binary"]


@contextmanager
def scoring(tracking_uri: str, model: str, folder: Path) -> Iterator[Callable[[object], tuple[int, Any]]]:
    """Serve the model by `mlflow models serve` on loopback; yield a function that posts to it."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_REGISTRY_URI": tracking_uri}
    environment |= {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": "",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # MLflow starts uvicorn by its name.
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def ask(body: object) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=EVENT_DEADLINE_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def is_healthy() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=REQUEST_DEADLINE_S) as response:
            return response.status == 200

    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(
            is_healthy,
            lambda: f"the served model: {(folder / 'serve.log').read_text()}",
            COMMAND_DEADLINE_S,
            alive=lambda: process.poll() is None,
            errors=(OSError,),
            poll_every_s=0.2,
        )
        yield ask
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(KILLED_DEADLINE_S)


class Server:
    """An `mlflow server` on loopback that can be killed and started again on the same files and port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        process = self.process
        wait_until(
            self.is_healthy,
            lambda: f"a response of MLflow: {(self.folder / 'log').read_text()}",
            COMMAND_DEADLINE_S,
            alive=lambda: process.poll() is None,
            errors=(OSError,),
            poll_every_s=0.2,
        )

    def is_healthy(self) -> bool:
        with urllib.request.urlopen(f"{self.uri}/health", timeout=REQUEST_DEADLINE_S) as response:
            return response.status == 200

    def kill(self) -> None:
        """Kill the server and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait(KILLED_DEADLINE_S)
            self.process = None


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(one_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    return one_server


@pytest.mark.slow
def test_on_a_server_that_dies_and_comes_back_every_point_is_there_once(server, backbone_files, tmp_path):
    tracking = open_tracking("mae")
    run = tracking.run("p", "pretrain", {"a": 1}, dataset=MANIFEST, dataset_uri="/d")
    longest_s, step = 0.0, 0
    restart = threading.Thread(target=server.start)
    for phase in ("up", "down", "up again"):
        if phase == "down":
            server.kill()
        if phase == "up again":
            restart.start()
        for _ in range(20):
            began_s = time.monotonic()
            run.log_points(points(step + 1, step + 50))
            longest_s = max(longest_s, time.monotonic() - began_s)
            step += 50
            let_pass(0.05)
    assert longest_s < 5, "logging waited for the server"
    join(restart, COMMAND_DEADLINE_S)
    ref = register_backbone(run, backbone_files, "mae-s")
    run.finish()
    assert history(tracking, run.id) == list(range(1, step + 1))
    assert tracking.client.get_run(run.id).info.status == "FINISHED"
    found = tracking.find_run("p")
    assert found is not None
    assert found.id == run.id
    files = tracking.fetch(tracking.resolve("models:/mae-s@candidate"), tmp_path / "x")
    assert {name: path.read_bytes() for name, path in files.items()} == backbone_files
    assert ref.uri in [step.id for step in tracking.lineage("models:/mae-s/1")]


@pytest.mark.slow
@pytest.mark.parametrize("away_s", [2, pytest.param(60, marks=pytest.mark.long)])
def test_a_driver_killed_while_delivering_to_a_server_that_dies_leaves_no_gap_and_no_double(server, tmp_path, away_s):
    """Kill the driver and then the server, both while they write; the next driver delivers the rest in order."""
    storage, num_steps = open_storage(tmp_path / "run"), 12_000
    spool = MetricSpool(storage)
    for step in range(1, num_steps + 1):
        spool.add(step, {"train/loss": 1 / step})
    spool.close()
    tracking = open_tracking("mae")
    words = [sys.executable, "-m", "tests.pipelines.registry.delivering", storage.uri, "killed"]
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(words, stdout=log, stderr=log, cwd=Path(__file__).parents[3])
    try:
        wait_until(
            lambda: (found := tracking.find_run("killed")) is not None and found.last_steps(),
            lambda: f"the driver's first points: {(tmp_path / 'driver.log').read_text()}",
            COMMAND_DEADLINE_S,
            alive=lambda: driver.poll() is None,
        )
    finally:
        driver.kill()
        driver.wait(KILLED_DEADLINE_S)
    # The next driver, whose server is killed while it takes points and is away for some seconds.
    next_run = tracking.run("killed", "pretrain", {})
    with MetricFollower(storage, next_run, poll_every_s=0.05):
        wait_until(lambda: next_run.num_waiting, "the second driver to deliver")
        server.kill()
        spool = MetricSpool(storage)
        spool.add(num_steps + 1, {"train/loss": 0.0})
        spool.close()
        let_pass(away_s)
        server.start()
    next_run.finish()
    assert history(tracking, next_run.id, "train/loss") == list(range(1, num_steps + 2))


class fake_server:
    """Answers every connection with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def __enter__(self) -> str:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._answer, daemon=True)
        self.thread.start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        join(self.thread)

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self.answer)
