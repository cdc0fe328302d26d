"""Efficient-vDiT: sparse attention and few-step sampling for video diffusion transformers in ComfyUI.

Importing this package needs neither ComfyUI nor torch; ComfyUI calls `comfy_entrypoint` when it loads the pack.
"""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():  # noqa: ANN201 - the return type exists inside ComfyUI only
    """The extension object that ComfyUI asks for its list of nodes."""
    from .nodes import EfficientVDiTExtension

    return EfficientVDiTExtension()
