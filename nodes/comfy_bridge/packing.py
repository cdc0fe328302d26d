"""The inputs of a step as JSON and named tensors, and back: what can travel to the workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _RECORD = "_tensor", "_tuple", "_record"
# Classes of ComfyUI's whose objects only hold data; they arrive as bare records of the same fields.
_RECORDS = (("comfy.ldm.minimax.model", "PackedLayout"),)


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """``value`` with each tensor replaced by its name in ``tensors``. Raises ValueError naming what is neither data nor
    tensor."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        parts = [pack(part, tensors, f"{name}.{i}") for i, part in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    if (type(value).__module__, type(value).__name__) in _RECORDS:
        return {_RECORD: pack(vars(value), tensors, name)}
    if isinstance(value, dict):
        return {str(key): pack(part, tensors, f"{name}.{key}") for key, part in value.items()}
    raise ValueError(
        f"The input {name.lstrip('.')} of the model is a {type(value).__name__}, which cannot be sent to the workers. "
        "Remove the node that adds it, or bypass EVDiTSequenceParallel."
    )


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
