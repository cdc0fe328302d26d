"""What a search costs and what it must not depend on: memory of a dense run, no trial of backends, padded text."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.backends import workspace as extra_bytes
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
from efficient_vdit_core.search import ProbeRecord, clock, make_probe_override, probe, replay_blocks
from efficient_vdit_core.search.tile_mass import MassRecord, make_mass_override
from efficient_vdit_core.tiles import TilePattern, TokenGrid

HEADS, DIM = 4, 32
LAYOUT = TokenLayout(TokenGrid(8, 8, 16), suffix=16)


def patterns(*counts):
    return tuple(map(TilePattern, counts))


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made within it held at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


class Block(torch.nn.Module):
    def forward(self, x, options):
        return x + sdpa_attention(x * 1.1, x * 0.9, x, HEADS, transformer_options=options)


def peak(override, blocks=2) -> int:
    x = torch.randn(1, LAYOUT.tokens, HEADS * DIM)
    options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(LAYOUT)}
    with torch.no_grad(), PeakBytes() as bytes_held:
        for _ in range(blocks):
            x = Block()(x, options)
    return bytes_held.peak


ATTENTION_OUTPUT = LAYOUT.tokens * HEADS * DIM * 4


def dense(func, *args, **kwargs):
    return func(*args, **kwargs)


def test_the_search_holds_one_more_attention_output_whatever_the_candidates(monkeypatch):
    """Beside it the copies of one candidate: queries and keys of the reference frames, and the float32 copies of a
    head."""
    monkeypatch.setattr(extra_bytes, "_CPU_BYTES", 2**16)  # the bound on the copies that a sparse run makes as well
    few = peak(make_probe_override(ProbeRecord(patterns(1))))
    many = peak(make_probe_override(ProbeRecord(patterns(0, 1, 2, 3))))
    assert few <= peak(dense) + 3 * ATTENTION_OUTPUT
    assert many <= few + 2 * ATTENTION_OUTPUT
    score_matrix = HEADS * LAYOUT.tokens**2 * 4
    assert many < score_matrix / 2


def test_the_tile_map_never_holds_all_weights():
    record = MassRecord((0, 1), rows=16)
    assert peak(make_mass_override(record)) < peak(dense) + HEADS * LAYOUT.tokens**2 * 4 / 4 and set(record.found) == {
        0,
        1,
    }


def test_errors_are_the_pattern_s_even_where_dense_attention_is_faster(monkeypatch):
    monkeypatch.setattr(clock, "choose_backend", lambda *args, **kwargs: "dense")
    record, timed = ProbeRecord(patterns(1)), ProbeRecord(patterns(1), timed=True)
    for each in (record, timed):
        torch.manual_seed(0)
        peak(make_probe_override(each), blocks=1)
    assert record.error(0, TilePattern(1)) == timed.error(0, TilePattern(1)) > 0.1
    assert timed.cost(0, TilePattern(1)) == 1.0  # never chosen: a run would take dense attention


def test_the_trial_behind_a_measured_cost_is_the_run_s_own(monkeypatch):
    """Under the same name, and of fewer heads, which some of ComfyUI's backends take from the argument alone."""
    names = []

    def choose(shape, layout, pattern, *, dense):
        q, k, v = shape.tensors(1, layout.tokens)
        assert dense(q, k, v).shape == q.shape
        names.append(dense.name)
        return "dense"

    def by_argument(q, k, v, heads, *, skip_reshape, **_):
        batch, _, _, dim = q.shape
        q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
        return (q @ k.transpose(1, 2) / dim**0.5).softmax(-1).bmm(v).unflatten(0, (batch, heads))

    monkeypatch.setattr(clock, "choose_backend", choose)
    layout, record = TokenLayout(TokenGrid(4, 1, 3)), ProbeRecord(patterns(1), timed=True)
    override = make_probe_override(record, previous=lambda func, *args, **kwargs: func(*args, **kwargs))
    qkv = torch.randn(3, 1, HEADS, layout.tokens, DIM)
    override(
        by_argument,
        *qkv,
        HEADS,
        skip_reshape=True,
        skip_output_reshape=True,
        transformer_options={FORWARD_KEY: ForwardState(layout)},
    )
    assert names == ["<lambda> over by_argument"] and record.cost(0, TilePattern(1)) == 1.0


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("layout", "padding", "without"),
    [
        (TokenLayout(TokenGrid(4, 1, 4), suffix=5), range(18, 21), TokenLayout(TokenGrid(4, 1, 4), suffix=2)),
        (TokenLayout(TokenGrid(4, 1, 4), prefix=5), range(2, 5), TokenLayout(TokenGrid(4, 1, 4), prefix=2)),
    ],
)
def test_padded_text_is_left_out_of_the_comparison(blocks, layout, padding, without):
    """Masked tokens change no error: the same as without them."""
    torch.manual_seed(0)
    x = torch.randn(1, layout.tokens, 16)
    mask = torch.zeros(1, 1, 1, layout.tokens)
    mask[..., list(padding)] = float("-inf")
    real = [n for n in range(layout.tokens) if n not in padding]

    class Masked(torch.nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.mask = mask

        def forward(self, x, options):
            out = sdpa_attention(x, x, x, 2, mask=self.mask, transformer_options=options)
            return out if self.mask is None else out[:, real]

    found = []
    for tokens, m, state in (
        (x, mask, ForwardState(layout, padding=padding)),
        (x[:, real], None, ForwardState(without)),
    ):
        record, block = ProbeRecord(patterns(0, 1)), Masked(m)
        with replay_blocks([block] if blocks else [], record):
            block(tokens, {OVERRIDE_KEY: make_probe_override(record), FORWARD_KEY: state})
        found.append([record.error(0, TilePattern(k), "block" if blocks else "attention") for k in (0, 1)])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and min(found[0]) > 0.05


@pytest.mark.parametrize(("backend", "of_a_part"), [("frames", True), ("triton", False), ("flex", False)])
def test_groups_of_heads_cost_a_call_each_only_where_they_take_one(monkeypatch, backend, of_a_part):
    seen = []

    def attend(q, *_, **__):
        seen.append(q.shape[1])
        return torch.zeros_like(q)

    monkeypatch.setattr(clock, "choose_backend", lambda *args, **kwargs: backend)
    for module in (probe, clock):
        monkeypatch.setattr(module, "tile_attention", attend)
    record = ProbeRecord(patterns(1), timed=True, by_head=True)
    peak(make_probe_override(record), blocks=1)
    assert (HEADS // 2 in seen) == of_a_part and HEADS in seen
