"""What would be used is said, and what does not answer is named with the remedy."""

from pathlib import Path

import pytest

from pipelines.bench.ports import free_port
from pipelines.cli.doctor import doctor
from pipelines.machine import Machine

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def closed_port() -> int:
    return free_port()


@pytest.mark.slow
def test_everything_is_local_and_answers_where_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    found = doctor()
    assert found["ok"], found["text"]
    assert str(tmp_path) in found["mlflow"]["says"]
    assert "embedded" in found["ray"]["says"]


def test_what_does_not_answer_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    found = doctor()
    assert not found["ok"]
    for part, remedy in (("ray", "unset RAY_ADDRESS"), ("storage", "correct the URL"), ("mlflow", "unset it")):
        assert not found[part]["ok"]
        assert str(closed_port) in found[part]["says"]
        assert remedy in found[part]["says"]


@pytest.mark.slow
def test_it_says_what_auto_chooses_and_what_bounds_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pipelines.cli.doctor.machine", lambda: Machine(num_cores=1))
    found = doctor()
    line = "a run gets 1 worker on CPU, float32, micro-batch 64, 2 data tasks on 1 core"
    assert (found["auto"]["ok"], found["auto"]["says"]) == (True, line)
    # A ViT-B takes more of a core than any photograph.
    assert found["step"]["says"].startswith("the step would bound vit_base_patch16 at 224 px: ")
    assert found["step"]["says"].endswith(" decoded by 1 core")
