"""Attention under a tile pattern: ``tile_attention`` checks and dispatches, each backend is a file of its own."""

from .backends.registry import BACKENDS, BackendStatus, available_backends, check_backend, simplest_backend
from .dispatch import tile_attention
from .layout import TokenLayout
from .selection import choose_backend

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "TokenLayout",
    "available_backends",
    "check_backend",
    "choose_backend",
    "simplest_backend",
    "tile_attention",
]
