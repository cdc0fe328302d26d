"""What several nodes share: the menu category and the socket type of a plan."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "Efficient-vDiT"

# Carries an efficient_vdit_core.tiles.TilePlan between nodes.
Plan = io.Custom("EVDIT_PLAN")
