"""LoRAs in files, under ComfyUI's key names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..limits.quote import named, quoted
from ..models.opensora_plan.checkpoint import read_state_dict
from .lora import STUDENT, LoRALinear, adaptable, adapted

Rename = Callable[[str], str]

COMFY_PREFIX = "diffusion_model."
LOST = 0.05  # share of a change, in the norm, that rounding may take


def comfy_lora(module: nn.Module, state: dict[str, Tensor], comfy_name: Rename = str) -> dict[str, Tensor]:
    """The student's adapters in ``state`` (the module's names) as a LoRA file that ComfyUI's loaders take.

    ``comfy_name`` gives a layer's name in ComfyUI, where it has another one there.
    """
    out = {}
    for name, layer in adapted(module).items():
        down, up = state[f"{name}.{STUDENT}_down"], state[f"{name}.{STUDENT}_up"]
        key = COMFY_PREFIX + comfy_name(name)
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down, up
        out[f"{key}.alpha"] = torch.tensor(layer.scales[STUDENT] * down.shape[0])
    return out


def start_from(module: nn.Module, file: Path, comfy_name: Rename = str) -> None:
    """Give the student's adapters the weights of a file of `comfy_lora`. Raises ValueError where it is of another rank or
    model."""
    found = _read(module, file, comfy_name)
    for name, layer in adapted(module).items():
        own, scale = layer.part(STUDENT), layer.scales[STUDENT]
        down, up, given_scale = found.get(name, (None, None, 0.0))
        alike = math.isclose(given_scale, scale, rel_tol=1e-2)  # older files hold alpha in the weights' precision
        if down is None or up is None or not alike or (down.shape, up.shape) != (own[0].shape, own[1].shape):
            raise ValueError(
                f"{named(file.name)} does not fit layer {name}, which wants rank {len(own[0])} and alpha "
                f"{scale * len(own[0]):g} as model.lora_rank and lora_alpha say. Set these to the LoRA's, or choose another."
            )
        own[0].data.copy_(down)
        own[1].data.copy_(up)


def wear(module: nn.Module, files: Sequence[str | Path], comfy_name: Rename = str) -> None:
    """Put files of `comfy_lora` on the module, beside its weights: in their precision a small change would be lost.

    Raises ValueError where a file is for another model.
    """
    for file in map(Path, files):
        for name, (down, up, scale) in _read(module, file, comfy_name).items():
            adaptable(module, name).wear(down, up, scale)


def _read(module: nn.Module, file: Path, comfy_name: Rename) -> dict[str, tuple[Tensor, Tensor, float]]:
    """down, up and scale of each layer of the module that the file changes."""
    lora, _ = read_state_dict(file)
    layers = {
        COMFY_PREFIX + comfy_name(name): (name, m)
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear | LoRALinear)
    }
    found, wrong = {}, []
    for key in sorted({key.rpartition(".alpha")[0] for key in lora if key.endswith(".alpha")}):
        down, up = (lora.get(f"{key}.lora_{part}.weight") for part in ("down", "up"))
        name, layer = layers.get(key, ("", None))
        linear = layer.base if isinstance(layer, LoRALinear) else layer
        if (
            linear is None
            or down is None
            or up is None
            or (down.shape[1], up.shape[0]) != (linear.in_features, linear.out_features)
        ):
            wrong.append(key)
        else:
            found[name] = down, up, float(lora[f"{key}.alpha"]) / len(down)
    if wrong or not found:
        raise ValueError(
            f"{named(file.name)} is no LoRA of this model as evdit distill writes it"
            + (f" ({len(wrong)} layers do not fit, such as {quoted(wrong[0])})" if wrong else "")
            + ". Choose another."
        )
    return found


def merged(base: dict[str, Tensor], lora: dict[str, Tensor], comfy_name: Rename = str) -> dict[str, Tensor]:
    """Full weights: ``base`` with a file of ``comfy_lora`` added, in the base's precision where that holds the change."""
    out = dict(base)
    for name, value in base.items():
        stem = COMFY_PREFIX + comfy_name(name.removesuffix(".weight"))
        if name.endswith(".weight") and f"{stem}.alpha" in lora:
            down, up = lora[f"{stem}.lora_down.weight"].float(), lora[f"{stem}.lora_up.weight"].float()
            scale = float(lora[f"{stem}.alpha"]) / down.shape[0]
            out[name] = changed(value, scale * up @ down)
    return out


def changed(value: Tensor, change: Tensor) -> Tensor:
    """value + change in the value's precision; in float32 where rounding takes more than `LOST` of the change.

    Weights of bf16 lie on a grid of 1 / 256 of themselves: a change below half a step vanishes.
    """
    exact = value.float() + change
    rounded = exact.to(value.dtype)
    lost = torch.linalg.vector_norm(rounded.float() - exact)
    return rounded if lost <= LOST * torch.linalg.vector_norm(change) else exact
