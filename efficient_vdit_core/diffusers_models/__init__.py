"""Tile plans for the video transformers of Hugging Face diffusers: ``apply_to_diffusers(pipe.transformer, plan)``."""

from .patch import DiffusersPatch, apply_to_diffusers, remove_from_diffusers

__all__ = ["DiffusersPatch", "apply_to_diffusers", "remove_from_diffusers"]
