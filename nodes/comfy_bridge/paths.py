"""Names in the loaders' lists, and the files they stand for."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...efficient_vdit_core import assets

BUILT_IN = "tiny (built in)"


def file_names(folder: str) -> list[str]:
    """The built-in model, then ComfyUI's files of that kind ("diffusion_models", "text_encoders" or "vae")."""
    return [BUILT_IN, *folder_paths.get_filename_list(folder)]


def resolve(folder: str, name: str, part: str) -> Path:
    """The file behind a list entry; `part` is its counterpart in the built-in model ("transformer", ...)."""
    if name == BUILT_IN:
        return Path(assets.tiny_path(part))
    return Path(folder_paths.get_full_path_or_raise(folder, name))
