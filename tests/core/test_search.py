"""The search finds which layers need full attention; its choices are those of brute force."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.hook.override import make_attention_override
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.search import (
    ProbeRecord,
    SearchSettings,
    choose_for_speedup,
    choose_under_threshold,
    make_probe_override,
    measure_output,
    parse_candidates,
    plan_from_record,
    replay_blocks,
)
from efficient_vdit_core.search import clock as clock_module
from efficient_vdit_core.search.describe import describe_plan
from efficient_vdit_core.search.record import ATTENTION, BLOCK, OUTPUT
from efficient_vdit_core.search.select import MEASURED
from efficient_vdit_core.tiles import TilePattern, TokenGrid

FRAMES, SIZE, HEADS, DIM = 6, 3, 2, 8
LAYOUT = TokenLayout(TokenGrid(FRAMES, 1, SIZE), suffix=2)


class Layer(nn.Module):
    """Every token looks ``shift`` frames ahead: at its own frame for 0, at what no sparse pattern keeps for 1.

    "first" looks at frame 0, which one reference frame keeps. Adds to its input in place, as some video models do.
    """

    def __init__(self, looks):
        super().__init__()
        frame = torch.arange(FRAMES).repeat_interleave(SIZE)
        at = torch.zeros_like(frame) if looks == "first" else (frame + looks) % FRAMES
        text = torch.full((LAYOUT.suffix,), DIM - 1)  # attends to itself
        frame, at = torch.cat([frame, text]), torch.cat([at, text])
        self.where = nn.functional.one_hot(frame, DIM).float().repeat(1, HEADS)
        self.wanted = 40 * nn.functional.one_hot(at, DIM).float().repeat(1, HEADS)

    def forward(self, x, options):
        b = len(x)
        x += sdpa_attention(
            self.wanted.expand(b, -1, -1), self.where.expand(b, -1, -1), x, HEADS, transformer_options=options
        )
        text = x[:, :4]
        return x + sdpa_attention(x, text, text, HEADS, transformer_options=options)


class Model(nn.Module):
    def __init__(self, looks=(0, 1, 0, 1, "first")):
        super().__init__()
        self.blocks = nn.ModuleList(map(Layer, looks))

    def forward(self, x, override, layout=LAYOUT):
        options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(layout)}
        for block in self.blocks:
            x = block(x.clone(), options)
        return x


def clip(seed=0):
    return torch.randn(2, LAYOUT.tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed))


def patterns(*counts):
    return tuple(map(TilePattern, counts))


def probed(model=None, candidates=(0, 1, 2), blocks=False, **changes):
    model, record = model or Model(), ProbeRecord(patterns(*candidates), **changes)
    override = make_probe_override(record)
    with replay_blocks(model.blocks if blocks else [], record):
        for seed in range(2):
            model(clip(seed), override)
    return record


def plan(record, layers=5, heads=None, **choice):
    return plan_from_record(
        record, SearchSettings(record.candidates, **choice), layers=layers, family="any", heads=heads
    )


def test_exactly_the_layers_that_look_at_other_frames_stay_full():
    chosen = plan(probed(), threshold=0.05)
    assert [p.k for p in chosen.patterns] == [0, None, 0, None, 1]
    assert chosen.frames == FRAMES and chosen.provenance["threshold"] == 0.05


@pytest.mark.parametrize("blocks", [False, True])
def test_the_run_goes_on_undisturbed(blocks):
    model, record = Model(), ProbeRecord(patterns(0, 1))
    dense = model(clip(), lambda func, *a, **k: func(*a, **k))
    with replay_blocks(model.blocks if blocks else [], record):
        assert torch.equal(model(clip(), make_probe_override(record)), dense)
    assert record.dense == {"cross-attention": 5}


@pytest.mark.parametrize("k", [0, 1, 2])
def test_errors_are_those_of_the_masked_oracle(oracle, k):
    record, seen = ProbeRecord(patterns(k)), []

    def previous(func, q, keys, v, heads, **kwargs):
        if len(seen) < 1:
            seen.extend(x.clone().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, keys, v))
        return func(q, keys, v, heads, **kwargs)

    Model((1,))(clip(), make_probe_override(record, previous=previous))
    references = {0: [], 1: [0], 2: [0, 3]}[k]
    want = oracle(*seen, FRAMES, SIZE, references, 0, 2)
    dense = oracle(*seen, FRAMES, SIZE, range(FRAMES), 0, 2)
    assert record.error(0, TilePattern(k)) == pytest.approx(float((want - dense).norm() / dense.norm()), rel=1e-4)


def test_block_errors_are_those_of_a_run_with_that_block_sparse():
    model, record = Model(), probed(blocks=True)
    for layer in range(5):
        x = clip(0)
        for block in model.blocks[:layer]:
            x = block(x.clone(), {})
        sparse = make_attention_override(TilePlan.uniform(1), AttentionReport())
        want = model.blocks[layer](x.clone(), {OVERRIDE_KEY: sparse, FORWARD_KEY: ForwardState(LAYOUT)})
        dense = model.blocks[layer](x.clone(), {})
        assert record.errors[BLOCK][layer, TilePattern(1)][0] == pytest.approx(
            float((want - dense).norm() / dense.norm()), rel=1e-4, abs=1e-6
        )
    assert [p.k for p in plan(record, layers=2, threshold=0.05, error=BLOCK).patterns] == [0, None]


def probed_by_output(model, candidates=(0, 1, 2), progress=None):
    """The record of one clip, whose forwards are counted from their first call on each time, and what the run gave."""
    record = ProbeRecord(patterns(*candidates))
    override = make_probe_override(record)
    return record, measure_output(record, lambda: model(clip(), override), progress)


def only(layer, pattern, layers=5):
    """The plan under which one layer alone is sparse."""
    return TilePlan(tuple(pattern if i == layer else TilePattern(None) for i in range(layers)))


def test_output_errors_are_those_of_a_run_with_that_layer_sparse():
    model = Model()
    dense = model(clip(), None)
    record, out = probed_by_output(model)
    assert torch.equal(out, dense), "the run goes on undisturbed"
    for layer, k in itertools.product(range(5), (0, 1, 2)):
        sparse = model(clip(), make_attention_override(only(layer, TilePattern(k)), AttentionReport()))
        want = float((sparse - dense).norm() / dense.norm())
        assert record.error(layer, TilePattern(k), OUTPUT) == pytest.approx(want, rel=1e-4, abs=1e-6)
        of_heads = record.of_heads(layer, TilePattern(k), OUTPUT)
        assert of_heads.sum() == pytest.approx(want**2, rel=1e-3, abs=1e-9)
        attention = record.of_heads(layer, TilePattern(k))
        np.testing.assert_allclose(of_heads * attention.sum(), attention * of_heads.sum(), rtol=1e-4, atol=1e-12)
    assert record.dense == {"cross-attention": 5}, "the further forwards are counted nowhere"


def test_a_layer_is_not_measured_in_a_forward_that_leaves_it_out():
    """As guidance that skips a layer asks once more without it: nothing is to be seen of its candidates there."""
    whole, record = Model(), ProbeRecord(patterns(0, 1))
    skipping = Model()
    skipping.blocks[1] = nn.Identity()
    skipping.blocks[1].forward = lambda x, options: options[FORWARD_KEY].count_from(2) or x
    override = make_probe_override(record)
    for model in (whole, skipping):
        measure_output(record, lambda model=model: model(clip(), override))
    found = {layer: len(record.errors[OUTPUT][layer, TilePattern(1)]) for layer in range(5)}
    assert found == {0: 2, 1: 1, 2: 2, 3: 2, 4: 2}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("most", [1, 3])
def test_what_the_output_says_decides_where_it_is_asked_for(most, groups):
    """Two layers err alike in their attention, and only one of them can stay full."""
    record, _ = probed_by_output(Model())
    for layer, k in itertools.product(range(5), (0, 1, 2)):
        error = record.error(layer, TilePattern(k))
        record.errors[OUTPUT][layer, TilePattern(k)] = [error * (100.0 if layer == most else 1.0)]
    chosen = plan(record, speedup=2.0, error=OUTPUT, head_groups=groups, heads=HEADS)
    assert [p.is_full(FRAMES) for p in chosen.patterns] == [i == most for i in range(5)]
    assert "model's output" in chosen.provenance["error"]


def test_cancelling_between_forwards_leaves_nothing_behind():
    told = []

    def stop(layer):
        told.append(layer)
        if layer == 2:
            raise KeyboardInterrupt

    model, record = Model(), ProbeRecord(patterns(0, 1))
    override = make_probe_override(record)
    with pytest.raises(KeyboardInterrupt):
        measure_output(record, lambda: model(clip(), override), stop)
    assert told == [0, 0, 1, 1, 2] and record.replaying is None


def test_cancelling_leaves_nothing_behind():
    model, record = Model(), ProbeRecord(patterns(0, 1))

    def stop(layer):
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replay_blocks(model.blocks, record):
        model(clip(), make_probe_override(record, progress=stop))
    assert record.replaying is None
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in model.blocks)


class AnyLength(nn.Module):
    """A block of a model that takes clips of any length."""

    def forward(self, x, options):
        return x + sdpa_attention(x, x, x, HEADS, transformer_options=options)


def in_windows(measure, clips, **settings):
    """The record of a forward of two blocks for each of ``clips``, seed -> frames, and the frames of all that were computed."""
    blocks, record, computed = nn.ModuleList([AnyLength(), AnyLength()]), ProbeRecord(patterns(1, 4), **settings), []
    override = make_probe_override(record)
    for seed, frames in clips.items():
        layout = TokenLayout(TokenGrid(frames, 1, SIZE))
        x = torch.randn(1, layout.tokens, HEADS * DIM, generator=torch.Generator().manual_seed(seed))

        def forward(x=x, layout=layout):
            options, out = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(layout, depth=2)}, x
            computed.append(layout.grid.t)
            for block in blocks:
                out = block(out, options)
            return out

        with replay_blocks(blocks if measure == BLOCK else [], record):
            if measure == OUTPUT:
                measure_output(record, forward)
            else:
                forward()
    return record, computed


@pytest.mark.parametrize("measure", [ATTENTION, BLOCK, OUTPUT])
def test_errors_are_those_of_one_number_of_frames(measure):
    """Of context windows of two lengths: four reference frames leave nothing out of 5, and something out of 6."""
    record, computed = in_windows(measure, {0: 5, 1: 6, 2: 5, 3: 6, 4: 6}, timed=True)
    alone, _ = in_windows(measure, {0: 5, 2: 5}, timed=True)
    for layer, k in itertools.product(range(2), (1, 4)):
        assert record.errors[measure][layer, TilePattern(k)] == alone.errors[measure][layer, TilePattern(k)]
        assert record.error(layer, TilePattern(4), measure) == 0.0 < record.error(layer, TilePattern(1), measure)
        assert len(record.seconds[layer, None]) == 2, "what a call takes is that of as many frames too"
    assert computed.count(6) == 3, "no forward that is left out is computed again"
    assert record.layout.grid.t == 5 and record.left_out == {6: 3} and alone.left_out == {}
    chosen, plain = (plan(r, layers=2, threshold=5.0, error=measure) for r in (record, alone))
    assert chosen.frames == 5 and chosen.provenance["left_out_forwards"] == {"6": 3}
    assert "Forwards left out: 3, over 6 latent frames: errors are of forwards over 5" in describe_plan(chosen)
    assert "left_out_forwards" not in plain.provenance and "left out" not in describe_plan(plain)


def test_text_of_another_length_and_a_part_of_the_picture_leave_nothing_out():
    record = ProbeRecord(patterns(1))
    override = make_probe_override(record)
    for layout in (LAYOUT, TokenLayout(LAYOUT.grid, suffix=5), TokenLayout(TokenGrid(FRAMES, 1, SIZE - 1), suffix=2)):
        x = torch.randn(1, layout.tokens, HEADS * DIM)
        AnyLength()(x, {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(layout)})
    assert len(record.errors[ATTENTION][0, TilePattern(1)]) == 3 and not record.left_out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_is_not_finite_stays_full_and_is_named(value):
    record = probed(Model((0, 0)))
    broken = clip()
    broken[0, 5] = value
    Model((0,))(broken, make_probe_override(record))
    chosen = plan(record, layers=2, threshold=0.05)
    assert [p.k for p in chosen.patterns] == [None, 0]
    assert chosen.provenance["not_finite_layers"] == [0]
    assert "Infinity" not in chosen.to_json() and "NaN" not in chosen.to_json()
    with pytest.raises(ValueError, match="at most"):
        plan(record, layers=2, speedup=20)


def broken_search(measure: str) -> ProbeRecord:
    """A search in a model that gives NaN with full attention as well."""
    record, model, broken = ProbeRecord(patterns(0, 1)), Model((0, 0)), clip()
    broken[0, 5] = math.nan
    override = make_probe_override(record)
    with replay_blocks(model.blocks if measure == BLOCK else [], record):
        if measure == OUTPUT:
            measure_output(record, lambda: model(broken.clone(), override))
        else:
            model(broken, override)
    return record


@pytest.mark.parametrize("aim", [{"threshold": 0.05}, {"speedup": 2.0}])
@pytest.mark.parametrize(
    ("measure", "head_groups"), [(ATTENTION, 1), (ATTENTION, 2), (BLOCK, 1), (OUTPUT, 1), (OUTPUT, 2)]
)
def test_a_model_that_gives_no_numbers_with_full_attention_is_named_and_no_candidate_blamed(measure, head_groups, aim):
    with pytest.raises(ValueError, match="In every layer .* with full attention too: the model itself"):
        plan(broken_search(measure), layers=2, error=measure, head_groups=head_groups, **aim)


def test_candidates_that_are_not_finite_where_full_attention_is_are_not_called_the_model_s_fault():
    record = recorded((ONE, TWO), dict.fromkeys(itertools.product(range(2), (ONE, TWO)), math.inf))
    assert plan(record, layers=2, threshold=0.1).provenance["not_finite_layers"] == [0, 1]


def test_a_layer_that_was_never_seen_stays_full_and_is_named():
    chosen = plan(probed(), layers=7, threshold=0.05)
    assert chosen.provenance["not_measured_layers"] == [5, 6] and chosen.patterns[6].k is None


def test_the_same_run_gives_the_same_bytes():
    assert plan(probed(), speedup=1.5).to_json() == plan(probed(), speedup=1.5).to_json()


def test_measured_costs_decide_where_they_are_asked_for():
    record = probed(timed=True)
    assert set(record.seconds) == {(i, k) for i in range(5) for k in (None, *patterns(0, 1, 2))}
    for i in range(5):
        for k, seconds in zip((None, *patterns(0, 1)), (1.0, 2.0, 0.9), strict=True):
            record.seconds[i, k] = [seconds]
    chosen = plan(record, threshold=0.05, costs="measured")
    assert chosen.patterns[0].k != 0  # sparser, yet slower than dense here
    assert chosen.provenance["measured_costs"]["0"] == [2.0] * 5


def test_a_first_call_that_compiles_is_not_charged_to_its_layer(monkeypatch):
    """One probe and two give the same plan: each kind of call is made once before its time is taken."""
    clock, compiled, real = [0.0], set(), clock_module.tile_attention

    def attend(*given, backend, **options):
        if backend == "parts":  # the one that is timed; errors are those of another
            kind = (options["pattern"], given[0].shape)
            clock[0] += 0.1 if kind in compiled else 8.0
            compiled.add(kind)
        return real(*given, backend=backend, **options)

    monkeypatch.setattr(clock_module, "choose_backend", lambda *_, **__: "parts")
    monkeypatch.setattr(clock_module, "tile_attention", attend)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    record, model = ProbeRecord(patterns(0, 1), timed=True, by_head=True), Model()
    model(clip(), make_probe_override(record))
    assert len(compiled) == 4  # two patterns, of all heads and of half
    assert {round(s, 6) for (_, p), taken in record.seconds.items() if p is not None for s in taken} == {0.1}
    assert {round(s, 6) for (_, p), taken in record.parts.items() if p is not None for _, s in taken} == {0.1}


def test_a_target_out_of_reach_ends_the_run_at_its_first_measured_call():
    """What stands beside the video is known only there, and makes every pattern dearer."""
    beside, candidates = TokenLayout(TokenGrid(FRAMES, 1, SIZE), prefix=LAYOUT.grid.tokens), patterns(0, 1)
    settings = SearchSettings(candidates, speedup=2.0)
    record, measured, begun = settings.record(FRAMES), [], settings.check_reach
    override = make_probe_override(record, begun=begun, progress=measured.append)
    x = torch.randn(2, beside.tokens, HEADS * DIM)
    options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(beside)}
    with pytest.raises(ValueError, match=r"2x, but these candidates reach at most 1\.\d+x"):
        sdpa_attention(x, x, x, HEADS, transformer_options=options)
    assert not measured and not record.layers
    Model()(clip(), make_probe_override(record, begun=begun, progress=measured.append))  # text alone beside it
    assert len(measured) == 5


def test_by_the_clock_nothing_is_out_of_reach_before_it_is_timed():
    by_the_clock = SearchSettings(patterns(2), speedup=30.0, costs=MEASURED)
    by_the_clock.check(FRAMES)
    by_the_clock.check_reach(LAYOUT)
    for speedup in (math.nan, 0.5):
        with pytest.raises(ValueError, match="speed-up"):
            replace(by_the_clock, speedup=speedup).check(FRAMES)
    with pytest.raises(ValueError, match="at most"):
        SearchSettings(patterns(2), speedup=30.0).check(FRAMES)


def test_nothing_to_search_says_why():
    record = ProbeRecord(patterns(1))
    Model()(clip(), make_probe_override(record), TokenLayout(TokenGrid(1, 4, 5)))
    with pytest.raises(ValueError, match="5 a single frame"):
        plan(record, threshold=0.1)


def table(layers, seed, candidates=(1, 2, 4)):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(layers, len(candidates), generator=generator).tolist()
    costs = (torch.randint(1, 11, (layers, len(candidates)), generator=generator) / 10).tolist()
    return [[dict(zip(candidates, row, strict=True)) for row in rows] for rows in (errors, costs)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("speedup", [1.0, 1.3, 2.0, 3.0])
def test_the_knapsack_is_as_good_as_brute_force(seed, speedup):
    errors, costs = table(5, seed)
    budget = 5 / speedup + 1e-9
    options = [[(1.0, 0.0), *((c[k], e[k]) for k in e if c[k] < 1)] for e, c in zip(errors, costs, strict=True)]
    fitting = [sum(o[1] for o in combo) for combo in itertools.product(*options) if sum(o[0] for o in combo) <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="at most"):
            choose_for_speedup(errors, costs, speedup)
        return
    chosen = choose_for_speedup(errors, costs, speedup)
    assert sum(errors[i][k] for i, k in enumerate(chosen) if k is not None) == pytest.approx(min(fitting))
    assert sum(1.0 if k is None else costs[i][k] for i, k in enumerate(chosen)) <= budget


def test_a_deep_model_is_planned_quickly_and_within_its_budget(monkeypatch):
    errors, costs = table(60, 1, (1, 2, 3, 4, 6))
    costs = [{k: v * (0.9 + 0.1 * errors[i][k]) for k, v in layer.items()} for i, layer in enumerate(costs)]
    exact = choose_for_speedup(errors[:14], costs[:14], 2.5)
    monkeypatch.setattr("efficient_vdit_core.search.select.MAX_PARTIAL_PLANS", 500)

    def total(table, chosen, full):
        return sum(full if k is None else table[i][k] for i, k in enumerate(chosen))

    rounded = choose_for_speedup(errors[:14], costs[:14], 2.5)
    assert total(errors, exact, 0.0) <= total(errors, rounded, 0.0) <= total(errors, exact, 0.0) * 1.05
    assert total(costs, choose_for_speedup(errors, costs, 2.5), 1.0) <= 60 / 2.5 + 1e-9


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_the_threshold_takes_the_cheapest_that_passes(seed, threshold):
    errors, costs = table(6, seed)
    for i, k in enumerate(choose_under_threshold(errors, costs, threshold)):
        passing = [c for c in errors[i] if errors[i][c] < threshold and costs[i][c] < 1]
        assert (k is None and not passing) or (k in passing and costs[i][k] == min(costs[i][c] for c in passing))


def test_an_error_as_large_as_the_threshold_does_not_pass():
    assert choose_under_threshold([{1: 0.3}], [{1: 0.5}], 0.3) == [None]
    assert choose_under_threshold([{1: 0.3}], [{1: 0.5}], 0.31) == [1]


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_targets_that_mean_nothing_are_refused(value):
    errors, costs = table(2, 0)
    with pytest.raises(ValueError, match="threshold"):
        choose_under_threshold(errors, costs, value)
    with pytest.raises(ValueError, match="speed-up"):
        choose_for_speedup(errors, costs, value)


def test_candidates_are_read():
    assert parse_candidates(" 4,1, 2,1") == patterns(1, 2, 4)
    for text in ("", "1,", "a", "-1", "1.5", "1;2", ",".join(map(str, range(17)))):
        with pytest.raises(ValueError, match="candidates"):
            parse_candidates(text)


def test_the_provenance_predicts_what_the_plan_does():
    chosen = plan(probed(), speedup=1.5)
    extra, video = LAYOUT.suffix, LAYOUT.grid.tokens
    densities = [p.flop_density(LAYOUT.grid, extra) for p in chosen.patterns]
    assert chosen.provenance["attention_flop_density"] == pytest.approx(sum(densities) / 5, abs=1e-6)
    assert chosen.provenance["attention_speedup"] >= 1.5
    assert json.loads(chosen.to_json())["provenance"]["extra_tokens"] == extra and video == 18


ONE, TWO = patterns(1, 2)


def recorded(candidates, errors, **settings):
    """A record of 8 frames that holds these attention errors of (layer, pattern)."""
    record = ProbeRecord(candidates, **settings)
    record.layout = TokenLayout(TokenGrid(8, 1, 4))
    for (layer, pattern), error in errors.items():
        record.add(ATTENTION, layer, pattern, error)
    return record


def test_a_layer_with_one_candidate_that_is_not_finite_stays_full_and_is_named():
    errors = {(0, ONE): math.inf, (0, TWO): 0.01, (1, ONE): 0.01, (1, TWO): 0.01}
    chosen = plan(recorded((ONE, TWO), errors), layers=2, threshold=0.1)
    assert chosen.patterns == (TilePattern(None), ONE) and chosen.provenance["not_finite_layers"] == [0]


def test_a_pattern_that_was_timed_slower_than_dense_is_not_taken_by_head():
    record = recorded((ONE,), {(0, ONE): 0.01}, timed=True, by_head=True)
    record.add_heads(0, ONE, 0, np.array([5e-5, 5e-5]))
    record.add_seconds(0, ONE, 1.2)
    record.add_seconds(0, None, 1.0)
    chosen = plan(record, layers=1, threshold=0.5, costs=MEASURED, head_groups=2)
    assert chosen.patterns == (TilePattern(None),)


def test_an_error_is_the_mean_over_forwards_and_nothing_of_it_is_no_head_s():
    record = ProbeRecord((ONE,))
    for error in (0.3, 0.4):
        record.add(OUTPUT, 0, ONE, error)
    assert record.squared(0, ONE, OUTPUT) == pytest.approx((0.3**2 + 0.4**2) / 2)
    exact = ProbeRecord((ONE,))
    exact.add_heads(0, ONE, 0, np.zeros(2))
    exact.add(OUTPUT, 0, ONE, 0.0)
    assert exact.of_heads(0, ONE, OUTPUT).tolist() == [0.0, 0.0]


def test_a_search_by_head_and_by_the_clock_times_parts_of_the_heads():
    record = SearchSettings((ONE,), speedup=2.0, costs=MEASURED, head_groups=2).record(8)
    assert record.timed and record.by_head


def test_a_target_is_judged_by_all_tokens_and_taken_where_it_is_exactly_in_reach():
    settings = SearchSettings((ONE,), speedup=2.0)
    settings.check(8)
    with pytest.raises(ValueError, match="at most"):
        settings.check_reach(TokenLayout(TokenGrid(8, 1, 4), suffix=32))
    assert choose_for_speedup([{1: 0.2}] * 3, [{1: 0.1}] * 3, 10.0) == [1] * 3
