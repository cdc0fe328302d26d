"""Low-rank adapters on a model's linear layers: y = W x + (alpha / rank) up(down(x)), exported under ComfyUI's key
names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rename = Callable[[str], str]

COMFY_PREFIX = "diffusion_model."
LOST = 0.05  # share of a change, in the norm, that rounding may take
TARGETS = r"\.(to_[qkv]|to_out\.0|proj|net\.0\.proj|net\.2)$"  # attention and feed-forward of transformer blocks


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank part in float32. At the start it changes nothing."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale, self.enabled = base, alpha / rank, True
        factory = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_down = nn.Parameter(torch.empty(rank, base.in_features, **factory))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, **factory))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.enabled:
            return out
        # In the input's precision: a copy of it in float32 would be kept for the gradient in every layer.
        low = F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return out + (self.scale * low).to(out.dtype)


def add_lora(module: nn.Module, rank: int, alpha: float | None = None, targets: str = TARGETS) -> list[str]:
    """Freeze ``module`` and put adapters on the linear layers whose names match; returns these names.

    Raises ValueError where none matches.
    """
    if rank < 1:
        raise ValueError(f"The LoRA's rank is {rank}, expected at least 1. Correct lora_rank.")
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and re.search(targets, "." + n)]
    if not names:
        raise ValueError(
            f"No linear layer of {type(module).__name__} matches the LoRA targets {targets!r}. Correct them."
        )
    module.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        owner.register_module(last, LoRALinear(module.get_submodule(name), rank, float(alpha or rank)))  # pyright: ignore[reportArgumentType]
    return names


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def lora_off(module: nn.Module) -> Iterator[None]:
    """Within it the module is the base it was made from."""
    found = list(adapters(module).values())
    for layer in found:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in found:
            layer.enabled = True


def comfy_lora(module: nn.Module, state: dict[str, Tensor], comfy_name: Rename = str) -> dict[str, Tensor]:
    """The adapters in ``state`` (the module's names) as a LoRA file that ComfyUI's loaders take.

    ``comfy_name`` gives a layer's name in ComfyUI, where it has another one there.
    """
    out = {}
    for name, layer in adapters(module).items():
        down, up = state[f"{name}.lora_down"], state[f"{name}.lora_up"]
        key = COMFY_PREFIX + comfy_name(name)
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down, up
        out[f"{key}.alpha"] = torch.tensor(layer.scale * down.shape[0])
    return out


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
