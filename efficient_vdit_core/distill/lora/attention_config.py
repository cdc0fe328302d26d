"""A plan as an attention-config LoRA: the layers' attention as ComfyUI itself chooses it, for use without this pack.

ComfyUI (its QUANTIZATION.md, "Diffusion attention preferences") reads from a file ``<module>.comfy_attention.config``:
JSON as uint8, a list of methods of which it takes the first that the machine has. Checkpoints carry it since September
2026, LoRAs since October. Its sparse method routes blocks of 64 tokens by their content and does not know frames, so
what is carried over is which layers bear sparse attention, not the plan's tiles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...limits.numbers import number
from ...plan import TilePlan
from ...storage.weight_files import save_safetensors

SPARSE, INT8 = "comfy_kitchen_sol", "comfy_kitchen_int8"
MAX_TAU = 100.0

Method = dict[str, Any]  # its name under "attention", and what it takes


@dataclass(frozen=True)
class Attention:
    """Where a family's layers attend in ComfyUI. ``module`` takes the layer's number."""

    module: str
    layers: int


# Only modules of which ComfyUI's documentation says that they read the entry: elsewhere it would be passed over.
FAMILIES = {"minimax_h3": Attention("diffusion_model.blocks.{}.attn", 50)}


def attention_config(
    plan: TilePlan, *, tau: float = 1.0, below: float = 1.0, int8: bool = False
) -> dict[str, list[Method]]:
    """By module, the methods of each layer that has a say, the preferred one first.

    Args:
        plan: of a family in `FAMILIES`, its depth or a uniform one.
        tau: of ComfyUI's sparse method: higher leaves out more.
        below: layers whose share of tiles is smaller attend sparsely, 0 (none) to 1 (all that are not full).
        int8: the dense layers, and the sparse ones where a machine has no sparse method, attend in INT8.

    Raises:
        ValueError: the family is another, or no layer would be told anything.
    """
    number(tau, "--tau", 0, MAX_TAU, above=True)
    number(below, "--below", 0, 1)
    if plan.family not in FAMILIES:
        raise ValueError(
            f"The plan is for {plan.family}, expected {' or '.join(FAMILIES)}: of other models it is not known that ComfyUI reads an "
            "attention config. Use Sparse Attention with the plan itself."
        )
    attention = FAMILIES[plan.family]
    plan.check_fits(layers=attention.layers)
    otherwise: list[Method] = [{"attention": INT8}] if int8 else []
    entries = {
        layer: [{"attention": SPARSE, "tau": tau}, *otherwise] if density < below else otherwise
        for layer, density in enumerate(_densities(plan, attention.layers))
    }
    told = {attention.module.format(layer): entry for layer, entry in entries.items() if entry}
    if not told:
        raise ValueError(
            f"No layer of the plan computes less than {below:g} of its tiles, so the file would say nothing. Raise --below, or "
            "choose a sparser plan."
        )
    return told


def write_attention_config(plan: TilePlan, target: str | Path, **settings: Any) -> tuple[int, int]:
    """Write `attention_config` to a .safetensors file; returns the numbers of sparse layers and of all."""
    entries = attention_config(plan, **settings)
    save_safetensors(target, {f"{module}.comfy_attention.config": _as_bytes(e) for module, e in entries.items()})
    sparse = sum(entry[0]["attention"] == SPARSE for entry in entries.values())
    return sparse, FAMILIES[plan.family].layers


def _densities(plan: TilePlan, layers: int) -> list[float]:
    if plan.frames is None:
        raise ValueError(
            "The plan does not say for how many latent frames it was made, so its layers' shares are not known. Save it again from "
            "Search Tile Plan, or write the frames into it."
        )
    return [plan.pattern(layer, layers).density(plan.frames) for layer in range(layers)]


def _as_bytes(entry: list[Method]) -> Tensor:
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
