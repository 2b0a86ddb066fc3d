"""The packaged model verifies its files by what it was packaged with."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipelines.registry import open_tracking, register_backbone

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.mark.slow
def test_a_file_that_was_altered_is_named_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.registry.embedder import Embedder

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracking = open_tracking("mae")
    config = json.dumps({"kind": "backbone", "pixels": {"mean": [0.3], "std": [0.35]}}).encode()
    run = tracking.run("p", "pretrain", {})
    ref = register_backbone(run, {"encoder.safetensors": b"weights", "config.json": config}, "mae-served")
    run.finish()
    folder = Path(tracking.client.get_logged_model(ref.model_id).artifact_location)
    packaged = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]["python_function"]["config"]
    assert packaged == {"model": "mae-served", "sha256": ref.sha256}
    (folder / "artifacts" / "encoder.safetensors").write_bytes(b"other")
    files = {name: str(folder / "artifacts" / name) for name in ref.sha256}
    with pytest.raises(ValueError, match=r"encoder\.safetensors of mae-served has sha256 .* instead of the packaged"):
        Embedder().load_context(SimpleNamespace(artifacts=files, model_config=packaged))
