"""What several nodes share: the menu category and the socket type of a plan."""

from __future__ import annotations

from typing import Any, TypeVar

from comfy_api.latest import io

from ..efficient_vdit_core.plan import TilePlan

CATEGORY = "Efficient-vDiT"

Input = TypeVar("Input", bound=io.Input)

# Carries an efficient_vdit_core.plan.TilePlan between nodes.
Plan = io.Custom("EVDIT_PLAN")


def plan_ui(plan: TilePlan) -> dict[str, list[str]]:
    """What the page's chart of a plan is drawn from after a run: its text form. For ``NodeOutput(ui=...)``."""
    return {"evdit_plan": [plan.to_text()]}


def for_page(field: Input, **more: Any) -> Input:
    """An input with ``more`` for the page, in versions of ComfyUI too whose inputs take no such argument."""
    field.extra_dict = {**field.extra_dict, **more}
    return field
