"""Looks at a dense model while ComfyUI samples with it: the layer-wise search and the tile map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ...efficient_vdit_core.attention.dense_call import Override
from ...efficient_vdit_core.attention.hook.state import Around
from ...efficient_vdit_core.plan import TilePlan
from ...efficient_vdit_core.search import (
    SearchSettings,
    make_probe_override,
    measure_output,
    plan_from_record,
    replay_blocks,
)
from ...efficient_vdit_core.search.record import BLOCK, OUTPUT
from ...efficient_vdit_core.search.tile_mass import MassRecord, TileMass, make_mass_override
from .families import Family, class_of, find_family, uncompiled, why_no_family
from .hook import WRAPPER_KEY, Hook, dense, from_workers
from .measure import why_not_twice
from .publish import install
from .replaced_attention import none_asked, why_none_asked
from .sampling import IMAGE_TO_IMAGE
from .unit_variance import at_unit_variance
from .window import Window

NOT_HERE = (
    "The model comes from EVDiTSequenceParallel, whose workers compute it, so that nothing inside it can be measured. Connect the "
    "model from before EVDiTSequenceParallel."
)
WALK_STEPS = 10  # of the schedule on which the tile map walks to its noise level


@dataclass(frozen=True)
class ProbeSampling:
    """How a search runs the model: Euler steps from the noise of ``seed`` with guidance ``cfg``.

    ``sigmas`` (default: ``probes`` steps of the model's own schedule) are the noise levels; it is run at all but the last.
    """

    seed: int
    probes: int
    cfg: float = 1.0
    sigmas: Tensor | None = None

    def levels(self, model: Any) -> Tensor:
        """Raises ValueError where the model would not be run at any."""
        levels = _schedule(model, self.probes) if self.sigmas is None else self.sigmas
        if len(levels) < 2:
            raise ValueError(
                f"sigmas has {len(levels)} noise levels, expected at least 2: the model is run at all but the last."
            )
        return levels


def check_searchable(model: Any, error: str) -> None:
    """Raises ValueError where a MODEL is unknown, or its output's errors are to be measured and a forward is not the same when
    it is computed again."""
    _known_family(model)
    if error == OUTPUT and (why := why_not_twice(model, model.model_options, WRAPPER_KEY)):
        raise ValueError(
            f"The model's output cannot be measured: {why}. Search before that node, or set error to attention."
        )


def search_plan(
    model: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    settings: SearchSettings,
    sampling: ProbeSampling,
) -> TilePlan:
    """A plan for a MODEL that `check_searchable` lets pass, from one dense sampling, each step of which is measured in every
    layer.

    ``latent`` is noised to the first noise level. Where it has a noise mask, as image to video and guide frames do, that is
    kept to, as in sampling. ``negative`` None samples without guidance. Raises ValueError where nothing fits.
    """
    family, network = _known_family(model)
    start, mask = _latent(model, latent, empty=sampling.sigmas is None), latent.get("noise_mask")
    record, levels = settings.record(_video(start).shape[2]), sampling.levels(model)
    again = len(record.candidates) if settings.error == OUTPUT else 0
    progress = _Progress(len(levels) - 1, family.depth(network), again)
    begun = settings.check_reach
    probing = _observed(
        model,
        family,
        lambda previous: make_probe_override(record, progress=progress.layer, begun=begun, previous=previous),
        around=partial(measure_output, record, progress=progress.again) if again else None,
    )
    with replay_blocks(_blocks(model, family), record) if settings.error == BLOCK else nullcontext():
        _walk(probing, positive, negative, start, mask, levels, sampling.seed, sampling.cfg, progress.step)
    if record.layout is None and none_asked(record.dense):
        raise ValueError(f"No self-attention over a video was found: {why_none_asked(model, family)}")
    about = {
        "sigmas": [round(float(s), 6) for s in levels[:-1]],
        "seed": sampling.seed,
        "guidance": 1.0 if negative is None else sampling.cfg,
    }
    of_model = {"layers": progress.depth, "family": family.name, "heads": family.head_count(network)}
    return plan_from_record(record, settings, **of_model, about=about)


def measure_tiles(
    model: Any,
    conditioning: Any,
    latent: dict[str, Any],
    *,
    layers: Sequence[int],
    percent: float,
    seed: int,
    rows: int,
) -> dict[int, TileMass]:
    """The tile mass of ``layers``, dense and without guidance, at ``percent`` of the noise schedule.

    Walks there from pure noise with Euler steps, so that the layers see what they see in a run.
    """
    family, network = _known_family(model)
    depth = family.depth(network)
    schedule, target = _schedule(model, WALK_STEPS), model.get_model_object("model_sampling").percent_to_sigma(percent)
    last = int((schedule[:-1] - target).abs().argmin())
    record = MassRecord(tuple(layers), rows=rows, active=last == 0)
    progress = _Progress(last + 1, depth)

    def stepped(step: int, *_: Any) -> None:
        progress.step(step)
        record.active = step + 1 >= last

    observed = _observed(
        model, family, lambda previous: make_mass_override(record, progress=progress.layer, previous=previous)
    )
    start, mask = _latent(model, latent, empty=True), latent.get("noise_mask")
    _walk(observed, conditioning, None, start, mask, schedule[: last + 2], seed, 1.0, stepped)
    missing = [i for i in layers if i not in record.found]
    if missing:
        raise ValueError(
            f"The layers {missing} were not seen attending over a video{_why_missing(model, family, record)}"
        )
    return record.found


def _why_missing(model: Any, family: Family, record: MassRecord) -> str:
    """Why layers of a finished walk have no map, and what to do."""
    if none_asked(record.reasons):
        return f": {why_none_asked(model, family)}"
    return (
        f" ({', '.join(sorted(record.reasons))}). Use a latent of several frames and a model whose attention is not masked and whose "
        "blocks no other node replaces."
    )


def model_depth(model: Any, plan: TilePlan | None) -> int:
    """The number of layers of a MODEL. Raises ValueError where its family is unknown, or ``plan`` was made for another
    model."""
    family, network = _known_family(model)
    depth = family.depth(network)
    if plan is not None:
        plan.check_fits(family=family.name, layers=depth, heads=family.head_count(network))
    return depth


class _Progress:
    """The node's progress bar over steps x layers, each of which is also where a user's Cancel takes effect; ``again``: how
    many forwards more a step has for each layer."""

    def __init__(self, steps: int, depth: int, again: int = 0) -> None:
        self.depth, self.each = depth, depth * (1 + again)
        self.total = steps * self.each
        self.bar = comfy.utils.ProgressBar(self.total)
        self.steps = self.layers = self.forwards = 0
        self.attended = False

    def layer(self, layer: int) -> None:
        # With guidance a layer may be called once for both prompts or once for each.
        self.layers = max(self.layers, layer + 1)
        self._tell()

    def again(self, _: int) -> None:
        """Before one of the further forwards."""
        self.forwards += 1
        self._tell()

    def step(self, step: int, *_: Any) -> None:
        """Behind each step. Raises ValueError where the model attended in none of its layers, which it did before."""
        if self.attended and not self.layers:
            raise ValueError(
                f"In step {step + 1} of {self.total // self.each} no attention was asked for, so nothing can be measured there: another "
                "node leaves forwards of the model out, as EasyCache and LazyCache do, or no prompt is for that part of the "
                "schedule. Connect the model from before that node, and prompts for all of the schedule."
            )
        self.attended = self.attended or self.layers > 0
        self.steps, self.layers, self.forwards = step + 1, 0, 0
        self._tell()

    def _tell(self) -> None:
        mm.throw_exception_if_processing_interrupted()
        done = self.steps * self.each + self.layers + self.forwards
        self.bar.update_absolute(min(done, self.total), self.total)


def _schedule(model: Any, steps: int) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def _known_family(model: Any) -> tuple[Family, Any]:
    if from_workers(model):
        raise ValueError(NOT_HERE)
    network = uncompiled(model.get_model_object("diffusion_model"))
    kind = class_of(model)
    family = find_family(kind)
    if family is None:
        raise ValueError(f"{kind.__name__} cannot be measured: {why_no_family(kind)}.")
    return family, network


def _blocks(model: Any, family: Family) -> list[torch.nn.Module]:
    network = model.get_model_object("diffusion_model")
    if uncompiled(network) is not network:
        raise ValueError(
            "The model is compiled, so its blocks cannot be run again under each candidate. Search before the node that compiles "
            "it, or set error to attention."
        )
    return family.layers(network)


def _observed(
    model: Any, family: Family, make: Callable[[Override | None], Override], around: Around | None = None
) -> Any:
    """A clone that publishes its token layout as a sparse one does, with ``make``'s override in place of the sparse
    one."""
    if why := family.why_no_hook():
        raise ValueError(f"The model's attention cannot be measured: {why}. Update ComfyUI.")
    network = uncompiled(model.get_model_object("diffusion_model"))
    clone = install(model, Hook(family, Window(), dense(), make, around=around, stack=family.stack(network)))
    # Uncompiled: the measuring within blocks would be compiled for every candidate anew.
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    return clone


# Where a latent has them, ComfyUI's samplers take an empty one to the size that the model's own latents would have.
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def _latent(model: Any, latent: dict[str, Any], *, empty: bool) -> Any:
    """The first entry of the latents' batch (1, C, T, H, W) with the model's channels; zeros of its size where
    ``empty``.

    What a noise mask keeps is content, and so is what FlowRVS starts from in place of noise: such latents stay as they
    are. Video with audio comes as a nested tensor, and stays one.
    """
    from_latent = isinstance(model.get_model_object("model_sampling"), IMAGE_TO_IMAGE)
    samples, empty = latent["samples"], empty and not from_latent and "noise_mask" not in latent
    if samples.is_nested:
        start = type(samples)([torch.zeros_like(x[:1]) if empty else x[:1] for x in samples.unbind()])
    else:
        ratios = {name: latent[name] for name in _RATIOS if latent.get(name) is not None}
        first = torch.zeros_like(samples[:1]) if empty else samples[:1]
        start = comfy.sample.fix_empty_latent_channels(model, first, **ratios)
    if _video(start).ndim != 5:
        raise ValueError(
            f"The latent has shape {tuple(samples.shape)}, expected a video's: (batch, channels, frames, height, width)."
        )
    return start


def _video(latent: Any) -> Tensor:
    return latent.unbind()[0] if latent.is_nested else latent


def _euler(model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    return sample_euler(at_unit_variance(model), x, sigmas, **options)


def _walk(
    model: Any,
    positive: Any,
    negative: Any,
    start: Any,
    mask: Any,
    sigmas: Tensor,
    seed: int,
    cfg: float,
    callback: Any,
) -> None:
    noise = comfy.sample.prepare_noise(start, seed)
    other, scale = (positive, 1.0) if negative is None else (negative, cfg)
    comfy.sample.sample_custom(
        model, noise, scale, comfy.samplers.KSAMPLER(_euler), sigmas, positive, other, start, noise_mask=mask, callback=callback,
        disable_pbar=True, seed=seed,
    )  # fmt: skip
