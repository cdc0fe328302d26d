"""The model of the speed-up against figures worked out by hand from the stated rates."""

import pytest

from efficient_vdit_core.bench.parallel import model_rows
from efficient_vdit_core.parallel.sharding.forecast import (
    GPU_RATES,
    LayerShape,
    Rates,
    bytes_sent,
    forward_speedup,
    overhead,
    speedup,
)
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LONG = LayerShape(TokenGrid(24, 45, 80), 24, 96)


@pytest.mark.parametrize(
    ("ranks", "k", "scheme", "mebibytes"),
    [(2, None, "ulysses", 379.7), (4, None, "ulysses", 284.8), (8, None, "ulysses", 166.1)],
)
def test_bytes_of_a_real_layer(ranks, k, scheme, mebibytes):
    assert bytes_sent(LONG, TilePattern(k), ranks, scheme)[1] / 2**20 == pytest.approx(mebibytes, abs=0.06)


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


def test_the_overhead_is_what_the_runs_took_beyond_the_model():
    assert overhead(seconds=0.6, alone=1.0, ranks=2, sent=50, link=1000.0) == pytest.approx(1.1)
    assert overhead(seconds=0.4, alone=1.0, ranks=2, sent=0, link=1.0) == 1.0


def test_the_rows_stand_beside_the_paper():
    rows = model_rows([{"scheme": "rb", "overhead": 1.02}, {"scheme": "alone"}])
    assert {row["kind"] for row in rows} == {"model"}
    four = [row for row in rows if row["ranks"] == 4]
    assert {row["paper_speedup"] for row in four} == {3.68, 3.91}
    assert all(row["overhead"] == (1.02 if row["scheme"] == "rb" else 1.0) for row in rows)
    assert all(1.0 < row["speedup"] <= row["ranks"] for row in rows)
