"""What a pool may import: the class that builds the model, and the folders it may load code from.

Both are fixed when the pool starts. A message names a model, never a module.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "EVDIT_IMPORT"
PACK = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Host:
    """The class ``name`` of the module ``module``, a path below the folder ``package`` with dots; no folder means this
    package."""

    package: str
    module: str
    name: str

    def load(self) -> Any:
        """The class itself.

        The packages above the module are entered without running them: those of a node pack would import ComfyUI,
        which is not there before the host has set it up.
        """
        if not self.package:
            return getattr(importlib.import_module(f"...{self.module}", __package__), self.name)
        folder, package = Path(self.package), "evdit_host"
        for part in ["", *self.module.split(".")[:-1]]:
            folder, package = (folder / part, f"{package}.{part}") if part else (folder, package)
            if package not in sys.modules:
                bare = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(package, None, is_package=True))
                bare.__path__ = [str(folder)]
                sys.modules[package] = bare
        module = self.module.rsplit(".", 1)[-1]
        return getattr(importlib.import_module(f"{package}.{module}"), self.name)


COMFYUI_HOST = Host(str(PACK), "nodes.comfy_bridge.parallel.host", "ComfyHost")


def usual_folders() -> tuple[str, ...]:
    """For a pool that is started by hand: this pack, the folder of packs it lies in, the ComfyUI around that, and what
    the variable EVDIT_IMPORT names."""
    found = [PACK]
    if PACK.parent.name == "custom_nodes":
        found.append(PACK.parent)
        found += [PACK.parents[1]] if (PACK.parents[1] / "folder_paths.py").is_file() else []
    named = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    return (*map(str, found), *named)


def check_import(path: str, allowed: Sequence[str]) -> None:
    """Raises ValueError where ``path`` does not lie in a folder that the pool may import from."""
    for real in (os.path.abspath, os.path.realpath):
        if any(Path(real(path)).is_relative_to(real(folder)) for folder in allowed):
            return
    raise ValueError(
        f"The workers may not import {path}: a pool imports only from the folders that were fixed when it started. If you trust "
        f"this one, start the pool anew with the folder in {VARIABLE}, or with `evdit workers --import FOLDER`."
    )
