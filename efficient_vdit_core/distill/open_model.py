"""The adapter of the family that a configuration names."""

from __future__ import annotations

from ..limits.quote import quoted
from .config import ModelConfig
from .model import FamilyModel


def open_model(config: ModelConfig) -> FamilyModel:
    """The family's adapter; weights are at most mapped into memory, not read."""
    if config.family == "opensora_plan":
        from .open_sora_plan import OpenSoraPlanModel

        return OpenSoraPlanModel(config)
    if config.family == "diffusers":
        from .diffusers_model import DiffusersModel

        return DiffusersModel(config)
    raise ValueError(
        f"model.family is {quoted(config.family)}, expected opensora_plan or diffusers. Correct the configuration."
    )
