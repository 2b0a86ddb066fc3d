"""Files of weights: what is read, and that nothing but tensors and plain values is."""

import argparse
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mae_core.errors import UserError
from mae_core.formats.reading import read_checkpoint

TENSORS = {"cls_token": torch.randn(1, 1, 8), "blocks.0.norm1.weight": torch.randn(8)}


def saved(path: Path, content: object, **options: bool) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {
            "model": t,
            "optimizer": {"state": {}},
            "epoch": 399,
            "args": argparse.Namespace(norm_pix_loss=True),
        },
        lambda t: {"state_dict": t},
        lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
        lambda t: {"state_dict": {f"module.encoder.{name}": tensor for name, tensor in t.items()}},
    ],
)
def test_tensors_are_found_in_wrappers_and_under_prefixes(wrap, tmp_path):
    found = read_checkpoint(saved(tmp_path / "a.pth", wrap(TENSORS)))
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_the_scripts_arguments_come_along(tmp_path):
    arguments = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75, device="cuda")
    found = read_checkpoint(saved(tmp_path / "a.pth", {"model": TENSORS, "args": arguments}))
    assert found.arguments == vars(arguments)


def test_safetensors_are_known_by_content_not_by_suffix(tmp_path):
    save_file(TENSORS, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").tensors.keys() == TENSORS.keys()


def test_torchs_old_format_is_read_too(tmp_path):
    path = saved(tmp_path / "a.pth", {"model": TENSORS}, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path).tensors["cls_token"], TENSORS["cls_token"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("old", [True, False])
def test_code_in_a_pickle_is_named_and_not_run(old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pth", {"model": TENSORS, "x": Evil()}, _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match=r"holds a pickled (posix|os)\.system, which could run code"):
        read_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_another_object_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.pth holds a pickled pathlib\S*\.PosixPath, which .*torch\.save"):
        read_checkpoint(saved(tmp_path / "a.pth", {"model": TENSORS, "args": argparse.Namespace(output=Path("x"))}))


def test_a_module_is_not_unpickled(tmp_path):
    with pytest.raises(UserError, match=r"holds a pickled torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(saved(tmp_path / "a.pth", torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2), "holds a Tensor instead of named tensors"),
        ({"state": {0: {}}, "param_groups": []}, "is an optimizer's state"),
        ({"student": {}, "teacher": {}}, "training checkpoint of DINO"),
        ({"epoch": 3, "loss": 0.4}, "holds no tensors under model or state_dict, but epoch, loss"),
    ],
)
def test_what_holds_no_weights_is_named(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_checkpoint(saved(tmp_path / "a.pth", content))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_a_truncated_file_is_an_error_with_a_remedy(kind, share, tmp_path):
    path = tmp_path / "a.pth"
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        saved(path, {"model": TENSORS}, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"a\.pth .*(again|give a \.pth)"):
        read_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(UserError, match=r"neither a torch file nor safetensors"):
        read_checkpoint(tmp_path / "a.pth")
    buffer = io.BytesIO()
    pickle.dump({"a": 1}, buffer)
    (tmp_path / "b.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"b\.pkl"):
        read_checkpoint(tmp_path / "b.pkl")
