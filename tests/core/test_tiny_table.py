"""The tiny world's table: its rows, their order, and its chart."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch

from efficient_vdit_core.assets import recipe_path
from efficient_vdit_core.commands import recipe
from efficient_vdit_core.distill.config import read_section, read_toml
from efficient_vdit_core.distill.runs.recipe import RecipeConfig
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.storage.rows_file import RowsFile
from efficient_vdit_core.tinyworld.moving.scene import held_out_scenes
from efficient_vdit_core.tinyworld.tables import judge
from efficient_vdit_core.tinyworld.tables.chart import draw
from efficient_vdit_core.tinyworld.tables.rows import kept
from efficient_vdit_core.tinyworld.tables.stages import TableConfig, TinyTable


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
        "efficient_vdit_core.tinyworld.tables.stages.attention_speeds", lambda file, counts: {1: 3.0, 2: 2.0, 4: 1.25}
    )
    monkeypatch.setattr(table, "judge", lambda: type("J", (), {"model": type("M", (), {"layers": 6})}))
    plan = TilePlan.from_json('{"schema_version": 1, "reference_frames": [1, 1, 2, null, 4, 1]}')
    got = table._speed(plan)
    density = (3 * 22 + 34 + 64 + 52) / 64 / 6  # live tiles of 1:7, 2:6, full and 4:4
    assert got["sparsity"] == pytest.approx(1 - density) and got["attention_ideal_speedup"] == pytest.approx(
        1 / density
    )
    assert got["attention_measured_speedup"] == pytest.approx(6 / (3 / 3.0 + 1 / 2.0 + 1 + 1 / 1.25))
    untimed = TilePlan.from_json('{"schema_version": 1, "reference_frames": [1, 1, 3, null, 4, 1]}')
    assert table._speed(untimed)["attention_measured_speedup"] is None
    for text in ("all:1~1", "all:1+2"):  # neighbours and mean frames cost what reference frames alone do not
        assert table._speed(TilePlan.from_text(text))["attention_measured_speedup"] is None
    assert table._speed(None)["attention_ideal_speedup"] == 1.0


def test_rows_of_other_settings_are_not_taken(tmp_path):
    table = make_table(tmp_path)
    (tmp_path / "seed-0" / "rows").mkdir(parents=True)
    (tmp_path / "seed-0" / "rows" / "bounds.json").write_text("[]")
    assert table.bounds() == []
    for name, value in (("captions", 5), ("guidance", 2.0), ("reference_steps", 50), ("students", (8,))):
        other = TinyTable(replace(table.table, **{name: value}), table.recipe, tmp_path)
        with pytest.raises(ValueError, match=f"rows was begun with other settings .{name}: "):
            other.bounds()
    more = TinyTable(replace(table.table, uniform=("3:5",), seeds=1), table.recipe, tmp_path)
    assert more.bounds() == [] and make_table(tmp_path).bounds() == []


def test_counts_that_were_not_timed_are_timed_then(tmp_path, monkeypatch):
    timed = []
    speeds = lambda counts: timed.append(counts) or {count: 1.5 for count in counts}  # noqa: E731
    monkeypatch.setattr(judge, "_time_speeds", speeds)
    file = tmp_path / "speeds.json"
    assert judge.attention_speeds(file, (1, 2)) == judge.attention_speeds(file, (2,)) == {1: 1.5, 2: 1.5}
    assert judge.attention_speeds(file, (3,)) == {1: 1.5, 2: 1.5, 3: 1.5} and timed == [[1, 2], [1, 2, 3]]


def test_latents_that_are_no_numbers_are_counted_and_their_row_can_be_read_again(tmp_path, monkeypatch):
    of, scenes = object.__new__(judge.Judge), held_out_scenes(3)
    of.scenes = scenes
    monkeypatch.setattr(of, "decode", lambda latents: [np.zeros((5, 64, 64, 3), np.uint8)] * len(latents))
    latents = torch.full((3, 2), 1e30)
    sound = of.figures(latents, torch.zeros(3, 2))
    assert sound["broken_clips"] == 0 and sound["endpoint_error"] == pytest.approx(1e30)
    latents[0, 0], latents[1, 1] = float("nan"), float("inf")
    found = of.figures(latents, torch.zeros(3, 2))
    assert found["broken_clips"] == 2 and found["endpoint_error"] is None
    row = lambda: {**found, "error": float("nan"), "of": [(float("inf"), 1.5)]}  # noqa: E731
    file = tmp_path / "row.json"
    first = kept(file, row)
    assert first == kept(file, row) and (first["error"], first["of"]) == (None, [[None, 1.5]])
    out = RowsFile(tmp_path / "all.json")
    out.finish({}, [row()])
    assert "NaN" not in out.file.read_text() and "Infinity" not in out.file.read_text()


def test_a_row_of_what_was_not_measured_is_said(capsys):
    recipe._say_row({"row": "a", "seed": 0, "all_right": 1.0, "all_right_interval": None, "motion": None})
    assert capsys.readouterr().out.split() == ["a", "1.000", *"------"]
    recipe._say_row({"row": "a", "seed": 0, "all_right": 1.0, "all_right_interval": [0.5, 1.0], "motion": 0.5})
    assert capsys.readouterr().out.split() == ["a", "1.000", "0.500-1.000", "-", "-", "0.500", "-", "-"]


def test_the_chart_shows_every_row_once():
    machine = {"hardware": "CPU <x>", "versions": {"torch": "2"}}
    row = {"all_right": 0.9, "sparsity": 0.0, "evaluations": 8}
    rows = [{"row": "base, 8 steps", **row}, {"row": "KD & more", **row, "sparsity": 0.6, "attention_ideal_speedup": 2.5},
            {"row": "base, 8 steps", **row, "all_right": 0.8}]  # fmt: skip
    svg = draw({"rows": rows, "machine": machine})
    texts = [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]
    assert texts.count("base, 8 steps") == 1 and "KD & more" in texts
    assert "85.0 %, 8 evaluations" in texts and "90.0 %, attention 2.5x less" in texts
