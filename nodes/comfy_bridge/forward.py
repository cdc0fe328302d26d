"""What a forward of a MODEL tells its attention calls, and what they will look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...efficient_vdit_core.attention.call_shape import CallShape
from ...efficient_vdit_core.attention.dense_call import FileAttention
from ...efficient_vdit_core.attention.hook.state import ForwardState
from ...efficient_vdit_core.attention.report.reason_names import AS_LONG_AS_THE_VIDEO
from .families import Family, Stack, uncompiled
from .layouts import UnknownLayout


def forward_state(
    family: Family, model: Any, x: Tensor, text: Tensor | None, conds: dict[str, Any], stack: Stack | None = None
) -> ForwardState:
    """Where the video tokens of a forward on latents ``x`` stand; a state without a layout, with the reason, where
    unknown. ``stack``: the model's layers as the node knows them, None = as they are now."""
    stack = stack or family.stack(model)
    # Video with audio comes packed into one tensor, and the shapes beside it. Of video alone they are told too, but context
    # windows do not keep to them.
    shapes = conds.get("latent_shapes", ())
    size = shapes[0] if len(shapes) > 1 else x.shape
    try:
        _check_blocks(stack, family.count_blocks(model))
        if len(size) != 5:
            raise UnknownLayout(
                f"its latents have the shape {tuple(size)}, expected (batch, channels, frames, height, width)"
            )
        found = family.layout(size, model, text, conds)
    except UnknownLayout as error:
        return ForwardState(None, reason=str(error))
    others = frozenset(found.others)
    return ForwardState(
        found.layout,
        # Cross-attention is told from self-attention by its length; here the lengths are the same.
        reason=AS_LONG_AS_THE_VIDEO if found.layout.tokens in others else "",
        others=others,
        depth=stack.depth,
        heads=stack.heads,
        offsets=stack.offsets,
        order=family.order(model, conds),
        padding=found.padding,
        file_attention=file_attention(family, model),
    )


def _check_blocks(stack: Stack, now: dict[str, int]) -> None:
    """Raises UnknownLayout where the model's lists hold other blocks than its layers, so that which layer a call is of is not
    known."""
    if now != stack.blocks:
        before, found = (" + ".join(map(str, counts.values())) for counts in (stack.blocks, now))
        raise UnknownLayout(
            f"another node has replaced the model's blocks ({found} in place of {before}, as First Block Cache does)"
        )


def call_shape(family: Family, base_model: Any, x: Tensor, stack: Stack | None = None) -> CallShape:
    """What the self-attention calls of a forward on latents ``x`` look like, as far as it can be told beforehand. ``stack`` as
    in `forward_state`."""
    stack = stack or family.stack(uncompiled(base_model.diffusion_model))
    return CallShape(x.shape[0], stack.heads, stack.head_dim, compute_dtype(base_model), x.device)


def compute_dtype(base_model: Any) -> torch.dtype:
    """What a model of ComfyUI's computes in, whatever its weights are kept in."""
    inference = getattr(base_model, "get_dtype_inference", None)  # in versions that know quantised weights
    return inference() if inference else base_model.manual_cast_dtype or base_model.get_dtype()


def file_attention(family: Family, model: Any) -> dict[int, FileAttention]:
    """By layer, the attention functions that the checkpoint itself asks for; layers without a wish are left out.

    ComfyUI keeps a wish at the module whose calls it is for, and drops it where an override is installed.
    """
    found: dict[int, FileAttention] = {}
    for layer, block in enumerate(family.layers(model)):
        modules: list[Any] = [m for m in block.modules() if hasattr(m, "comfy_attention")]
        wishes = [module.comfy_attention.function for module in modules]
        if any(wish is not None for wish in wishes):
            # The attention over the video comes first in every block here; the others mostly agree.
            others = set(wishes[1:])
            found[layer] = FileAttention(wishes[0], others.pop() if len(others) == 1 else None)
    return found
