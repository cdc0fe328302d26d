"""Writes the averaged weights: the whole transformer under its own names, or a LoRA under ComfyUI's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ...limits.quote import named
from ...models.distilled import DistillMetadata
from ...models.opensora_plan.weights import is_finite
from ...storage.files import write_text
from ...storage.weight_files import save_safetensors
from ..families.model import FamilyModel
from ..lora.files import comfy_lora

WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "lora.safetensors"


def result_file(folder: Path, *, lora: bool) -> Path:
    """Where the result of a run in ``folder`` lies once it is finished."""
    return folder / LORA if lora else folder / "transformer" / WEIGHTS


def export(
    model: FamilyModel,
    module: nn.Module,
    ema: dict[str, Tensor],
    folder: Path,
    about: DistillMetadata,
    *,
    lora: bool,
    rank: int = 0,
) -> Path:
    """Write the result in the model's ``saved_dtype`` and return its path; only process 0 writes."""
    file = result_file(folder, lora=lora)
    if rank:
        return file
    entries = {**about.to_entry(), "format": "pt"}
    state = _cast(
        comfy_lora(module, ema, model.comfy_layer) if lora else {**module.state_dict(), **ema}, model.saved_dtype
    )
    _refuse_no_number(state)
    if lora:
        save_safetensors(file, state, entries)
        return file
    config = model.config_entry()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file.parent / "config.json", json.dumps(config, indent=2) + "\n")
    # Last: where this file stands, the run is finished.
    save_safetensors(file, state, {**entries, "config": json.dumps(config)})
    return file


def _refuse_no_number(state: dict[str, Tensor]) -> None:
    wrong = [name for name, value in state.items() if value.is_floating_point() and not is_finite(value)]
    if wrong:
        raise ValueError(
            f"The weights are not finite ({len(wrong)} tensors, such as {named(wrong[0])}), so nothing is exported. Train again "
            "in a new folder, with a lower learning rate."
        )


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In ``dtype``, but for the LoRAs' alphas, which would change their strength."""
    cast = {name for name, value in state.items() if value.is_floating_point() and not name.endswith(".alpha")}
    return {name: value.to(dtype) if name in cast else value for name, value in state.items()}
