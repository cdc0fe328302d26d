"""What Sparse Attention puts into a MODEL: the plan made ready, and the override that follows it, under one key."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...efficient_vdit_core.attention.call_shape import CallShape
from ...efficient_vdit_core.attention.dense_call import Override
from ...efficient_vdit_core.attention.hook.override import attention_override
from ...efficient_vdit_core.attention.hook.prepare import Preparation
from ...efficient_vdit_core.attention.hook.state import Around, ForwardState
from ...efficient_vdit_core.attention.report.cost import StepCost
from ...efficient_vdit_core.attention.report.report import AttentionReport
from ...efficient_vdit_core.attention.sdpa import OVERRIDE_KEY as OVERRIDE
from ...efficient_vdit_core.plan import TilePlan
from .families import Family, Stack
from .window import Window

WRAPPER_KEY = "efficient_vdit"
DENSE_KEY = "efficient_vdit_dense"  # of what only tells of a MODEL that stays dense: it has no hook
PARALLEL_KEY = "efficient_vdit_parallel"  # Sequence Parallel's
MOST_OVERRIDES = 16  # remembered; a node that makes a new one for each step must not fill the memory


@dataclass
class HookRun:
    """What a hook knows of the present run, made anew for each.

    ``clips``: how many are sampled at once. ``running`` while its own wrapper is around it, ``beside`` while it is another
    MODEL's. ``asked`` once a forward came by. ``why_once`` says why no forward may be computed twice. ``second_hooks`` are
    those of the second models that it samples with.
    """

    clips: int = 0
    running: bool = False
    beside: bool = False
    asked: bool = False
    why_once: str = ""
    second_hooks: list[Hook] = field(default_factory=list)


@dataclass(eq=False)
class Hook:
    """What Sparse Attention has put into one MODEL: the plan made ready, and the overrides that follow it.

    ``made_for`` gives the BaseModel. ``make``: the override over another node's, default the sparse one. A search and a
    rank put their own here, which take tensors only and settle nothing beforehand. ``around`` computes each forward, as often as it
    likes; None: once. ``weights`` as in ``StepCost``, 0 = not asked for. ``after_run`` is called after each sampling that it
    took part in. ``stack``: the model's layers as they were when the node was made, None = as each forward finds them.
    """

    family: Family
    window: Window
    preparation: Preparation
    make: Callable[[Override | None], Override] | None = None
    caution: str = ""
    weights: int = 0
    around: Around | None = None
    after_run: Callable[[], None] = lambda: None
    stack: Stack | None = None
    made_for: Callable[[], Any] = lambda: None
    made: dict[int, Override] = field(default_factory=dict)  # by the id of what each is over, and keeps alive
    run: HookRun = field(default_factory=HookRun)

    @property
    def settles(self) -> bool:
        """Whether its backends are settled before a forward and its steps may be timed: not a search's, and not on a rank, where
        how often a short step is computed would hang on seconds that ranks do not agree on."""
        return self.make is None

    @property
    def report(self) -> AttentionReport:
        return self.preparation.report

    @property
    def plan(self) -> TilePlan:
        return self.preparation.plan

    def over(self, current: Override | None) -> Override:
        """An override on top of ``current``, which it asks for every dense piece; ``current`` where it is ours."""
        if current is not None and followed_by(current) is self.preparation:
            return current
        # By identity: another node's override may be any object, with an equality of its own or without a hash.
        if id(current) not in self.made:
            if len(self.made) >= MOST_OVERRIDES:
                self.made.clear()
            chosen = self.make(current) if self.make else attention_override(self.preparation, previous=current)
            # Kept out of torch.compile: it counts calls, and each count would compile the model anew.
            override: Any = torch.compiler.disable(chosen)
            override.replaces, override.preparation, override.marks = current, self.preparation, weakref.ref(override)
            if self.settles:
                override.container_function = _with_containers(override)
            self.made[id(current)] = override
        return self.made[id(current)]

    def tell_clip(self, state: ForwardState, shape: CallShape) -> None:
        """To the report: the clip of a forward whose calls look like ``shape``, and what it costs."""
        self.report.layout = state.layout
        if state.layout is not None and state.depth:
            self.report.cost = StepCost(state.layout, shape.heads, shape.head_dim, state.depth, self.weights)

    def forget(self) -> None:
        """Lets go, after a run, of what only its forwards needed: what their attention kept, and other nodes' overrides."""
        self.preparation.forget()
        self.made.clear()


def followed_by(override: Any) -> Preparation | None:
    """The plan that an override of ours follows; None of another node's, though it carry our marks as functools.wraps copies
    them."""
    marks = getattr(override, "marks", None)
    return override.preparation if marks is not None and marks() is override else None


def beneath(override: Any) -> Any:
    """What an override of ours is over; another node's as it is."""
    return override if followed_by(override) is None else override.replaces


def dense() -> Preparation:
    """For a hook that only tells where the tokens stand."""
    return Preparation(TilePlan.uniform(None), AttentionReport())


def take_off(patched: Any) -> None:
    """Has a MODEL that a hook was put into neither act nor tell of its runs any more; its override stays."""
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        patched.remove_callbacks_with_key(kind, WRAPPER_KEY)


def hook_of(model: Any) -> Hook | None:
    """What Sparse Attention has put into a MODEL, whatever other nodes did to its override since."""
    return _hook_by(model, WrappersMP.APPLY_MODEL)


def from_workers(model: Any) -> bool:
    """Whether a MODEL has been through Sequence Parallel, so that its forwards are not computed in this process."""
    return bool(model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(PARALLEL_KEY))


def attention_of_others(model: Any) -> Override | None:
    """Another node's override of a MODEL's attention, ours over it or not; None where there is none."""
    override = model.model_options["transformer_options"].get(OVERRIDE)
    while followed_by(override) is not None:
        override = override.replaces
    return override


def report_of(model: Any) -> AttentionReport | None:
    """The counts that Sparse Attention keeps, of calls in this process or in the workers; None where the MODEL has not been
    through that node, or was left dense by it."""
    hook = _hook_by(model, WrappersMP.OUTER_SAMPLE)
    return hook.report if hook else None


def _hook_by(model: Any, kind: str) -> Hook | None:
    """The hook that a wrapper of ours of this ``kind`` is for."""
    wrappers = model.wrappers.get(kind, {}).get(WRAPPER_KEY, [])
    return getattr(wrappers[-1], "hook", None) if wrappers else None


def _with_containers(override: Override) -> Override:
    """The override for q, k, v in containers; ComfyUI gives it no function to fall back on, so it brings its own."""

    def container_function(q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        return override(optimized_attention, q, k, v, heads, *args, **kwargs)

    return container_function
