"""What several nodes share: the menu category and the socket type of a plan."""

from __future__ import annotations

from comfy_api.latest import io

from ..efficient_vdit_core.plan import TilePlan

CATEGORY = "Efficient-vDiT"

# Carries an efficient_vdit_core.plan.TilePlan between nodes.
Plan = io.Custom("EVDIT_PLAN")


def plan_ui(plan: TilePlan) -> dict[str, list[str]]:
    """What the page's chart of a plan is drawn from after a run: its text form. For ``NodeOutput(ui=...)``."""
    return {"evdit_plan": [plan.to_text()]}
