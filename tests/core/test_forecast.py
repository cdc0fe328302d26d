"""The model of the speed-up against figures worked out by hand from the stated rates."""

import pytest

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.bench.bounds import MODELS, gpu_forecasts
from efficient_vdit_core.bench.parallel import model_rows
from efficient_vdit_core.parallel.sharding.forecast import (
    GPU_RATES,
    LayerShape,
    Rates,
    _rb_work,
    bytes_sent,
    forward_seconds,
    forward_speedup,
    layer_seconds,
    overhead,
    speedup,
    weights_of,
)
from efficient_vdit_core.parallel.sharding.layout import choose_shard
from efficient_vdit_core.parallel.sharding.timeline import RbWork, rb_seconds, ulysses_seconds
from efficient_vdit_core.parallel.sharding.traffic import (
    RbBytes,
    rb_bytes,
    rb_exchanges,
    ulysses_bytes,
    ulysses_exchanges,
)
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LONG = LayerShape(TokenLayout(TokenGrid(24, 45, 80)), 24, 96)
BYTES_ALONE = Rates("a byte a second, arithmetic without limit", 1e30, 1.0)
NO_WORK = RbWork(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("ranks", "k", "scheme", "mebibytes"),
    [(2, None, "ulysses", 379.7), (4, None, "ulysses", 284.8), (8, None, "ulysses", 166.1)],
)
def test_bytes_of_a_real_layer(ranks, k, scheme, mebibytes):
    assert bytes_sent(LONG, TilePattern(k), ranks, scheme)[1] / 2**20 == pytest.approx(mebibytes, abs=0.06)


def test_layers_of_unlike_patterns_send_over_the_one_shard_of_the_forward():
    """Which suits the commonest of them; each for itself would send less."""
    shape, ranks = LayerShape(TokenLayout(TokenGrid(21, 30, 52)), 12, 128), 4
    patterns = [TilePattern(k) for k in (4, 4, 2, 1)]
    shard = choose_shard(shape.layout, ranks, patterns)
    sent = [max(rb_bytes(shard, pattern, 12, 128, 2)) for pattern in patterns]
    assert forward_seconds(shape, iter(patterns), ranks, "rb", BYTES_ALONE) == pytest.approx(sum(sent))
    assert sum(bytes_sent(shape, pattern, ranks, "rb")[1] for pattern in patterns) < 0.8 * sum(sent)


def test_the_most_that_a_rank_sends_is_told():
    """Five frames on four ranks."""
    shape = LayerShape(TokenLayout(TokenGrid(5, 1, 3)), 4, 8)
    sent = ulysses_bytes(choose_shard(shape.layout, 4, [TilePattern(None)]), 4, 8, 2)
    assert min(sent) < max(sent)
    assert bytes_sent(shape, TilePattern(None), 4, "ulysses") == ("ulysses", max(sent))


def test_overlapped_ulysses_takes_as_long_as_its_busiest_rank():
    shape = LayerShape(TokenLayout(TokenGrid(5, 1, 3)), 4, 8)
    shard = choose_shard(shape.layout, 4, [TilePattern(None)])
    each = [ulysses_seconds(0.0, *sent, 1.0) for sent in ulysses_exchanges(shard, 4, 8, 2)]
    found = layer_seconds(shape, TilePattern(None), 4, "ulysses", BYTES_ALONE, overlapped=True)
    assert min(each) < max(each) == pytest.approx(found)


def test_overlapped_reference_broadcast_takes_as_long_as_its_busiest_rank():
    shape, pattern = LayerShape(TokenLayout(TokenGrid(6, 1, 4), prefix=3), 4, 8), TilePattern(2)
    shard = choose_shard(shape.layout, 4, [pattern])
    each = [rb_seconds(NO_WORK, sent, 1.0) for sent in rb_exchanges(shard, pattern, 4, 8, 2)]
    found = layer_seconds(shape, pattern, 4, "rb", BYTES_ALONE, overlapped=True)
    assert min(each) < max(each) == pytest.approx(found)


def test_an_overlapped_layer_sends_over_the_shard_of_the_forward():
    """Which suits another pattern than its own."""
    shape, pattern = LayerShape(TokenLayout(TokenGrid(21, 30, 52)), 12, 128), TilePattern(1)
    shard = choose_shard(shape.layout, 4, [TilePattern(4)])
    own, given = (
        layer_seconds(shape, pattern, 4, "rb", BYTES_ALONE, overlapped=True, shard=it) for it in (None, shard)
    )
    sent = rb_exchanges(shard, pattern, 12, 128, 2)
    assert own != given == pytest.approx(max(rb_seconds(NO_WORK, of_rank, 1.0) for of_rank in sent))


def test_a_link_without_limit_leaves_the_arithmetic():
    endless = Rates("endless", 1e14, 1e30)
    assert speedup(LONG, TilePattern(1), 4, "auto", endless) == pytest.approx(4.0)
    assert speedup(LONG, TilePattern(1), 4, "auto", endless, overhead=1.25) == pytest.approx(3.2)


def test_reference_broadcast_wins_on_slow_links():
    for rates in GPU_RATES:
        rb, ulysses = (speedup(LONG, TilePattern(1), 4, scheme, rates) for scheme in ("rb", "ulysses"))
        assert 1 < ulysses < rb < 4
    assert speedup(LONG, TilePattern(None), 4, "rb", GPU_RATES[0]) == speedup(
        LONG, TilePattern(None), 4, "ulysses", GPU_RATES[0]
    )


def test_a_forward_is_the_sum_of_its_layers():
    """Two layers of equal patterns are one; of different ones, time adds up: the answer lies between theirs."""
    rates, sparse, full = GPU_RATES[1], TilePattern(1), TilePattern(None)
    one, other = (speedup(LONG, pattern, 4, "auto", rates) for pattern in (sparse, full))
    assert forward_speedup(LONG, [sparse, sparse], 4, "auto", rates) == pytest.approx(one)
    assert min(one, other) < forward_speedup(LONG, [sparse, full], 4, "auto", rates) < max(one, other)
    times = [LONG.flops(pattern) / rates.flops for pattern in (sparse, full)]
    want = sum(times) / (times[0] / one + times[1] / other)
    assert forward_speedup(LONG, [sparse, full], 4, "auto", rates) == pytest.approx(want)


def test_gathered_weights_hide_behind_arithmetic_until_they_take_longer():
    """A byte more than fits behind a quarter of the arithmetic begins to count."""
    rates, patterns = GPU_RATES[2], [TilePattern(1)] * 2
    computing = 2 * LONG.flops(patterns[0]) / rates.flops / 4
    hidden = int(computing * rates.link * 0.99)
    without = forward_speedup(LONG, patterns, 4, "auto", rates)
    assert forward_speedup(LONG, patterns, 4, "auto", rates, hidden) == without
    sent = 4 * computing / without - computing
    want = 4 * computing / (3 * hidden / rates.link + sent)
    assert forward_speedup(LONG, patterns, 4, "auto", rates, 3 * hidden) == pytest.approx(want)


def test_a_layer_is_its_matrices_its_attention_and_the_text_that_it_is_crossed_with():
    """By hand: 14 width^2 weights for each token, keys and values of the text, and pairs of tokens and text."""
    layout, width, text = TokenLayout(TokenGrid(4, 1, 3)), 6, 5
    tokens = layout.tokens
    matrices = 2 * tokens * 14 * width**2 + 4 * text * width**2
    attention = 4 * tokens**2 * width + 4 * tokens * width * text
    assert LayerShape(layout, 2, 3, text=text).flops(TilePattern(None)) == matrices + attention


def test_reference_broadcast_is_cut_into_shared_rows_and_rows_to_shared_keys():
    """By hand: two reference frames of 4 tokens and 3 before the video are shared, of 27."""
    shape = LayerShape(TokenLayout(TokenGrid(6, 1, 4), prefix=3), 4, 8)
    shared, tokens, width = 11, 27, 32
    rows, to_shared = 4 * shared * tokens * width, 4 * (tokens - shared) * shared * width
    assert _rb_work(shape, TilePattern(2), 1e9, 1.0) == RbWork(1e9 - rows - to_shared, rows, to_shared)


def test_a_layer_of_another_model_is_its_own_matrices_and_sequence():
    """MiniMax-H3: the rows before the video see all, and its matrices are not Open-Sora-Plan's."""
    layout, weights = TokenLayout(TokenGrid(72, 24, 42), 1110), 385_351_680
    layer = LayerShape(layout, 56, 128, text=0, weights=weights)
    tokens, video = layout.tokens, layout.grid.tokens
    left = 1 - (1 - TilePattern(8).density(72)) * (video / tokens) ** 2
    assert layer.flops(TilePattern(8)) == pytest.approx(2 * tokens * weights + 4 * tokens**2 * 56 * 128 * left)


def test_a_clip_that_people_make_on_several_gpus():
    rows = gpu_forecasts("minimax_h3", "1344x768-10s")
    found = {(r["plan"], r["gpus"], r["rates"]): r["speedup"] for r in rows}
    assert len(found) == len(rows) == (1 + len(MODELS["minimax_h3"].presets)) * 2 * len(GPU_RATES)
    for (_, gpus, _), speedup_of_it in found.items():
        assert 1.0 < speedup_of_it < gpus
    assert all(r["speedup"] < r["speedup_overlapped"] < r["gpus"] for r in rows)
    fast, slow = GPU_RATES[0].name, GPU_RATES[-1].name
    assert all(found[plan, 4, fast] > found[plan, 4, slow] for plan in ("none", "minimax_h3_strong"))


def test_the_marks_on_gpus_with_the_exchanges_beside_the_attention():
    """MiniMax-H3, 10 s at 768p under the plan that leaves 0.3 of the attention; a model at stated rates."""
    found = {
        (r["gpus"], r["rates"]): r["speedup_overlapped"]
        for r in gpu_forecasts("minimax_h3", "1344x768-10s")
        if r["plan"] == "minimax_h3_strong"
    }
    nvlink, pcie = GPU_RATES[0].name, GPU_RATES[1].name
    assert found[2, pcie] >= 1.9 and found[4, nvlink] >= 3.9 and found[4, pcie] >= 3.7


def test_an_exchange_counts_where_the_work_beside_it_is_shorter():
    """By hand, in seconds and bytes at a byte a second: queries 3, keys 6, rows 4 beside work of 1, 5 and 2."""
    assert rb_seconds(RbWork(1, 5, 2), RbBytes(3, 0, 6, 4), 1.0) == 9 + 4  # the link is never idle
    assert (
        rb_seconds(RbWork(4, 5, 2), RbBytes(3, 0, 6, 4), 1.0) == 4 + 5 + 4
    )  # only the way back is longer than its work
    assert rb_seconds(RbWork(4, 5, 9), RbBytes(3, 0, 6, 4), 1.0) == 4 + 5 + 9
    assert rb_seconds(RbWork(4, 5, 9), RbBytes(3, 2, 4, 4), 1.0) == 5 + 4 + 5 + 9  # near frames wait for the halo


def test_work_waits_for_the_queries_and_keys_that_it_is_of():
    """Where nothing else is sent that it would wait for."""
    assert rb_seconds(RbWork(1, 10, 2), RbBytes(3, 0, 0, 0), 1.0) == 3 + 10 + 2
    assert rb_seconds(RbWork(1, 1, 5), RbBytes(0, 0, 8, 1), 1.0) == 8 + 5


def test_ulysses_hides_all_but_the_first_heads_way_there_and_the_last_ones_back():
    assert ulysses_seconds(20, 6, 2, 1.0) == 3 + 20 + 1
    assert ulysses_seconds(2, 6, 2, 1.0) == 6 + 1 + 1  # the second heads come when the first are done
    assert ulysses_seconds(2, 6, 20, 1.0) == 6 + 20


def test_unlike_devices_get_shares_by_what_they_measured():
    assert weights_of(["RTX 4090", "RTX 3090"], [160e12, 70e12]) == (16, 7)
    assert weights_of(["RTX 4090"] * 2, [160e12, 70e12]) == (), "of one name: chance"
    assert weights_of(["RTX 4090", "L40S"], [160e12, 158e12]) == ()
    assert weights_of(["H100", "GTX 1080"], [800e12, 1e12]) == (16, 1)
    assert weights_of(["RTX 4090", "RTX 4090", "RTX 3090"], [160e12, 140e12, 75e12]) == (16, 16, 8)


def test_the_overhead_is_what_the_runs_took_beyond_the_model():
    assert overhead(seconds=0.6, alone=1.0, ranks=2, sent=50, link=1000.0) == pytest.approx(1.1)
    assert overhead(seconds=0.4, alone=1.0, ranks=2, sent=0, link=1.0) == 1.0
    assert overhead(seconds=3.0, alone=2.0, ranks=2, sent=4, link=4.0) == 2.0


def test_the_rows_stand_beside_the_paper():
    rows = model_rows([{"scheme": "rb", "overhead": 1.02}, {"scheme": "alone"}])
    assert {row["kind"] for row in rows} == {"model"}
    four = [row for row in rows if row["ranks"] == 4]
    assert {row["paper_speedup"] for row in four} == {3.68, 3.91}
    assert all(row["overhead"] == (1.02 if row["scheme"] == "rb" else 1.0) for row in rows)
    assert all(1.0 < row["speedup"] <= row["ranks"] for row in rows)
