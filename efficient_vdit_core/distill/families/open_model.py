"""The adapter of the family that a configuration names."""

from __future__ import annotations

from pathlib import Path

from ...limits.quote import named, quoted
from ..config import ModelConfig
from ..lora.comfy_names import MINIMAX_H3
from .model import FamilyModel


def open_model(config: ModelConfig) -> FamilyModel:
    """The family's adapter; weights are at most mapped into memory, not read."""
    if config.family == "opensora_plan":
        from .opensora_plan import OpenSoraPlanModel

        return OpenSoraPlanModel(config)
    if config.family == "diffusers":
        return _of_diffusers(config)
    raise ValueError(
        f"model.family is {quoted(config.family)}, expected opensora_plan or diffusers. Correct the configuration."
    )


def _of_diffusers(config: ModelConfig) -> FamilyModel:
    """By the class that the folder's transformer is of."""
    from .diffusers_folder import read_json
    from .diffusers_model import DiffusersModel
    from .minimax_h3 import MiniMaxH3Model

    folder = Path(config.path)
    kind = read_json(folder / "transformer" / "config.json").get("_class_name", "")
    if kind in DiffusersModel.FAMILIES:
        return DiffusersModel(config)
    if kind == MINIMAX_H3:
        return MiniMaxH3Model(config)
    known = ", ".join(DiffusersModel.FAMILIES)
    raise ValueError(
        f"{named(folder.name)} holds a {named(str(kind) or 'nameless model')}, expected {known} or {MINIMAX_H3}."
    )
