"""Write a model as a program, ONNX or torch.export, and check that it computes what the model computes.

A program takes any number of images, and on request images of any size that has whole patches.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.config import Size
from mae_core.encoder import norm_layer
from mae_core.errors import UserError
from mae_core.formats.configs import timm_arguments, timm_name
from mae_core.formats.ours import encoder_part
from pipelines.errors import CommandFailed
from pipelines.weights.exportable import Exportable
from pipelines.weights.tensor_formats import Written

_OPSET = 20
_MAX_ONE_FILE_BYTES = 1_900_000_000
"""An ONNX file is a protobuf, at most 2 GB; larger weights go beside it."""
_BATCHES = (1, 2, 5)
"""Batches at which a written program must equal the model, at the model's own image size; it is traced at another."""
_OTHER_BATCH = 2
"""Batch at which it must at other image sizes."""
_TRACED_BATCH = 3
_MIN_PATCHES = 2
"""Fewest patches a side of a dynamic size: torch.export treats 1 as a constant."""
_TOLERANCE = 1e-4
"""Largest difference from rounding, relative to the largest output."""


def write_onnx(model: Exportable, folder: Path, place: str, *, dynamic_size: bool) -> Written:
    """Write model.onnx and run it with onnxruntime. Raises UserError if a package that this needs is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, which is not installed; run pip install onnx onnxscript onnxruntime "
            "(the extra `export`)"
        )
    import onnxruntime

    path = folder / "model.onnx"
    num_bytes = sum(tensor.numel() * 4 for tensor in model.tensors.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own internals
        torch.onnx.export(
            _Program(model, dynamic_size),
            (_traced(model, dynamic_size),),
            path,
            input_names=["images"],
            output_names=["logits" if model.classes else "tokens"],
            dynamic_shapes=_shapes(model, dynamic_size),
            opset_version=_OPSET,
            external_data=num_bytes > _MAX_ONE_FILE_BYTES,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    checked = _compare(
        model, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), dynamic_size
    )
    return Written(
        load=(
            f"import onnxruntime; session = onnxruntime.InferenceSession({f'{place}/model.onnx'!r}, "
            "providers=['CPUExecutionProvider'])"
        ),
        use=f"`session.run(None, {{'images': images}})[0]` are {_meaning(model)}; images are float32",
        checked=f"onnxruntime equals torch, {checked}",
        notes=(f"Opset {_OPSET}. {_limits(model, dynamic_size)}",),
    )


def write_torch(model: Exportable, folder: Path, place: str, *, dynamic_size: bool) -> Written:
    """Write model.pt2, a program of torch.export, and run it."""
    path = folder / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own internals
        exported = torch.export.export(
            _Program(model, dynamic_size),
            (_traced(model, dynamic_size),),
            dynamic_shapes=_shapes(model, dynamic_size),
        )
        torch.export.save(exported, path)
        loaded = torch.export.load(path).module()
    return Written(
        load=f"import torch; model = torch.export.load({f'{place}/model.pt2'!r}).module()",
        use=f"`model(images)` are {_meaning(model)}; neither timm nor this project is needed",
        checked=f"the loaded program equals the model, {_compare(model, loaded, dynamic_size)}",
        notes=(f"Written by torch {torch.__version__}. {_limits(model, dynamic_size)}",),
    )


class _Program(nn.Module):
    """The computation that is exported: logits, or all tokens after the last norm."""

    def __init__(self, model: Exportable, dynamic_size: bool) -> None:
        super().__init__()
        self.vit, self.is_classifier = (_dynamic(model) if dynamic_size else model.vit), bool(model.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images) if self.is_classifier else self.vit.forward_features(images)


def _dynamic(model: Exportable) -> VisionTransformer:
    """Build the model anew so that it interpolates its positions to the grid of its images."""
    arguments = timm_arguments(model.model, num_classes=len(model.classes), pool=model.pool)
    vit: Any = timm.create_model(
        timm_name(model.model), **arguments, norm_layer=norm_layer(model.model.norm_eps), dynamic_img_size=True
    )
    vit.load_state_dict(encoder_part(model.tensors))
    return vit.eval()


def _shapes(model: Exportable, dynamic_size: bool) -> dict[str, dict[int, Any]]:
    """Return the dynamic dimensions as torch.export takes them: the batch, and whole patches of height and width."""
    found: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        for axis, name in ((2, "rows"), (3, "columns")):
            found[axis] = model.model.patch_px * torch.export.Dim(name, min=_MIN_PATCHES)
    return {"images": found}


def _traced(model: Exportable, dynamic_size: bool) -> Tensor:
    """Return the images to trace with: a dynamic size is neither the model's own nor square."""
    (rows, columns), patch_px = model.model.grid, model.model.patch_px
    size = ((rows + 2) * patch_px, (columns + 5) * patch_px) if dynamic_size else model.model.image_px
    return _images(model, _TRACED_BATCH, size)


def _sizes(model: Exportable, dynamic_size: bool) -> Iterator[Size]:
    """Yield image sizes to check: the model's own, larger, smaller, and upright and wide ones."""
    yield model.model.image_px
    if dynamic_size:
        (rows, columns), patch_px = model.model.grid, model.model.patch_px
        few = _MIN_PATCHES
        for height, width in ((rows + 3, rows + 3), (few, few), (2 * rows, few), (few, columns + 1)):
            yield height * patch_px, width * patch_px


def _images(model: Exportable, batch: int, size: Size) -> Tensor:
    return torch.randn((batch, model.model.channels, *size), generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def _compare(model: Exportable, run: Callable[[Tensor], Tensor], dynamic_size: bool) -> str:
    """Run the written program and the model on several batches and sizes. Raises CommandFailed if they differ."""
    own, dynamic, largest, sizes = _Program(model, False), _Program(model, dynamic_size), 0.0, []
    for size in _sizes(model, dynamic_size):
        is_own = size == model.model.image_px
        sizes.append(f"{size[0]} x {size[1]}")
        for batch in _BATCHES if is_own else (_OTHER_BATCH,):
            images = _images(model, batch, size)
            expected = (own if is_own else dynamic)(images)
            difference = (run(images) - expected).abs().max().item() / max(1.0, expected.abs().max().item())
            if not difference <= _TOLERANCE:
                raise CommandFailed(
                    f"the exported program differs from the model by {difference:.1e} at {batch} images of {sizes[-1]} "
                    f"px, more than rounding ({_TOLERANCE:g}); nothing was written: export another format, and report "
                    "this"
                )
            largest = max(largest, difference)
    batches = ", ".join(map(str, _BATCHES))
    return f"largest difference {largest:.1e} at batches of {batches} and {', '.join(sizes)} px"


def _meaning(model: Exportable) -> str:
    return "logits" if model.classes else "the class token, then the patch tokens"


def _limits(model: Exportable, dynamic_size: bool) -> str:
    if not dynamic_size:
        return "The batch is dynamic, the image size fixed."
    return (
        f"Batch and image size are dynamic: sides are multiples of {model.model.patch_px} px, at least "
        f"{_MIN_PATCHES * model.model.patch_px} px. Positions are interpolated to another size, as by timm's "
        "dynamic_img_size."
    )
