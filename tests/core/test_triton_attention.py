"""The fused kernels against the oracle, through Triton's interpreter, in float32; ``tests/gpu`` runs the real builds.

Sizes are small, since the interpreter takes a twentieth of a second for every block of 16 rows, and awkward: with 16
rows and 32 columns a block, frames of 19 tokens end in a broken block and 37 keys need a whole and a broken one.
"""

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.attention import TokenLayout, choose_backend, selection, tile_attention
from efficient_vdit_core.attention.backends import triton as backend
from efficient_vdit_core.attention.backends.triton import attend_triton, attend_triton_lse
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid

FORWARD = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BACKWARD = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}

pytestmark = [
    pytest.mark.usefixtures("triton_device"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU"),
]


def qkv(layout, dim, device, *, batch=1, heads=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, layout.tokens, dim, generator=generator).to(device, dtype) for _ in range(3)]


def expected(score_oracle, tensors, layout, k):
    """Output and LSE of the oracle, float64."""
    grid = layout.grid
    references = TilePattern(k).reference_frames(grid.t)
    scores = score_oracle(*tensors[:2], grid.t, grid.tokens_per_frame, references, layout.prefix, layout.suffix)
    return scores.softmax(-1) @ tensors[2].double(), torch.logsumexp(scores, -1)


def assert_equals_oracle(score_oracle, tensors, layout, k):
    out, lse = attend_triton_lse(*tensors, layout, TilePattern(k))
    want, want_lse = expected(score_oracle, tensors, layout, k)
    close = {"atol": FORWARD[out.dtype], "rtol": FORWARD[out.dtype]}
    assert out.dtype == tensors[0].dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, **close)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("grid", "prefix", "suffix", "k"),
    [
        ((4, 1, 19), 0, 0, 2),  # a frame ends inside a block
        ((3, 1, 37), 3, 5, 1),  # and inside a block of keys
        ((3, 2, 8), 0, 0, 1),  # a frame is a block
        ((2, 4, 8), 0, 33, 0),  # a frame is two blocks; a long suffix, and nothing else is shared
        ((9, 1, 1), 2, 0, 2),  # frames of one token
        ((5, 1, 1), 0, 0, 0),  # each token sees itself alone
        ((3, 1, 5), 20, 0, 3),  # all frames are reference frames
        ((3, 1, 5), 0, 1, 7),  # more reference frames than frames
        ((1, 2, 3), 1, 1, 1),
        ((3, 1, 5), 0, 0, None),
    ],
)
def test_equals_the_masked_oracle(score_oracle, triton_device, grid, prefix, suffix, k):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    assert_equals_oracle(score_oracle, qkv(layout, 32, triton_device), layout, k)


@pytest.mark.parametrize("k", [1, None])
def test_blocks_that_are_all_masked_are_the_same(score_oracle, triton_device, monkeypatch, k):
    """As on sm_100: one way through the loops' bodies."""
    monkeypatch.setattr(backend, "INTERPRETER_BLOCKS", {"ROWS": 16, "COLS": 32, "MASKED": True})
    layout = TokenLayout(TokenGrid(3, 1, 37), 3, 5)
    tensors = [x.requires_grad_() for x in qkv(layout, 32, triton_device)]
    assert_equals_oracle(score_oracle, tensors, layout, k)
    ours = torch.autograd.grad(attend_triton(*tensors, layout, TilePattern(k)).square().sum(), tensors)
    theirs = torch.autograd.grad(expected(score_oracle, tensors, layout, k)[0].square().sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("layout", "batch"), [(TokenLayout(TokenGrid(4, 1, 19), 3, 5), 1), (TokenLayout(TokenGrid(5, 1, 7)), 2)], ids=str
)
def test_heads_that_differ_take_one_launch(score_oracle, triton_device, monkeypatch, layout, batch):
    """Groups that are mixed, a window and a head that leaves nothing out; there and back, also in a batch of two."""
    patterns = [TilePattern(1), TilePattern(0, window=1), TilePattern(1), TilePattern(None), TilePattern(2)]
    tensors = [x.requires_grad_() for x in qkv(layout, 32, triton_device, batch=batch, heads=5)]
    launches, launch = [], backend._launch
    monkeypatch.setattr(backend, "_launch", lambda *args, **flags: (launches.append(args[0]), launch(*args, **flags)))
    out, lse = attend_triton_lse(*tensors, layout, by_head(patterns))
    found = torch.autograd.grad((out.square().sum() + lse.sum()), tensors)
    assert len(launches) == 3
    want, want_lse = torch.empty_like(out, dtype=torch.float64), torch.empty_like(lse, dtype=torch.float64)
    for head, pattern in enumerate(patterns):
        q, k, v = (x[:, head : head + 1] for x in tensors)
        grid = layout.grid
        references = pattern.reference_frames(grid.t)
        at = (grid.t, grid.tokens_per_frame, references, layout.prefix, layout.suffix, pattern.window)
        scores = score_oracle(q, k, *at)
        want[:, head : head + 1] = scores.softmax(-1) @ v.double()
        want_lse[:, head : head + 1] = torch.logsumexp(scores, -1)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)
    correct = torch.autograd.grad((want.square().sum() + want_lse.sum()), tensors)
    for a, b in zip(found, correct, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rows_that_see_most_come_first():
    layout = TokenLayout(TokenGrid(4, 1, 10), 2, 1)
    pattern = by_head([TilePattern(1), TilePattern(0, window=1), TilePattern(2)])
    units, segments, turns = (x.tolist() for x in backend.index_tables(layout, pattern, 3, torch.device("cpu")))
    assert units[:2] == [[0, 2, 0, 1], [42, 43, 0, 1]] and segments[0] == [0, 43]
    seen = [sum(end - start for start, end in segments[units[u][2] : units[u][3]]) for _, u in turns]
    assert seen == sorted(seen, reverse=True) and seen[:3] == [43, 43, 43]
    assert {(head, tuple(units[unit][:2])) for head, unit in turns} == {
        (head, layout.span(frame, frame + 1)) for head in range(3) for frame in range(4)
    }


@pytest.mark.parametrize("gradients", [False, True])
def test_tiles_are_tuned_before_the_run_once_a_kind(triton_device, monkeypatch, gradients):
    monkeypatch.setattr(backend, "_TUNED", set())
    launches, launch = [], backend._launch
    monkeypatch.setattr(
        backend, "_launch", lambda kernel, tensors, q, *rest, **flags: (
            launches.append(tuple(q.shape)), launch(kernel, tensors, q, *rest, **flags)
        )
    )  # fmt: skip
    shape = CallShape(2, 6, 32, torch.float32, triton_device, gradients)
    for tokens in (20, 21, 40):  # the first two are of one class
        backend._tune(shape, TokenLayout(TokenGrid(2, 1, tokens)), TilePattern(1), multiprocessors=1)
    kernels = 3 if gradients else 1
    assert launches == [(1, 4, 40, 32)] * kernels + [(1, 4, 80, 32)] * kernels


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("dim", backend.HEAD_DIMS)
def test_head_sizes_and_dtypes(score_oracle, triton_device, dim, dtype):
    layout = TokenLayout(TokenGrid(2, 1, 18), 1)
    assert_equals_oracle(score_oracle, qkv(layout, dim, triton_device, dtype=dtype), layout, 0)


def test_any_strides(score_oracle, triton_device):
    layout = TokenLayout(TokenGrid(2, 1, 5))
    plain = qkv(layout, 48, triton_device, batch=2, heads=2)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    channels_apart = [torch.stack((x, x), -1)[..., 0] for x in plain]
    expanded = [x[:1, :1].expand(2, 2, -1, -1) for x in plain]
    for tensors in (
        tokens_first,
        [expanded[0], channels_apart[1], plain[2]],
        [channels_apart[0], plain[1], expanded[2]],
    ):
        assert_equals_oracle(score_oracle, tensors, layout, 0)


@pytest.mark.parametrize(
    ("grid", "prefix", "suffix", "k", "dim", "dtype"),
    [
        ((2, 1, 19), 2, 0, 0, 96, torch.float32),
        ((2, 1, 33), 0, 0, 0, 64, torch.float32),
        ((3, 1, 1), 0, 0, 1, 80, torch.float32),
        ((3, 1, 7), 1, 1, 2, 128, torch.bfloat16),
        ((3, 1, 7), 0, 0, 1, 48, torch.float16),
    ],
)
def test_gradients(score_oracle, triton_device, grid, prefix, suffix, k, dim, dtype):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    tensors = [x.requires_grad_() for x in qkv(layout, dim, triton_device, dtype=dtype)]
    weight, lse_weight = torch.randn_like(tensors[0]), torch.randn(1, 1, layout.tokens, device=triton_device)
    out, lse = attend_triton_lse(*tensors, layout, TilePattern(k))
    want, want_lse = expected(score_oracle, tensors, layout, k)
    for ours, theirs in (
        ((out * weight).sum(), (want * weight).sum()),
        ((lse * lse_weight).sum(), (want_lse * lse_weight).sum()),
    ):
        differing = tensors if ours.dtype == out.dtype and ours is not lse else tensors[:2]
        found = torch.autograd.grad(ours, tensors, retain_graph=True, allow_unused=True)
        correct = torch.autograd.grad(theirs, tensors, retain_graph=True, allow_unused=True)
        for a, b in zip(found[: len(differing)], correct[: len(differing)], strict=True):
            b = torch.zeros_like(a) if b is None else b
            torch.testing.assert_close(a, b, atol=BACKWARD[dtype], rtol=BACKWARD[dtype])


def test_gradients_of_strided_and_expanded_tensors(score_oracle, triton_device):
    layout = TokenLayout(TokenGrid(3, 1, 3), 1)
    sources = [x.requires_grad_() for x in qkv(layout, 32, triton_device, heads=2)]
    tensors = [
        sources[0].transpose(1, 2).contiguous().transpose(1, 2),
        sources[1][:, :1].expand(-1, 2, -1, -1),
        sources[2],
    ]
    ours = torch.autograd.grad(
        attend_triton(*tensors, layout, TilePattern(1)).sum(), sources
    )  # its gradient is expanded, too
    theirs = torch.autograd.grad(expected(score_oracle, tensors, layout, 1)[0].sum(), sources)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_partial_results_merge_by_their_lse(triton_device):
    layout, keys = TokenLayout(TokenGrid(1, 1, 20)), 40
    q, k, v = (torch.randn(1, 1, n, 32, device=triton_device) for n in (20, keys, keys))
    parts = [attend_triton_lse(q, k[:, :, i : i + 20], v[:, :, i : i + 20], layout, TilePattern(None)) for i in (0, 20)]
    share = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(part * s[..., None] for (part, _), s in zip(parts, share, strict=True))
    torch.testing.assert_close(merged, F.scaled_dot_product_attention(q, k, v), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("poisoned", ["k", "v"])
def test_nan_stays_within_what_the_mask_connects(triton_device, poisoned):
    layout = TokenLayout(TokenGrid(4, 1, 19), 3)  # frames 0 and 2 are references of k = 2
    tensors = dict(zip("qkv", qkv(layout, 32, triton_device), strict=True))
    tensors[poisoned][:, :, 3 + 19 : 3 + 38] = float("nan")  # frame 1; the blocks of its neighbours end inside it
    out, lse = attend_triton_lse(**tensors, layout=layout, pattern=TilePattern(2))
    rows = out.isnan().any(-1)[0, 0]
    assert rows[:3].all() and [bool(frame.any()) for frame in rows[3:].split(19)] == [True, True, True, False]
    assert torch.equal(lse.isnan()[0, 0], rows if poisoned == "k" else torch.zeros_like(rows))


@pytest.mark.parametrize(
    ("grid", "token_stride"),
    [
        ((2, 1, 150), 2**23 - 8),  # a block's first token lies beyond 32 bits
        ((2, 1, 17), 2**27),  # a block's 17th token lies beyond 32 bits from its first
    ],
)
def test_more_than_two_to_the_31_elements(score_oracle, triton_device, tmp_path, monkeypatch, grid, token_stride):
    """Tokens and heads lie further apart in a sparse file than 32 bits can say. An offset that wrapped around would
    stay inside the file and read zeros. Outputs are dense: their offsets are formed by the same helper, which this
    cannot reach.
    """
    if triton_device.type != "cpu":
        pytest.skip("a sparse file stands for memory that a GPU would have to have")
    monkeypatch.setattr(
        backend, "INTERPRETER_BLOCKS", {"ROWS": 32 if grid[2] < 32 else 128, "COLS": 128, "MASKED": False}
    )
    layout, head_stride, base = TokenLayout(TokenGrid(*grid)), 2**31 + 2**20, 2**31
    size = base + head_stride + layout.tokens * token_stride
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    assert (layout.tokens - 1) * token_stride > 2**31
    tensors = []
    for i, x in enumerate(qkv(layout, 32, torch.device("cpu"), heads=2, dtype=torch.float16)):
        tensors.append(storage.as_strided(x.shape, (0, head_stride, token_stride, 1), base + 64 * i).copy_(x))
    assert_equals_oracle(score_oracle, tensors, layout, 0)


def test_it_is_reached_by_name_and_never_tried_by_auto_under_the_interpreter(oracle, triton_device, monkeypatch):
    layout = TokenLayout(TokenGrid(3, 1, 5))
    tensors = qkv(layout, 32, triton_device)
    out = tile_attention(*tensors, layout, TilePattern(1), backend="triton")
    torch.testing.assert_close(out.double(), oracle(*tensors, 3, 5, (0,)), atol=2e-5, rtol=2e-5)
    assert torch.equal(out, attend_triton(*tensors, layout, TilePattern(1)))
    if triton_device.type == "cpu":
        monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
        monkeypatch.setattr(selection, "default_book", lambda: Trial())
        assert choose_backend(CallShape.of(tensors[0]), layout, TilePattern(1)) == "dense"


class Trial:
    """Stands for the book of choices: refuses the fused kernel as a candidate and takes dense."""

    backend = "dense"

    def choose(self, candidates, *_):
        assert "triton" not in candidates
        return self


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_argument_that_does_not_fit_is_named(triton_device, name):
    layout = TokenLayout(TokenGrid(3, 1, 5))
    tensors = dict(zip("qkv", qkv(layout, 32, triton_device), strict=True))
    for wrong in (tensors[name][:, :, :4], tensors[name][0], tensors[name][:, :0]):
        with pytest.raises(ValueError, match=f"^({name}|k) has shape"):
            attend_triton(**{**tensors, name: wrong}, layout=layout, pattern=TilePattern(1))


def test_what_the_kernel_cannot_take_is_refused(triton_device):
    layout = TokenLayout(TokenGrid(3, 1, 5))
    with pytest.raises(ValueError, match="q has head_dim 40, expected one of 32, 48, 64, 80, 96, 128"):
        attend_triton(*qkv(layout, 40, triton_device), layout, TilePattern(1))
    with pytest.raises(ValueError, match="q is torch.float64"):
        attend_triton(*qkv(layout, 32, triton_device, dtype=torch.float64), layout, TilePattern(1))
    q, k, v = qkv(layout, 32, triton_device)
    with pytest.raises(ValueError, match="v is torch.float16"):
        attend_triton(q, k, v.half(), layout, TilePattern(1))
