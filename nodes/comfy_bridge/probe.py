"""Looks at a dense model while ComfyUI samples with it: the layer-wise search and the tile map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention.override import Override
from ...efficient_vdit_core.plan import TilePlan
from ...efficient_vdit_core.search import ProbeRecord, make_probe_override, parse_candidates, plan_from_record
from ...efficient_vdit_core.search.candidates import sparse_candidates
from ...efficient_vdit_core.search.tile_mass import MassRecord, TileMass, choose_layers, make_mass_override
from .families import FAMILIES, Family, find_family, uncompiled
from .patch import OVERRIDE, WRAPPER_KEY, patch_attention

MAX_MAPS = 12
WALK_STEPS = 10  # of the schedule on which the tile map walks to its noise level


def search_plan(
    model: Any, positive: Any, negative: Any, latent: dict[str, Any], *, seed: int, probes: int, threshold: float,
    speedup: float, candidates: str, cfg: float, costs: str,
) -> TilePlan:
    """A plan for MODEL from one dense sampling of ``probes`` Euler steps, each of which is measured in every layer.

    ``negative`` None samples without guidance. Raises ValueError where the model is unknown or nothing fits.
    """
    family, network = _known_family(model)
    counts, depth = parse_candidates(candidates), family.depth(network)
    empty = _empty_latent(model, latent)
    record = ProbeRecord(sparse_candidates(counts, empty.shape[2]), timed=costs == "measured")
    bar, done = comfy.utils.ProgressBar(probes * depth), [0, 0]

    def progress(layer: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        # With guidance a layer may be called once for both prompts or once for each.
        done[1] = max(done[1], layer + 1)
        bar.update_absolute(done[0] * depth + done[1], probes * depth)

    def stepped(step: int, *_: Any) -> None:
        done[:] = [step + 1, 0]

    probing = _observed(model, lambda previous: make_probe_override(record, progress=progress, previous=previous))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", probes)
    _walk(probing, positive, negative, empty, sigmas, seed, cfg, stepped)
    about = {"sigmas": [round(float(s), 6) for s in sigmas[:-1]], "seed": seed, "guidance": 1.0 if negative is None else cfg}
    return plan_from_record(
        record, layers=depth, family=family.name, heads=family.head_count(network), threshold=threshold, speedup=speedup,
        costs=costs, about=about,
    )


def measure_tiles(
    model: Any, conditioning: Any, latent: dict[str, Any], *, layers: str, percent: float, seed: int, rows: int
) -> dict[int, TileMass]:
    """The tile mass of the chosen layers, dense and without guidance, at ``percent`` of the noise schedule.

    Walks there from pure noise with Euler steps, so that the layers see what they see in a run.
    """
    family, network = _known_family(model)
    chosen = choose_layers(layers, family.depth(network), MAX_MAPS)
    sampling = model.get_model_object("model_sampling")
    schedule = comfy.samplers.calculate_sigmas(sampling, "simple", WALK_STEPS)
    target = sampling.percent_to_sigma(percent)
    last = int((schedule[:-1] - target).abs().argmin())
    record = MassRecord(chosen, rows=rows, active=last == 0)
    bar = comfy.utils.ProgressBar(last + 1)

    def stepped(step: int, *_: Any) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(step + 1, last + 1)
        record.active = step + 1 >= last

    observed = _observed(model, lambda previous: make_mass_override(record, previous=previous))
    _walk(observed, conditioning, None, _empty_latent(model, latent), schedule[: last + 2], seed, 1.0, stepped)
    missing = [i for i in chosen if i not in record.found]
    if missing:
        raise ValueError(
            f"The layers {missing} were not seen attending over a video ({', '.join(sorted(record.reasons)) or 'never called'}). "
            "Use a latent of several frames and a model whose attention is not masked."
        )
    return record.found


def _known_family(model: Any) -> tuple[Family, Any]:
    network = uncompiled(model.get_model_object("diffusion_model"))
    family = find_family(network)
    if family is None:
        raise ValueError(
            f"{type(network).__name__} cannot be measured: where its video tokens stand is not known. Known are {', '.join(FAMILIES)}."
        )
    return family, network


def _observed(model: Any, make: Callable[[Override | None], Override]) -> Any:
    """A clone that publishes its token layout as a sparse one does, with ``make``'s override in place of the sparse one."""
    clone = patch_attention(model, TilePlan.uniform(None))
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    options = clone.model_options["transformer_options"]
    if not hasattr(options.get(OVERRIDE), "replaces"):
        raise ValueError("This ComfyUI gives the model no attention hook, so its attention cannot be measured. Update ComfyUI.")
    options[OVERRIDE] = torch.compiler.disable(make(options[OVERRIDE].replaces))
    return clone


def _empty_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """Zeros (1, C, T, H, W) of the latent's size, with the model's channels."""
    samples = latent["samples"][:1]
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(samples))
    if empty.ndim != 5:
        raise ValueError(f"The latent has shape {tuple(samples.shape)}, expected a video's: (batch, channels, frames, height, width).")
    return empty


def _walk(model: Any, positive: Any, negative: Any, empty: Tensor, sigmas: Tensor, seed: int, cfg: float, callback: Any) -> None:
    noise = comfy.sample.prepare_noise(empty, seed)
    other, scale = (positive, 1.0) if negative is None else (negative, cfg)
    euler = comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(
        model, noise, scale, euler, sigmas, positive, other, empty, callback=callback, disable_pbar=True, seed=seed
    )
