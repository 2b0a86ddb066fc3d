"""Convert training state to named tensors and to safetensors bytes, and back. No pickle, no file access."""

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from mae_core.errors import UserError


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize tensors as one safetensors file; equal tensors give equal bytes."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


# Widest first, the order in which safetensors stores tensors, so that each is aligned.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def parts(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Serialize CPU tensors as `pack` does, in parts that share their memory.

    Hashing and writing a part release the interpreter lock; `pack` holds it while it copies.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, data, offset = {}, [], 0
    for name in names:
        tensor = tensors[name].detach().contiguous()
        data.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        end = offset + data[-1].nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *data]


def unpack(content: bytes) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises UserError for anything else, including a truncated file."""
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{len(content)} bytes are not a complete safetensors file ({error}); fetch or export the weights again"
        ) from error


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters and buffers by name, sharing its memory."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as `<state>/<parameter's name>`, independent of the order of its parameters."""
    return {
        f"{key}/{name}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned. Raises UserError for another model's state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[parameter]: i for i, parameter in enumerate(learning)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in index or (value.ndim and value.shape != learning[index[name]].shape):
            raise UserError(
                f"optimizer state {key!r} of shape {tuple(value.shape)} belongs to another model; "
                "resume with the config that the checkpoint was written with"
            )
        state.setdefault(index[name], {})[kind] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
