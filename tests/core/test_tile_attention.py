import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from efficient_vdit_core.attention import TokenLayout, available_backends, tile_attention
from efficient_vdit_core.attention.backends.frames import default_extra_bytes
from efficient_vdit_core.tiles import TilePattern, TokenGrid

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def qkv(layout, dim=64, batch=2, heads=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, layout.tokens, dim, generator=generator).to(dtype) for _ in range(3)]


def expected(oracle, tensors, layout, k):
    grid = layout.grid
    return oracle(
        *tensors, grid.t, grid.tokens_per_frame, TilePattern(k).reference_frames(grid.t), layout.prefix, layout.suffix
    )


@pytest.mark.parametrize("grid", [(5, 2, 3), (7, 1, 37), (8, 3, 2), (3, 5, 1), (1, 2, 3), (2, 2, 2)])
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (5, 0), (0, 3), (4, 7)])
def test_equals_the_masked_oracle(oracle, grid, prefix, suffix):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    tensors = qkv(layout)
    for k in (0, 1, 2, 3, grid[0], None):
        out = tile_attention(*tensors, layout, TilePattern(k))
        torch.testing.assert_close(out, expected(oracle, tensors, layout, k).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dim", "dtype"), list(itertools.product((64, 96, 128), TOLERANCE)))
def test_head_sizes_and_dtypes(oracle, dim, dtype):
    layout = TokenLayout(TokenGrid(5, 3, 3), 2, 3)
    tensors = qkv(layout, dim, dtype=dtype)
    out = tile_attention(*tensors, layout, TilePattern(2))
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), expected(oracle, tensors, layout, 2), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_all_frames_equal_dense_exactly():
    layout = TokenLayout(TokenGrid(6, 2, 3), 1, 2)
    tensors = qkv(layout)
    assert torch.equal(tile_attention(*tensors, layout, TilePattern(6)), F.scaled_dot_product_attention(*tensors))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_gradients(oracle, k):
    layout = TokenLayout(TokenGrid(5, 2, 3), 2, 3)
    tensors = [x.double().requires_grad_() for x in qkv(layout, 8)]
    weight = torch.randn_like(tensors[0])
    ours = torch.autograd.grad((tile_attention(*tensors, layout, TilePattern(k)) * weight).sum(), tensors)
    theirs = torch.autograd.grad((expected(oracle, tensors, layout, k) * weight).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_for_one_of_them_alone(oracle, name):
    """As in training an adapter of one projection; a frame at a time, so that chunks follow one another."""
    layout = TokenLayout(TokenGrid(5, 2, 3), 2, 3)
    tensors = [x.double() for x in qkv(layout, 8)]
    wanted = tensors["qkv".index(name)].requires_grad_()
    ours, theirs = (
        tile_attention(*tensors, layout, TilePattern(1), max_extra_bytes=1),
        expected(oracle, tensors, layout, 1),
    )
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), wanted), torch.autograd.grad(theirs.sum(), wanted))


def test_any_strides(oracle):
    layout = TokenLayout(TokenGrid(5, 2, 2), 1, 1)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(layout)]
    expanded = [x[:, :1].expand(-1, 2, -1, -1) for x in qkv(layout)]
    for tensors in (strided, expanded):
        out = tile_attention(*tensors, layout, TilePattern(2))
        torch.testing.assert_close(out, expected(oracle, tensors, layout, 2).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_copies_stay_under_the_bound(oracle, k):
    layout = TokenLayout(TokenGrid(9, 2, 4), 3, 0)
    tensors = qkv(layout)
    shared = 3 + k * 8
    one_frame = 2 * 2 * (8 + shared) * 64 * 4  # keys and values of one frame of one batch entry, two heads
    for bound in (1, one_frame, 3 * one_frame + 5, 10**9):
        seen = []

        def dense(q, k, v, seen=seen):
            if q.shape[2] == 8:  # the frames' calls; the shared rows see the keys as they are
                seen.append(k.numel() * 4 + v.numel() * 4)
            return F.scaled_dot_product_attention(q, k, v)

        out = tile_attention(*tensors, layout, TilePattern(k), dense=dense, max_extra_bytes=bound)
        assert max(seen) <= max(bound, one_frame)
        torch.testing.assert_close(out, expected(oracle, tensors, layout, k).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("poisoned", "reached"),
    [("q", [False, True] + 4 * [False]), ("k", [True, True, False, True, False, False]), ("v", None)],
)
def test_nan_stays_within_what_the_mask_connects(poisoned, reached):
    layout = TokenLayout(TokenGrid(6, 4, 4))  # over fewer than 16 keys PyTorch's own SDPA makes zeros of a NaN in q
    tensors = dict(zip("qkv", qkv(layout), strict=True))
    tensors[poisoned][:, :, 16:32] = float("nan")  # frame 1, not a reference of k = 2: frames 0 and 3 are
    rows = tile_attention(**tensors, layout=layout, pattern=TilePattern(2)).isnan().any(-1)[0, 0].view(6, 16).any(-1)
    assert rows.tolist() == (reached or [True, True, False, True, False, False])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("prefix", "bound"), [(0, 1), (5, 60_000), (5, 200_000), (5, 10**9)])
def test_memory_stays_under_the_stated_bound(k, prefix, bound):
    layout = TokenLayout(TokenGrid(9, 6, 8), prefix, 3)
    batch, heads, size, dim = 2, 2, 48, 64
    tensors = qkv(layout, dim, batch, heads)
    shared, row = prefix + 3 + k * size, dim * 4
    one_frame_of_one_head = max(2 * batch * shared, 3 * size + 2 * shared) * row
    output = batch * heads * layout.tokens * row

    def attend():
        return tile_attention(
            *tensors, layout, TilePattern(k), dense=lambda q, k, v: torch.zeros(q.shape), max_extra_bytes=bound
        )

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        attend()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert output < peak <= output + max(bound, one_frame_of_one_head) + 4096  # small tensors of indices


@pytest.mark.parametrize("free", [2**30, 80 * 2**30])
def test_a_call_allocates_the_same_however_much_is_free(monkeypatch, free):
    """What is recorded at one step is replayed at the next."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 2 * free))
    q = torch.empty(1, 56, 38_010, 128, dtype=torch.bfloat16, device="meta")
    assert default_extra_bytes(q, 10**9) == q.numel() * 2 == 4 * default_extra_bytes(q, 10**9, gradients=True)
    assert default_extra_bytes(q[:, :1, :999], 10**9) == 64 * 2**20


def test_no_value_of_a_tensor_is_read_on_the_way():
    layout = TokenLayout(TokenGrid(24, 45, 80), 7)
    tensors = [torch.empty(2, 24, layout.tokens, 96, device="meta") for _ in range(3)]  # reading one would raise
    out = tile_attention(*tensors, layout, TilePattern(2), backend="frames", dense=lambda q, k, v: torch.empty_like(q))
    assert out.shape == tensors[0].shape


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_argument_that_does_not_fit_is_named(name):
    layout = TokenLayout(TokenGrid(3, 2, 2))
    tensors = dict(zip("qkv", qkv(layout), strict=True))
    for wrong in (tensors[name][:, :, :5], tensors[name][0], tensors[name][:, :0]):
        with pytest.raises(ValueError, match=f"^({name}|k) has shape"):
            tile_attention(**{**tensors, name: wrong}, layout=layout, pattern=TilePattern(1))


def test_whole_numbers_are_refused():
    layout = TokenLayout(TokenGrid(3, 2, 2))
    with pytest.raises(ValueError, match="^q is torch.int64, expected a float dtype"):
        tile_attention(*(x.long() for x in qkv(layout)), layout, TilePattern(1))


def test_mixed_dtypes_and_unknown_backends_are_refused():
    layout = TokenLayout(TokenGrid(3, 2, 2))
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match="v is torch.float16"):
        tile_attention(q, k, v.half(), layout, TilePattern(1))
    with pytest.raises(ValueError, match="backend is 'warp', expected auto, dense, frames, triton, flex or parts"):
        tile_attention(q, k, v, layout, TilePattern(1), backend="warp")
    assert "frames" in [b.name for b in available_backends() if b.available]


@pytest.mark.parametrize("k", [0, 2])
def test_torch_compile_traces_it_whole(oracle, k):
    layout = TokenLayout(TokenGrid(6, 2, 3), 2, 1)
    tensors = qkv(layout)
    compiled = torch.compile(
        lambda q, k_, v: tile_attention(q, k_, v, layout, TilePattern(k)), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(*tensors), expected(oracle, tensors, layout, k).float(), atol=1e-5, rtol=1e-5)


def test_nothing_is_copied_where_there_is_nothing_to_share():
    layout = TokenLayout(TokenGrid(4, 2, 3))
    q, k, v = qkv(layout, batch=1)
    memory = {x.untyped_storage().data_ptr() for x in (q, k, v)}

    def dense(q, k, v):
        assert {x.untyped_storage().data_ptr() for x in (q, k, v)} == memory
        return F.scaled_dot_product_attention(q, k, v)

    tile_attention(q, k, v, layout, TilePattern(0), dense=dense)


class Forgetful(torch.autograd.Function):
    """Attention with no way back, as quantised kernels have none."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        ctx.mark_non_differentiable(out)
        return out


@pytest.mark.parametrize("backend", ["frames", "dense"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_that_would_be_lost_is_refused(backend, name):
    layout = TokenLayout(TokenGrid(3, 2, 2))
    tensors = dict(zip("qkv", qkv(layout), strict=True))
    tensors[name].requires_grad_()

    def sage(q, k, v):
        return Forgetful.apply(q, k, v)

    def attend(dense, k=1):
        return tile_attention(**tensors, layout=layout, pattern=TilePattern(k), dense=dense, backend=backend)

    for k, used in ((1, backend), (None, "dense")):
        with pytest.raises(
            ValueError, match=f"^{name} requires a gradient, and the backend {used} with sage gives none"
        ):
            attend(sage, k)
    with torch.no_grad():
        assert not attend(sage).requires_grad
    assert attend(F.scaled_dot_product_attention).requires_grad


@pytest.mark.parametrize(
    ("backend", "pattern"),
    [("frames", TilePattern(2)), ("parts", TilePattern(2, window=1)), ("auto", TilePattern(2, means=2)), ("dense", TilePattern(2))],
)  # fmt: skip
def test_autocast_casts_as_for_pytorch_s_attention(backend, pattern):
    """On CUDA a norm gives float32 there, a matrix halves: q and k come in another dtype than v."""
    layout = TokenLayout(TokenGrid(9, 1, 5), 2)
    q, k, v = (torch.randn(1, 2, layout.tokens, 8).requires_grad_() for _ in range(3))
    mixed = (q, k.to(torch.float16), v.to(torch.bfloat16))
    want = tile_attention(*(x.to(torch.bfloat16) for x in mixed), layout, pattern, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for given in ((q, k, v), mixed):
            out = tile_attention(*given, layout, pattern, backend=backend)
            assert out.dtype == F.scaled_dot_product_attention(*given).dtype == torch.bfloat16
        exact = [x.double() for x in (q, k, v)]
        assert tile_attention(*exact, layout, pattern, backend=backend).dtype == torch.float64
    assert torch.equal(out, want)
    slopes = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [x.dtype for x in slopes] == [torch.float32] * 3
    with pytest.raises(ValueError, match="k is torch.float16"):
        tile_attention(*mixed, layout, pattern, backend=backend)
