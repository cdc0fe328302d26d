"""A searched plan in words: what was chosen, what it should gain, and the errors it rests on."""

from __future__ import annotations

import math

from ..attention.hook.residual import work_of_plan
from ..plan import TilePlan
from ..tiles import TilePattern, TokenGrid

EVERY, STEPS = (2, 3, 4, 6), 20  # residuals and the schedule that a report gives the work for
OTHER_FRAMES = "Prompts for a part of the clip have others, and context windows with causal_window_fix."


def describe_plan(plan: TilePlan) -> str:
    """A few lines and a table, one row a layer: the pattern, its relative error, and each candidate's."""
    about = plan.provenance
    lines = [
        f"Plan: {plan.to_text()}",
        f"Attention FLOPs: {about['attention_flop_density']:.0%} of dense; "
        f"predicted speed-up of the attention: {about['attention_speedup']:.2f}x (by {about['costs']})",
        *_with_residual(plan),
        f"Error: {about['error']}{'; of the plan the root of the mean square' if 'plan_errors' in about else ''}",
    ]
    for name, meaning in (("not_finite_layers", "not finite"), ("not_measured_layers", "not measured")):
        if about[name]:
            lines.append(f"Full because {meaning}: layer {', '.join(map(str, about[name]))}")
    for frames, count in about.get("left_out_forwards", {}).items():
        lines.append(
            f"Forwards left out: {count}, over {frames} latent frames: errors are of forwards over {plan.frames}, as the first was. "
            f"{OTHER_FRAMES}"
        )
    return "\n".join([*lines, "", *_table(plan)])


def _table(plan: TilePlan) -> list[str]:
    frames = plan.frames or 1
    errors = {TilePattern.parse(name).name(frames): found for name, found in plan.provenance["errors"].items()}
    columns = {"plan": _plan_errors(plan), **errors}
    names = [pattern.name(frames) for pattern in plan.patterns]
    width, widths = max(map(len, ["pattern", *names])), {name: max(len(name), 6) for name in columns}
    lines = [f"layer  {'pattern':<{width}}  " + "  ".join(f"{name:<{widths[name]}}" for name in columns)]
    for i, name in enumerate(names):
        row = "  ".join(f"{_number(values[i]):<{widths[column]}}" for column, values in columns.items())
        lines.append(f"{i:>5}  {name:<{width}}  {row}")
    return [line.rstrip() for line in lines]


def _plan_errors(plan: TilePlan) -> list[float | None]:
    """Each layer's error under its chosen patterns: measured as such where heads may differ, else its candidate's."""
    about, frames = plan.provenance, plan.frames or 1
    if "plan_errors" in about:
        return about["plan_errors"]
    names = ["" if p.is_full(frames) else p.kinds[0].short_name for p in plan.patterns]
    return [about["errors"][name][i] if name else 0.0 for i, name in enumerate(names)]


def _number(error: float | None) -> str:
    return f"{math.nan if error is None else error:.4f}"


def _with_residual(plan: TilePlan) -> list[str]:
    """What the plan costs with the cached residual, where it leaves anything out."""
    about = plan.provenance
    grid, extra = TokenGrid(*about["grid"]), about["extra_tokens"]
    densities = [pattern.flop_density(grid, extra) for pattern in plan.patterns]
    if min(densities) == 1.0:
        return []
    work = ", ".join(f"{every}: {work_of_plan(densities, every, STEPS):.0%}" for every in EVERY)
    return [f"With residual_every, for models that nobody distilled, in {STEPS} steps: {work} of dense"]
