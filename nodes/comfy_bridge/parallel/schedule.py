"""A MODEL's noise schedule as numbers and tensors: it goes to the workers with each evaluation, because a sampler may set it in
place, which changes only the object in ComfyUI's process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, type(None), Tensor)


def schedule_of(model_sampling: Any) -> dict[str, Any]:
    """The settings and tensors of ComfyUI's ``model_sampling``, such as its shift and its levels, by name."""
    settings = {name: value for name, value in vars(model_sampling).items() if not name.startswith("_")}
    del settings["training"]  # torch's
    found = {**settings, **dict(model_sampling.named_buffers(recurse=False))}
    return {name: value for name, value in found.items() if isinstance(value, _PLAIN)}


def set_schedule(model_sampling: Any, schedule: dict[str, Any]) -> None:
    """Give another ``model_sampling`` of the same class what ``schedule_of`` has found; tensors are copied to where its own
    are."""
    for name, value in schedule.items():
        if isinstance(value, Tensor):
            before = getattr(model_sampling, name, None)
            # A copy: what has come lies in the memory of the whole message.
            value = value.to(before.device if isinstance(before, Tensor) else value.device, copy=True)
        setattr(model_sampling, name, value)
