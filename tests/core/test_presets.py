"""The plans that ship: marked as what they are, for a family that the pack knows, and worth their while."""

import ast
from pathlib import Path

import pytest

from efficient_vdit_core.assets import preset_names, preset_path
from efficient_vdit_core.plan import TilePlan

FAMILIES = Path(__file__).parents[2] / "nodes" / "comfy_bridge" / "families.py"


def known_families() -> set[str]:
    """The first argument of every row of the table, read without importing ComfyUI."""
    calls = [n for n in ast.walk(ast.parse(FAMILIES.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    return {ast.literal_eval(c.args[0]) for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Family"}


def test_every_family_has_a_preset_and_no_other():
    assert set(preset_names()) == known_families()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_marked_and_halves_the_attention(name):
    plan = TilePlan.load(preset_path(name))
    assert plan.family == name and plan.provenance["method"] == "preset, not searched"
    assert plan.frames and f"= {plan.frames} latent frames" in plan.provenance["chosen_for"]
    density = plan.pattern(5, 30).density(plan.frames)
    assert 0.4 <= density <= 0.6 and density == pytest.approx(plan.provenance["tile_density_there"], abs=6e-4)
    assert [plan.pattern(i, 30).k for i in (0, 1, 29)] == [None] * 3 and plan.pattern(2, 30).k == plan.pattern(28, 30).k
    assert TilePlan.from_text(plan.to_text()).patterns == plan.patterns


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset plan 'sora'"):
        preset_path("sora")
