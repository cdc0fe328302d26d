"""The settings that a table's finished rows depend on, kept beside them: a row that stands is never computed again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...distill.config import FREE
from ...distill.runs.recipe import RecipeConfig
from ...folder_record import claim_folder


def claim_rows(folder: Path, recipe: RecipeConfig, **judged: Any) -> None:
    """Raises ValueError where the rows in ``folder`` are another recipe's or were ``judged`` otherwise. Which rows there are may
    change."""
    claim_folder(
        folder, {**judged, **_learnt(recipe)}, "To judge anew, delete that folder; the trainings beside it stay."
    )


def _learnt(recipe: RecipeConfig) -> dict[str, Any]:
    """All settings of a recipe by section and key, but for those that change no result."""
    flat = {"order": recipe.order}
    for section, values in asdict(recipe).items():
        if isinstance(values, dict):
            kind = "training" if section.endswith("_training") else section
            flat |= {f"{section}.{key}": value for key, value in values.items() if f"{kind}.{key}" not in FREE}
    return flat
