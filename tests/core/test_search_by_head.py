"""The search that gives each head a pattern: against brute force, against the search by layer, and at real sizes."""

import itertools
import json
import time

import numpy as np
import pytest
import torch

from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.plan.head_patterns import HeadPatterns
from efficient_vdit_core.search import (
    ProbeRecord,
    SearchSettings,
    make_probe_override,
    parse_candidates,
    plan_from_record,
)
from efficient_vdit_core.search.by_head import HeadTable, heads_for_speedup, heads_under_threshold
from efficient_vdit_core.search.describe import describe_plan
from efficient_vdit_core.search.errors import relative_error, relative_errors
from efficient_vdit_core.search.record import BLOCK, HeadErrors
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LAYOUT = TokenLayout(TokenGrid(6, 1, 4), suffix=3)
HEADS, DIM = 4, 8


def tables(layers, heads, candidates, seed=0, call=0.0):
    """Errors that fall as costs rise, as those of patterns do; of each cost ``call`` is that of a call."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        costs = np.sort(rng.uniform(0.2, 0.9, candidates))
        errors = np.sort(rng.exponential(1.0, (candidates, heads)) * rng.lognormal(0, 1.5, heads), axis=0)[::-1]
        found.append(
            HeadTable(np.vstack([errors, np.zeros(heads)]), np.append(costs, 1.0), np.full(candidates + 1, call))
        )
    return found


def cost_of(table, chosen):
    """A call for each group, and for each head the rest of what all heads cost."""
    heads, groups = len(chosen), {c: list(chosen).count(c) for c in chosen}
    return sum(table.calls[c] + n * (table.costs[c] - table.calls[c]) / heads for c, n in groups.items())


def total(tables, chosen):
    at = np.arange(tables[0].errors.shape[1])
    errors = sum(float(t.errors[c, at].sum()) for t, c in zip(tables, chosen, strict=True))
    return errors, sum(cost_of(t, c) for t, c in zip(tables, chosen, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("call", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_a_speedup_costs_about_the_least_error_of_all_plans(groups, call, seed):
    layers = tables(2, 3, 2, seed, call)
    chosen = heads_for_speedup(layers, 1.6, groups)
    found, cost = total(layers, chosen)
    assert cost <= 2 / 1.6 + 1e-9 and all(len(set(c.tolist())) <= groups for c in chosen)
    of_layer = [c for c in itertools.product(range(3), repeat=3) if len(set(c)) <= groups]
    every = (total(layers, [np.array(a), np.array(b)]) for a, b in itertools.product(of_layer, repeat=2))
    least = min(e for e, c in every if c <= 2 / 1.6 + 1e-9)
    assert least <= found + 1e-9 <= 1.25 * least + 1e-9  # of six heads; a real model has thousands to choose among


@pytest.mark.parametrize("call", [0.02, 0.08])
@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_costs_little_more_than_the_cheapest_of_all_choices(call, seed):
    (table,) = tables(1, 6, 3, seed, call)
    every = [np.array(c) for c in itertools.product(range(4), repeat=6) if len(set(c)) <= 3]
    chosen = heads_under_threshold(table, 1.0, 3)
    fitting = [cost_of(table, c) for c in every if table.errors[c, range(6)].sum() < 1.0]
    assert table.errors[chosen, range(6)].sum() < 1.0
    assert min(fitting) <= cost_of(table, chosen) + 1e-9 < 1.15 * min(fitting)


def test_a_group_has_to_earn_its_call():
    errors, costs = np.array([[0.0, 0.0, 9.0, 9.0], [0.1, 0.1, 4.0, 4.0], [0.0] * 4]), np.array([0.45, 0.5, 1.0])
    two, one = (heads_for_speedup([HeadTable(errors, costs, np.full(3, call))], 1 / 0.55, 2) for call in (0.02, 0.1))
    assert two[0].tolist() == [0, 0, 1, 1]  # 0.02 + 0.215 and 0.02 + 0.24
    assert one[0].tolist() == [1] * 4  # 0.1 + 0.175 and 0.1 + 0.2 would be above 0.55


@pytest.mark.parametrize("choose", [heads_for_speedup, heads_under_threshold])
def test_at_equal_errors_the_fewest_groups_win(choose):
    """Two candidates that are as good and as dear in every head, in an order that would mix them."""
    errors = np.array([[0.1, 0.2, 0.1, 0.2], [0.2, 0.1, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1], [0.0] * 4])
    table = HeadTable(errors, np.array([0.5, 0.5, 0.5, 1.0]), np.full(4, 1e-3))
    chosen = heads_for_speedup([table], 2.0, 3)[0] if choose is heads_for_speedup else choose(table, 0.7, 3)
    assert chosen.tolist() == [2] * 4


def test_costs_by_flops_choose_what_they_always_chose():
    stored = [[0, 3, 0, 0, 1, 1], [0, 4, 0, 0, 3, 4], [1, 1, 1, 3, 1, 3]]
    assert [c.tolist() for c in heads_for_speedup(tables(3, 6, 4, seed=3), 1.7, 3)] == stored


@pytest.mark.parametrize("groups", [2, 4])
def test_many_heads_come_within_a_hundredth_of_the_lower_bound(groups):
    """The bound is the Lagrange dual, which no plan can beat."""
    layers = tables(20, 24, 6)
    found, cost = total(layers, heads_for_speedup(layers, 2.0, groups))
    sets = np.array(list(itertools.combinations(range(7), groups)))

    def dual(price):
        return sum(((t.errors + price * t.costs[:, None] / 24)[sets].min(1).sum(1)).min() for t in layers) - price * 10

    bound = max(dual(price) for price in np.geomspace(1e-3, 1e4, 400))
    assert bound <= found <= 1.01 * bound and 9.95 < cost <= 10


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.5, 1e9])
def test_a_threshold_holds_for_the_layer(threshold):
    for table in tables(5, 16, 4):
        chosen = heads_under_threshold(table, threshold, 3)
        error, cost = total([table], [chosen])
        assert error < threshold**2 or (threshold == 0 and set(chosen) == {4})
        assert (
            cost
            <= min([c for c, e in zip(table.costs, table.errors.sum(1), strict=True) if e < threshold**2] or [1.0])
            + 1e-9
        )


def test_a_target_out_of_reach_names_what_can_be_had():
    layers = tables(3, 4, 2)
    most = 3 / sum(t.costs[0] for t in layers)
    with pytest.raises(ValueError, match=f"at most {most:.2f}x"):
        heads_for_speedup(layers, most * 1.01, 3)
    assert total(layers, heads_for_speedup(layers, most * 0.9999, 3))[1] <= 3 / most * 1.001


def test_a_model_of_real_size_takes_seconds():
    layers = tables(60, 56, 12)
    start = time.process_time()
    first, second = (heads_for_speedup(layers, 2.5, 4) for _ in range(2))
    assert time.process_time() - start < 120  # twice; seconds each where nothing else runs
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def qkv(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, LAYOUT.tokens, DIM, generator=generator) for _ in range(3)]


def probed(candidates="1,2,1~1", layers=3, at_once=HEADS, **times):
    record = ProbeRecord(parse_candidates(candidates), **times)
    override = make_probe_override(record)

    def dense(q, k, v, heads, **_):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    for seed in range(2):
        state = ForwardState(LAYOUT, depth=layers, heads=HEADS)
        options = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": {FORWARD_KEY: state}}
        for layer in range(layers):
            tensors = qkv(10 * seed + layer)
            for first in range(0, HEADS, at_once):
                part = [x[:, first : first + at_once] for x in tensors]
                override(dense, *part, part[0].shape[1], **options)
    return record


def planned(record, layers=3, **choice):
    return plan_from_record(record, SearchSettings(record.candidates, **choice), layers=layers, family="any")


def test_heads_errors_are_those_of_each_head_and_sum_to_the_layers():
    record, pattern = probed(), TilePattern(1, window=1)
    want = np.zeros(HEADS)
    for seed in (0, 10):
        q, k, v = qkv(seed)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        wrong = (tile_attention(q, k, v, LAYOUT, pattern) - exact).square().sum((0, 2, 3))
        want += (wrong / exact.square().sum()).numpy() / 2
    np.testing.assert_allclose(record.heads[0, pattern].mean, want, rtol=1e-4)
    exact, approximate = qkv(0)[:2]
    whole, of_heads = relative_errors(approximate, exact)
    assert whole == relative_error(approximate, exact) == pytest.approx(of_heads.sum() ** 0.5, rel=1e-6)


def test_a_call_costs_what_half_of_the_heads_cost_above_half():
    record, pattern = ProbeRecord((TilePattern(1),), timed=True, by_head=True), TilePattern(1)
    record.seconds[0, None], record.seconds[0, pattern] = [3.0, 2.0], [0.8]
    assert record.call_cost(0, pattern) == 0.0  # no part was timed
    record.parts[0, pattern] = [(0.5, 0.7), (0.5, 0.5)]
    assert record.call_cost(0, pattern) == pytest.approx(0.1)  # 0.2 of 2 seconds, for 0.2 + 0.6 / 2 is 0.5
    record.parts[0, pattern] = [(0.6, 0.4)]
    assert record.call_cost(0, pattern) == 0.0  # a time below its share is chance
    record.parts[0, pattern] = [(0.5, 5.0)]
    assert record.call_cost(0, pattern) == record.cost(0, pattern)


def test_measured_costs_price_each_group_in_the_choice_and_in_the_prediction():
    record = probed(timed=True, by_head=True)
    kinds = [None, *record.candidates]
    assert set(record.parts) == {(layer, p) for layer in range(3) for p in kinds}
    assert {share for taken in record.parts.values() for share, _ in taken} == {0.5}
    assert not probed(timed=True).parts and not probed(timed=True, by_head=True, at_once=1).parts

    def plan(call):
        for layer, (p, seconds) in itertools.product(range(3), zip(kinds, (1.0, 0.4, 0.6, 0.5), strict=True)):
            record.seconds[layer, p], record.parts[layer, p] = [seconds], [(0.5, seconds / 2 + call / 2)]
        return planned(record, speedup=1.7, costs="measured", head_groups=3)

    def groups(plan):
        return sum(len(p.kinds) for p in plan.patterns)

    cheap, dear = plan(0.0), plan(0.12)
    assert groups(dear) < groups(cheap) and dear.provenance["attention_speedup"] >= 1.7
    assert dear.provenance["measured_call_costs"]["1"] == [0.12] * 3 == dear.provenance["measured_call_costs"]["full"]
    assert plan(0.12).patterns == dear.patterns
    seconds = {TilePattern(None): 1.0, TilePattern(1): 0.4, TilePattern(2): 0.6, TilePattern(1, window=1): 0.5}
    for call in (0.03, 0.12):
        spent = [
            sum(call + len(heads) * (seconds[p] - call) / HEADS for p, heads in layer.head_groups(HEADS).items())
            for layer in plan(call).patterns
        ]
        assert plan(call).provenance["attention_speedup"] == pytest.approx(3 / sum(spent), abs=1e-4)
    assert groups(plan(0.03)) > 3  # a layer of several groups, or the price of a call would not be in it


def test_heads_that_come_in_several_calls_are_put_together():
    whole, parts = (probed(at_once=n).heads[1, TilePattern(1)].mean for n in (HEADS, 2))
    np.testing.assert_allclose(parts, whole, rtol=0.3)  # each call is weighed by its heads, not by their size
    found = HeadErrors()
    found.add(0, np.array([4.0, 0.0]))
    found.add(2, np.array([2.0]))
    np.testing.assert_allclose(found.mean, [4 * 2 / 3, 0.0, 2 / 3])


def test_a_plan_by_head_has_a_smaller_error_than_one_by_layer_at_the_same_cost():
    record = probed()
    by_layer, by_heads = (planned(record, speedup=1.5, head_groups=groups) for groups in (1, 3))
    assert (
        any(isinstance(p, HeadPatterns) for p in by_heads.patterns)
        and by_heads.heads == HEADS
        and by_layer.heads is None
    )
    assert all(len(p.groups) <= 3 for p in by_heads.patterns if isinstance(p, HeadPatterns))
    assert by_heads.provenance["attention_speedup"] >= 1.5 and by_heads.provenance["head_groups"] == 3

    def squared(plan):
        return sum(
            float(record.heads[i, p].mean[list(heads)].sum())
            for i, pattern in enumerate(plan.patterns)
            for p, heads in (pattern.groups if isinstance(pattern, HeadPatterns) else {pattern: range(HEADS)}).items()
            if p.k is not None
        )

    assert squared(by_heads) < squared(by_layer)
    np.testing.assert_allclose(sum(e**2 for e in by_heads.provenance["plan_errors"]), squared(by_heads), rtol=1e-4)
    assert json.loads(by_heads.to_json())["schema_version"] == 2
    assert "heads" in describe_plan(by_heads) and "1:5~1" in describe_plan(by_heads)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_report_names_the_patterns_and_tells_the_plans_own_errors(groups):
    record = probed("1,2,1~1,0+1")
    plan = planned(record, speedup=1.5, head_groups=groups)
    head, *rows = describe_plan(plan).split("\n\n")[1].splitlines()
    assert head.split() == ["layer", "pattern", "plan", "1:5", "2:4", "1:5~1", "0:6+1"]
    for layer, (row, pattern) in enumerate(zip(rows, plan.patterns, strict=True)):
        found, *_, with_mean = map(float, row.split()[-5:])
        assert with_mean == pytest.approx(record.error(layer, TilePattern(0, means=1), "attention"), abs=1e-4)
        if groups == 1:
            want = 0 if pattern.k is None else record.error(layer, pattern, "attention")
        else:
            parts = pattern.head_groups(HEADS).items()
            want = sum(record.heads[layer, p].mean[list(heads)].sum() for p, heads in parts if p.k is not None) ** 0.5
        assert found == pytest.approx(want, abs=1e-4)


def test_a_threshold_by_head_and_layers_without_measurement():
    record = probed(layers=2)
    plan = planned(record, threshold=0.6, head_groups=2)
    assert plan.patterns[2] == TilePattern(None) and plan.provenance["not_measured_layers"] == [2]
    assert all(error < 0.6 for error in plan.provenance["plan_errors"])
    assert plan.provenance["attention_flop_density"] < 1
    full = planned(record, layers=2, threshold=0.0, head_groups=2)
    assert set(full.patterns) == {TilePattern(None)}


@pytest.mark.parametrize("speedup", [2.0, 3.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_target_that_layers_without_measurement_put_out_of_reach_is_named_as_it_was_set(groups, speedup):
    record = probed("1", layers=2)
    reach = 3 / (1 + 2 * TilePattern(1).flop_density(LAYOUT.grid, LAYOUT.suffix))
    with pytest.raises(ValueError, match=f"is {speedup:g}x, but these candidates reach at most {reach:.2f}x"):
        planned(record, speedup=speedup, head_groups=groups)


@pytest.mark.parametrize(
    ("groups", "measure", "message"),
    [(0, "attention", "1 to 4"), (5, "attention", "1 to 4"), (2, BLOCK, "no head has")],
)
def test_what_heads_cannot_be_told_apart_by_is_refused(groups, measure, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(parse_candidates("1"), speedup=1.5, head_groups=groups, error=measure)


def test_candidates_with_windows_are_read():
    assert parse_candidates("2~1, 1,1~1") == (TilePattern(1), TilePattern(1, window=1), TilePattern(2, window=1))
    for text in ("full", "1:7", "1~", "1~-1", "~1", "1~999"):
        with pytest.raises(ValueError, match="candidates"):
            parse_candidates(text)
    with pytest.raises(ValueError, match="'1~-1' cannot be used: .* window -1, expected .* from 0"):
        parse_candidates("1~-1")
