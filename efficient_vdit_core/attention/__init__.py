"""Attention under a tile pattern: ``tile_attention`` checks and dispatches, each backend is a file of its own."""

from .dispatch import (
    BACKENDS,
    BackendStatus,
    available_backends,
    check_backend,
    choose_backend,
    simplest_backend,
    tile_attention,
)
from .layout import TokenLayout

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
