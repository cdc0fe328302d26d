"""The computed block mask against a mask written out, and FlexAttention under it against the oracle.

FlexAttention needs a GPU to be worth compiling; without one its eager form, which applies the same block mask, stands
in.
"""

import functools
import time

import pytest
import torch

from efficient_vdit_core.attention import TokenLayout, available_backends, dispatch, tile_attention
from efficient_vdit_core.attention.backends import flex
from efficient_vdit_core.attention.backends.flex import (
    attend_flex,
    block_mask,
    flex_status,
    live_and_full_tiles,
    mask_of,
    token_owners,
)
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid

CPU = torch.device("cpu")
# Frames longer, shorter and as long as a block of 8, one-token frames, prefix and suffix, N a multiple of 8 or not.
SHAPES = [
    ((5, 1, 11), 3, 0), ((7, 1, 3), 0, 5), ((4, 2, 4), 0, 0), ((4, 2, 4), 8, 8), ((9, 1, 1), 2, 1), ((3, 4, 5), 0, 0), ((1, 1, 5), 4, 0),
]  # fmt: skip


def arrow_mask(layout, k, window=0):
    """The N x N mask, token by token."""
    size, references = layout.grid.tokens_per_frame, TilePattern(k).reference_frames(layout.grid.t)

    def frame(token):
        inside = 0 <= token - layout.prefix < layout.grid.tokens
        return (token - layout.prefix) // size if inside else None

    def shared(token):
        return frame(token) is None or frame(token) in references

    n = range(layout.tokens)
    return torch.tensor([[shared(i) or shared(j) or abs(frame(i) - frame(j)) <= window for j in n] for i in n])


@pytest.mark.parametrize(("grid", "prefix", "suffix"), SHAPES)
@pytest.mark.parametrize(("k", "window"), [(0, 0), (1, 0), (2, 0), (None, 0), (0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("blocks", [(8, 8), (16, 8)])
def test_the_block_mask_is_what_sampling_every_pair_finds(grid, prefix, suffix, k, window, blocks):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    mask, n = arrow_mask(layout, k, window), layout.tokens
    ours = block_mask(layout, TilePattern(k, window=window), CPU, *blocks)
    sampled = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, n, n, device="cpu", BLOCK_SIZE=blocks)
    assert ours.seq_lengths == sampled.seq_lengths == (n, n) and torch.equal(ours.to_dense(), sampled.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name).flatten(), getattr(sampled, name).flatten()), name
    for side in ("kv", "full_kv", "q", "full_q"):
        number, index = getattr(ours, f"{side}_num_blocks"), getattr(ours, f"{side}_indices")
        theirs = getattr(sampled, f"{side}_indices")
        for row in range(number.shape[-1]):
            assert torch.equal(index[0, 0, row, : number[0, 0, row]], theirs[0, 0, row, : number[0, 0, row]]), side
    token = torch.arange(n)
    assert torch.equal(ours.mask_mod(0, 0, token[:, None], token), mask)


# Groups that stand apart, with windows of their own, one that leaves nothing out.
DIFFER = by_head(
    [TilePattern(1), TilePattern(0, window=1), TilePattern(None), TilePattern(2, window=2), TilePattern(1)]
)


def arrow_masks(layout):
    """(H, N, N)"""
    return torch.stack([arrow_mask(layout, p.k, p.window) for p in DIFFER.patterns])


@pytest.mark.parametrize(("grid", "prefix", "suffix"), SHAPES)
@pytest.mark.parametrize("blocks", [(8, 8), (16, 8)])
def test_heads_that_differ_have_their_own_tables_in_one_mask(grid, prefix, suffix, blocks):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    mask, n, heads = arrow_masks(layout), layout.tokens, len(DIFFER.patterns)
    ours = mask_of(layout, DIFFER, heads, CPU, *blocks)
    sampled = create_block_mask(lambda b, h, i, j: mask[h, i, j], None, heads, n, n, device="cpu", BLOCK_SIZE=blocks)
    assert ours.shape == sampled.shape == (1, heads, n, n) and torch.equal(ours.to_dense(), sampled.to_dense())
    for side in ("kv", "full_kv", "q", "full_q"):
        number, index = getattr(ours, f"{side}_num_blocks"), getattr(ours, f"{side}_indices")
        assert torch.equal(number, getattr(sampled, f"{side}_num_blocks")), side
        counted = torch.arange(index.shape[-1]) < number[..., None]
        assert torch.equal(index[counted], getattr(sampled, f"{side}_indices")[counted]), side
    token, head = torch.arange(n), torch.arange(heads)[:, None, None]
    assert torch.equal(ours.mask_mod(head, head, token[:, None], token), mask)
    with pytest.raises(ValueError, match="is for 5 heads, but its attention has 4"):
        mask_of(layout, DIFFER, 4, CPU, *blocks)


def test_tiles_are_told_apart_by_counting_their_pairs():
    layout = TokenLayout(TokenGrid(6, 1, 13), 5, 9)
    live, full = live_and_full_tiles(token_owners(layout, TilePattern(2)), 8, 8)
    padded = torch.zeros(96, 96, dtype=torch.int64)
    padded[: layout.tokens, : layout.tokens] = arrow_mask(layout, 2)
    pairs = padded.view(12, 8, 12, 8).sum((1, 3))
    assert torch.equal(live, pairs > 0) and torch.equal(full, pairs == 64)
    assert 0 < full.sum() < live.sum() < live.numel()


def test_a_720p_mask_is_built_in_milliseconds_and_only_once():
    layout, pattern = TokenLayout(TokenGrid(24, 45, 80)), TilePattern(2)
    start = time.perf_counter()
    mask = block_mask(layout, pattern, CPU)
    assert time.perf_counter() - start < 5, "evaluating 7e9 pairs would take far longer"
    assert mask is block_mask(layout, pattern, CPU) and mask.kv_indices.shape[-1] == 675


@pytest.fixture
def device(monkeypatch):
    """The GPU where there is one. On a CPU, flex in its eager form, with the status that would refuse it set aside."""
    if flex_status()[0]:
        return torch.device("cuda")
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "flex_status", lambda device: (True, "eager, for the test"))
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    return CPU


def qkv(layout, device, dtype=torch.float32, dim=64, heads=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, layout.tokens, dim, generator=generator).to(device, dtype) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("grid", "prefix", "suffix"), [*SHAPES, ((3, 1, 130), 0, 7)])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_equals_the_masked_oracle(oracle, device, grid, prefix, suffix, k):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    tensors = qkv(layout, device)
    want = oracle(
        *tensors, grid[0], layout.grid.tokens_per_frame, TilePattern(k).reference_frames(grid[0]), prefix, suffix
    )
    torch.testing.assert_close(attend_flex(*tensors, layout, TilePattern(k)).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("grid", "prefix", "suffix"), [*SHAPES, ((3, 1, 130), 0, 7)])
def test_all_groups_of_heads_are_one_call(device, monkeypatch, grid, prefix, suffix):
    """The full one as well, under a backend for all or by group."""
    monkeypatch.setattr(dispatch, "check_backend", lambda *_: None)
    calls, attend = [], flex._attend
    monkeypatch.setattr(flex, "_attend", lambda *args: calls.append(1) or attend(*args))
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    q, k, v = (x[:, :5] for x in qkv(layout, device, heads=6))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), attn_mask=arrow_masks(layout).to(device)
    )
    by_group = {p: "dense" if p.is_full(grid[0]) else "flex" for p in DIFFER.kinds}
    for backend in ("flex", by_group):
        out = tile_attention(q, k, v, layout, DIFFER, backend=backend)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    assert len(calls) == (2 if "flex" in by_group.values() else 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_any_strides(oracle, device):
    layout = TokenLayout(TokenGrid(3, 1, 50), 5, 2)
    tensors = awkward(*qkv(layout, device))
    want = oracle(*tensors, 3, 50, (0,), 5, 2)
    torch.testing.assert_close(attend_flex(*tensors, layout, TilePattern(1)).double(), want, atol=1e-5, rtol=1e-5)


def test_many_kinds_of_models_in_one_process(oracle, monkeypatch):
    """torch allows eight compilations of one function, here two, and an error follows; the kinds are told apart as on a
    GPU."""
    import torch._dynamo.config as compiler
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    monkeypatch.setattr(flex, "flex_status", lambda device: (True, "compiled without generating code, for the test"))
    monkeypatch.setattr(
        flex, "_compiled", functools.cache(lambda: torch.compile(flex_attention, fullgraph=True, backend="eager"))
    )
    layout = TokenLayout(TokenGrid(3, 1, 5))
    with compiler.patch(recompile_limit=2):
        for dim in (16, 32, 48, 64):
            tensors = qkv(layout, CPU, dim=dim)
            want = oracle(*tensors, 3, 5, (0,))
            torch.testing.assert_close(
                attend_flex(*tensors, layout, TilePattern(1)).double(), want, atol=1e-5, rtol=1e-5
            )
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_what_is_not_finite_stays_within_the_tiles_that_hold_it(device, poisoned, poison):
    layout = TokenLayout(TokenGrid(5, 1, 128))  # a frame is a block; frame 0 is the reference
    tensors = dict(zip("qkv", qkv(layout, device), strict=True))
    if poisoned == "v" and device.type == "cpu":
        pytest.skip("the eager form multiplies all of v; only the compiled kernels skip tiles")
    before = attend_flex(**tensors, layout=layout, pattern=TilePattern(1))
    tensors[poisoned][:, :, 3 * 128 + 5] = poison
    out = attend_flex(**tensors, layout=layout, pattern=TilePattern(1))
    frames = (~out.isfinite()).any(-1)[0, 0].view(5, 128).any(-1)
    if poison != poison or poisoned == "v":
        assert frames.tolist() == [poisoned != "q", False, False, True, False]
    unreached = torch.tensor([1, 2, 4]).to(device)
    assert torch.equal(*(x.unflatten(2, (5, 128))[:, :, unreached] for x in (out, before)))


def test_a_head_size_that_torch_has_no_tiles_for_gets_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, half = torch.device("cuda"), torch.bfloat16
    plain = flex.Kernel(options=(("ROWS_GUARANTEED_SAFE", True),))
    assert dict(flex.triton_kernel(gpu, half, 96).options)["fwd_BLOCK_M"] == 128
    assert flex.triton_kernel(gpu, half, 128) == flex.triton_kernel(CPU, half, 96) == plain
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))  # 99 KiB of shared memory
    assert dict(flex.triton_kernel(gpu, half, 96).options)["fwd_num_stages"] == 2
    assert dict(flex.triton_kernel(gpu, torch.float32, 96).options)["fwd_BLOCK_N"] == 32
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert flex.triton_kernel(gpu, half, 96) == plain


@pytest.mark.parametrize(("capability", "blocks"), [((9, 0), (128, 128)), ((10, 0), (256, 128)), ((8, 9), None)])
def test_flash_attention_4_is_asked_where_it_is_installed(monkeypatch, capability, blocks):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert flex.flash_kernel(gpu, torch.bfloat16) is None  # it is not installed here
    monkeypatch.setattr(flex, "_installed", lambda module: module == "flash_attn.cute")
    found = flex.flash_kernel(gpu, torch.bfloat16)
    assert (found and (found.rows, found.columns)) == blocks
    assert flex.flash_kernel(gpu, torch.float32) is None and flex.flash_kernel(CPU, torch.bfloat16) is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_that_is_wrong_is_not_used(device, monkeypatch, caplog):
    """Its gradients too: here the result is right, and what comes back is not."""
    monkeypatch.setattr(flex, "_KERNELS", {})
    monkeypatch.setattr(flex, "flash_kernel", lambda *_: flex.Kernel(256, 128))
    dense = torch.nn.functional.scaled_dot_product_attention

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, mask):
            return dense(q, k, v, attn_mask=mask)

        @staticmethod
        def backward(ctx, dout):
            return dout, dout, dout, None

    def attend(apply):
        def run(q, k, v, layout, pattern, kernel):
            assert (kernel.rows, kernel.columns) == (256, 128)
            mask = torch.stack([arrow_mask(layout, p.k, p.window) for p in getattr(pattern, "patterns", [pattern])])
            return apply(q, k, v, mask.to(q.device))

        return run

    monkeypatch.setattr(flex, "_attend", attend(Wrong.apply))
    assert flex.kernel_of(device, torch.float32, 32) == flex.triton_kernel(device, torch.float32, 32)
    assert "FlashAttention-4 is not used: it is off by" in caplog.text
    monkeypatch.setattr(flex, "_attend", attend(lambda q, k, v, mask: dense(q, k, v, attn_mask=mask)))
    assert flex.kernel_of(device, torch.float32, 64) == flex.Kernel(256, 128)

    def only_alike(q, k, v, layout, pattern, kernel):
        return dense(q, k, v, attn_mask=arrow_mask(layout, pattern.kinds[0].k).to(q.device))

    monkeypatch.setattr(flex, "_attend", only_alike)
    assert flex.kernel_of(device, torch.float32, 48) == flex.Kernel(256, 128)
    assert flex.kernel_of(device, torch.float32, 48, differ=True) == flex.triton_kernel(device, torch.float32, 48)


@pytest.mark.skipif(
    not flex_status()[0], reason=f"NO GRADIENTS TESTED: FlexAttention has them on a GPU only ({flex_status()[1]})"
)
def test_gradients(oracle):
    layout = TokenLayout(TokenGrid(3, 1, 50), 5, 2)
    q, k, v = (x.requires_grad_() for x in qkv(layout, torch.device("cuda")))
    tensors = awkward(q, k, v)
    ours = torch.autograd.grad(attend_flex(*tensors, layout, TilePattern(1)).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(oracle(*tensors, 3, 50, (0,), 5, 2).square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def awkward(q, k, v):
    """Tokens before heads, one head expanded to all, channels two apart."""
    return (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k[:, :1].expand(-1, 2, -1, -1),
        torch.stack((v, v), -1)[..., 0],
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_argument_that_does_not_fit_is_named(device, name):
    layout = TokenLayout(TokenGrid(3, 1, 5))
    tensors = dict(zip("qkv", qkv(layout, device), strict=True))
    for wrong in (tensors[name][:, :, :4], tensors[name][0], tensors[name][:, :0]):
        with pytest.raises(ValueError, match=f"^({name}|k) has shape"):
            attend_flex(**{**tensors, name: wrong}, layout=layout, pattern=TilePattern(1))
    with pytest.raises(ValueError, match="q is torch.float64"):
        attend_flex(*qkv(layout, device, torch.float64), layout, TilePattern(1))


def test_a_cpu_is_refused_with_the_reason():
    layout = TokenLayout(TokenGrid(3, 1, 5))
    tensors = qkv(layout, CPU)
    for attend in (attend_flex, lambda *a: tile_attention(*a, backend="flex")):
        with pytest.raises(ValueError, match="no backward, compiles for a minute and is no faster than frames. Choose"):
            attend(*tensors, layout, TilePattern(1))
    assert ("flex", False) in [(b.name, b.available) for b in available_backends("cpu")]


@pytest.mark.parametrize("pattern", [TilePattern(1), by_head([TilePattern(1), TilePattern(2)])])
def test_a_run_that_has_ended_keeps_no_masks_on_the_device(pattern):
    layout = TokenLayout(TokenGrid(6, 2, 3))
    flex.mask_of(layout, pattern, 2, torch.device("cpu"))
    assert flex.block_mask.cache_info().currsize
    Preparation(TilePlan.uniform(1), AttentionReport()).forget()
    assert flex.block_mask.cache_info().currsize == 0 and flex._heads.cache_info().currsize == 0
