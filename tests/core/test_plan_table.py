"""The oracle of best tiles, and the table of plans on a small scale."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core import assets
from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.bench.oracle import OracleRecord, best_tiles
from efficient_vdit_core.cli import main
from efficient_vdit_core.distill.config import read_toml
from efficient_vdit_core.distill.runs.recipe import RecipeConfig
from efficient_vdit_core.search.errors import relative_error
from efficient_vdit_core.search.watch import make_watching_override
from efficient_vdit_core.storage.rows_file import RowsFile
from efficient_vdit_core.tiles import TilePattern, TokenGrid
from efficient_vdit_core.tinyworld.tables import residual, stages
from efficient_vdit_core.tinyworld.tables.plans import (
    AT_EQUAL_COST,
    BEST_TILES,
    KINDS,
    SPEEDUPS,
    PlanTable,
    PlanTableConfig,
    Row,
    run_plan_table,
)

LAYOUT = TokenLayout(TokenGrid(6, 1, 5), 2, 3)


def qkv(heads=3, sharp=1.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, LAYOUT.tokens, 16, generator=generator) for _ in range(3))
    return sharp * q, k, v


def test_all_tiles_are_dense_attention_and_few_are_no_worse_than_a_plan():
    tensors = qkv(sharp=2.0)
    exact = F.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(best_tiles(*tensors, LAYOUT, 1.0), exact)
    pattern = TilePattern(2)
    planned = relative_error(tile_attention(*tensors, LAYOUT, pattern), exact)
    errors = [relative_error(best_tiles(*tensors, LAYOUT, share), exact) for share in (0.2, pattern.density(6), 0.9)]
    assert errors[0] > errors[1] > errors[2] and errors[1] < planned


def test_attention_within_frames_keeps_the_diagonal():
    q, k, v = qkv()
    frame = F.one_hot(torch.arange(6).repeat_interleave(5), 16).float() * 30
    start, stop = LAYOUT.prefix, LAYOUT.tokens - LAYOUT.suffix
    q[:, :, start:stop] = k[:, :, start:stop] = frame
    got, want = best_tiles(q, k, v, LAYOUT, 1 / 6), tile_attention(q, k, v, LAYOUT, TilePattern(0))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_override_measures_and_leaves_the_run_alone():
    record = OracleRecord((0.5, 1.0))
    state = ForwardState(LAYOUT, depth=1, heads=3)
    options = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": {FORWARD_KEY: state}}
    tensors = qkv()
    out = make_watching_override(record.add)(
        lambda q, k, v, *_, **__: F.scaled_dot_product_attention(q, k, v), *tensors, 3, **options
    )
    assert torch.equal(out, F.scaled_dot_product_attention(*tensors))
    assert record.squared(1.0) < 1e-10 < record.squared(0.5) == record.errors[0, 0.5][0] ** 2


def test_a_watch_sees_no_masked_padding():
    padding = range(LAYOUT.tokens - 2, LAYOUT.tokens)
    mask = torch.zeros(1, 1, 1, LAYOUT.tokens)
    mask[..., list(padding)] = -torch.inf
    state, seen = ForwardState(LAYOUT, padding=padding), []
    options = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": {FORWARD_KEY: state}}

    def dense(q, k, v, heads, mask=None, **_):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    make_watching_override(lambda *call: seen.append(call))(dense, *qkv(), 3, mask=mask, **options)
    ((layer, *tensors, exact, layout),) = seen
    assert layer == 0 and layout.tokens == exact.shape[2] == LAYOUT.tokens - 2
    torch.testing.assert_close(best_tiles(*tensors, layout, 1.0), exact)


def test_a_clip_too_large_for_whole_scores_is_refused():
    layout = TokenLayout(TokenGrid(5, 1, 1000))
    with pytest.raises(ValueError, match="at most 4096"):
        best_tiles(*torch.zeros(3, 1, 1, layout.tokens, 8), layout, 0.5)


def test_the_rows_that_are_asked_for_alone(tmp_path):
    recipe = RecipeConfig.from_dict({k: v for k, v in read_toml(assets.recipe_path("tiny")).items() if k != "table"})
    config = PlanTableConfig(captions=1, noises=1, seeds=1, only=("by head, means, 2.3x less + KD", "dense"))
    rows = [row.name for row in PlanTable(config, recipe, tmp_path, 0).rows()]
    assert rows == ["dense", "by head, means, 2.3x less + KD"] and not config.wants(BEST_TILES)


def test_a_plan_table_is_checked_before_its_first_row(tmp_path):
    values = {k: v for k, v in read_toml(assets.recipe_path("tiny")).items() if k != "table"}
    values["knowledge_training"] = {**values["knowledge_training"], "optimizer": "muon"}
    values["model"] = {**values.get("model", {}), "train": "lora", "lora_rank": 4, "dtype": "float32"}
    with pytest.raises(ValueError, match="training.optimizer is muon.*rank 4"):
        recipe, out = RecipeConfig.from_dict(values), tmp_path / "a.json"
        run_plan_table(PlanTableConfig(seeds=1), recipe, tmp_path / "run", RowsFile(out), "", lambda row: None)
    assert not (tmp_path / "run").exists() and not out.exists()


FIGURES = {
    name: 1.0 for name in ("endpoint_error", "all_right", "motion", "overlap", "density", "squared_attention_error")
}


@pytest.mark.parametrize("table", ["tiny-plans", "tiny-table", "tiny-residual"])
def test_rows_so_far_stand_beside_older_results(tmp_path, monkeypatch, capsys, table):
    seen = []

    def measure(*given, **_):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(given)
        return {"row": "a", "seed": 0, "all_right_interval": (0, 1), **FIGURES}

    class Judge:
        def __init__(self, *_, **__): ...

        def sample(self, *_, **__): ...

        figures = measure

    monkeypatch.setattr(PlanTable, "measure", measure)
    monkeypatch.setattr(stages.TinyTable, "measure", measure)
    monkeypatch.setattr(stages.TinyTable, "bounds", lambda *_: [])
    monkeypatch.setattr(residual, "Judge", Judge)
    out, part = tmp_path / "a.json", tmp_path / "a.json.part"
    out.write_text("those of a whole run")
    folder = [] if table == "tiny-residual" else ["--out", str(tmp_path / "run")]
    assert main(["recipe", table, *folder, "--json", str(out)]) == 130
    assert out.read_text() == "those of a whole run" and f"rows so far in {part}" in capsys.readouterr().out
    found = json.loads(part.read_text())
    assert len(found["rows"]) == 2 and found["complete"] is False
    assert main(["recipe", table, *folder, "--json", str(tmp_path / "b.json")]) == 130
    assert "rows so far" not in capsys.readouterr().out


def test_rows_with_what_was_not_measured_are_said(tmp_path, monkeypatch, capsys):
    row = {"row": "a", "seed": 0, **FIGURES, "motion": None, "endpoint_error": None, "squared_attention_error": None}
    judge = type("Judge", (), {"__init__": lambda *_, **__: None, "sample": lambda *_, **__: None,
                               "figures": lambda *_: row})  # fmt: skip
    monkeypatch.setattr(PlanTable, "measure", lambda *_: row)
    monkeypatch.setattr(residual, "Judge", judge)
    plans = ["tiny-plans", "--out", str(tmp_path / "run"), "--seeds", "1", "--only", "dense"]
    for table in (plans, ["tiny-residual"]):
        assert main(["recipe", *table, "--json", str(tmp_path / "a.json")]) == 0
        assert " - " in capsys.readouterr().out


def test_a_whole_table_takes_the_place_of_older_results(tmp_path, monkeypatch):
    monkeypatch.setattr(PlanTable, "measure", lambda *_: {"row": "a", "seed": 0, **FIGURES})
    command, out = ["recipe", "tiny-plans", "--out", str(tmp_path / "run"), "--seeds", "1"], tmp_path / "a.json"
    out.write_text("older ones")
    assert main([*command, "--only", "dense", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 1 and found["complete"] is True and not out.with_name("a.json.part").exists()


def test_a_name_of_no_row_is_refused(tmp_path, capsys):
    command, out = ["recipe", "tiny-plans", "--out", str(tmp_path / "run")], tmp_path / "a.json"
    out.write_text("older ones")
    for only in (["nosuchrow"], ["dense", "--only", "+ KD", "--no-training"]):
        assert main([*command, "--json", str(out), "--only", *only]) == 2
        assert "which is in the name of no row that is measured here, such as" in capsys.readouterr().err
    assert out.read_text() == "older ones" and not (tmp_path / "run").exists()


def test_rows_are_judged_and_kept(tmp_path):
    recipe = RecipeConfig.from_dict({k: v for k, v in read_toml(assets.recipe_path("tiny")).items() if k != "table"})
    table = PlanTable(PlanTableConfig(captions=1, noises=1, seeds=1, train=False), recipe, tmp_path, 0)
    table.texts = table.texts[:2]
    rows = list(table.rows())
    assert len(rows) == 1 + len(KINDS) * len(SPEEDUPS) - 2 + sum(map(len, AT_EQUAL_COST.values())) and not any(
        row.trained for row in rows
    )
    dense, near = table.measure(rows[0]), table.measure(Row("by head, neighbours", 3.3))
    assert dense["endpoint_error"] == 0.0 and dense["density"] == 1.0
    assert near["density"] <= 1 / 3.3 + 1e-9 and "[" in near["plan"] and "~" in near["plan"]
    arrow = table.measure(Row("by layer", 3.3))
    assert 0 < near["squared_attention_error"] < arrow["squared_attention_error"]
    assert table.oracle()["squared_attention_error"]["3.3"] < near["squared_attention_error"]
    file = tmp_path / "seed-0" / "rows" / "by-layer-3.3x-less.json"
    file.write_text(json.dumps({**arrow, "all_right": 7}))
    assert table.measure(Row("by layer", 3.3))["all_right"] == 7  # a finished row is not computed again
    for other, changed in (
        (PlanTableConfig(captions=2, noises=1, seeds=1), recipe),
        (table.table, replace(recipe, knowledge=replace(recipe.knowledge, mlp=0.5))),
    ):
        with pytest.raises(
            ValueError, match=r"rows was begun with other settings \((captions|knowledge\.mlp): .*delete that folder"
        ):
            PlanTable(other, changed, tmp_path, 0).measure(Row("by layer", 3.3))
    moved = replace(recipe, data=replace(recipe.data, cache="elsewhere"))
    assert PlanTable(table.table, moved, tmp_path, 0).measure(Row("by layer", 3.3))["all_right"] == 7
    (tmp_path / "seed-0" / "rows" / "settings.json").unlink()  # as an earlier version left it
    assert table.measure(Row("by layer", 3.3))["all_right"] == 7
