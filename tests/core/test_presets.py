"""The plans that ship: marked as what they are, for a family that the pack knows, and worth their while."""

import ast
import re
from pathlib import Path

import pytest

from efficient_vdit_core.assets import preset_names, preset_path
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern

FAMILIES = Path(__file__).parents[2] / "nodes" / "comfy_bridge" / "families.py"


def known_families() -> set[str]:
    """The first argument of every row of the table, read without importing ComfyUI."""
    calls = [n for n in ast.walk(ast.parse(FAMILIES.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    return {ast.literal_eval(c.args[0]) for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Family"}


def plans() -> dict[str, TilePlan]:
    return {name: TilePlan.load(preset_path(name)) for name in preset_names()}


def test_every_family_has_a_preset_of_its_name_and_others_are_stronger():
    families = {plan.family for plan in plans().values()}
    assert families == known_families() and families <= set(preset_names())
    assert set(preset_names()) - families == {"minimax_h3_strong", *WITH_MEANS}


# From a model's usual length to the longest clip that a preset was chosen for it leaves about half of the tiles, a strong one a
# fifth. MiniMax-H3's distance of five is set by its latents and not by that share.
SHARES = {"minimax_h3": (0.37, 0.38), "minimax_h3_strong": (0.2, 0.21)}
WITH_MEANS = {f"{family}_means": family for family in ("hunyuan_video", "ltx_av", "minimax_h3", "wan")}


def density(plan: TilePlan, frames: int) -> float:
    return plan.pattern(5, 30).scaled(plan.frames, frames).density(frames)


USUAL = {"cogvideox": (13, 4), "hunyuan_video": (33, 8), "kandinsky5": (31, 8), "kandinsky6": (31, 8), "ltx_av": (16, 4),
         "ltx_video": (13, 4), "wan": (21, 6)}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_a_mild_preset_stays_as_mild_on_a_clip_of_twice_the_length(name):
    plan, (usual, k) = TilePlan.load(preset_path(name)), USUAL[name]
    assert plan.pattern(5, 30).scaled(plan.frames, usual).reference_frames(usual) == TilePattern(k).reference_frames(
        usual
    )
    assert density(plan, 2 * usual) >= 0.8 * density(plan, usual)


@pytest.mark.parametrize("name", WITH_MEANS)
def test_a_preset_with_means_computes_less_than_the_one_without_at_every_length(name):
    means, plain = (TilePlan.load(preset_path(each)) for each in (name, WITH_MEANS[name]))
    usual = USUAL.get(WITH_MEANS[name], (37, 0))[0]
    for frames in range(usual, means.frames + 1):
        assert 0.5 * density(plain, frames) <= density(means, frames) <= 0.96 * density(plain, frames), frames


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_marked_and_leaves_the_share_that_it_names(name):
    plan = TilePlan.load(preset_path(name))
    assert plan.provenance["method"] == "preset, not searched"
    assert plan.frames and f"= {plan.frames} latent frames" in plan.provenance["chosen_for"]
    assert density(plan, plan.frames) == pytest.approx(plan.provenance["tile_density_there"], abs=6e-4)
    usual = re.fullmatch(r".*= (\d+) latent frames: (\S+), (\S+) of the tiles", plan.provenance.get("usual_length", ""))
    if usual is not None:
        frames = int(usual[1])
        assert plan.pattern(5, 30).scaled(plan.frames, frames).name(frames) == usual[2]
        assert density(plan, frames) == pytest.approx(float(usual[3]), abs=6e-4)
    for frames in {plan.frames, int(usual[1])} if usual else {plan.frames}:
        plain = density(TilePlan.load(preset_path(WITH_MEANS[name])), frames) if name in WITH_MEANS else 0
        least, most = (0.2, 0.85 * plain) if plain else SHARES.get(name, (0.4, 0.6))
        assert least <= density(plan, frames) <= most
    assert [plan.pattern(i, 30).k for i in (0, 1, 29)] == [None] * 3 and plan.pattern(2, 30).k == plan.pattern(28, 30).k
    assert TilePlan.from_text(plan.to_text()).patterns == plan.patterns


@pytest.mark.parametrize(("name", "distance"), [("minimax_h3", 5), ("minimax_h3_strong", 10), ("minimax_h3_means", 10)])
@pytest.mark.parametrize("frames", [2, 7, 37, 72, 107])
def test_minimax_h3_s_reference_frames_hold_a_single_pixel_frame(name, distance, frames):
    """Of each five latent frames the first holds one pixel frame: clips of 17k + 5 frames are 5k + 2 latent ones."""
    plan = TilePlan.load(preset_path(name))
    pattern = plan.pattern(5, 50).scaled(plan.frames, frames)
    if not pattern.is_full(frames):
        assert pattern.reference_frames(frames) == tuple(range(0, frames, distance))


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset plan 'sora'"):
        preset_path("sora")
