"""A searched plan in words: what was chosen, what it should gain, and the errors it rests on."""

from __future__ import annotations

import math

from ..attention.residual import work_of_plan
from ..plan import TilePlan
from ..tiles import TokenGrid

EVERY, STEPS = (2, 3, 4, 6), 20  # residuals and the schedule that a report gives the work for


def describe_plan(plan: TilePlan) -> str:
    """A few lines and a table, one row a layer: the pattern, and each candidate's relative error."""
    about = plan.provenance
    errors = about["errors"]
    lines = [
        f"Plan: {plan.to_text()}",
        f"Attention FLOPs: {about['attention_flop_density']:.0%} of dense; "
        f"predicted speed-up of the attention: {about['attention_speedup']:.2f}x (by {about['costs']})",
        *_with_residual(plan),
        f"Error: {about['error']}",
    ]
    for name, meaning in (("not_finite_layers", "not finite"), ("not_measured_layers", "not measured")):
        if about[name]:
            lines.append(f"Full because {meaning}: layer {', '.join(map(str, about[name]))}")
    frames = plan.frames or 1
    names = [pattern.name(frames) for pattern in plan.patterns]
    width = max(map(len, ["pattern", *names]))
    lines += ["", f"layer  {'pattern':<{width}}  " + "  ".join(f"k={k:<6}" for k in errors)]
    for i, name in enumerate(names):
        row = "  ".join(f"{math.nan if values[i] is None else values[i]:<8.4f}" for values in errors.values())
        lines.append(f"{i:>5}  {name:<{width}}  {row}".rstrip())
    return "\n".join(lines)


def _with_residual(plan: TilePlan) -> list[str]:
    """What the plan costs with the cached residual, where it leaves anything out."""
    about = plan.provenance
    grid, extra = TokenGrid(*about["grid"]), about["extra_tokens"]
    densities = [pattern.flop_density(grid, extra) for pattern in plan.patterns]
    if min(densities) == 1.0:
        return []
    work = ", ".join(f"{every}: {work_of_plan(densities, every, STEPS):.0%}" for every in EVERY)
    return [f"With residual_every, for models that nobody distilled, in {STEPS} steps: {work} of dense"]
