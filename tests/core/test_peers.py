"""The bench beside ComfyUI's own sparse attention: its density is the peer's, and its errors are what they say."""

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.bench import peers
from efficient_vdit_core.search.candidates import parse_candidates
from efficient_vdit_core.search.probe import make_probe_override
from efficient_vdit_core.search.record import ProbeRecord
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LAYOUT = TokenLayout(TokenGrid(6, 8, 16))  # two blocks a frame


def qkv(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, 2, LAYOUT.tokens, 16, generator=generator)
    return [shared + torch.randn(shared.shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("density", [0.35, 0.5, 0.7])
@pytest.mark.parametrize("method", [peers.SOL, peers.SLA])
def test_the_setting_gives_the_density_that_is_asked_for(method, density):
    q, k, _ = qkv()
    assert peers.routed_share(q, k, method, peers._setting(q, k, method, density)) == pytest.approx(density, abs=0.06)


@pytest.mark.parametrize("density", [0.35, 0.6])
@pytest.mark.parametrize("method", [peers.SOL, peers.SLA])
def test_the_share_is_what_the_peer_computes_exactly(method, density):
    """Seen from outside: a value that only one block of keys has comes through where that block is computed exactly."""
    attend = pytest.importorskip("comfy_kitchen.backends.eager.sol_attn").sol_attn
    q, k, _ = qkv()
    setting = peers._setting(q, k, method, density)
    blocks = LAYOUT.tokens // peers.BLOCK
    seen = torch.zeros(2, blocks, blocks, dtype=torch.bool)
    owner = torch.arange(LAYOUT.tokens) // peers.BLOCK
    v = F.one_hot(owner, blocks).float().expand(1, 2, -1, -1)
    settings = {"tau": setting} if method == peers.SOL else {"topk_ratio": setting}
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), tail=False, **settings)
    for block in range(blocks):
        seen[:, block] = (out[0, owner == block] > 0).any(0)
    assert float(seen.float().mean()) == pytest.approx(peers.routed_share(q, k, method, setting), abs=1e-6)


MEANS = [f"arrow, {count} mean frames" for count in (1, 2, 3)]


def test_errors_are_those_of_the_same_calls_at_the_same_density():
    def dense_peer(q, k, v, **_):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    record = peers.PeerRecord((2,), dense_peer)
    q, k, v = qkv()
    record.add(3, q, k, v, F.scaled_dot_product_attention(q, k, v), LAYOUT)
    rows = {row["method"]: row for row in record.rows()}
    assert set(rows) == {peers.ARROW, *MEANS, peers.SOL, peers.SLA} and {r["layer"] for r in rows.values()} == {3}
    assert rows[peers.ARROW]["density"] == TilePattern(2).density(6)
    assert (
        rows[MEANS[0]]["density"] == TilePattern(2, means=1).density(6)
        and rows[MEANS[0]]["error"] < rows[peers.ARROW]["error"]
    )
    assert peers.SEARCHED not in rows
    assert rows[peers.SOL]["density"] == pytest.approx(TilePattern(2).density(6), abs=0.06)
    assert rows[peers.SOL]["error"] < 1e-6 < 0.01 < rows[peers.ARROW]["error"]


def test_a_searched_plan_costs_no_more_and_errs_less():
    probed = ProbeRecord(parse_candidates(peers.CANDIDATES))
    look = make_probe_override(probed)
    attend = lambda q, k, v, heads, **_: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    for seed in (1, 2):
        options = {FORWARD_KEY: ForwardState(layout=LAYOUT, depth=1), "block_index": 0}
        look(attend, *qkv(seed), 2, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    plans = peers.searched_plans(probed, (1, 2), layers=1, heads=2)
    record = peers.PeerRecord((1, 2), lambda q, k, v, **_: v, plans)
    q, k, v = qkv()
    record.add(0, q, k, v, F.scaled_dot_product_attention(q, k, v), LAYOUT)
    for count in (1, 2):
        rows = {row["method"]: row for row in record.rows() if row["reference_frames"] == count}
        assert rows[peers.SEARCHED]["density"] <= rows[peers.ARROW]["density"] + 1e-9
        assert rows[peers.SEARCHED]["error"] < rows[peers.ARROW]["error"]
