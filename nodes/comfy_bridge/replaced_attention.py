"""Runs in which no self-attention over the video came by: what is known of the node that computes it by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ...efficient_vdit_core.attention.report.reason_names import ALONE, CROSS_ATTENTION
from .families import Family, uncompiled

NETWORK = "diffusion_model."
# A layer's attention over the video, by its path. Nodes give it another forward, or another class with one.
_SELF_ATTENTION = r"((.*\.)?(self_)?(attn1?|attention))"
_PATCH = re.compile(re.escape(NETWORK) + _SELF_ATTENTION + r"\.(forward|__class__)")
_MODULE = re.compile(_SELF_ATTENTION)


def none_asked(reasons: Iterable[str]) -> bool:
    """Whether calls that stayed dense for these reasons alone leave it open why none over the video was among them."""
    return set(reasons) <= {CROSS_ATTENTION, ALONE}


def why_none_asked(model: Any, family: Family) -> str:
    """Why a run of a MODEL made no call of its self-attention over the video, and what to do."""
    found = own_forwards(model, family)
    if not found:
        return (
            "another node replaces the attention, the blocks or the forward of this "
            "model (leave it out), or this ComfyUI passes no attention hook to it (update it)."
        )
    first, by = next(iter(found.items()))
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"another node computes the attention by itself, by {by} in place of {first}{more}. "
        "Leave that node out, or take one that sets ComfyUI's attention override in its place (for SageAttention, KJNodes' Patch "
        "Sage Attention)."
    )


def own_forwards(model: Any, family: Family) -> dict[str, str]:
    """By its path in the network: each layer's self-attention of a MODEL that does not run its class's own forward, and the
    name of what it runs. Of a MODEL that is loaded, as behind a run, also what stands in the network without a patch."""
    found = {}
    for key, patch in model.object_patches.items():
        if match := _PATCH.fullmatch(key):
            found[match[1]] = patch
    for path, module in uncompiled(model.model.diffusion_model).named_modules():
        if _MODULE.fullmatch(path) and not _of_its_class(module):
            found.setdefault(path, module.forward)
    layers = tuple(f"{name}." for name in family.blocks.values())
    return {
        path: getattr(patch, "__name__", type(patch).__name__)
        for path, patch in found.items()
        if path.startswith(layers)
    }


def _of_its_class(module: Any) -> bool:
    """Whether a module runs its class's forward. It may be put on the module itself, as ComfyUI does where it takes a patch
    off."""
    return getattr(module.forward, "__func__", None) is type(module).forward
