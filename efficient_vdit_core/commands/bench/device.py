"""The device that a bench runs on."""

from __future__ import annotations

from typing import Any


def device_named(name: str) -> Any:
    """The torch.device of ``--device``; raises ValueError where it is none, or not here."""
    import torch

    from ...generation.devices import pick_device

    return torch.device(pick_device(name))
