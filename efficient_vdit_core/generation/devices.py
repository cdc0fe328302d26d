"""The device and the precision that a model runs in, by the names that people give."""

from __future__ import annotations

import torch

from ..limits.quote import quoted, reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> str:
    """A device name that works here; ValueError if it does not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"The device {quoted(device)} cannot be used ({reason(error)}); 'evdit doctor' lists what can."
        ) from error
    return device


def pick_dtype(dtype: str, device: str, *, built_in: bool) -> torch.dtype:
    """A precision by name, or for "auto" that which suits the device and the model; ValueError for other names."""
    if dtype == "auto":
        return torch.float32 if built_in or device == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {quoted(dtype)}.")
    return DTYPES[dtype]
