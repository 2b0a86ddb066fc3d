"""What a command reads of the model that it names, and what it says of a model that it cannot use."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mae_core.errors import UserError
from mae_core.state import pack
from pipelines.registry import is_registered, read_model

TENSORS = {"cls_token": torch.randn(1, 1, 8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"kind": "backbone"}))
    (tmp_path / "encoder.safetensors").write_bytes(pack(TENSORS))
    return tmp_path


def test_a_folder_gives_its_config_and_the_first_weights_that_it_has(folder: Path) -> None:
    found = read_model(str(folder), "mae.safetensors", "encoder.safetensors", remedy="")
    assert (found.name, found.ref, found.values) == ("encoder.safetensors", None, {"kind": "backbone"})
    assert torch.equal(found.tensors["cls_token"], TENSORS["cls_token"])
    for name, digest in found.sha256.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert not is_registered(str(folder))
    assert is_registered("models:/mae-vit_base_patch16@candidate")


def test_the_error_for_other_weights_ends_with_the_remedy(folder: Path) -> None:
    with pytest.raises(UserError, match=rf"{folder} has no classifier.safetensors; fine-tune {folder}"):
        read_model(str(folder), "classifier.safetensors", remedy="fine-tune {model}")


def test_a_folder_without_config_and_a_damaged_config_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json; give models:/NAME@ALIAS, or the export/ folder"):
        read_model(str(folder / "absent"), "encoder.safetensors", remedy="")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"is not JSON .*; copy or download the model again"):
        _ = read_model(str(folder), "encoder.safetensors", remedy="").values
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="describes no model"):
        _ = read_model(str(folder), "encoder.safetensors", remedy="").values
