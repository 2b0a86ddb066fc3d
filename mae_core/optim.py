"""Optimizers: AdamW with layer-wise learning-rate decay and LARS, of the paper's recipes, and Muon."""

import re
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mae_core.config import OptimConfig
from mae_core.errors import UserError

_TOKENS = ("cls_token", "mask_token", "pos_embed", "reg_token", "mixture")
_FIRST = re.compile(r"(cls_token|pos_embed|patch_embed\..*)")
_IN_BLOCK = re.compile(r"\bblocks\.\d+\.")
_BLOCK = re.compile(r"blocks\.(\d+)\..*")
_LAST = re.compile(r"(norm|fc_norm|head)\..*")


def build_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> Optimizer:
    """Build the optimizer named in the config over all parameters that require a gradient."""
    groups = param_groups(model, config.weight_decay, config.layer_decay)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    if config.name == "lars":
        return LARS(groups, lr=lr, momentum=config.momentum)
    if config.name == "muon":
        return Muon(_split(groups, model), lr=lr, momentum=config.momentum, betas=config.betas)
    return AdamW(groups, lr=lr, betas=config.betas, fused=True)


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters by (learning-rate scale, weight decay).

    Biases, norms, tokens and other 1-D parameters are not decayed. With layer_decay below 1 the learning rate falls by
    that factor from each block to the one below it. Raises UserError if a parameter's name is unknown, instead of
    training it at the wrong rate.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scale_of = _layer_scales(model, layer_decay) if layer_decay < 1 else (lambda name: 1.0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        decayed = parameter.ndim > 1 and not name.endswith(_TOKENS)
        key = (scale_of(name), weight_decay if decayed else 0.0)
        group = groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def _layer_scales(model: nn.Module, layer_decay: float) -> Callable[[str], float]:
    """Scale the rate by layer: 1 for the head, layer_decay ** (depth + 1) for the patch embedding."""
    names = [name for name, _ in model.named_parameters()]
    blocks = {int(found[1]) for name in names if (found := _BLOCK.fullmatch(name))}
    unknown = [name for name in names if not any(p.fullmatch(name) for p in (_FIRST, _BLOCK, _LAST))]
    if unknown or not blocks:
        raise UserError(
            f"layer_decay {layer_decay} needs a backbone with timm's ViT names, not {(unknown or names)[0]!r}; "
            "rename its parameters or try layer_decay 1"
        )
    top = max(blocks) + 2

    def scale_of(name: str) -> float:
        block = _BLOCK.fullmatch(name)
        layer = int(block[1]) + 1 if block else 0 if _FIRST.fullmatch(name) else top
        return layer_decay ** (top - layer)

    return scale_of


def _split(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Split each group into matrices of blocks, which Muon updates, and everything else, which AdamW updates."""
    matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and _IN_BLOCK.search(name)}
    found = []
    for group in groups:
        for use_fallback in (False, True):
            chosen = [parameter for parameter in group["params"] if (parameter not in matrices) == use_fallback]
            if chosen:
                found.append({**group, "params": chosen, "use_fallback": use_fallback})
    return found


class Muon(timm.optim.Muon):
    """timm's Muon (Jordan et al. 2024), with updates scaled to the size of AdamW's (Liu et al. 2025).

    An update is skipped if `found_inf` is 1, as by torch's fused optimizers, at the price of a synchronization a step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item() > 0:
            return
        super().step()
        for state in self.state.values():
            # It follows from the group. Only tensors are saved.
            state.pop("use_muon", None)


class LARS(Optimizer):
    """SGD with momentum and steps of equal length relative to the norm of each weight matrix (You et al. 2017).

    Parameters with one dimension are neither decayed nor rescaled, as in the recipe of Table 9.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None, "LARS takes no closure"
        # As in torch's fused optimizers: if this is 1, nothing changes, without a synchronization with the device.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    update = update * _trust_ratio(parameter, update, group["trust"])
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                moved = momentum * group["momentum"] + update
                if found_inf is None:
                    momentum.copy_(moved)
                    parameter.sub_(momentum, alpha=group["lr"])
                else:
                    momentum.copy_(torch.where(found_inf > 0, momentum, moved))
                    parameter.sub_(torch.where(found_inf > 0, torch.zeros_like(moved), moved), alpha=group["lr"])


def _trust_ratio(parameter: Tensor, update: Tensor, trust: float) -> Tensor:
    """Compute trust * |parameter| / |update|, or 1 if either norm is zero, without a synchronization."""
    weight_norm, update_norm = parameter.norm(), update.norm()
    ratio = trust * weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
