"""The backends on a real GPU, at sizes where whole blocks, autotuning and compilation matter; the oracle in float64."""

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.attention import TokenLayout, available_backends, choose_backend, tile_attention
from efficient_vdit_core.attention.autotune.choose import default_book
from efficient_vdit_core.attention.backends.triton import attend_triton, attend_triton_lse, make_ready
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip(
        "SKIPPED THE GPU'S TESTS: no CUDA GPU was found; nothing is known about the kernels' real builds",
        allow_module_level=True,
    )

GPU = torch.device("cuda")
NEEDS = {
    b.name: pytest.mark.skipif(not b.available, reason=f"SKIPPED {b.name.upper()} ON THE GPU: {b.reason}")
    for b in available_backends(GPU)
}
BACKENDS = [pytest.param(name, marks=mark) for name, mark in NEEDS.items()]
FORWARD = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
# Frames that end inside a block of 128, that are two whole ones, and far shorter ones beside a long text.
LAYOUTS = [
    TokenLayout(TokenGrid(5, 9, 37), 3, 5),
    TokenLayout(TokenGrid(8, 16, 16)),
    TokenLayout(TokenGrid(24, 7, 11), 0, 226),
]


def qkv(layout, dim, dtype, heads=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, layout.tokens, dim, generator=generator).to(GPU, dtype) for _ in range(3)]


def live(layout, k):
    """The N x N mask: (N, N) bool."""
    owner = torch.arange(layout.grid.t).repeat_interleave(layout.grid.tokens_per_frame)
    shared = torch.isin(owner, torch.tensor(TilePattern(k).reference_frames(layout.grid.t), dtype=torch.long))
    owner, shared = (
        F.pad(owner, (layout.prefix, layout.suffix), value=-1),
        F.pad(shared, (layout.prefix, layout.suffix), value=True),
    )
    return ((owner[:, None] == owner) | shared[:, None] | shared).to(GPU)


def oracle(q, k, v, layout, count):
    """Output and LSE from the definition, float64."""
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~live(layout, count), float("-inf"))
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (128, torch.bfloat16), (96, torch.float32)]
)
def test_equals_the_oracle(backend, layout, dim, dtype):
    if backend == "triton" and dtype == torch.float32:
        pytest.skip("the fused kernel takes halves only")
    tensors = qkv(layout, dim, dtype)
    for k in (0, 1, 3):
        out = tile_attention(*tensors, layout, TilePattern(k), backend=backend)
        torch.testing.assert_close(
            out.double(), oracle(*tensors, layout, k)[0], atol=FORWARD[dtype], rtol=FORWARD[dtype]
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_gradients(backend, dim):
    layout = LAYOUTS[0]
    tensors = [x.requires_grad_() for x in qkv(layout, dim, torch.bfloat16)]
    weight = torch.randn_like(tensors[0])
    ours = torch.autograd.grad(
        (tile_attention(*tensors, layout, TilePattern(1), backend=backend) * weight).sum(), tensors
    )
    theirs = torch.autograd.grad((oracle(*tensors, layout, 1)[0] * weight).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 3e-2 * b.abs().max()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "flex"])  # it spreads within tiles
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_nan_stays_within_what_the_mask_connects(backend, poisoned):
    layout = LAYOUTS[0]
    tensors = dict(zip("qkv", qkv(layout, 64, torch.bfloat16), strict=True))
    token = layout.prefix + layout.grid.tokens_per_frame + 7  # in frame 1, no reference frame of k = 1
    tensors[poisoned][:, :, token] = float("nan")
    out = tile_attention(**tensors, layout=layout, pattern=TilePattern(1), backend=backend)
    reached = live(layout, 1)[:, token] if poisoned != "q" else torch.arange(layout.tokens, device=GPU) == token
    assert torch.equal(out.isnan().any(-1)[0, 0], reached) and 0 < reached.sum() < layout.tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_device_is_never_waited_for(backend):
    layout, pattern = LAYOUTS[0], TilePattern(2)
    tensors = qkv(layout, 96, torch.bfloat16)
    tile_attention(*tensors, layout, pattern, backend=backend)  # tables, tuning and compilation, once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tile_attention(*tensors, layout, pattern, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS["triton"]
def test_the_lse():
    layout = LAYOUTS[0]
    tensors = qkv(layout, 96, torch.bfloat16)
    lse = attend_triton_lse(*tensors, layout, TilePattern(1))[1]
    torch.testing.assert_close(lse.double(), oracle(*tensors, layout, 1)[1], atol=1e-3, rtol=1e-3)


@NEEDS["triton"]
def test_more_than_two_to_the_31_elements():
    layout, heads, dim = TokenLayout(TokenGrid(2100, 32, 32)), 8, 128
    needed = 5 * 2 * heads * layout.tokens * dim
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"SKIPPED 64-BIT OFFSETS: {needed / 2**30:.0f} GiB of GPU memory are not free")
    q, k, v = (torch.randn(1, heads, layout.tokens, dim, dtype=torch.bfloat16, device=GPU) for _ in range(3))
    assert q.numel() > 2**31
    last = [x[:, :, -1024:] for x in (q, k, v)]
    found = attend_triton(q, k, v, layout, TilePattern(0))[:, :, -1024:]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*last), atol=2e-2, rtol=2e-2)


@NEEDS["triton"]
@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_tuned_in_a_call_that_was_made_ready(gradients):
    """Tuning waits for the device, which a block that is recorded must not."""
    from efficient_vdit_core.attention.backends import arrow_kernels

    layout, pattern = TokenLayout(TokenGrid(5, 23, 33)), by_head([TilePattern(1), TilePattern(0, window=1)])
    tensors = [x.requires_grad_(gradients) for x in qkv(layout, 64, torch.float16)]
    make_ready(CallShape.of(*tensors), layout, pattern)
    kernels = (
        arrow_kernels.forward_kernel,
        arrow_kernels.query_gradient_kernel,
        arrow_kernels.key_value_gradient_kernel,
    )
    known = [len(kernel.cache) for kernel in kernels]
    out = attend_triton(*tensors, layout, pattern)
    if gradients:
        torch.autograd.grad(out.sum(), tensors)
    assert [len(kernel.cache) for kernel in kernels] == known


def test_auto_tries_all_and_keeps_the_fastest(tmp_path, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path))
    layout = TokenLayout(TokenGrid(24, 20, 30))
    shape = CallShape.of(qkv(layout, 96, torch.bfloat16)[0])
    chosen = choose_backend(shape, layout, TilePattern(2))
    (choice,) = default_book().choices.values()
    every = {"dense", *(b.name for b in available_backends(GPU) if b.available)}
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(GPU) == (9, 0)
    assert set(choice.milliseconds) == every - ({"flex"} if hopper and "triton" in every else set())
    assert chosen == choice.backend == min(choice.milliseconds, key=choice.milliseconds.__getitem__) != "dense"
    assert (tmp_path / "attention.json").is_file()
