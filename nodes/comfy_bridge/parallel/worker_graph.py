"""How the workers shall build a MODEL: the part of the prompt before a node, its packs, and where this ComfyUI keeps
things."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths

from ....efficient_vdit_core.parallel.pool.code_version import sources_number
from ..families import comfyui_version

COMFY_NODES: Any = importlib.import_module("nodes")  # ComfyUI's, whose name this pack's folder shares
PACK = Path(__file__).resolve().parents[3]


def recipe(prompt: dict[str, Any] | None, node_id: str | None, node_name: str) -> tuple[str, dict[str, Any]]:
    """A key that names the model, and the message that has the workers build it.

    Raises ValueError where the node is not part of the prompt as it was queued (another node has expanded into it).
    """
    if not prompt or node_id not in prompt:
        raise ValueError(
            f"{node_name} was made by another node while the prompt ran, expected it in the prompt itself: the workers cannot see "
            "what stands before it. Place it in the workflow."
        )
    source = prompt[node_id]["inputs"]["model"]
    if not isinstance(source, list) or source[0] not in prompt:
        raise ValueError(
            f"The model of {node_name} comes from a node that the queued prompt does not hold. Connect a loader or a patch."
        )
    part = upstream(prompt, str(source[0]))
    files = named_files(part)
    # A file that was replaced under its old name makes another model.
    about_files = {path: [found.st_size, found.st_mtime_ns] for path in files for found in [Path(path).stat()]}
    key = hashlib.sha256(json.dumps([part, source, about_files], sort_keys=True).encode()).hexdigest()
    kinds = sorted({node["class_type"] for node in part.values()})
    packs = {kind: path for kind in kinds if (path := pack_of(kind)) is not None}
    about = _about()
    folders = [about["root"], str(PACK), *packs.values()]
    paths = {**dict.fromkeys(folders), **{path: size for path, (size, _) in about_files.items()}}
    # At the code of this pack the pool looks itself.
    sources = {path: _code_of(path) for path in packs.values() if path != str(PACK)}
    files_and_code = {"packs": packs, "sources": sources, "paths": paths, "files": about_files}
    return key, {"comfyui": about, "prompt": part, "source": source, **files_and_code}


def import_folders() -> tuple[str, ...]:
    """Where the workers may load code from: this ComfyUI, its folders of packs, and this pack."""
    return (_root(), *folder_paths.get_folder_paths("custom_nodes"), str(PACK))


def upstream(prompt: dict[str, Any], node_id: str) -> dict[str, Any]:
    """The node and all that it takes inputs from, without what only the page needs."""
    found: dict[str, Any] = {}
    waiting = [node_id]
    while waiting:
        name = waiting.pop()
        if name in found or name not in prompt:
            continue
        found[name] = {"class_type": prompt[name]["class_type"], "inputs": prompt[name]["inputs"]}
        waiting += [
            str(value[0]) for value in prompt[name]["inputs"].values() if isinstance(value, list) and len(value) == 2
        ]
    return found


def named_files(part: dict[str, Any]) -> list[str]:
    """The files that the nodes' inputs name, as ComfyUI finds them in its model folders and among its inputs."""
    texts = {text for node in part.values() for text in _texts(node["inputs"]) if len(text) < 256 and "." in text}
    folders = folder_paths.folder_names_and_paths
    places = {(folder, text) for folder in folders for text in texts}
    # Load Tile Plan lists files under their folder's name.
    places |= {
        (folder, rest) for folder, _, rest in (text.partition("/") for text in texts) if folder in folders and rest
    }
    found = {folder_paths.get_full_path(folder, text) for folder, text in places}
    return sorted(filter(None, [*found, *map(_input_file, texts)]))


def _texts(value: Any) -> Iterator[str]:
    """Those in an input: some nodes take records, such as a list of LoRAs with their strengths."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _input_file(text: str) -> str | None:
    """The file among ComfyUI's inputs that a text names, if it names one."""
    try:
        path = folder_paths.get_annotated_filepath(text)
    except ValueError:  # of another folder
        return None
    return path if os.path.isfile(path) else None


def pack_of(kind: str) -> str | None:
    """The folder or file that the node class ``kind`` was loaded from; None for ComfyUI's own nodes."""
    module = getattr(COMFY_NODES.NODE_CLASS_MAPPINGS.get(kind), "RELATIVE_PYTHON_MODULE", "nodes")
    parent, _, name = module.partition(".")
    if parent != "custom_nodes":
        return None
    folder = COMFY_NODES.LOADED_MODULE_DIRS.get(name)
    if folder is not None:
        return folder
    # A pack of one file is kept under its path without the ending.
    for known in COMFY_NODES.LOADED_MODULE_DIRS:
        if Path(known).name == name and Path(f"{known}.py").is_file():
            return f"{known}.py"
    raise ValueError(
        f"Where the node {kind} was loaded from is not known, so the workers cannot load it. Bypass EVDiTSequenceParallel."
    )


@cache
def _code_of(path: str) -> str:
    """A number of what the sources of a pack, a folder or a file, say; once in a process, which loads them once."""
    pack = Path(path)
    if pack.is_file():
        return sources_number(pack.parent, [pack])
    return sources_number(pack, filter(Path.is_file, pack.rglob("*.py")))


def _about() -> dict[str, Any]:
    folders = {
        name: [list(where), sorted(endings)]
        for name, (where, endings, *_) in folder_paths.folder_names_and_paths.items()
    }
    where = {"root": _root(), "folders": folders, "input": folder_paths.get_input_directory()}
    return {**where, "argv": sys.argv[1:], "version": comfyui_version()}


def _root() -> str:
    return str(Path(inspect.getfile(folder_paths)).resolve().parent)
