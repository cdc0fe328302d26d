"""Names in the nodes' lists, and the files they stand for."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...efficient_vdit_core import assets
from ...efficient_vdit_core.limits.quote import quoted, reason
from ...efficient_vdit_core.models.distilled import read_metadata
from ...efficient_vdit_core.plan import TilePlan
from ...efficient_vdit_core.storage.files import write_numbered

BUILT_IN = "tiny (built in)"
BUILT_IN_MODELS = {f"{name.replace('-', ' ')} (built in)": name for name in assets.TINY_MODELS}
PLANS = "evdit_plans"  # the model folder of plan files
CHECKPOINTS = ("diffusion_models", "loras")
PRESET = " (preset)"
# A new Load Tile Plan starts on the first entry of its list, which should fit the models that most people have.
FIRST_FAMILIES = ("minimax_h3", "wan", "ltx")


def _own_folder() -> Path:
    """Where plans are saved; extra_model_paths.yaml may name more folders, which then stand before it in ComfyUI's list."""
    return Path(folder_paths.models_dir) / PLANS


folder_paths.add_model_folder_path(PLANS, str(_own_folder()))


def file_names(folder: str) -> list[str]:
    """The built-in ones, then ComfyUI's files of that kind ("diffusion_models", "text_encoders" or "vae")."""
    built_in = BUILT_IN_MODELS if folder == "diffusion_models" else [BUILT_IN]
    return [*built_in, *folder_paths.get_filename_list(folder)]


def resolve(folder: str, name: str, part: str) -> Path:
    """The file behind a list entry; `part` is its counterpart in the built-in model ("transformer", ...)."""
    if name in BUILT_IN_MODELS:
        return assets.tiny_path(part, BUILT_IN_MODELS[name])
    return model_path(folder, name)


def model_path(folder: str, name: str) -> Path:
    """The file behind a name of ComfyUI's list. Raises ValueError where there is none."""
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise ValueError(
            f"{quoted(name, 200)} was not found in models/{folder}. Put it there, or choose another from the list."
        )
    return Path(found)


def checkpoint_files() -> list[str]:
    """The models and LoRAs, with their folder, that may carry what they were distilled for."""
    return [f"{folder}/{name}" for folder in CHECKPOINTS for name in folder_paths.get_filename_list(folder)]


def checkpoint_path(name: str) -> Path | None:
    """The file behind a name of ``checkpoint_files``; None where the name is of no such folder. Raises ValueError where
    the file is gone."""
    folder, _, file = name.partition("/")
    return model_path(folder, file) if folder in CHECKPOINTS and file else None


def plan_names() -> list[str]:
    """The presets that come with the pack, then the plan files in models/evdit_plans."""
    presets = sorted(assets.preset_names(), key=_family_rank)
    files = [name for name in folder_paths.get_filename_list(PLANS) if name.endswith(".json")]
    return [*(name + PRESET for name in presets), *files]


def _family_rank(preset: str) -> int:
    return next((i for i, family in enumerate(FIRST_FAMILIES) if preset.startswith(family)), len(FIRST_FAMILIES))


def plan_path(name: str) -> Path:
    """The file behind a name of `plan_names`. Raises ValueError where there is none."""
    found = _listed_plan(name) if name in plan_names() else None
    if found is None:
        raise ValueError(
            f"The plan {quoted(name)} was not found in models/{PLANS}. Choose one from the list, or save one with Save Tile Plan."
        )
    return found


def plan_paths() -> dict[str, Path]:
    """The names of `plan_names` and their files, but for those that are gone. The list is made once for all of them."""
    files = {name: _listed_plan(name) for name in plan_names()}
    return {name: path for name, path in files.items() if path is not None}


def _listed_plan(name: str) -> Path | None:
    """The file behind a name that stands in `plan_names`; None where it is gone since."""
    if name.endswith(PRESET):
        return assets.preset_path(name.removesuffix(PRESET))
    found = folder_paths.get_full_path(PLANS, name)
    return Path(found) if found else None


def load_plan(name: str) -> TilePlan:
    """The plan of a name of ``plan_names``, or that a file of ``checkpoint_files`` carries. Raises ValueError where there
    is none."""
    checkpoint = _carrier(name)
    if checkpoint is None:
        return TilePlan.load(plan_path(name))
    about = read_metadata(checkpoint)
    plan = about.tile_plan if about else None
    if plan is None:
        raise ValueError(
            f"{quoted(name, 200)} carries no plan: it was not distilled under one by this pack's trainer. Choose a plan or a preset."
        )
    return plan


def plan_changed(name: str) -> float:
    """When the file behind a name was changed."""
    return (_carrier(name) or plan_path(name)).stat().st_mtime


def _carrier(name: str) -> Path | None:
    """The model or LoRA that a name stands for; None for a plan, which comes first where both have it."""
    return None if name in plan_names() else checkpoint_path(name)


def save_plan(plan: TilePlan, prefix: str) -> str:
    """Write PREFIX_00001.json, or the next number that no folder of plans has, into models/evdit_plans and return its name.
    Overwrites nothing.

    Raises ValueError where ``prefix`` is more than a plain file name.
    """
    folder = _own_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_numbered(
            folder, prefix, plan.to_json(), beside=[Path(place) for place in folder_paths.get_folder_paths(PLANS)]
        )
    except OSError as error:
        raise ValueError(
            f"The plan could not be saved in models/{PLANS} ({error.strerror or reason(error)}). Make room there, or let "
            "ComfyUI write in it."
        ) from error
