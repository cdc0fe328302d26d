"""The video models whose self-attention the pack understands: a row for each, one layout rule for each.

Shapes: latents x (B, C, T, H, W). Video tokens stand in the order t, h, w in every family here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...efficient_vdit_core.attention import TokenLayout
from ...efficient_vdit_core.tiles import TokenGrid

# (latents, diffusion model, the other conditionings by name) -> where the video tokens stand
LayoutRule = Callable[[Tensor, nn.Module, Mapping[str, Any]], TokenLayout]


@dataclass(frozen=True)
class Family:
    """name: as in plan files. blocks, heads: where the diffusion model keeps its layers and its head count."""

    name: str
    blocks: str
    heads: str
    layout: LayoutRule

    def depth(self, diffusion_model: nn.Module) -> int:
        """The number of layers."""
        return len(getattr(diffusion_model, self.blocks))

    def head_count(self, diffusion_model: nn.Module) -> int:
        """The number of attention heads in a layer."""
        value: Any = diffusion_model
        for name in self.heads.split("."):
            value = getattr(value, name)
        return int(value)


def find_family(diffusion_model: nn.Module) -> Family | None:
    """The row of this model, or None. Exact classes only: a subclass may order its tokens in another way."""
    return FAMILIES.get(type(uncompiled(diffusion_model)).__name__)


def uncompiled(diffusion_model: nn.Module) -> nn.Module:
    """The model itself where torch.compile has wrapped it."""
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


def patch_grid(x: Tensor, patch: tuple[int, int, int]) -> TokenGrid:
    """The token grid of latents x (B, C, T, H, W); incomplete patches are padded by the models, so they count."""
    t, h, w = (-(-size // p) for size, p in zip(x.shape[-3:], patch, strict=True))
    return TokenGrid(t, h, w)


def _open_sora_plan(x: Tensor, model: Any, conds: Mapping[str, Any]) -> TokenLayout:
    return TokenLayout(patch_grid(x, model.patch_size))


def _wan(x: Tensor, model: Any, conds: Mapping[str, Any]) -> TokenLayout:
    grid = patch_grid(x, model.patch_size)
    appended = conds.get("time_dim_concat")  # whole frames behind the clip
    if appended is not None:
        grid = TokenGrid(grid.t + patch_grid(appended, model.patch_size).t, grid.h, grid.w)
    has_reference = conds.get("reference_latent") is not None and getattr(model, "ref_conv", None) is not None
    return TokenLayout(grid, prefix=grid.tokens_per_frame if has_reference else 0)


FAMILIES: dict[str, Family] = {
    "OpenSoraT2V": Family("opensora_plan", "transformer_blocks", "config.num_attention_heads", _open_sora_plan),
    "WanModel": Family("wan", "blocks", "num_heads", _wan),
}
