"""The plan, the weights, the noise schedules and the data that a run's configuration names by a path. What is learnt depends on what
they hold, not on where they lie: a file may change under a run that is not finished, and a recipe's folder may move with all
that is in it.

folder/settings.json   what they held when the folder was claimed
folder/plan.json       the plan itself, should its own file change
"""

from __future__ import annotations

import json
from pathlib import Path

from ...limits.quote import quoted
from ...storage.folder_record import claim_folder, settings_of
from ..config import DistillConfig
from ..data.stamp import data_stamp
from ..families.fingerprints import weights_stamp
from ..families.model import read_plan
from ..families.open_model import open_model

PLAN, PLAN_COPY = "objective.plan", "plan.json"


def changes(before: DistillConfig, config: DistillConfig, folder: Path) -> dict[str, str]:
    """``before -> config`` by ``section.key``, of all that matters for what is learnt in ``folder``. Where that has no record
    of contents, as earlier versions left it, paths are compared."""
    recorded, now = settings_of(folder), _contents(config)
    of_settings = {key: change for key, change in before.differences(config).items() if key not in recorded}
    changed = {key: value for key, value in now.items() if recorded.get(key, value) != value}
    return of_settings | {key: f"{quoted(recorded[key])} -> {quoted(value)}" for key, value in changed.items()}


def keep_contents(config: DistillConfig, folder: Path) -> None:
    """Keep what the plan, the weights and the data hold now, unless the folder has it already."""
    claim_folder(folder, _contents(config))
    if config.objective.plan and not (folder / PLAN_COPY).is_file():
        read_plan(config.objective.plan).save(folder / PLAN_COPY)


def _contents(config: DistillConfig) -> dict[str, str]:
    """By section and key, or in words what lies in model.path; an empty text where nothing is named. Of a plan it is what is
    computed, not where it is from."""
    model, plan, found = config.model, config.objective.plan, open_model(config.model)
    weights = {"model.transformer": [model.transformer], "model.init": [model.init], "model.loras": model.loras}
    weights["the transformer in model.path"] = [] if model.transformer else [found.transformer_file]
    stamps = {name: weights_stamp(map(Path, filter(None, files))) for name, files in weights.items()}
    data = data_stamp(config.data)
    return {
        PLAN: read_plan(plan).to_text() if plan else "",
        **{name: f"weights {stamp}" if stamp else "" for name, stamp in stamps.items()},
        "the schedule in model.path": json.dumps(found.schedules),
        **({"data": data} if data else {}),
    }
