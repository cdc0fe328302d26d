"""Which steps of a run are sparse: by the noise schedule, and by number."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...efficient_vdit_core.attention.report.reason_names import NO_STEP_NUMBERS, OUTSIDE_THE_WINDOW
from .replaced_blocks import replaced_blocks

# A last step so many times as long as any before it is no schedule's own. Schedules of fewer steps have such ones.
_LEAP, _FEWEST = 3.0, 5
# A step may lie on the window's edge; schedule and window round it in their own ways.
_ROUNDING = 1 + 1e-4
_LATE = 0.02  # of the noise schedule: a sampler that begins there or later goes on from another's steps, or from a clip
STILL = ("standard_static", "batched")  # context windows that are the same in every step


@dataclass(frozen=True)
class Window:
    """Sparse from ``start`` to ``end`` of the noise schedule (0..1), but not in the run's first and last steps.

    Steps by number mean the same under every shift and for levels given by hand; they count within one sampler node.
    """

    start: float = 0.0
    end: float = 1.0
    dense_first_steps: int = 0
    dense_last_steps: int = 0

    def check(self) -> None:
        """Raise ValueError where no step could be sparse, or a number is none."""
        if not 0.0 <= self.start < self.end <= 1.0:  # NaN is neither
            raise ValueError(
                f"start_percent is {self.start} and end_percent {self.end}, expected 0 to 1 with start below end: no step "
                "would be sparse. Lower start_percent, raise end_percent, or bypass the node."
            )
        for name in ("dense_first_steps", "dense_last_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more. Correct it.")

    def why_outside(self, model_sampling: Any, options: dict[str, Any], t: Tensor) -> str:
        """The reason why the step at noise level ``t`` is dense; "" inside the window.

        Reads the level from the device, so once a forward only.
        """
        if (self.start, self.end) != (0.0, 1.0):
            high, low = (model_sampling.percent_to_sigma(p) for p in (self.start, self.end))
            level = float(t.flatten()[0])
            if not low * _ROUNDING < level <= high * _ROUNDING:
                return OUTSIDE_THE_WINDOW
        if not (self.dense_first_steps or self.dense_last_steps):
            return ""
        steps = steps_of(options)
        if not steps:
            return NO_STEP_NUMBERS
        step = step_of(options, t)
        inside = self.dense_first_steps <= step < steps - self.dense_last_steps
        return "" if inside else OUTSIDE_THE_WINDOW

    def why_dense_again(self, model_sampling: Any, options: dict[str, Any]) -> str:
        """That the first steps stay dense of a sampler that goes on from where another one has come, and what keeps the
        clip's own alone; "" of other samplers."""
        if not (self.dense_first_steps and steps_of(options)):
            return ""
        first, last = (float(options["sample_sigmas"][at]) for at in (0, -1))
        begins = _percent_of(model_sampling, first)
        if first <= last or begins < _LATE:  # levels rise where a clip is turned into noise
            return ""
        return (
            f"this sampler begins {begins:.0%} into the noise schedule, and dense_first_steps keeps its first steps dense as well. "
            "Where another sampler made the clip's first steps, start_percent 0.01 in its place keeps those alone dense."
        )

    def goes_on(self, model_sampling: Any, options: dict[str, Any], t: Tensor) -> bool:
        """Whether the step after that of noise level ``t``, which is inside, is inside as well."""
        following = step_of(options, t) + 1
        if following >= steps_of(options):
            return False
        return not self.why_outside(model_sampling, options, options["sample_sigmas"][following : following + 1])

    def comes(self, model_sampling: Any, options: dict[str, Any], t: Tensor) -> bool:
        """Whether a step after that of noise level ``t``, which is outside, is inside."""
        if not steps_of(options):
            return False
        options = {**options, "sample_sigmas": options["sample_sigmas"].cpu()}
        levels = options["sample_sigmas"][step_of(options, t) + 1 : -1]
        return any(not self.why_outside(model_sampling, options, level) for level in levels)


def steps_of(options: dict[str, Any]) -> int:
    """How many steps the sampler takes, 0 where there is no schedule."""
    schedule = options.get("sample_sigmas")
    return 0 if schedule is None else max(0, len(schedule) - 1)


def whole_steps(model_sampling: Any, options: dict[str, Any]) -> int:
    """How many steps the whole schedule has of which the sampler takes a part, as where two experts share it; all of
    its own where it goes from noise to a clean clip, 0 where there is no schedule.

    ComfyUI tells a sampler its own part only. As many as the whole noise schedule would have at its mean step; without the
    last one where that leaps to a clean clip, as at the end of a part whose rest of the noise is forced out.
    """
    steps = steps_of(options)
    if not steps:
        return 0
    levels = options["sample_sigmas"].tolist()
    start, before_last, end = (_percent_of(model_sampling, levels[at]) for at in (0, -2, -1))
    # Of a schedule's own steps the last is hardly longer than the mean, so the others are seldom looked at one by one.
    if steps >= _FEWEST and end - before_last > _LEAP * (before_last - start) / (steps - 1):
        reached = [_percent_of(model_sampling, level) for level in levels[:-1]]
        if 0 < _LEAP * max(after - before for before, after in pairwise(reached)) < end - before_last:
            steps, end = steps - 1, before_last
    return round(steps / (end - start)) if end > start else steps


def _percent_of(model_sampling: Any, level: float) -> float:
    """Where in the noise schedule a level is reached, 0 = noise to 1 = clean: the inverse of ``percent_to_sigma``."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if model_sampling.percent_to_sigma(middle) >= level else (low, middle)
    return (low + high) / 2


def step_of(options: dict[str, Any], t: Tensor) -> int:
    """The step of the schedule that noise level ``t`` belongs to, 0 = first; 0 where there is no schedule.

    A level between two steps, as samplers of higher order ask for, belongs to the step that has begun. Levels may rise, as
    where a clip is turned into noise.
    """
    schedule = options.get("sample_sigmas")
    if schedule is None:
        return 0
    levels, level = schedule.float(), float(t.flatten()[0])
    falls = levels[0] >= levels[-1]
    # Schedules begin with steps that lie closer together than what is rounded away.
    told = torch.isclose(levels, levels.new_tensor(level), rtol=1e-6, atol=0.0).nonzero()
    reached = torch.where(falls, levels * _ROUNDING >= level, levels <= level * _ROUNDING)
    step = int(told[-1]) if len(told) else int(reached.sum()) - 1
    return min(max(0, step), max(0, len(schedule) - 2))


def why_windows_move(base_model: Any, options: dict[str, Any]) -> str:
    """Why nothing can be kept for ComfyUI's context windows from one step to the next; "" where the forward is in none,
    or they stay."""
    if options.get("context_window") is None:
        return ""
    handler = getattr(base_model.current_patcher, "model_options", {}).get("context_handler")
    name = getattr(getattr(handler, "context_schedule", None), "name", "")
    if not name or name in STILL:
        return ""
    return f"the context windows ({name}) move from step to step; choose {' or '.join(STILL)}"


def branches_of(options: dict[str, Any], batch: int, clips: int) -> tuple[tuple[Any, int], ...]:
    """The prompts in a forward's batch: what tells each from others, and its rows. Its context window does too, and the blocks
    that other nodes replace: guidance may ask a prompt once more without some of them.

    () where ComfyUI does not say, or the ``batch`` is not each prompt's ``clips``: a node that shares it out leaves the names
    of all prompts with every part.
    """
    names = options.get("uuids") or options.get("cond_or_uncond") or ()
    if not names or batch != len(names) * clips:
        return ()
    window = options.get("context_window")
    frames = tuple(getattr(window, "index_list", ())) if window is not None else ()
    return tuple(((name, frames, replaced_blocks(options)), clips) for name in names)
