"""Files of weights: safetensors, alone or in shards, and PyTorch's own, which are read as tensors and never as code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..limits.documents import parse_json, read_text
from ..limits.quote import named, quoted, reason
from .files import read_torch, whole_file

MAX_INDEX = 2**25  # bytes: a name and a file for each tensor of a model
_SAFETENSORS = (".safetensors", ".sft")
_MOST_CLAIMED = (
    2**26
)  # bytes of tensors beyond those that a PyTorch file holds: some have small buffers that are expanded
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "checkpoint.ckpt")


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, an index of shards or one of these, a .ckpt, or a folder that holds one
    of these.

    A .ckpt is read by ``torch.load(weights_only=True)``; of its content the averaged weights are taken where there are
    any.
    """
    file = _weights_file(Path(path))
    if file.name.endswith(".safetensors.index.json"):
        return _read_shards(file)
    if file.suffix.lower() in _SAFETENSORS:
        return _read_safetensors(file)
    if file.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        return _pick_weights(read_torch_file(file)), {}
    raise ValueError(
        f"{named(file.name)} is not a weights file: expected .safetensors, .safetensors.index.json or .ckpt. Choose another file."
    )


def files_of(path: str | Path) -> set[Path]:
    """The files that `read_state_dict` reads of a path: an index with its shards, or the one file."""
    file = _weights_file(Path(path))
    return {file, *_shards_of(file)[1]} if file.name.endswith(".safetensors.index.json") else {file}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of what `read_state_dict` reads; no weights are read. A .ckpt has none."""
    file = _weights_file(Path(path))
    if file.name.endswith(".safetensors.index.json"):
        file = min(_shards_of(file)[1])
    return _safetensors_metadata(file) if file.suffix.lower() in _SAFETENSORS else {}


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `read_state_dict` reads, by name; of safetensors no weights are read."""
    file = _weights_file(Path(path))
    shards = file.name.endswith(".safetensors.index.json")
    if not shards and file.suffix.lower() not in _SAFETENSORS:
        return {name: tuple(x.shape) for name, x in read_state_dict(file)[0].items()}
    found: dict[str, tuple[int, ...]] = {}
    for part in sorted(_shards_of(file)[1]) if shards else [file]:
        with _opened(part) as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def find_weights(path: str | Path) -> Path | None:
    """The file that `read_state_dict` reads of a path, an index for what is in shards; None where there is none. Raises
    ValueError for a shard without its index, and for several models in a folder, none of them of a usual name."""
    path = Path(path)
    if not path.is_dir():
        return _whole_model(path) if path.is_file() else None
    names = [*WEIGHT_NAMES, *(f"{n}.index.json" for n in WEIGHT_NAMES[:2])]
    usual = next((path / n for n in names if (path / n).is_file()), None)
    if usual is not None:
        return _whole_model(usual)
    found = {_whole_model(f) for f in path.glob("*.safetensors.index.json")}
    found = found or {_whole_model(f) for f in path.glob("*.safetensors")}
    if len(found) > 1:
        some = " and ".join(named(file.name) for file in sorted(found)[:2])
        raise ValueError(
            f"The folder {quoted(path.name)} holds {len(found)} files of weights, such as {some}, expected one, or one named "
            f"{WEIGHT_NAMES[0]}. Name the file itself, or move the others elsewhere."
        )
    return next(iter(found), None)


def save_safetensors(
    path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; a file of that name is replaced only once the new one is whole. Raises OSError where it
    cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as part:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, part, metadata=dict(metadata or {})
            )
    except SafetensorError as error:
        raise OSError(
            f"{named(str(path), 120)} could not be written ({reason(error)}). Make room there and start the same command again."
        ) from error


def read_torch_file(file: Path) -> Any:
    """What a PyTorch file holds, memory-mapped where its format allows; tensors and plain containers only, never
    code. ValueError also for tensors of far more numbers than the file has, for all of which one can stand."""
    advice = "Download it again, or ask its publisher for safetensors."
    with open(file, "rb") as opened:
        archive = opened.read(4) == b"PK\x03\x04"  # PyTorch's present format; the older one cannot be mapped
    content = read_torch(file, advice, mmap=archive)
    if sum(_claimed(value) for value in _all_within(content) if isinstance(value, Tensor)) > _MOST_CLAIMED:
        raise ValueError(
            f"{named(file.name)} holds tensors of far more numbers than the file has, which no model has. {advice}"
        )
    return content


def _all_within(content: Any) -> Iterator[Any]:
    """Each value once: containers may be deep, and hold one another or themselves."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            waiting.extend(_children(value))
            yield value


def _claimed(tensor: Tensor) -> int:
    """Bytes of a tensor beyond those that the file holds for it, as an expanded buffer has some."""
    return max(0, tensor.nbytes - tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else 0


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _weights_file(path: Path) -> Path:
    file = find_weights(path)
    if file is None and path.is_dir():
        raise ValueError(
            f"The folder {quoted(path.name)} holds no weights: expected {WEIGHT_NAMES[0]}, {WEIGHT_NAMES[1]} or {WEIGHT_NAMES[2]}. "
            "Choose another; of a pytorch_model.bin 'evdit convert text-encoder' makes such a file."
        )
    if file is None:
        raise ValueError(f"{quoted(str(path), 120)} does not exist. Check the path.")
    return file


def _whole_model(file: Path) -> Path:
    """The index beside a file that is one shard of several, else the file. ComfyUI lists shards, and no index."""
    shard = _SHARD.fullmatch(file.name)
    if shard is None or int(shard[3]) < 2:
        return file
    index = file.with_name(f"{shard[1]}.safetensors.index.json")
    if not index.is_file():
        raise ValueError(
            f"{named(file.name)} is part {int(shard[2])} of {int(shard[3])} of a model, and {named(index.name)}, which names all of "
            "them, is not beside it. Download that file and every part into one folder."
        )
    return index


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, TypeError) as error:  # the last of shapes beyond PyTorch's integers
        raise ValueError(
            f"{named(file.name)} cannot be read as safetensors ({reason(error)}). The file is cut short or damaged; download it again."
        ) from error


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118


def _safetensors_metadata(file: Path) -> dict[str, str]:
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


def _shards_of(index: Path) -> tuple[set[str], set[Path]]:
    """The names of a model's tensors and the files that hold them. Raises ValueError where one is not beside the index."""
    what = f"The index of shards {named(index.name)}"
    values = parse_json(read_text(index, what, limit=MAX_INDEX), what, advice="Download it again.", limit=MAX_INDEX)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise ValueError(f"{what} has no weight_map of tensors to files. Download it again.")
    shards = sorted(set(names.values()))
    missing = [s for s in shards if len(s) > 200 or Path(s).name != s or not (index.parent / s).is_file()]
    if missing:
        raise ValueError(
            f"{named(index.name)} names {len(shards)} shards, but {', '.join(map(named, missing[:2]))} "
            f"{'is' if len(missing) == 1 else f'and so on, {len(missing)} in all, are'} not beside it. Download what is missing."
        )
    return set(names), {index.parent / shard for shard in shards}


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    names, shards = _shards_of(index)
    state_dict: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(shards):
        tensors, found = _read_safetensors(shard)
        state_dict.update(tensors)
        metadata.update(found)
    absent = sorted(names - set(state_dict))
    if absent:
        raise ValueError(
            f"The shards of {named(index.name)} lack {len(absent)} tensors, such as {named(absent[0])}. Download them again."
        )
    return state_dict, metadata


def _pick_weights(content: Any) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint: averaged weights first, then ``state_dict`` or its ``gen_model``."""
    if isinstance(content, dict) and content.get("ema_state_dict"):
        content = content["ema_state_dict"]
    elif isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
        content = content.get("gen_model", content) if isinstance(content, dict) else None
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            "The checkpoint holds no state dict: expected ema_state_dict or state_dict. It is not a model's weights."
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}
