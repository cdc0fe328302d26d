"""The inputs of a step as JSON and named tensors, and back: what can travel to the workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _RECORD = _MARKS = "_tensor", "_tuple", "_record"
# Classes of ComfyUI's whose objects only hold data; they arrive as bare records of the same fields.
_RECORDS = (("comfy.ldm.minimax.model", "PackedLayout"),)


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """``value`` with each tensor replaced by its number in ``tensors``. Raises ValueError where something is neither data nor
    tensor, or a key is no text; ``name``, by dots, says where."""
    if isinstance(value, Tensor):
        number = str(len(tensors))
        tensors[number] = value
        return {_TENSOR: number}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        parts = [pack(part, tensors, f"{name}.{i}") for i, part in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    if (type(value).__module__, type(value).__name__) in _RECORDS:
        return {_RECORD: pack(vars(value), tensors, name)}
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str) or key in _MARKS]:
            raise _unsendable(name, f"has the key {odd[0]!r}, expected a text other than {', '.join(_MARKS)}")
        return {key: pack(part, tensors, f"{name}.{key}") for key, part in value.items()}
    raise _unsendable(name, f"is a {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The inverse of ``pack``, tensors on ``device``."""
    if isinstance(value, list):
        return [unpack(part, tensors, device) for part in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]].to(device)
    if _TUPLE in value:
        return tuple(unpack(part, tensors, device) for part in value[_TUPLE])
    if _RECORD in value:
        return SimpleNamespace(**unpack(value[_RECORD], tensors, device))
    return {key: unpack(part, tensors, device) for key, part in value.items()}


def _unsendable(name: str, why: str) -> ValueError:
    return ValueError(
        f"The input {name.lstrip('.')} of the model {why}, which cannot be sent to the workers. Remove the node that adds it, or "
        "bypass EVDiTSequenceParallel."
    )
