"""What a MODEL in the graph was distilled for, where its file says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...efficient_vdit_core.limits.quote import quoted
from ...efficient_vdit_core.models.distilled import DistillMetadata, read_metadata
from ...efficient_vdit_core.plan import TilePlan

DISTILLED = "evdit_distilled"  # the attachment of models that this pack loads
LOADED_MODEL = "the loaded model"  # what the lists call it, among the files


def model_metadata(model: Any) -> DistillMetadata | None:
    """What this pack's trainer wrote into the file that a MODEL was loaded from; LoRAs on top say nothing here."""
    found = model.get_attachment(DISTILLED)
    if found is None and (file := _file(model)):
        found = read_metadata(file)
    return found


def carried_plan(model: Any) -> TilePlan:
    """The plan in a MODEL's file. Raises ValueError where there is none, or no MODEL."""
    if model is None:
        raise ValueError(
            f"plan_name is {quoted(LOADED_MODEL)}, but no model is connected. Connect it, or choose a file from the list."
        )
    about = model_metadata(model)
    plan = about.tile_plan if about else None
    if plan is None:
        raise ValueError(
            "The loaded model's file carries no plan: it was not distilled under one by this pack's trainer, or this ComfyUI does not "
            "keep its name. Choose the file that carries one, a LoRA's too, or a preset."
        )
    return plan


def _file(model: Any) -> Path | None:
    """Which file core's loaders made a MODEL of, as they keep it to load it again (ComfyUI 0.25 and later)."""
    made_by = getattr(model, "cached_patcher_init", None)
    first = made_by[1][0] if made_by and made_by[1] else None
    return Path(first) if isinstance(first, str) and Path(first).is_file() else None
