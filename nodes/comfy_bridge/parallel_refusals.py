"""What cannot act on a shared out MODEL, because it would stay in ComfyUI's process: it is refused, not lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from .hook import WRAPPER_KEY

# What acts below the sampler: in the workers, where the same nodes have run. The other kinds of wrappers act here.
IN_WORKERS = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
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
_PLAIN = (bool, int, float, str, tuple, list, dict)


@dataclass(frozen=True)
class Known:
    """What the workers' model has too: functions of other nodes, options of every forward, and changed modules.

    ``wrapper``: the key of the one wrapper that may act here in the place of theirs. ``schedule``: the model's
    ``model_sampling``.
    """

    hooks: list[str]
    options: dict[str, Any]
    modules: set[str]
    patches: dict[str, int]
    wrapper: str
    schedule: Any

    @classmethod
    def of(cls, patched: Any, wrapper: str) -> Known:
        """Of a MODEL before its own wrapper is added."""
        options = dict(patched.model_options["transformer_options"])
        modules, schedule = set(patched.object_patches), patched.get_model_object("model_sampling")
        return cls(_hooks(options), options, modules, _counts(patched.patches), wrapper, schedule)

    def check_evaluation(self, control: Any, options: dict[str, Any]) -> None:
        """Raises ValueError where the workers could not compute what this evaluation asks for."""
        if control is not None:
            raise ValueError(
                "A ControlNet acts on this run, which the workers cannot apply. Remove it, or bypass EVDiTSequenceParallel."
            )
        if marks := self._marks(options):
            raise ValueError(
                f"A node marks evaluations by {', '.join(marks)}: a guidance by layers or between sound and video, or one that stands "
                "behind EVDiTSequenceParallel. The workers cannot see that. Remove it, or place it before."
            )
        if _hooks(options) != self.hooks:
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
        modules = [name for name in set(patcher.object_patches) - self.modules if name.startswith("diffusion_model")]
        if _counts(patcher.patches) != self.patches or modules or wrappers != {self.wrapper}:
            raise ValueError(
                "A LoRA or another patch stands between EVDiTSequenceParallel and the sampler, where the workers cannot see it. Place "
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


def _hooks(options: dict[str, Any]) -> list[str]:
    """The places in a forward's ``transformer_options`` where functions of other nodes hook in, and their names."""

    def walk(found: Any, place: str) -> list[str]:
        if isinstance(found, dict):
            return [name for key, value in found.items() for name in walk(value, f"{place} {key}")]
        if isinstance(found, list):
            return [name for value in found for name in walk(value, place)]
        return [f"{place}: {getattr(found, '__qualname__', type(found).__qualname__)}"]

    kinds = ("patches", "patches_replace", OVERRIDE)
    return sorted(name for kind in kinds if kind in options for name in walk(options[kind], kind))


def _counts(patches: dict[str, Any]) -> dict[str, int]:
    return {key: len(found) for key, found in patches.items()}


def _differ(one: Any, other: Any) -> bool:
    """Whether two options are known to differ; ComfyUI copies them from forward to forward, objects too."""
    return one is not other and isinstance(one, _PLAIN) and repr(one) != repr(other)
