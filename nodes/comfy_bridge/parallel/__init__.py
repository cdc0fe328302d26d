"""Sequence parallelism in ComfyUI: its side, and what runs in the workers."""
