"""Attention under a tile pattern: ``tile_attention`` checks and dispatches, each backend is a file of its own."""

from .dispatch import DEFAULT_MAX_EXTRA_BYTES, BackendStatus, available_backends, tile_attention
from .layout import TokenLayout

__all__ = ["DEFAULT_MAX_EXTRA_BYTES", "BackendStatus", "TokenLayout", "available_backends", "tile_attention"]
