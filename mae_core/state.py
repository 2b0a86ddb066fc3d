"""Training state as named tensors, and named tensors as bytes: safetensors, never pickle, no file system."""

import hashlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as one safetensors file, the same bytes for the same tensors."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(content: bytes) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises ValueError for anything else, a cut-off file included."""
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{len(content)} bytes are no whole safetensors file ({error}); fetch or export the weights again"
        ) from error


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by name, sharing its memory."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `<state>/<parameter's name>`, whatever the order of its parameters."""
    return {
        f"{key}/{name}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The optimizer is in the state that `optimizer_tensors` gave. Raises ValueError for another model's state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[parameter]: i for i, parameter in enumerate(learning)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in index or (value.ndim and value.shape != learning[index[name]].shape):
            raise ValueError(
                f"optimizer state {key!r} of shape {tuple(value.shape)} belongs to another model; "
                "resume with the config that the checkpoint was written with"
            )
        state.setdefault(index[name], {})[kind] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and values, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
