"""A published LoRA, such as a few-step one, merged into a model's weights: what a student under a plan can start from.

diffusers reads its names, whether they are diffusers' own, ComfyUI's or musubi's.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...limits.documents import parse_json
from ...limits.quote import named, quoted, shortened
from ...storage.weight_files import read_state_dict, save_safetensors
from ..config import ModelConfig
from ..lora.comfy_names import COGVIDEOX, MINIMAX_H3, WAN
from ..lora.files import changed
from .open_model import open_model

PREFIX = "transformer."
DOWN, UP, BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"


def merge_published(
    folder: str | Path, lora: str | Path, target: str | Path, strength: float = 1.0, expert: str = ""
) -> int:
    """Writes the transformer of ``folder`` (diffusers' layout) with ``strength`` times the file ``lora`` added, for
    ``model.transformer`` of a recipe; returns how many of its tensors were changed. ``expert``: high or low, of Wan 2.2's
    two networks.

    Raises ValueError where a part of the LoRA fits nothing in the model, or is of a kind that diffusers leaves out.
    """
    model = open_model(ModelConfig(path=str(folder), family="diffusers", dtype="bfloat16", expert=expert))
    kind = model.config_entry()["_class_name"]
    given, about = read_state_dict(lora)
    found = _in_diffusers_names(kind, given, Path(lora).name)
    if lost := _left_out(given, found):
        raise ValueError(
            f"The LoRA {named(Path(lora).name)} changes {len(lost)} tensors of kinds that diffusers leaves out, such as "
            f"{named(lost[0])}. Merge it with the tool that it comes from."
        )
    if kind == MINIMAX_H3 and not any(n.endswith(".alpha") for n in given):
        found = _scaled_by_alpha(found, about, Path(lora).name)
    changes = _changes(found, strength * _scale_in_metadata(about, Path(lora).name))
    state = dict(model.load().state_dict())
    if wrong := sorted(n for n, x in changes.items() if n not in state or state[n].shape != x.shape):
        raise ValueError(
            f"The LoRA {named(Path(lora).name)} is for another model: {len(wrong)} of its {len(changes)} changes, such as "
            f"{named(wrong[0])}, fit nothing in {named(Path(folder).name)}."
        )
    for name, change in changes.items():  # one at a time: all of them together are larger than the model
        state[name] = changed(state[name], change.computed())
    save_safetensors(Path(target), state, {"config": json.dumps(model.config_entry()), "format": "pt"})
    return len(changes)


def _in_diffusers_names(kind: str, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    from diffusers.loaders import CogVideoXLoraLoaderMixin, MiniMaxH3LoraLoaderMixin, WanLoraLoaderMixin

    readers: dict[str, Any] = {
        WAN: WanLoraLoaderMixin,
        COGVIDEOX: CogVideoXLoraLoaderMixin,
        MINIMAX_H3: MiniMaxH3LoraLoaderMixin,
    }
    try:
        found: dict[str, Tensor] = readers[kind].lora_state_dict(dict(state))
    except (KeyError, ValueError, IndexError) as error:
        said = shortened(str(error), 200)
        raise ValueError(f"diffusers cannot read the LoRA {named(name)} for {kind}: {said}") from error
    return {key.removeprefix(PREFIX): x for key, x in found.items()}


def _left_out(given: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """What diffusers' reader has dropped, which it only logs: whole differences that are not zero, DoRA's scales, and
    factors. (Of MiniMax-H3's, of which one may become three, it says itself that it cannot read them.)"""
    kept = {id(x) for x in found.values()}
    whole = [n for n, x in given.items() if ".diff" in n and id(x) not in kept and bool(x.any()) or "dora_scale" in n]
    factors = sum(re.search(r"lora_(up|down|A|B)\.", n) is not None for n in given)
    read = sum(n.endswith((DOWN, UP)) for n in found)
    return whole or ([n for n in given if "lora_" in n][:1] * (factors - read))


def _scaled_by_alpha(found: dict[str, Tensor], about: dict[str, str], name: str) -> dict[str, Tensor]:
    """With the alpha that files for MiniMax-H3 may have beside their tensors, one for layers of all ranks; without one
    alpha is the rank."""
    if "alpha" not in about:
        return found
    try:
        alpha = float(about["alpha"])
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise ValueError(f"The LoRA {named(name)} says that its alpha is {quoted(about['alpha'])}, expected a number.")
    return {n: x * (alpha / len(x)) if n.endswith(DOWN) else x for n, x in found.items()}


def _scale_in_metadata(about: dict[str, str], name: str) -> float:
    """alpha / r of a LoRA that PEFT wrote, which its tensors do not say."""
    values = parse_json(
        about.get("lora_adapter_metadata", "{}"), f"The metadata of {named(name)}", advice="Save it again."
    )
    values = {str(key).removeprefix(PREFIX): value for key, value in values.items()} if isinstance(values, dict) else {}
    if values.get("rank_pattern") or values.get("alpha_pattern") or values.get("use_dora"):
        raise ValueError(
            f"The LoRA {named(name)} has ranks of their own in some layers, or is a DoRA. Merge it with the tool that it comes from."
        )
    alpha, rank = values.get("lora_alpha"), values.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        return 1.0
    return alpha / rank**0.5 if values.get("use_rslora") else alpha / rank


@dataclass(frozen=True)
class _Change:
    """strength times what is added to a weight or a bias: up @ down, or ``up`` itself."""

    strength: float
    up: Tensor
    down: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.up.shape if self.down is None else torch.Size((len(self.up), self.down.shape[1]))

    def computed(self) -> Tensor:
        return self.strength * (self.up.float() if self.down is None else self.up.float() @ self.down.float())


def _changes(state: dict[str, Tensor], strength: float) -> dict[str, _Change]:
    """By weight and bias; diffusers' reader has put alpha / rank into the factors."""
    found = {}
    for name, x in state.items():
        if name.endswith(DOWN):
            stem = name.removesuffix(DOWN)
            found[f"{stem}.weight"] = _Change(strength, state[stem + UP], x)
        elif name.endswith(BIAS):
            found[f"{name.removesuffix(BIAS)}.bias"] = _Change(strength, x)
        elif not name.endswith(UP):
            found[name] = _Change(strength, x)  # fits nothing, and is told
    return found
