"""The tiny world's table: its measures against truths that can be worked out, its order, and its chart."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from efficient_vdit_core.assets import recipe_path
from efficient_vdit_core.distill.config import read_section, read_toml
from efficient_vdit_core.distill.recipe import RecipeConfig
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tinyworld.chart import draw
from efficient_vdit_core.tinyworld.physics import frechet_distance, read_physics, start_spread
from efficient_vdit_core.tinyworld.table import TableConfig, TinyTable
from efficient_vdit_core.tinyworld.world import COLORS, DIRECTIONS, SPEEDS, random_scene, render


@pytest.mark.parametrize("seed", range(6))
def test_physics_of_a_true_clip_are_those_of_its_scene(seed):
    scene = random_scene(np.random.default_rng(seed))
    found = read_physics(render(scene))
    x, y, vx, vy, size, *color = found.state
    expected = np.array(DIRECTIONS[scene.direction]) * SPEEDS[scene.speed]
    np.testing.assert_allclose((vx, vy), expected, atol=0.06)
    np.testing.assert_allclose(
        (x, y), np.array(scene.start) - 0.5, atol=5.0
    )  # a triangle weighs a third of its radius lower
    assert scene.radius < size < 2 * scene.radius
    np.testing.assert_allclose(color, COLORS[scene.color], atol=1)
    assert 0.5 * SPEEDS[scene.speed] < found.motion <= SPEEDS[scene.speed] + 0.05
    assert found.flicker < 0.01


def test_flicker_and_stillness_are_seen():
    clip = render(random_scene(np.random.default_rng(0))).astype(np.int16)
    noisy = np.clip(clip + np.random.default_rng(1).integers(-6, 7, clip.shape), 0, 255).astype(np.uint8)
    assert 2.0 < read_physics(noisy).flicker < 6.0
    still = np.repeat(clip[:1], len(clip), axis=0).astype(np.uint8)
    assert read_physics(still).motion == pytest.approx(0.0, abs=1e-6)
    assert read_physics(np.full((5, 64, 64, 3), 9, np.uint8)).state is None


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(20_000, 3)) * [1.0, 10.0, 0.1]
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(real + [2.0, 0.0, 0.0], real) == pytest.approx(4.0, rel=0.05)
    assert frechet_distance(real * [3.0, 1.0, 1.0] - 2 * real.mean(0) * [1, 0, 0], real) == pytest.approx(4.0, rel=0.05)


def test_diversity_is_the_spread_within_a_caption():
    states = [np.array([0.0, 0, 9]), np.array([6.0, 8, 9]), np.array([5.0, 5, 1]), None]
    assert start_spread(states, [0, 0, 1, 1]) == pytest.approx((18 + 32) ** 0.5)
    assert start_spread([None], [0]) == 0.0


def make_table(tmp_path):
    values = read_toml(recipe_path("tiny"))
    table = read_section(TableConfig, values.pop("table"), "table")
    return TinyTable(table, RecipeConfig.from_dict(values), tmp_path)


def test_the_shipped_recipes_can_be_read(tmp_path):
    rows = [row.name for row in make_table(tmp_path).rows()]
    assert len(set(rows)) == len(rows)
    few = [f"consistency, {n} steps" for n in (4, 8, 20)]
    sparse = [name + end for name in ("searched r-0.1", "uniform 1:7") for end in ("", " + KD")]
    assert {"base, 100 steps", "base, 8 steps", *few, *sparse, "KD before consistency, x-2.3"} <= set(rows)
    headline = [row.name for row in make_table(tmp_path).rows() if row.headline]
    assert headline == ["base, 100 steps", "consistency, 8 steps", "searched x-2.3", "searched x-2.3 + KD"]
    assert RecipeConfig.from_dict(read_toml(recipe_path("three_stage"))).consistency.segments == 20


def test_speed_columns_follow_the_plan(tmp_path, monkeypatch):
    table = make_table(tmp_path)
    monkeypatch.setattr(
        "efficient_vdit_core.tinyworld.table.attention_speeds", lambda file, counts: {1: 3.0, 2: 2.0, 4: 1.25}
    )
    monkeypatch.setattr(table, "judge", lambda: type("J", (), {"model": type("M", (), {"layers": 6})}))
    plan = TilePlan.from_json('{"schema_version": 1, "reference_frames": [1, 1, 2, null, 4, 1]}')
    got = table._speed(plan)
    density = (3 * 22 + 34 + 64 + 52) / 64 / 6  # live tiles of 1:7, 2:6, full and 4:4
    assert got["sparsity"] == pytest.approx(1 - density) and got["attention_ideal_speedup"] == pytest.approx(
        1 / density
    )
    assert got["attention_measured_speedup"] == pytest.approx(6 / (3 / 3.0 + 1 / 2.0 + 1 + 1 / 1.25))
    assert table._speed(None)["attention_ideal_speedup"] == 1.0


def test_the_chart_shows_every_row_once():
    machine = {"hardware": "CPU <x>", "versions": {"torch": "2"}}
    row = {"agreement": 0.9, "sparsity": 0.0, "evaluations": 8}
    rows = [{"row": "base, 8 steps", **row}, {"row": "KD & more", **row, "sparsity": 0.6, "attention_ideal_speedup": 2.5},
            {"row": "base, 8 steps", **row, "agreement": 0.8}]  # fmt: skip
    svg = draw({"rows": rows, "machine": machine})
    texts = [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]
    assert texts.count("base, 8 steps") == 1 and "KD & more" in texts
    assert "85.0 %, 8 evaluations" in texts and "90.0 %, attention 2.5x less" in texts
