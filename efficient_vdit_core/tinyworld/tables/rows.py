"""A table's finished rows: one that stands is never computed again, and the settings that all depend on are kept beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...distill.config import FREE
from ...distill.runs.recipe import RecipeConfig
from ...limits.documents import parse_json, read_text
from ...limits.quote import named
from ...storage.files import write_text
from ...storage.folder_record import claim_folder
from ...storage.json_text import json_text


def claim_rows(folder: Path, recipe: RecipeConfig, **judged: Any) -> None:
    """Raises ValueError where the rows in ``folder`` are another recipe's or were ``judged`` otherwise. Which rows there are may
    change."""
    claim_folder(
        folder, {**judged, **_learnt(recipe)}, "To judge anew, delete that folder; the trainings beside it stay."
    )


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What ``file`` holds as JSON, which is made where it is not there yet; None where a number was not finite. Raises
    ValueError where it is damaged."""
    if not file.is_file():
        text = json_text(make(), indent=1)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        return json.loads(text)
    what = f"The row {named(file.name)}"
    return parse_json(read_text(file, what), what, advice="Delete it; the same command makes it anew.")


def _learnt(recipe: RecipeConfig) -> dict[str, Any]:
    """All settings of a recipe by section and key, but for those that change no result."""
    flat = {"order": recipe.order}
    for section, values in asdict(recipe).items():
        if isinstance(values, dict):
            kind = "training" if section.endswith("_training") else section
            flat |= {f"{section}.{key}": value for key, value in values.items() if f"{kind}.{key}" not in FREE}
    return flat
