"""With MAE_ARTIFACTS, files of versions go to the S3 store and come from it, without a server in between."""

import json
from pathlib import Path

import pytest

from mae_core.errors import UserError
from pipelines.config import PruneConfig
from pipelines.promotion.prune import prune
from pipelines.registry import open_tracking, register_backbone
from pipelines.storage import open_storage

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.mark.s3
@pytest.mark.slow
def test_a_version_lies_in_the_store_is_verified_on_loading_and_pruned_there(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MAE_ARTIFACTS", f"{s3}/mlflow")
    tracking = open_tracking("direct uploads")
    run = tracking.run("p", "pretrain", {})
    config = json.dumps({"kind": "backbone", "pixels": {"mean": [0.3], "std": [0.35]}}).encode()
    # More than boto3's 8 MB, so that it is uploaded in parts.
    files: list[dict[str, bytes | Path]] = [
        {"encoder.safetensors": bytes([number]) * 9_000_000, "config.json": config} for number in range(2)
    ]
    first, second = (register_backbone(run, content, "mae-direct") for content in files)
    run.finish()
    location = tracking.client.get_logged_model(second.model_id).artifact_location
    assert location.startswith(f"{s3}/mlflow/direct_uploads/")
    fetched = tracking.fetch(second, tmp_path / "fetched")
    assert {name: path.read_bytes() for name, path in fetched.items()} == files[1]
    assert not list(tmp_path.rglob("artifacts"))
    assert prune(PruneConfig(keep=1, older_than_days=0, delete=True, experiment="direct uploads"))["deleted"] == [
        first.uri
    ]
    store = open_storage(location)
    assert store.exists("artifacts/encoder.safetensors")
    assert not open_storage(location.replace(second.model_id, first.model_id)).list()
    store.write("artifacts/encoder.safetensors", b"other weights")
    with pytest.raises(UserError, match=r"encoder\.safetensors of models:/mae-direct/2 has sha256"):
        tracking.verify(second)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["/local/folder", "s3://", "s3://key:secret@bucket/x", "http://host/x"])
def test_any_other_place_is_refused_without_printing_a_secret(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MAE_ARTIFACTS", value)
    with pytest.raises(UserError, match=r"is no s3:// prefix; try s3://bucket/mlflow") as refused:
        open_tracking("mae")
    assert "secret" not in str(refused.value)
