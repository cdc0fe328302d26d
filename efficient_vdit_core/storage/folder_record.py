"""What a folder's contents were made with, kept beside them, so that others are neither gone on from nor taken for these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..limits.documents import parse_json, read_text
from ..limits.quote import named, quoted, shortened
from .files import write_text

RECORD = "settings.json"
ADVICE = "Go on with the same ones, or choose another folder."


def check_settings(
    folder: Path, settings: dict[str, Any], advice: str = ADVICE, before: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raises ValueError, with ``advice``, where ``folder`` was begun with others. What its record does not say is as it is, but for
    what is in ``before``: settings that came later than the first records, and what they were until then."""
    found, settings = settings_of(folder), json.loads(json.dumps(settings))  # as they are read back: tuples are lists
    found = {**before, **found} if found else found
    differing = [f"{k}: {quoted(found[k])} -> {quoted(v)}" for k, v in settings.items() if found.get(k, v) != v]
    if differing:
        raise ValueError(
            f"{named(folder.name)} was begun with other settings ({shortened('; '.join(differing), 200)}). {advice}"
        )


def claim_folder(
    folder: Path, settings: dict[str, Any], advice: str = ADVICE, before: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """`check_settings`, and keep them. A folder that has no record is taken as it is: earlier versions wrote none."""
    check_settings(folder, settings, advice, before)
    recorded = settings_of(folder)
    if not settings.keys() <= recorded.keys():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps({**recorded, **settings}, indent=1) + "\n")


def settings_of(folder: Path) -> dict[str, Any]:
    """What the folder's record says; nothing where it has none. Raises ValueError where that cannot be read."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    what = f"{RECORD} in {named(folder.name)}"
    found = parse_json(read_text(file, what), what, advice="Delete it where the folder's settings are known.")
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no table of settings. Delete it where the folder's settings are known.")
    return found
