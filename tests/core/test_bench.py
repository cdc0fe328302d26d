import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest
import torch

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.autotune.trial import Choice
from efficient_vdit_core.attention.backends import registry
from efficient_vdit_core.bench import (
    attention,
    blocks,
    bounds,
    dense,
    exactness,
    gpu,
    kernels,
    minimax_h3,
    overhead,
    paper,
    step,
    timed_models,
    turns,
    wan,
)
from efficient_vdit_core.bench.bounds import preset_bounds
from efficient_vdit_core.bench.dense import peak_flops
from efficient_vdit_core.bench.machine import describe_machine, peak_extra_bytes
from efficient_vdit_core.bench.mixture_score import energy_distance
from efficient_vdit_core.bench.plot import draw
from efficient_vdit_core.bench.rounds import Rounds
from efficient_vdit_core.cli import main
from efficient_vdit_core.commands import ISSUES
from efficient_vdit_core.commands import bench as commands
from efficient_vdit_core.commands.bench.verdict import Verdict
from efficient_vdit_core.tiles import TilePattern, TokenGrid

SHAPE = attention.Shape(5, 37, 2, 64, "float32", (1, 2))
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_rows_say_what_was_run_and_how_exact_it_is():
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))
    assert [(r["pattern"], r["backend"]) for r in rows] == [("full", "sdpa"), ("1:4", "frames"), ("2:3", "frames")]
    assert rows[0]["speedup"] == 1.0 and rows[0]["ideal_speedup"] == 1.0
    assert rows[1]["ideal_speedup"] == pytest.approx(25 / 13)
    for row in rows:
        assert row["max_relative_error"] < 1e-5 and row["milliseconds"] > 0
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ideal_speedup"])


def test_a_wrong_result_shows_in_the_error(monkeypatch):
    monkeypatch.setattr(
        attention, "tile_attention", lambda q, k, v, *_, **__: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    )
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))
    assert rows[0]["max_relative_error"] < 1e-5 and min(r["max_relative_error"] for r in rows[1:]) > 0.05


def failing(monkeypatch, backend):
    """That backend raises as a kernel's launch does, which is no RuntimeError."""
    attend = attention.tile_attention

    class OutOfResources(Exception):
        pass

    def tile_attention(*args, **how):
        if how["backend"] == backend:
            raise OutOfResources("shared memory,\nRequired: 114688")
        return attend(*args, **how)

    monkeypatch.setattr(attention, "tile_attention", tile_attention)
    return "OutOfResources: shared memory, Required: 114688"


def test_a_backend_that_fails_costs_no_other_its_times(monkeypatch, tmp_path, capsys):
    why = failing(monkeypatch, "parts")
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("parts", "frames"))
    assert [(r["pattern"], r["backend"]) for r in rows if "speedup" in r] == [
        ("full", "sdpa"), ("1:4", "frames"), ("2:3", "frames")
    ]  # fmt: skip
    assert [(r["pattern"], r["backend"], r["error"]) for r in rows if "error" in r] == [
        ("1:4", "parts", why), ("2:3", "parts", why)
    ]  # fmt: skip
    assert draw({"rows": rows, "machine": describe_machine(CPU)}).count("frames, ") == 2
    monkeypatch.setattr(attention, "presets", lambda: {"cpu": [SHAPE]})
    command = ["bench", "attention", "--device", "cpu", "--repeats", "1", "--backends"]
    assert main([*command, "parts", "frames"]) == 0
    said = capsys.readouterr().out
    assert said.count(why) == 2 and "geometric mean of 2 rows" in said
    assert main([*command, "parts"]) != 0
    assert f"No backend runs here: {why}" in capsys.readouterr().err


def test_without_any_dense_attention_there_is_nothing_to_compare_with(monkeypatch):
    def broken(q, k, v):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "dense_functions", lambda q: {"sdpa": broken})
    with pytest.raises(RuntimeError, match="No dense attention runs here .*RuntimeError: no kernel image"):
        attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))


def test_others_sparse_attention_is_not_in_the_mean_of_ours(monkeypatch, capsys):
    def other(q, k, v, share):
        return q

    monkeypatch.setattr(attention, "routed_functions", lambda q: {"kitchen sla": other})
    monkeypatch.setattr(attention, "presets", lambda: {"cpu": [SHAPE]})
    assert main(["bench", "attention", "--device", "cpu", "--repeats", "1", "--backends", "frames"]) == 0
    said = capsys.readouterr().out
    assert said.count("kitchen sla") == 2 and "geometric mean of 2 rows" in said


def test_dense_attention_beside_a_pattern_counts_as_dense(monkeypatch, capsys):
    """It computes every tile, and nothing of it is a share of the pattern's ideal."""
    monkeypatch.setattr(attention, "presets", lambda: {"cpu": [SHAPE]})
    asked = ["bench", "attention", "--device", "cpu", "--repeats", "1", "--backends"]
    assert main([*asked, "dense"]) == 0 and "geometric mean" not in capsys.readouterr().out
    assert main([*asked, "frames", "dense"]) == 0 and "geometric mean of 2 rows" in capsys.readouterr().out
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("dense",))
    assert {row["backend"] for row in rows[1:]} == {"dense"}
    work = [row["tflops_per_second"] * row["milliseconds"] for row in rows]
    assert work == pytest.approx([work[0]] * len(rows))


def test_the_paper_preset_is_table_1():
    shapes = attention.presets()["paper"]
    rows = {(s.frames, k) for s in shapes for k in (None, *s.references)}
    assert rows == set(paper.MILLISECONDS) and len(rows) == 11
    assert paper.speedup(24, 3) == pytest.approx(3.67, abs=0.005)
    assert paper.speedup(21, 3) is None


def test_the_cpu_grid_is_complete():
    grid = attention.presets()["cpu"]
    assert {s.frames for s in grid} == {8, 21, 24} and min(s.tokens for s in grid) >= 400
    assert {s.dtype for s in grid} == {"float32", "bfloat16"} and {s.references for s in grid} == {(1, 2, 3, 4)}


def test_tokens_before_the_video_are_computed_and_counted():
    shape = attention.Shape(5, 37, 2, 64, "float32", (1,), prefix=29)
    dense, sparse = attention.measure(shape, CPU, repeats=1, seed=0, backends=("frames",))
    assert max(dense["max_relative_error"], sparse["max_relative_error"]) < 1e-5
    assert sparse["ideal_speedup"] == pytest.approx(1 / TilePattern(1).flop_density(shape.layout.grid, 29))


def test_minimax_h3_s_clips_are_those_of_its_own_nodes():
    """frames, tokens of a frame, tokens before the video: clips of 17 n + 5 frames, 32 x 32 pixels, 40 sounds a second."""
    found = {(s.frames, s.tokens, s.prefix) for s in attention.presets()["h3"]}
    five = {(37, 1008, 714), (72, 1008, 1110), (107, 1008, 1506)}
    assert found == five | {(37, 1008, 714 + 2016), (37, 1008, 714 + 37 * 1008 + 414)}
    assert {s.references for s in attention.presets()["h3"]} == {(8, 4, 1), (15, 8, 1), (22, 11, 1)}
    assert minimax_h3.WEIGHTS_PER_BLOCK * minimax_h3.DEPTH == pytest.approx(19.27e9, rel=1e-3)


@pytest.mark.parametrize(
    ("clip", "share", "bounds"),
    [
        ("864x480-5s", 0.37, (1.45, 1.41, 1.35, 1.25)),
        ("1344x768-5s", 0.59, (2.08, 1.96, 1.77, 1.50)),
        ("1344x768-10s", 0.73, (3.14, 2.96, 2.24, 1.78)),
        ("1344x768-15s", 0.80, (4.15, 3.92, 2.64, 1.95)),
        ("1920x1088-15s", 0.89, (6.87, 6.18, 3.33, 2.21)),
    ],
)
def test_minimax_h3_s_bounds_are_amdahl_s(clip, share, bounds):
    rows = minimax_h3.bounds(minimax_h3.CLIPS[clip])
    assert rows[0]["attention_share"] == pytest.approx(share, abs=0.006)
    assert [r["bound"] for r in rows] == pytest.approx(bounds, abs=0.011)
    assert all(r["bound_with_int8_attention"] < r["bound"] for r in rows)


def test_a_preset_s_bound_counts_its_dense_layers():
    """Wan 14B, 81 frames of 1280x720: 6:15 in 37 of 40 layers."""
    row, means = preset_bounds("wan_14b", "1280x720-81f")
    tiles = 1 - 15 * 14 / 21**2
    assert row["attention_left"] == pytest.approx((37 * tiles + 3) / 40) and row["pattern"] == "6:15"
    share = row["attention_share"]
    assert row["bound"] == pytest.approx(1 / (1 - share * (1 - row["attention_left"]))) and 0.6 < share < 0.8
    assert row["int8_alone"] == pytest.approx(1 / (1 - share / 2)) and 1 < row["with_int8"] < row["bound"]
    assert means["pattern"] == "2:19~1+3" and means["attention_left"] < row["attention_left"]
    h3 = {r["preset"]: r for r in preset_bounds("minimax_h3", "1344x768-10s")}
    assert h3["minimax_h3"]["pattern"] == "15:57" and h3["minimax_h3_strong"]["pattern"] == "8:64"


def test_one_block_of_minimax_h3(monkeypatch, capsys, tmp_path):
    """At a small width, so that it is quick; the real one is the same code."""
    from diffusers import MiniMaxH3Transformer3DModel as Real

    small = Real(num_layers=1, num_refiner_layers=1, text_dim=64, time_embed_hidden_dim=8, time_embed_dim=4, hidden_size=16,
                 num_attention_heads=2, attention_head_dim=16, ffn_dim=16, rope_freq_dim=2, freq_dim=8)  # fmt: skip
    monkeypatch.setattr(minimax_h3, "_model", lambda depth: small)
    file = tmp_path / "h3.json"
    main(["bench", "step", "--model", "minimax_h3", "--size", "64x64-tiny", "--depth", "1", "--references", "2", "--dtype", "float32",
          "--repeats", "1", "--device", "cpu", "--json", str(file)])  # fmt: skip
    rows = [r for r in json.loads(file.read_text())["rows"] if r["kind"] == "measured"]
    assert [r["pattern"] for r in rows] == ["full", "2:5"] and all(r["seconds"] > 0 for r in rows)
    assert rows[0]["bound"] == 1.0 < rows[1]["bound"] and "at most" in capsys.readouterr().out


def test_the_model_of_rounds_meets_what_an_h200_took():
    """Measured where `parts` held a quarter of the output beyond it; more of it never takes longer."""
    rows = json.loads((ROOT / "efficient_vdit_core/bench/results/h200/attention_alone.json").read_text())["rows"]
    off, gained = [], []
    for shape in [shape for name in ("paper", "wan", "h3") for shape in attention.presets()[name]]:
        sizes = (shape.frames, shape.tokens, shape.prefix)
        alike = [r for r in rows if (r["frames"], r["tokens_per_frame"], r["prefix"]) == sizes]
        for k in shape.references if alike else ():
            (dense,) = [r["milliseconds"] for r in alike if r["backend"] == "cudnn_attention"]
            took = [r for r in alike if (r["backend"], r["pattern"]) == ("parts", TilePattern(k).name(shape.frames))]
            model, output = Rounds.measured(132, shape, dense), 2 * shape.heads * shape.layout.tokens * shape.head_dim
            less, more = model.parts(shape, k, max(2**26, output // 4)), model.parts(shape, k, output)
            off += [abs(less / row["milliseconds"] - 1) for row in took]
            gained += [1 - more / less for _ in took]
    assert len(off) == 23 and statistics.median(off) < 0.05 and max(off) < 0.14
    assert all(gain >= 0 for gain in gained) and max(gained) > 0.15


def test_one_block_of_wan_14b(monkeypatch, capsys, tmp_path):
    import diffusers

    Real = diffusers.WanTransformer3DModel  # noqa: N806
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 16,
        "freq_dim": 8,
        "text_dim": wan.TEXT_WIDTH,
    }
    monkeypatch.setattr(diffusers, "WanTransformer3DModel", lambda num_layers: Real(num_layers=num_layers, **small))
    tiny = replace(bounds.MODELS["wan_14b"], clips={"tiny": TokenLayout(TokenGrid(5, 2, 3))})
    monkeypatch.setitem(bounds.MODELS, "wan_14b", tiny)
    file = tmp_path / "wan.json"
    step_of = "bench step --model wan_14b --size tiny --references 1 7 --dtype float32 --repeats 1".split()
    main([*step_of, "--depth", "1", "--device", "cpu", "--json", str(file)])
    rows = [r for r in json.loads(file.read_text())["rows"] if r["kind"] == "measured"]
    assert [r["pattern"] for r in rows] == ["full", "1:4"] and all(r["seconds"] > 0 for r in rows)
    assert rows[0]["tokens"] == 30 and rows[0]["bound"] == 1.0 < rows[1]["bound"]
    said = capsys.readouterr().out
    assert "measured, 1 of 40 blocks" in said
    assert "not timed: 7 reference frames of the clip's 5 leave nothing out" in said


def test_references_that_leave_nothing_out_are_refused_where_there_are_no_others(monkeypatch, capsys):
    monkeypatch.setitem(step.SIZES, "tiny", (5, 4, 6))
    asked = "bench step --size tiny --depth 1 --device cpu --references 4 9".split()
    assert main(asked) == 2
    assert "--references is 4 9, expected less than 4 of the clip's 5 latent frames" in capsys.readouterr().err


def test_one_step_of_a_shallow_model(monkeypatch):
    monkeypatch.setitem(step.SIZES, "tiny", (5, 4, 6))
    rows = step.measure(step.StepShape("tiny", 1, (1,), "float32"), CPU, repeats=1, seed=0)
    assert [r["pattern"] for r in rows] == ["full", "1:4"] and rows[0]["tokens"] == 30
    assert 0 < rows[0]["attention_share"] < 1 <= rows[1]["amdahl_bound"] <= rows[1]["ideal_attention_speedup"]


def test_peak_memory_sees_what_was_held_for_a_moment():
    extra = peak_extra_bytes(lambda: torch.ones(64 * 2**20, dtype=torch.uint8).numel(), CPU)
    assert extra is None or 60 * 2**20 <= extra <= 70 * 2**20


def test_memory_is_not_told_where_the_system_does_not(monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refused)
    assert peak_extra_bytes(lambda: 1, CPU) is None


def test_what_a_training_sets_up_is_not_in_its_steps(monkeypatch):
    monkeypatch.setattr(gpu, "_trained", lambda run, method, steps, batch: 5.0 + 0.5 * steps)
    monkeypatch.setattr(gpu, "_searched", lambda run, captions, batch: 5.0 + 0.25 * captions)
    run = SimpleNamespace(small=False, in_time=list)
    for row in itertools.chain(*gpu.training(cast(gpu.Run, run))):
        assert row["setup_seconds"] == pytest.approx(5.0)


def test_overheads_are_named():
    rows = overhead.measure(2)
    assert [r["limit"] for r in rows] == [100.0, 5.0, 5.0, 5.0, 5.0] and all(r["milliseconds"] > 0 for r in rows)


def test_a_search_by_head_takes_at_most_half_more_than_one_by_layer():
    (row,) = overhead.measure_search(1)
    (kept,) = json.loads((ROOT / "efficient_vdit_core/bench/results/search_by_head.json").read_text())["rows"]
    assert row["bytes"] <= row["bytes_limit"] and kept["bytes"] <= kept["bytes_limit"]
    assert 0 < kept["milliseconds"] <= kept["limit"]


def test_the_chart_is_valid_and_drawn_to_scale():
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))
    rows[1].update(speedup=2.0, ideal_speedup=4.0, paper_speedup=1.0)
    svg = ET.fromstring(draw({"machine": describe_machine(CPU), "rows": rows[:2]}))
    widths = [
        float(r.get("width")) for r in svg.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") in ("12", "6")
    ]
    assert widths == pytest.approx([300, 150, 600], abs=0.1)


def test_the_chart_of_the_paper_s_rows_has_the_fastest_of_our_backends():
    (row,) = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))[1:2]
    kinds = [("frames", 2.0, 3.0), ("parts", 2.5, 3.0), ("kitchen sla", 9.0, 3.0), ("triton", 8.0, None)]
    rows = [{**row, "backend": name, "speedup": times, "paper_speedup": paper} for name, times, paper in kinds]
    chart = draw({"machine": describe_machine(CPU), "rows": rows}, only_paper=True)
    assert "2.50x" in chart and not any(f"{times:.2f}x" in chart for times in (2.0, 9.0, 8.0))
    kept = json.loads((ROOT / "efficient_vdit_core/bench/results/h200/attention_alone.json").read_text())
    assert draw(kept, only_paper=True).count("24 x 96") == 9
    with pytest.raises(ValueError, match="no row of the paper's Table 1.*--preset paper"):
        draw({"machine": describe_machine(CPU), "rows": rows[3:]}, only_paper=True)
    with pytest.raises(ValueError, match="no sparse row.*bench attention --json"):
        draw({"machine": describe_machine(CPU), "rows": []})


def test_the_commands_write_results_and_chart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "presets", lambda: {"cpu": [SHAPE]})
    results = tmp_path / "r.json"
    assert main(["bench", "attention", "--repeats", "1", "--device", "cpu", "--json", str(results)]) == 0
    kept = json.loads(results.read_text())
    assert (
        kept["machine"]["versions"]["torch"] == torch.__version__
        and kept["seed"] == 0
        and kept["command"].startswith("evdit ")
    )
    assert "geometric mean of" in capsys.readouterr().out
    assert main(["bench", "plot", str(results)]) == 0 and results.with_suffix(".svg").read_text().startswith("<svg")
    results.with_suffix(".svg").unlink()
    results.with_suffix(".svg").symlink_to(results)
    chart = ["recipe", "tiny-table", "--out", str(tmp_path / "runs"), "--json", str(results), "--chart"]
    for command in (["bench", "plot", str(results)], ["bench", "plot", str(results), "--out", str(results)],
                    [*chart, str(results)], [*chart, str(results.with_suffix(".svg"))]):  # fmt: skip
        assert main(command) == 2 and json.loads(results.read_text()) == kept
        assert re.search("must end in .svg|the file of the results", capsys.readouterr().err)


def test_ranks_are_timed_with_whole_and_with_shared_out_weights(tmp_path, capsys, monkeypatch):
    """Six blocks on two ranks: the same bits, from half of the weights and room for two whole blocks."""
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = tmp_path / "r.json"
    small = ["--grid", "4", "2", "2", "--heads", "1", "--depth", "6", "--references", "1", "--repeats", "1"]
    assert main(["bench", "parallel", "--device", "cpu", *small, "--json", str(results)]) == 0
    rows = [row for row in json.loads(results.read_text())["rows"] if row["kind"] == "measured"]
    found = {(row["pattern"], row["scheme"], row["weights"]): row for row in rows}
    assert len(found) == len(rows) == 3 + 4
    for pattern, scheme in (("full", "ulysses"), ("1:3", "rb")):
        whole, sharded = (found[pattern, scheme, weights] for weights in ("whole", "sharded"))
        assert "weight_bytes_gathered" not in whole and sharded["bytes_per_layer"] == whole["bytes_per_layer"]
        held = whole["weight_bytes"] * (1 / 2 + 2 / 6)
        assert sharded["weight_bytes"] == pytest.approx(held, rel=0.01)
        assert sharded["weight_bytes_gathered"] == pytest.approx(whole["weight_bytes"] / 2, rel=0.01)
        assert sharded["seconds_over_whole"] == pytest.approx(sharded["seconds"] / whole["seconds"])
    assert "of the time with whole ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attention", "--frames", "7"], "No shape of the preset"),
        (["attention", "--repeats", "0"], "--repeats: it is '0', expected a whole number from 1 to 10,000"),
        (["attention", "--json", "/nowhere/x.json"], "does not exist"),
        (["attention", "--heads", "0"], "--heads: it is '0'"),
        (["parallel", "--depth", "0"], "--depth: it is '0'"),
        (["parallel", "--ranks", "1,99"], "numbers up to 64"),
        (["parallel", "--grid", "4096", "4096", "4096"], "TiB of memory"),
        (["parallel", "--preset", "h3", "--ranks", "1,64"], "72 x 24 x 42 tokens with 56 heads, on 64 ranks"),
        (["mixture", "--segments", "-1"], "--segments: it is '-1'"),
        (["mixture", "--pairs", "--score"], "--score: not allowed with argument --pairs"),
        (["mixture", "--pairs", "--segments", "8"], "--segments is given with --pairs, which has its own"),
        (["mixture", "--segments", "8", "--score"], "--segments is given with --score, which has its own"),
        (["overhead", "--seed", "1" * 5000], "--seed: it is '111"),
        (["step", "--device", "meta", "--depth", "1"], "'meta' cannot be used"),
        (["plot", "gone.json"], "'gone.json' is no file"),
        (["step", "--depth", "99"], "--depth: it is '99'"),
    ],
)
def test_mistakes_are_named_before_anything_is_timed(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"), [("fraems", "backend is 'fraems', expected auto, dense, "), ("triton", "which cannot run here: ")]
)
def test_backends_are_checked_before_dense_attention_is_timed(monkeypatch, capsys, name, says):
    here = [replace(status, available=status.name != "triton") for status in registry.available_backends("cpu")]
    monkeypatch.setattr(registry, "statuses_on", lambda device: {status.name: status for status in here})
    monkeypatch.setattr(attention, "measure", lambda *_, **__: pytest.fail("it began"))
    assert main(["bench", "attention", "--device", "cpu", "--backends", "frames", name]) == 2
    assert says in capsys.readouterr().err


def test_the_backend_of_heads_is_checked_before_dense_attention_is_timed(monkeypatch, capsys):
    from efficient_vdit_core.bench import heads

    here = [replace(status, available=status.name != "triton") for status in registry.available_backends("cpu")]
    monkeypatch.setattr(registry, "statuses_on", lambda device: {status.name: status for status in here})
    monkeypatch.setattr(heads, "measure", lambda *_, **__: pytest.fail("it began"))
    assert main(["bench", "heads", "--device", "cpu", "--backend", "triton"]) == 2
    assert "which cannot run here: " in capsys.readouterr().err


def test_a_file_that_is_no_result_is_named(tmp_path, capsys):
    for text in ("{", "{}", '{"rows": []}'):
        (tmp_path / "x.json").write_text(text)
        assert main(["bench", "plot", str(tmp_path / "x.json")]) == 2
    assert "x.json is no results file" in capsys.readouterr().err


def test_heads_that_differ_are_timed_against_dense_attention(monkeypatch, tmp_path):
    from efficient_vdit_core.bench import heads

    monkeypatch.setattr(heads, "SHAPES", ((6, 5, 4, 16),))
    out = tmp_path / "heads.json"
    assert main(["bench", "heads", "--repeats", "1", "--device", "cpu", "--backend", "parts", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * len(heads.NEAR) * len(heads.GROUPS)
    assert all(row["efficiency"] == pytest.approx(row["speedup"] * row["density"]) for row in rows)
    assert {row["density"] for row in rows if (row["window"], row["means"], row["groups"]) == (0, 0, 1)} == {
        TilePattern(1).density(6)
    }


def test_rows_that_were_measured_outlive_ctrl_c(monkeypatch, capsys, tmp_path):
    from efficient_vdit_core.bench import heads

    kept, seen = heads.measure, []

    def interrupted(*args, **choices):
        for row in kept(*args, **choices):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(row)
            yield row

    monkeypatch.setattr(heads, "SHAPES", ((6, 5, 4, 16),))
    monkeypatch.setattr(heads, "measure", interrupted)
    out = tmp_path / "heads.json"
    out.write_text("those of a whole run")
    assert main(["bench", "heads", "--repeats", "1", "--device", "cpu", "--json", str(out)]) == 130
    found = json.loads((tmp_path / "heads.json.part").read_text())
    assert found["rows"] == seen and len(seen) == 2 and found["complete"] is False
    said = capsys.readouterr()
    assert "heads.json.part" in said.out and "what was finished before stays" in said.err
    assert out.read_text() == "those of a whole run"


def test_what_a_bench_finds_wrong_is_told_behind_all_its_rows(monkeypatch, tmp_path, capsys):
    def faulty(args, device):
        yield [{"passed": False}]
        raise Verdict("A config has a fault.")

    monkeypatch.setattr(commands.BENCHES["compile"], "run", faulty)
    out = tmp_path / "compiled.json"
    assert main(["bench", "compile", "--json", str(out)]) == 2
    assert json.loads(out.read_text())["complete"] is True and [file.name for file in tmp_path.iterdir()] == [out.name]
    assert "A config has a fault." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "heard"), [("heads", {"repeats": 1, "seed": 5}), ("overhead", {"repeats": 1}), ("mixture", {"seed": 5})]
)
def test_a_results_file_names_the_settings_that_its_bench_hears(monkeypatch, tmp_path, bench, heard):
    row = {"efficiency": 1.0}
    monkeypatch.setattr(commands.BENCHES[bench], "run", lambda args, device: iter([[row], [row]]))
    out = tmp_path / "r.json"
    assert main(["bench", bench, "--repeats", "1", "--seed", "5", "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {name: found[name] for name in ("repeats", "seed") if name in found} == heard
    assert found["complete"] is True and found["rows"] == [row, row]


def test_the_energy_distance_of_one_distribution_is_0_in_the_mean():
    """Of 200 pairs of samples; with each point a pair of itself it would be 0.053, 27 deviations of the mean above 0."""
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([energy_distance(*torch.randn(2, 64, 2, generator=generator)) for _ in range(200)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / 200**0.5
    apart = energy_distance(torch.zeros(9, 2), torch.tensor([3.0, 4.0]).expand(9, 2))
    assert apart == pytest.approx(10)


def test_ctrl_c_leaves_the_parts_that_were_measured_and_says_where(monkeypatch, capsys, tmp_path):
    def interrupted(run):
        yield [{"seconds": 1.0}]
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, "memory", (interrupted, 1.0))
    asked = ["bench", "gpu", "--device", "cpu", "--parts", "memory", "--out", str(tmp_path)]
    assert main(asked) == 130
    told = capsys.readouterr()
    assert f"results so far in {tmp_path}" in told.out and not told.err
    assert json.loads((tmp_path / "memory.json").read_text())["rows"] == [{"seconds": 1.0}]


def asked_for(part, folder):
    return ["bench", "gpu", "--device", "cpu", "--out", str(folder), "--parts", part]


def test_a_check_that_raises_is_not_exact(monkeypatch, capsys, tmp_path):
    def raises(run):
        yield [{"backend": "parts", "passed": True}]
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.PARTS, "exact", (raises, 0.22))
    assert main(asked_for("exact", tmp_path)) == 2
    assert "Not exact here: the check failed" in capsys.readouterr().err


@pytest.mark.parametrize(("spent", "why"), [(9.0, "cut: its share"), (11.0, "not begun: the budget")])
def test_a_check_without_time_is_not_complete_which_is_no_fault(monkeypatch, capsys, tmp_path, spent, why):
    monkeypatch.setattr(gpu.Run, "spent", spent)
    assert main([*asked_for("exact", tmp_path), "--budget", "10"]) == 0
    told = capsys.readouterr()
    assert f"not complete: exact: {why}" in told.out and not told.err


def test_parts_run_in_their_order_and_once(monkeypatch, tmp_path):
    ran = []
    for name in ("machine", "memory"):
        monkeypatch.setitem(gpu.PARTS, name, (lambda run, name=name: ran.append(name) or iter(()), 1.0))
    main([*asked_for("memory", tmp_path), "machine", "memory"])
    assert ran == ["machine", "memory"]


def test_parts_that_lack_a_package_are_named_before_the_first_and_left_out(monkeypatch, capsys, tmp_path):
    for module in ("diffusers", "accelerate"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(gpu, "TESTS", tmp_path / "none")
    ran = []
    for name in ("machine", "stock_steps", "training", "tests"):
        monkeypatch.setitem(gpu.PARTS, name, (lambda run, name=name: ran.append(name) or iter([[{"seconds": 1}]]), 1.0))
    assert main([*asked_for("machine", tmp_path), "stock_steps", "training", "tests"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "stock_steps: left out, because diffusers is not installed"
    assert lines[0] == "training: left out, because accelerate is not installed"
    assert lines[1].endswith(" -m pip install diffusers accelerate")
    assert lines[2] == "tests: left out, because tests/gpu is not here; use a clone"
    assert lines[3].startswith("machine: ") and lines[-1] == f"Please send the folder: {ISSUES}"
    assert "not complete: training: left out: without accelerate" in lines
    assert ran == ["machine", "tests"]


NEED_DIFFUSERS = ["stock_steps", "training"]


@pytest.mark.parametrize(
    "parts", [[p for p in gpu.PARTS if p not in NEED_DIFFUSERS], NEED_DIFFUSERS], ids=["bare", "diffusers"]
)
def test_one_command_tells_all_that_a_gpu_can(tmp_path, parts):
    """On a CPU, with shapes that say nothing about speed: every part runs and leaves a file that names the machine; all but
    two where diffusers is not installed. Most of the time is patience with a busy machine."""
    without = "import sys; sys.modules['diffusers'] = None" if parts != NEED_DIFFUSERS else ""
    code = f"{without}\nfrom efficient_vdit_core.cli import main\nraise SystemExit(main())"
    command = [sys.executable, "-c", code, "bench", "gpu", "--device", "cpu", "--budget", "600", "--parts", *parts]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(parts)
    for name, state in found.items():
        assert state["complete"] and state["rows"] and state["machine"]["versions"]["torch"] == torch.__version__, name
        assert state["command"].startswith("evdit bench gpu --device cpu --budget 600 --parts"), name
    if "profiles" in parts:
        for row in found["profiles"]["rows"]:
            times = [kernel["milliseconds"] for kernel in row["kernels"]]
            assert times == sorted(times, reverse=True) and 0 < sum(times) <= row["kernel_milliseconds"] * 1.001
            assert any("attention" in kernel["name"] for kernel in row["kernels"]) and row["host_milliseconds"] > 0
    if "exact" in parts:
        assert all(row["passed"] for row in found["exact"]["rows"])
        assert {"frames", "parts"} <= {row["backend"] for row in found["exact"]["rows"]}
        assert found["tests"]["rows"] == [
            {"exit_code": 5, "report": "tests_gpu.xml"}
        ]  # nothing runs there without a GPU


@pytest.fixture
def fake_parts(monkeypatch):
    """Parts that need no time: one that fails after a row, one that goes on for ever, one behind both."""
    monkeypatch.setattr(gpu, "PARTS", {})

    @gpu.part(0.2)
    def fails(run):
        yield [{"row": 1}, {"row": 2}]
        raise RuntimeError("no kernel image")

    @gpu.part(0.5)
    def endless(run):
        for number in run.in_time(itertools.count()):
            yield [{"row": number}]

    @gpu.part(0.5)
    def late(run):
        yield [{"row": "the only one"}]

    @gpu.part(1.0)
    def last(run):
        yield [{"row": run.rows["fails"][0]["row"]}]

    ticks = iter(range(10**6))
    return lambda: next(ticks)


def test_a_part_that_fails_or_takes_long_costs_no_other(fake_parts, tmp_path):
    run = gpu.Run(CPU, 0, 100, tmp_path, fake_parts)
    gpu.run_parts(run, list(gpu.PARTS), lambda name, row: None)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found["fails"]["rows"] == [{"row": 1}, {"row": 2}]
    assert found["fails"]["error"] == "RuntimeError: no kernel image"
    assert [name for name in gpu.PARTS if not found[name]["complete"]] == ["fails", "endless"] == list(run.incomplete)
    assert 10 < len(found["endless"]["rows"]) <= 50
    assert found["late"]["rows"] == [{"row": "the only one"}] and found["last"]["rows"] == [{"row": 1}]


def test_what_fails_in_a_part_costs_it_no_other_row(monkeypatch, tmp_path):
    """A backend whose kernel does not launch, and a model that diffusers does not have yet."""
    run = gpu.Run(CPU, 0, 100, tmp_path)
    monkeypatch.setattr(gpu, "SMALL", gpu.SMALL[:1])
    why = failing(monkeypatch, "parts")
    monkeypatch.setattr(gpu, "tile_attention", attention.tile_attention)

    def missing(*_, **__):
        raise ImportError("cannot import name 'MiniMaxH3Transformer3DModel'")

    monkeypatch.setattr(
        timed_models, "MEASURES", {"minimax_h3": missing, "wan_14b": lambda *_, **__: [{"seconds": 1.0}]}
    )
    monkeypatch.setattr(kernels, "tile_attention", attention.tile_attention)
    gpu.run_parts(run, ["attention_alone", "memory", "profiles"], lambda name, row: None)
    monkeypatch.setattr(gpu.Run, "small", False)
    gpu.run_parts(run, ["stock_steps"], lambda name, row: None)
    assert not run.incomplete
    errors = {name: [row.get("error") for row in rows] for name, rows in run.rows.items()}
    assert errors["attention_alone"] == [None, None, None, why, why]
    assert errors["memory"] == [None, None, why]
    assert errors["profiles"] == [None, None, None, why, None, None, why]
    name = "ImportError: cannot import name 'MiniMaxH3Transformer3DModel'"
    assert errors["stock_steps"] == [None, name, None, name]


def test_what_is_not_begun_in_time_has_a_file_that_says_so(fake_parts, tmp_path):
    gpu.run_parts(gpu.Run(CPU, 0, 3, tmp_path, fake_parts), list(gpu.PARTS), lambda name, row: None)
    last = json.loads((tmp_path / "last.json").read_text())
    assert not last["complete"] and not last["rows"] and last["ended_after_seconds"] > 3


def test_a_run_without_time_leaves_the_rows_of_the_one_before(fake_parts, tmp_path):
    def run(budget, clock):
        gpu.run_parts(gpu.Run(CPU, 0, budget, tmp_path, clock), list(gpu.PARTS), lambda name, row: None)
        return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    before = run(100, fake_parts)
    assert run(0, fake_parts) == before and before["late"]["rows"]


def test_an_interrupted_run_without_rows_leaves_those_of_the_one_before(monkeypatch, tmp_path):
    def interrupted(run):
        raise KeyboardInterrupt
        yield

    monkeypatch.setitem(gpu.PARTS, "memory", (lambda run: iter([[{"seconds": 1.0}]]), 1.0))
    assert main(asked_for("memory", tmp_path)) == 0
    monkeypatch.setitem(gpu.PARTS, "memory", (interrupted, 1.0))
    assert main(asked_for("memory", tmp_path)) == 130
    assert json.loads((tmp_path / "memory.json").read_text())["complete"]


def test_a_backend_that_is_wrong_or_raises_is_named(monkeypatch):
    def wrong(q, k, v, layout, pattern, backend):
        if backend == "parts":
            raise RuntimeError("out of registers")
        return exactness.F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(exactness, "tile_attention", wrong)
    monkeypatch.setattr(exactness, "SMALL_LAYOUTS", exactness.SMALL_LAYOUTS[:1])
    rows = [row for found in exactness.measure(CPU, seed=0) for row in found]
    assert rows and not any(row["passed"] for row in rows)
    assert {row["error"] for row in rows if row["backend"] == "parts"} == {"RuntimeError: out of registers"}


def test_a_choice_is_judged_by_the_times_that_were_taken(tmp_path):
    run = gpu.Run(CPU, 0, 60, tmp_path)
    shape = gpu.SMALL[0]
    row = {"frames": 8, "tokens_per_frame": 96, "prefix": 0, "heads": 2, "head_dim": 64, "dtype": "float32"}
    times = [
        ("full", "sdpa", 4.0),
        ("full", "sage", 0.1),
        ("2:6", "frames", 2.0),
        ("2:6", "parts", 3.0),
        ("1:7", "parts", 0.1),
    ]
    rows = [{**row, "pattern": p, "backend": b, "milliseconds": ms} for p, b, ms in times]
    run.rows["attention_alone"] = [*rows, {**rows[2], "head_dim": 32, "milliseconds": 0.1}]

    class Book:
        def choose(self, *_):
            return Choice("parts", {"parts": 1.0})

    found = gpu._choice(run, Book(), shape, 2)
    assert (found["chosen"], found["best"], found["regret"]) == ("parts", "frames", 0.5)


def test_what_is_installed_is_timed_and_what_is_only_quantised_is_no_baseline(monkeypatch):
    def sage(q, k, v):
        return torch.zeros_like(q)

    monkeypatch.setattr(
        attention, "dense_functions", lambda q: {"sdpa": torch.nn.functional.scaled_dot_product_attention, "sage": sage}
    )
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))
    dense = {r["backend"]: r for r in rows if r["pattern"] == "full"}
    assert dense["sdpa"]["speedup"] == 1.0 and dense["sage"]["max_relative_error"] > 0.5
    assert {r["backend"] for r in rows if r["pattern"] == "1:4"} == {"frames", "frames over sage"}


def test_pytorchs_own_choice_is_a_baseline_on_a_gpu(monkeypatch):
    """A listed kernel may be slow on a card where another one is chosen: the speed-up would pass the FLOPs' ideal."""
    monkeypatch.setattr(dense, "_takes", lambda name, run, sample: True)
    monkeypatch.setattr(dense, "_of_packages", lambda: {"sage": None})
    on_gpu = MagicMock(device=torch.device("cuda"), shape=(1, 1, 9, 8))
    assert list(dense.dense_functions(on_gpu)) == [
        "sdpa", "cudnn_attention", "flash_attention", "efficient_attention", "sage"
    ]  # fmt: skip
    assert dense.dense_functions(on_gpu)["sdpa"] is torch.nn.functional.scaled_dot_product_attention


def test_quantised_attention_counts_in_no_mean(monkeypatch, capsys):
    def int8(q, k, v):
        return torch.zeros_like(q)

    both = {"sdpa": torch.nn.functional.scaled_dot_product_attention, "kitchen int8": int8}
    monkeypatch.setattr(attention, "dense_functions", lambda q: both)
    monkeypatch.setattr(attention, "presets", lambda: {"cpu": [SHAPE]})
    assert main(["bench", "attention", "--device", "cpu", "--repeats", "1", "--backends", "frames"]) == 0
    said = capsys.readouterr().out
    assert said.count("frames over kitchen int8") == 2 and "geometric mean of 2 rows" in said


def test_a_check_without_room_costs_the_error_alone(monkeypatch):
    def no_room(*_):
        raise torch.cuda.OutOfMemoryError("none left")

    monkeypatch.setattr(attention, "_error", no_room)
    rows = attention.measure(SHAPE, CPU, repeats=1, seed=0, backends=("frames",))
    assert all(row["milliseconds"] > 0 and row["max_relative_error"] is None for row in rows)


def test_a_check_takes_little_room_and_keeps_nan():
    """In float32 and for all heads at once it took six times as much as one of the tensors."""
    shape = attention.Shape(4, 40, 16, 8, "float32", (1,))
    q, k, v = attention.random_tensors(shape, CPU, 0)
    out = attention.tile_attention(q, k, v, shape.layout, TilePattern(1))
    assert attention._error(out, q, k, v, shape, 1, torch.Generator().manual_seed(0)) < 1e-5
    out[0, 3] = float("nan")
    assert math.isnan(attention._error(out, q, k, v, shape, 1, torch.Generator().manual_seed(0)))
    largest, whole = [], torch.Tensor.float

    def seen(x):
        largest.append(x.numel())
        return whole(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", seen)
        attention._error(out, q, k, v, shape, 1, torch.Generator().manual_seed(0))
    assert max(largest) <= max(q.numel() // 16, attention.SAMPLED_ROWS * 8)


def test_blocks_are_drawn_in_the_dtype_that_they_run_in():
    with blocks.drawn(CPU, torch.bfloat16):
        assert torch.nn.Linear(3, 2).weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_slow_card_begins_with_the_quick_clips(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.Run, "small", False)
    shapes = gpu.Run(CPU, 0, 100, tmp_path).shapes
    work = [s.heads * s.head_dim * s.layout.tokens**2 for s in shapes]
    assert work == sorted(work) and {(s.head_dim, s.prefix > 0) for s in shapes[:4]} == {
        (96, False),
        (128, False),
        (128, True),
    }


@pytest.mark.parametrize(("lasts", "calls"), [(0.2, 2), (0.02, 1 + 3 + 3)])
def test_a_long_call_is_its_own_warm_up(monkeypatch, lasts, calls):
    asked = []

    def seconds(run, device, times=1):
        asked.append(times)
        return lasts

    monkeypatch.setattr(turns, "seconds", seconds)
    assert turns.sustained(lambda: None, torch.device("cuda")) == lasts and sum(asked) == calls


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307), ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 5090 D", None), ("NVIDIA H100 NVL", None),
    ],
)  # fmt: skip
def test_the_share_of_a_peak_is_told_of_the_card_and_dtype_that_it_is_of(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda"), torch.bfloat16)
    assert found == (teraflops and teraflops * 1e12)
    assert peak_flops(torch.device("cuda"), torch.float32) is None


def test_the_calls_alone_are_those_of_the_attention():
    from efficient_vdit_core.attention import TokenLayout, tile_attention
    from efficient_vdit_core.bench.calls import calls_alone

    layout, pattern = TokenLayout(TokenGrid(6, 1, 5), 2), TilePattern(2, window=1)
    q, k, v = (torch.randn(1, 2, layout.tokens, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want = tile_attention(q, k, v, layout, pattern)
    shared, *frames = calls_alone(q, k, v, layout, pattern)()
    torch.testing.assert_close(shared, torch.cat([want[:, :, s] for s in (slice(0, 7), slice(17, 22))], 2))
    others = [f for f in range(6) if f not in pattern.reference_frames(6)]
    for frame, found in zip(others, frames, strict=True):
        torch.testing.assert_close(found, want[:, :, 2 + 5 * frame : 7 + 5 * frame])
    row = attention.measure(
        attention.Shape(4, 6, 1, 8, "float32", (1,)), CPU, repeats=1, seed=0, backends=("frames",), calls=True
    )[-1]
    assert row["backend"] == attention.CALLS and row["max_relative_error"] is None and row["milliseconds"] > 0
