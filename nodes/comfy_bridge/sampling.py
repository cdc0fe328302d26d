"""ComfyUI's SIGMAS and SAMPLER made from the engine's few-step sampling."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_sampling
import torch
from comfy.k_diffusion.sampling import trange
from comfy.model_sampling import CONST, EPS, ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux
from comfy.samplers import KSAMPLER
from torch import Tensor

from ...efficient_vdit_core.limits.quote import quoted
from ...efficient_vdit_core.models.distilled import DistillMetadata, read_metadata
from ...efficient_vdit_core.sampling import consistency_sigmas, sample_consistency
from ...efficient_vdit_core.sampling.presets import PRESETS, parse_sigmas, preset_of
from ...efficient_vdit_core.sampling.schedule import shifted_time
from .distilled import LOADED_MODEL, model_metadata
from .paths import checkpoint_files, checkpoint_path
from .unit_variance import SCALES_NONE, at_unit_variance

log = logging.getLogger("efficient_vdit")

# Given no noise; in versions with such a model.
IMAGE_TO_IMAGE: Any = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())

SEGMENTS, FROM_CHECKPOINT, MANUAL = "segments", "from checkpoint", "manual"
PRESET_NAMES = [SEGMENTS, FROM_CHECKPOINT, MANUAL, *PRESETS]


def checkpoint_names() -> list[str]:
    """The loaded model, then the files that may say what they were distilled for."""
    return [LOADED_MODEL, *checkpoint_files()]


def checkpoint_changed(name: str) -> float:
    """When the file behind a name of `checkpoint_names` was changed; 0 where there is none."""
    path = None if name == LOADED_MODEL else checkpoint_path(name)
    return path.stat().st_mtime if path else 0.0


def checkpoint_metadata(model: Any, name: str) -> DistillMetadata:
    """What the loaded MODEL, or a file of `checkpoint_names`, was distilled for. Raises ValueError where it does not
    say."""
    if name == LOADED_MODEL:
        found = model_metadata(model)
    else:
        found = read_metadata(path) if (path := checkpoint_path(name)) else None
    if found is None:
        raise ValueError(
            f"{quoted(name)} does not say for how many segments it was distilled: it is no checkpoint of this pack's trainer. "
            "Choose the distilled file, or the preset 'segments' and its number."
        )
    return found


def preset_sigmas(
    model: Any, preset: str, segments: int, steps: int, *, shift: float, sigmas: str, checkpoint: str
) -> Tensor:
    """The noise levels of a choice in the node, all steps."""
    if preset == MANUAL:
        return parse_sigmas(sigmas)
    if preset in PRESETS:
        if not isinstance(model.get_model_object("model_sampling"), CONST):
            raise ValueError(
                f"The preset {quoted(preset)} is for flow models, but this model is none. Choose 'segments' or 'from checkpoint'."
            )
        return torch.tensor(PRESETS[preset].sigmas, dtype=torch.float32)
    if preset == FROM_CHECKPOINT:
        about = checkpoint_metadata(model, checkpoint)
        own = float(about.schedule.get("shift", 0.0) or 0.0)
        return model_consistency_sigmas(model, about.segments, about.steps, own or shift)
    return model_consistency_sigmas(model, segments, steps, shift)


def model_consistency_sigmas(model: Any, segments: int, steps: int, shift: float = 0.0) -> Tensor:
    """The (steps + 1,) noise levels of a MODEL at equal segments of its diffusion time, in its own units.

    ``shift``: of a flow model's time, in place of the model's own; 0 keeps that.
    """
    sampling = model.get_model_object("model_sampling")
    if shift:
        if not isinstance(sampling, CONST):
            raise ValueError(
                f"shift is {shift:g}, but the model is no flow model, so its time cannot be shifted. Set shift to 0."
            )
        return consistency_sigmas(lambda t: shifted_time(t, shift), segments, steps, start=1.0, clean=0.0)
    if isinstance(sampling, ModelSamplingDiscrete):
        start, clean = float(sampling.timestep(sampling.sigma_max)), -1.0
    elif isinstance(sampling, ModelSamplingDiscreteFlow):
        start, clean = float(sampling.multiplier), 0.0
    elif isinstance(sampling, ModelSamplingFlux):
        start, clean = 1.0, 0.0
    else:
        raise ValueError(
            f"The model's noise schedule is {_kinds(sampling)}, expected a discrete or a flow schedule: segments of equal "
            "diffusion time are not defined for others. Use a BasicScheduler node for this model."
        )
    return consistency_sigmas(sampling.sigma, segments, steps, start=start, clean=clean)


def consistency_sampler(gamma: float, noise_seed: int) -> KSAMPLER:
    """A SAMPLER that re-noises by the rule of the model it is used with."""
    return KSAMPLER(_sample, extra_options={"gamma": gamma, "noise_seed": noise_seed})


def _sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    gamma: float,
    noise_seed: int,
) -> Tensor:
    sampling = model.inner_model.inner_model.model_sampling
    renoises = isinstance(sampling, (EPS, CONST, SCALES_NONE)) and not isinstance(sampling, IMAGE_TO_IMAGE)
    if gamma and not renoises:
        raise ValueError(
            f"The model's noise schedule is {_kinds(sampling)}, expected an epsilon, v or flow model: fresh noise cannot be "
            "added to others. Set gamma to 0."
        )
    try:
        for remark in remarks(model.inner_model, sigmas, gamma):
            log.warning(remark)
    except (ValueError, OSError) as error:
        # The file was replaced, or says something else: the weights are loaded all the same.
        log.warning("What the model was distilled for is not known: %s", error)
    return sample_consistency(
        at_unit_variance(model), x, sigmas, extra_args, callback, disable,
        gamma=gamma, noise_seed=noise_seed, renoise=sampling.noise_scaling, trange=trange,
    )  # fmt: skip


def remarks(guider: Any, sigmas: Tensor, gamma: float) -> list[str]:
    """What is allowed but works against the way the guider's model was distilled."""
    patcher = getattr(guider, "model_patcher", None)
    about: DistillMetadata | None = model_metadata(patcher) if patcher is not None else None
    if about is None:
        return _remarks_on_preset(sigmas, gamma)
    found, cfg, steps = [], float(getattr(guider, "cfg", 1.0)), len(sigmas) - 1
    if cfg != 1.0 and about.guidance is not None:
        found.append(f"cfg is {cfg:g}, but guidance is already inside this distilled model: set cfg to 1.")
    trained, asked = about.schedule.get("sigma_min"), float(guider.inner_model.model_sampling.sigma_min)
    if isinstance(trained, float) and trained > 0 and not 1 / 1.05 < trained / asked < 1.05:
        found.append(
            f"this model was distilled on a schedule whose noise begins at {trained:.3g}, and ComfyUI's begins at {asked:.3g}, as for "
            "CogVideoX 2B: it is asked at other noise levels than it learnt."
        )
    # A run that ends above 0, or starts below the top, is one expert's part of the steps.
    top = float(guider.inner_model.model_sampling.sigma_max)
    if steps < about.segments and float(sigmas[-1]) == 0.0 and float(sigmas[0]) >= 0.99 * top:
        found.append(
            f"{steps} steps were asked of a model that was distilled for {about.segments}: it cannot jump that far; use more."
        )
    if more := about.more_steps(steps):
        found.append(more)
    if gamma == 1.0:
        found.append(
            "gamma is 1, but this model was distilled for deterministic jumps: set gamma to 0 for its best quality."
        )
    return found


def _remarks_on_preset(sigmas: Tensor, gamma: float) -> list[str]:
    name = preset_of(sigmas.tolist())
    if name is None or PRESETS[name].gamma == gamma:
        return []
    made_for = PRESETS[name].gamma
    return [
        f"gamma is {gamma:g}, and these are the levels of {name!r}: a model of that preset was made for gamma {made_for:g}."
    ]


def _kinds(sampling: Any) -> str:
    # ComfyUI builds a class "ModelSampling" from a schedule and a prediction; their names say more.
    return " + ".join(base.__name__ for base in type(sampling).__bases__)
