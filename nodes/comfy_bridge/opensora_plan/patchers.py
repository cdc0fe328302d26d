"""What keeps a network's weights where ComfyUI wants them."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher


def patcher_class(disable_dynamic: bool) -> Any:
    """ComfyUI's class for a network that it places by its own dynamic memory, in versions that have it, or without."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
