"""Which backends there are, what runs on a device, and what computes a pattern anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...tiles import TilePattern
from ..gpu import arrow_kernels_status
from . import flex

BACKENDS = ("frames", "triton", "flex", "parts")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend runs on this machine, and if not, why."""

    name: str
    available: bool
    reason: str


def available_backends(device: torch.device | str | None = None) -> list[BackendStatus]:
    """The backends of ``tile_attention`` on ``device`` (default: the GPU where there is one), for `evdit doctor`."""
    chosen = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames = BackendStatus("frames", True, "dense calls only; runs wherever PyTorch does")
    return [
        frames,
        BackendStatus("triton", *arrow_kernels_status(chosen)),
        BackendStatus("flex", *flex.flex_status(chosen)),
        _parts_status(chosen),
    ]


def _parts_status(device: torch.device) -> BackendStatus:
    if device.type not in ("cpu", "cuda"):
        return BackendStatus("parts", False, f"PyTorch's attention on {device.type} does not tell its log-sum-exp")
    return BackendStatus("parts", True, "dense calls over views, merged by their log-sum-exp")


@lru_cache
def statuses_on(device: torch.device) -> dict[str, BackendStatus]:
    """The same by name, looked up once a device."""
    return {status.name: status for status in available_backends(device)}


def check_backend(backend: str, device: torch.device | str) -> None:
    """Raise ValueError where the named backend is unknown, or cannot run on ``device``: the text says why."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}, expected auto, dense, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}. Choose auto."
        )
    status = statuses_on(torch.device(device))[backend]
    if not status.available:
        raise ValueError(f"backend is {backend!r}, which cannot run here: {status.reason}. Choose auto or frames.")


def check_means(backend: str) -> None:
    """Raise ValueError where the named backend cannot compute mean frames."""
    if backend not in ("auto", "dense", "parts"):
        raise ValueError(f"backend is {backend!r}, which computes no mean frames. Choose auto or parts.")


def simplest_backend(pattern: TilePattern) -> str:
    """The backend that computes the pattern on any device without a trial: ``frames``, or ``parts`` for mean frames, whose
    counts go into the log-sum-exp."""
    return "parts" if pattern.means else "frames"
