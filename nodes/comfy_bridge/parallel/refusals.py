"""What cannot act on a shared out MODEL, because it would stay in ComfyUI's process: it is refused, not lost."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any

import comfy.utils
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ....efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from ..hook import WRAPPER_KEY, attention_of_others, from_workers

# What acts below the sampler: in the workers, where the same nodes have run. The other kinds of wrappers act here.
IN_WORKERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
_AROUND = WrappersMP.DIFFUSION_MODEL
# Options of a forward that the workers' own hooks may read.
FORWARD_OPTIONS = ("sigmas", "sample_sigmas", "cond_or_uncond")
# Others that ComfyUI sets: callables, which are looked at by themselves, and what acts in this process alone.
_OPTIONS_HERE = frozenset(
    (
        "patches",
        "patches_replace",
        "wrappers",
        "callbacks",
        "uuids",
        "context_window",
        "multigpu_thread_device",
        OVERRIDE,
    )
)
# What RES4LYF's samplers put among the options, for the classes that it puts in the place of ComfyUI's networks (ReWanPatcher
# and its like). ComfyUI's own, and ours, read none of them.
OF_RES4LYF = frozenset(
    """
    AttnMask AttnMask_neg ExtraOptions RegContext RegContext_neg StyleMMDiT blocks_adain blocks_adain_cache blocks_attninj
    blocks_attninj_cache blocks_attninj_qkv freqsep_highpass_weight freqsep_inner_kernel_size freqsep_kernel_size
    freqsep_lowpass_method freqsep_lowpass_weight freqsep_mask freqsep_sigma freqsep_stride latent_type model_sampling
    noise_mode_adain regional_conditioning_floor regional_conditioning_floor_neg regional_conditioning_weight
    regional_conditioning_weight_neg row sigma_next sort_and_scatter update_cross_attn x_init x_tmp y0 y0_adain y0_attninj
    y0_inv y0_inv_standard_guide y0_standard_guide y0_style_method y0_style_neg y0_style_neg_mask y0_style_neg_mask_edge
    y0_style_neg_synweight y0_style_neg_weight y0_style_pos y0_style_pos_mask y0_style_pos_mask_edge y0_style_pos_synweight
    y0_style_pos_weight y0_style_tile_height y0_style_tile_padding y0_style_tile_width yt_negative yt_positive z_
    """.split()
)
_PLAIN = (bool, int, float, str, tuple, list, dict)
# Object patches of the network, and of the precision that it computes in.
_OBJECTS_IN_WORKERS = ("diffusion_model", "manual_cast_dtype")
# ComfyUI puts what a file asks of a module's attention there; it looks at no branch and at no option.
_ATTENTION_OF_A_FILE = ".comfy_attention"
# Older versions copy the objects among a MODEL's options with it, all but functions.
_OBJECTS_STAY = hasattr(comfy.utils, "deepcopy_list_dict")

# What other nodes have put somewhere, by place.
Found = dict[tuple[Any, ...], Any]


@dataclass(frozen=True)
class Known:
    """What the workers' model has too: functions of other nodes, options of every forward, and what changes the network.

    ``wrapper``: the key of the one wrapper that may act here in the place of theirs. ``schedule``: the model's
    ``model_sampling``, whose numbers are sent. ``options_seen``: whether another node's function may read the options of a
    forward there.
    """

    hooks: Found
    options: dict[str, Any]
    changes: Found
    wrapper: str
    schedule: Any
    options_seen: bool

    @classmethod
    def of(cls, patched: Any, wrapper: str, options_seen: bool) -> Known:
        """Of a MODEL before its own wrapper is added."""
        options = dict(patched.model_options["transformer_options"])
        schedule = patched.get_model_object("model_sampling")
        return cls(hooks_of(options), options, _changes(patched), wrapper, schedule, options_seen)

    def check_evaluation(self, control: Any, options: dict[str, Any]) -> None:
        """Raises ValueError where the workers could not compute what this evaluation asks for."""
        if control is not None:
            raise ValueError(
                "A ControlNet acts on this run, which the workers cannot apply. Remove it, or bypass EVDiTSequenceParallel."
            )
        marks = self._marks(options)
        if others := [key for key in marks if key not in OF_RES4LYF]:
            raise ValueError(
                f"A node marks evaluations by {', '.join(others)}: a guidance by layers or between sound and video, a sampler that "
                "passes values of its own to the model, or a node that stands behind EVDiTSequenceParallel. The workers cannot see "
                "that. Remove it, take one of ComfyUI's samplers, or place the node before."
            )
        if marks and self.options_seen:
            raise ValueError(
                "A sampler of RES4LYF passes values of its own to the model, and another node that acts inside the model (such as "
                "ReWanPatcher, or one with an attention of its own) may read them there, but the workers do not have them. Take one "
                "of ComfyUI's samplers, or remove that node."
            )
        if not _same(hooks_of(options), self.hooks):
            raise ValueError(
                "A node hooks the model's blocks in some of its evaluations (such as skip-layer or perturbed-attention guidance), or "
                "stands behind EVDiTSequenceParallel: the workers cannot see that. Remove it, or bypass EVDiTSequenceParallel."
            )

    def check_run(self, guider: Any) -> None:
        """Raises ValueError where a run has hooks of its own, or where a node behind ours has changed the model: the
        workers have run only those before it."""
        for conds in (getattr(guider, "conds", None) or {}).values():
            if any(isinstance(cond, dict) and cond.get("hooks") is not None for cond in conds):
                raise ValueError(
                    "The conditioning carries hooks (a LoRA or schedule of its own), which the workers cannot apply. Remove them."
                )
        patcher = guider.model_patcher
        wrappers = {key for kind in IN_WORKERS for key in patcher.wrappers.get(kind, {})}
        hooks = hooks_of(patcher.model_options["transformer_options"])
        if not (_same(_changes(patcher), self.changes) and _same(hooks, self.hooks)) or wrappers != {self.wrapper}:
            raise ValueError(
                "A LoRA or another patch stands behind EVDiTSequenceParallel, where the workers cannot see it. Place "
                "EVDiTSequenceParallel last, and the patch before it."
            )
        if patcher.get_model_object("model_sampling") is not self.schedule:
            raise ValueError(
                "A node behind EVDiTSequenceParallel changes the model's noise schedule (such as ModelSamplingSD3), and the workers "
                "compute with the one before. Place it before EVDiTSequenceParallel."
            )

    def _marks(self, options: dict[str, Any]) -> list[str]:
        """The options of a forward that the MODEL has not, or that say something else there."""
        looked_at = options.keys() - _OPTIONS_HERE - set(FORWARD_OPTIONS)
        known = self.options
        return sorted(str(key) for key in looked_at if key not in known or _differ(options[key], known[key]))


def refuse_second_time(model: Any) -> None:
    """Raises ValueError where a MODEL has been through our node already."""
    if from_workers(model):
        raise ValueError(
            "The model comes from another EVDiTSequenceParallel, whose workers compute it. Remove one of the two."
        )


def refuse_split_state(model: Any) -> None:
    """Raises where wrappers of one key act both here and in the workers, as EasyCache's do: they share a state of the
    run."""
    kinds = [
        (key, kind in IN_WORKERS)
        for kind, found in model.wrappers.items()
        for key in found
        if key not in (None, WRAPPER_KEY)
    ]
    split = sorted({str(key) for key, inside in kinds if inside and (key, False) in kinds})
    if split:
        raise ValueError(
            f"{', '.join(split)} shares what it remembers between the sampler and the model, which run in different processes here. "
            "Remove that node, or bypass EVDiTSequenceParallel."
        )


def wrapped(model: Any) -> bool:
    """Whether a node wraps a MODEL's network."""
    places = {"wrappers": model.wrappers}, model.model_options["transformer_options"]
    return any(get_all_wrappers(WrappersMP.DIFFUSION_MODEL, place) for place in places)


def others_act_inside(model: Any) -> bool:
    """Whether other nodes' functions are given a forward's batch, or a part of the model is theirs."""
    options = model.model_options["transformer_options"]
    hooks = hooks_of({name: value for name, value in options.items() if name != OVERRIDE})
    replaced = any(
        name.startswith("diffusion_model.") and not name.endswith(_ATTENTION_OF_A_FILE) for name in model.object_patches
    )
    return bool(hooks) or replaced or attention_of_others(model) is not None or wrapped(model)


def others_see_options(model: Any) -> bool:
    """Whether other nodes' functions are given a forward's options, inside the network or around it."""
    around = model.wrappers.get(WrappersMP.APPLY_MODEL, {}).keys() - {WRAPPER_KEY, COMPILE_KEY}
    return bool(around) or others_act_inside(model)


def hooks_of(options: dict[str, Any]) -> Found:
    """The functions of other nodes that a forward's ``transformer_options`` hook in, and those around the network."""
    places = {kind: options[kind] for kind in ("patches", "patches_replace", OVERRIDE) if kind in options}
    places[_AROUND] = options.get("wrappers", {}).get(_AROUND, {})
    return {place: x if _OBJECTS_STAY else _what_stays(x) for place, x in _found(places).items()}


def _what_stays(found: Any) -> Any:
    return found if isinstance(found, FunctionType) else getattr(found, "__func__", type(found))


def _changes(patcher: Any) -> Found:
    """What a MODEL has put on its network: LoRAs, merged or bypassed, functions over weights, and replaced objects."""
    objects = {name: x for name, x in patcher.object_patches.items() if name.startswith(_OBJECTS_IN_WORKERS)}
    kinds = (patcher.patches, patcher.injections, patcher.weight_wrapper_patches, objects)
    return _found(dict(enumerate(kinds)))


def _found(value: Any, place: tuple[Any, ...] = ()) -> Found:
    if not isinstance(value, dict | list):
        return {place: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {at: x for key, part in parts for at, x in _found(part, (*place, key)).items()}


def _same(one: Found, other: Found) -> bool:
    """Whether both have the very same things in the same places: one name can stand for two settings of a node."""
    return one.keys() == other.keys() and all(one[place] is other[place] for place in one)


def _differ(one: Any, other: Any) -> bool:
    """Whether two options are known to differ; ComfyUI copies them from forward to forward, objects too."""
    return one is not other and isinstance(one, _PLAIN) and repr(one) != repr(other)
