"""Low-rank adapters on a model's linear layers: y = W x + (alpha / rank) up(down(x)), exported under ComfyUI's key
names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..limits.quote import named
from ..models.opensora_plan.checkpoint import read_state_dict

Rename = Callable[[str], str]

COMFY_PREFIX = "diffusion_model."
LOST = 0.05  # share of a change, in the norm, that rounding may take
TARGETS = r"\.(to_[qkv]|to_out\.0|proj|net\.0\.proj|net\.2)$"  # attention and feed-forward of transformer blocks


STUDENT, FAKE = "lora", "fake"  # the adapters' names


class LoRALinear(nn.Module):
    """A frozen linear layer with trainable low-rank parts in float32, of which one counts at a time, or none. At the
    start they change nothing."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, names: tuple[str, ...] = (STUDENT,)) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.counts: str | None = names[0]
        factory = {"device": base.weight.device, "dtype": torch.float32}
        for name in names:
            down = nn.Parameter(torch.empty(rank, base.in_features, **factory))
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.register_parameter(f"{name}_down", down)
            self.register_parameter(f"{name}_up", nn.Parameter(torch.zeros(base.out_features, rank, **factory)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.counts is None:
            return out
        down, up = self.get_parameter(f"{self.counts}_down"), self.get_parameter(f"{self.counts}_up")
        # In the input's precision: a copy of it in float32 would be kept for the gradient in every layer.
        low = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return out + (self.scale * low).to(out.dtype)


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str = TARGETS,
    adapters: tuple[str, ...] = (STUDENT,),
) -> list[str]:
    """Freeze ``module`` and put adapters on the linear layers whose names match; returns these names. The first of the
    ``adapters`` counts.

    Raises ValueError where no layer matches.
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
        owner, layer = module.get_submodule(parent), module.get_submodule(name)
        owner.register_module(last, LoRALinear(layer, rank, float(alpha or rank), adapters))  # pyright: ignore[reportArgumentType]
    return names


def adapted(module: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have adapters, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def is_of(adapter: str, weight: str) -> bool:
    """Whether the weight of this name belongs to the adapter."""
    return weight.rpartition(".")[2] in (f"{adapter}_down", f"{adapter}_up")


def let_count(module: nn.Module, adapter: str | None) -> None:
    """From now on the module is its base with this adapter; with None the base alone."""
    for layer in adapted(module).values():
        layer.counts = adapter


@contextmanager
def counting(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within it the module is its base with this adapter, or the base alone; then what it was."""
    before = next(iter(adapted(module).values())).counts
    let_count(module, adapter)
    try:
        yield
    finally:
        let_count(module, before)


def lora_off(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the module is the base it was made from."""
    return counting(module, None)


def comfy_lora(module: nn.Module, state: dict[str, Tensor], comfy_name: Rename = str) -> dict[str, Tensor]:
    """The student's adapters in ``state`` (the module's names) as a LoRA file that ComfyUI's loaders take.

    ``comfy_name`` gives a layer's name in ComfyUI, where it has another one there.
    """
    out = {}
    for name, layer in adapted(module).items():
        down, up = state[f"{name}.lora_down"], state[f"{name}.lora_up"]
        key = COMFY_PREFIX + comfy_name(name)
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down, up
        out[f"{key}.alpha"] = torch.tensor(layer.scale * down.shape[0])
    return out


def start_from(module: nn.Module, file: Path, comfy_name: Rename = str) -> None:
    """Give the student's adapters the weights of a file of `comfy_lora`. Raises ValueError where it is of another rank or
    model."""
    lora, _ = read_state_dict(file)
    for name, layer in adapted(module).items():
        key = COMFY_PREFIX + comfy_name(name)
        given = [lora.get(f"{key}.lora_{part}.weight") for part in ("down", "up")]
        own = [layer.get_parameter(f"{STUDENT}_{part}") for part in ("down", "up")]
        scale = float(lora[f"{key}.alpha"]) / len(given[0]) if given[0] is not None and f"{key}.alpha" in lora else None
        if [getattr(value, "shape", None) for value in given] != [p.shape for p in own] or scale != layer.scale:
            raise ValueError(
                f"{named(file.name)} does not fit layer {name}, which wants rank {len(own[0])} and alpha "
                f"{layer.scale * len(own[0]):g} as model.lora_rank and lora_alpha say. Set these to the LoRA's, or choose "
                "another."
            )
        for mine, value in zip(own, given, strict=True):
            mine.data.copy_(value)  # pyright: ignore[reportArgumentType]


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
