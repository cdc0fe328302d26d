"""The mask as parts merged by their log-sum-exp: against the mask written out, and against its promises of memory."""

import itertools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from efficient_vdit_core.attention import TokenLayout, available_backends, selection, tile_attention
from efficient_vdit_core.attention.autotune.choose import ChoiceBook
from efficient_vdit_core.attention.autotune.trial import Choice
from efficient_vdit_core.attention.backends import merge, partial
from efficient_vdit_core.attention.backends.frames import attend_frames
from efficient_vdit_core.attention.backends.merge import merge_into
from efficient_vdit_core.attention.backends.partial import PartialAttention, kernels_for, partial_of, sdpa_partial
from efficient_vdit_core.attention.backends.parts import attend_parts
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.attention.dense_call import DenseCall
from efficient_vdit_core.attention.hook import backend_choices as choices_file
from efficient_vdit_core.attention.hook.override import attention_override, make_attention_override
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.sdpa import attention_sdpa
from efficient_vdit_core.attention.selection import choose_backend, fits, partial_for
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid

CPU = torch.device("cpu")
PATTERNS = [TilePattern(k, window=w) for k, w in itertools.product((0, 1, 2, 3), (0, 1, 2))]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def qkv(layout, dim=32, batch=2, heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, layout.tokens, dim, generator=generator).to(dtype) for _ in range(3)]


def expected(oracle, tensors, layout, pattern):
    grid, references = layout.grid, list(pattern.reference_frames(layout.grid.t))
    return oracle(*tensors, grid.t, grid.tokens_per_frame, references, layout.prefix, layout.suffix, pattern.window)


def parts(tensors, layout, pattern, bound=None):
    return tile_attention(*tensors, layout, pattern, backend="parts", max_extra_bytes=bound)


@pytest.mark.parametrize("grid", [(5, 2, 3), (7, 1, 37), (8, 3, 2), (3, 5, 1), (13, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (5, 0), (0, 3), (4, 7)])
def test_equals_the_masked_oracle(oracle, grid, prefix, suffix):
    layout = TokenLayout(TokenGrid(*grid), prefix, suffix)
    tensors = qkv(layout)
    for pattern in PATTERNS:
        want = expected(oracle, tensors, layout, pattern).float()
        for bound in (1, 20_000, None):
            torch.testing.assert_close(parts(tensors, layout, pattern, bound), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dim", "dtype"), list(itertools.product((40, 96, 128), TOLERANCE)))
def test_head_sizes_and_dtypes(oracle, dim, dtype):
    layout = TokenLayout(TokenGrid(6, 3, 3), 2, 3)
    tensors = qkv(layout, dim, dtype=dtype)
    for pattern in (TilePattern(2), TilePattern(1, window=1)):
        out, want = parts(tensors, layout, pattern), expected(oracle, tensors, layout, pattern)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.short_name)
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (2, 3)])
def test_gradients(oracle, pattern, prefix, suffix):
    layout = TokenLayout(TokenGrid(7, 2, 3), prefix, suffix)
    tensors = [x.double().requires_grad_() for x in qkv(layout, 8)]
    weight, want = torch.randn_like(tensors[0]), expected(oracle, tensors, layout, pattern)
    theirs = torch.autograd.grad((want * weight).sum(), tensors)
    for bound in (1, None):
        ours = torch.autograd.grad((parts(tensors, layout, pattern, bound) * weight).sum(), tensors)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_of_shared_keys_are_not_added_up_in_half_precision(oracle):
    """Each frame's rows add to them: to what 64 frames have added, bfloat16 would add next to nothing."""
    layout, pattern = TokenLayout(TokenGrid(64, 1, 2)), TilePattern(1)
    tensors = [x.requires_grad_() for x in qkv(layout, 16, batch=1, dtype=torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    theirs = torch.autograd.grad(expected(oracle, exact, layout, pattern).sum(), exact)
    ours = torch.autograd.grad(parts(tensors, layout, pattern, 1).float().sum(), tensors)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        shared = slice(0, layout.grid.tokens_per_frame)
        error = (a.double() - b)[:, :, shared].norm() / b[:, :, shared].norm()
        assert error < 0.007, float(error)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_gradient_for_one_of_them_alone(oracle, name):
    layout, pattern = TokenLayout(TokenGrid(5, 2, 3), 1), TilePattern(1, window=1)
    tensors = [x.double() for x in qkv(layout, 8)]
    wanted = tensors["qkv".index(name)].requires_grad_()
    ours, theirs = parts(tensors, layout, pattern), expected(oracle, tensors, layout, pattern)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), wanted), torch.autograd.grad(theirs.sum(), wanted))


def test_any_strides_and_heads_that_differ(oracle):
    layout = TokenLayout(TokenGrid(5, 2, 2), 1, 1)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(layout)]
    expanded = [x[:, :1].expand(-1, 2, -1, -1) for x in qkv(layout)]
    apart = [torch.stack((x, x), -1)[..., 0] for x in qkv(layout)]
    for tensors in (strided, expanded, apart):
        want = expected(oracle, tensors, layout, TilePattern(2)).float()
        torch.testing.assert_close(parts(tensors, layout, TilePattern(2)), want, atol=1e-5, rtol=1e-5)
    patterns = [TilePattern(2), TilePattern(1, window=1)]
    out = parts(strided, layout, by_head(patterns))
    for head, pattern in enumerate(patterns):
        want = expected(oracle, [x[:, head : head + 1] for x in strided], layout, pattern).float()
        torch.testing.assert_close(out[:, head : head + 1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("poisoned", "reached"),
    [("q", [False, True] + 4 * [False]), ("k", [True, True, False, True, False, False]), ("v", None)],
)
def test_nan_stays_within_what_the_mask_connects(poisoned, reached):
    layout = TokenLayout(TokenGrid(6, 4, 4))
    tensors = dict(zip("qkv", qkv(layout), strict=True))
    tensors[poisoned][:, :, 16:32] = float("nan")  # frame 1, not a reference of k = 2: frames 0 and 3 are
    rows = parts(list(tensors.values()), layout, TilePattern(2)).isnan().any(-1)[0, 0].view(6, 16).any(-1)
    assert rows.tolist() == (reached or [True, True, False, True, False, False])


def test_torch_compile_traces_it_whole(oracle):
    layout, pattern = TokenLayout(TokenGrid(6, 2, 3), 2, 1), TilePattern(2, window=1)
    tensors = qkv(layout)
    parts(tensors, layout, pattern)  # as a run is: prepared before its blocks are traced
    compiled = torch.compile(lambda *x: parts(x, layout, pattern), backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(*tensors), expected(oracle, tensors, layout, pattern).float(), atol=1e-5, rtol=1e-5
    )


def peak_bytes(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()  # noqa: F841
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "pattern", [TilePattern(1), TilePattern(3), TilePattern(2, window=1)], ids=lambda p: p.short_name
)
@pytest.mark.parametrize("bound", [1, 200_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_under_the_stated_bound(pattern, bound, dtype):
    layout = TokenLayout(TokenGrid(9, 6, 8), 5, 3)
    batch, heads, size, dim = 2, 2, 48, 64
    tensors = qkv(layout, dim, batch, heads, dtype)
    row = batch * heads * dim * dtype.itemsize
    shared = 8 + len(pattern.reference_frames(9)) * size
    output = layout.tokens * (row + batch * heads * 4)

    def nothing_inside(q, k, v):
        """A result and its lse, with no memory of its own beside them."""
        return torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape[:3])

    told = PartialAttention("nothing", nothing_inside)
    peak = peak_bytes(lambda: attend_parts(*tensors, layout, pattern, told, bound))
    # Half of the bound for each, or what one head and one frame take: here heads are two.
    of_shared = min(max(bound // 2, shared * row), 2 * shared * row)
    of_rows = min(max(bound // 2, 2 * size * row), 2 * layout.tokens * row) * (1 + 1 / dim)
    # Shares and sums of the lse; three float32 copies of one frame where the result is of half precision.
    merging = 4 * batch * heads * size * 9 * 4 + (3 * heads * size * dim * 4 if dtype != torch.float32 else 0)
    assert output < peak <= output + of_shared + of_rows + merging + 4096


@pytest.mark.parametrize(("k", "forward", "training"), [(1, 0.78, 0.45), (2, 0.95, 0.6), (4, 1.03, 0.7)])
def test_a_layer_at_its_peak(k, forward, training):
    """In outputs, beyond what dense attention holds that takes no memory inside: its output; with gradients also the
    slope and three gradients."""

    def back(dout, q, k, v, out, lse):
        return tuple(torch.zeros(x.shape, dtype=q.dtype) for x in (q, k, v))

    def there(q, k, v):
        return torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[:3])

    layout, told = TokenLayout(TokenGrid(24, 10, 16)), PartialAttention("nothing", there, back)
    tensors = [x.requires_grad_() for x in qkv(layout, 64, 1, 12, torch.bfloat16)]
    output = tensors[0].nbytes

    def attend(bound):
        return attend_parts(*tensors, layout, TilePattern(k), told, bound)

    def train():
        out = attend(output // 4)
        return torch.autograd.grad(out, tensors, torch.ones_like(out))

    with torch.no_grad():
        alone = peak_bytes(lambda: attend(output))
    lse = output / 32
    assert output + lse < alone <= (1 + forward) * output + lse
    assert 5 * output + lse < peak_bytes(train) <= (5 + training) * output + lse


def test_a_layer_with_mean_frames_at_its_peak(monkeypatch):
    """Without Triton too it holds less than its output beyond it, in half precision."""

    def there(q, k, v):
        return torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[:3])

    monkeypatch.setattr(merge, "_COPIED", 2**16)  # a small part of the layer, as it is of a real one
    layout, pattern = TokenLayout(TokenGrid(24, 10, 16)), TilePattern(2, window=1, means=3)
    tensors, told = qkv(layout, 64, 1, 12, torch.bfloat16), PartialAttention("nothing", there)
    output = tensors[0].nbytes
    with torch.no_grad():
        assert output < peak_bytes(lambda: attend_parts(*tensors, layout, pattern, told, output)) <= 1.95 * output


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_merging_some_rows_at_a_time_is_merging_all(monkeypatch, rows):
    (out, part), (lse, part_lse) = torch.randn(2, 3, 2, 7, 16).bfloat16(), 4 * torch.randn(2, 3, 2, 7)
    found = {}
    for copied in (2**22, rows * 2 * 16):
        monkeypatch.setattr(merge, "_COPIED", copied)
        found[copied] = out.clone(), lse.clone()
        merge_into(*found[copied], part, part_lse)
    whole, sliced = found.values()
    assert torch.equal(whole[0], sliced[0]) and torch.equal(whole[1], sliced[1])
    share = torch.sigmoid(part_lse.double() - lse)[..., None]
    want = out.double() + (part.double() - out.double()) * share
    torch.testing.assert_close(sliced[0].double(), want, atol=0, rtol=2**-8)


@pytest.mark.parametrize("backend", ["parts", "frames"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_training_step_takes_the_smaller_bound(monkeypatch, backend, gradients):
    from efficient_vdit_core.attention.backends import frames, parts

    asked = []

    def bound(q, frame_bytes, *, gradients=False):
        asked.append(gradients)
        return 2**30

    for module in (frames, parts):
        monkeypatch.setattr(module, "default_extra_bytes", bound)
    layout = TokenLayout(TokenGrid(6, 4, 4))
    q, k, v = (torch.empty(1, 2, layout.tokens, 16, device="meta", requires_grad=gradients) for _ in range(3))
    if backend == "frames":
        attend_frames(q, k, v, layout, TilePattern(2), lambda q, k, v: torch.empty_like(q))
    else:
        back = lambda dout, q, k, v, out, lse: (q, k, v)  # noqa: E731
        told = PartialAttention("nothing", lambda q, k, v: (torch.empty_like(q), q[..., 0].float()), back)
        attend_parts(q, k, v, layout, TilePattern(2), told)
    assert asked == [gradients]


def kept_bytes(attend, tensors):
    """What autograd keeps, each memory once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(*tensors)
    return sum(kept.values())


def test_training_keeps_what_dense_attention_keeps():
    layout, pattern = TokenLayout(TokenGrid(12, 4, 4), 3), TilePattern(2)
    tensors = [x.requires_grad_() for x in qkv(layout, 64)]
    dense = kept_bytes(F.scaled_dot_product_attention, tensors)
    assert kept_bytes(lambda *x: parts(x, layout, pattern), tensors) == dense
    copies = kept_bytes(lambda *x: attend_frames(*x, layout, pattern, F.scaled_dot_product_attention), tensors)
    assert copies > dense + 2 * 10 * 3 * 16 * 64 * 4 * 4  # keys and values of ten frames, three of them for each


def test_merging_is_attention_over_both():
    q, k, v = (torch.randn(3, 2, 5, 16, dtype=torch.float64) for _ in range(3))
    kernel = sdpa_partial(CPU, torch.float64, 16)
    (out, lse), other = kernel.forward(q, k[:, :, :2], v[:, :, :2]), kernel.forward(q, k[:, :, 2:], v[:, :, 2:])
    merge_into(out, lse, *other)
    whole = kernel.forward(q, k, v)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])
    first, (out, lse) = kernel.forward(q, k[:, :, :2], v[:, :, :2]), (torch.full_like(x, torch.nan) for x in whole)
    merge_into(out, lse, *other, first)
    torch.testing.assert_close((out, lse), whole)


@pytest.mark.usefixtures("triton_device")
@pytest.mark.parametrize("dim", [16, 40, 96])
def test_the_fused_merge_is_the_same(triton_device, dim):
    frames, tokens = 3, 37
    before = torch.randn(2, frames * tokens, dim, device=triton_device)
    lse = 4 * torch.randn(2, frames * tokens, device=triton_device)
    part = torch.randn(frames, 2, tokens, dim, device=triton_device)
    part_lse = 4 * torch.randn(frames, tokens, 2, device=triton_device).transpose(1, 2)
    plain, fused = ([x.clone().unflatten(1, (frames, tokens)).transpose(0, 1) for x in (before, lse)] for _ in range(2))
    share = torch.sigmoid(part_lse - plain[1])[..., None]
    want = plain[0] + (part - plain[0]) * share, torch.logaddexp(plain[1], part_lse)
    apart = [torch.full_like(x, torch.nan) for x in fused]  # of other strides than what is merged
    merge._merge_fused(*apart, part, part_lse, (fused[0], fused[1]))
    merge._merge_fused(*fused, part, part_lse, (fused[0], fused[1]))
    for found in (apart, fused):
        for ours, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


KERNELS = [((9, 0), "bfloat16", 96, ["flash", "efficient"]), ((7, 5), "float16", 128, ["efficient"]),
           ((7, 5), "bfloat16", 128, []), ((8, 0), "float32", 96, ["efficient"]), ((8, 0), "float64", 96, []),
           ((8, 0), "float16", 72, ["flash", "efficient"])]  # fmt: skip


@pytest.mark.parametrize(("capability", "dtype", "dim", "kernels"), KERNELS)
def test_a_gpu_gets_kernels_that_it_has(monkeypatch, capability, dtype, dim, kernels):
    """PyTorch's flash attention, and bfloat16 in the memory-efficient one, begin with Ampere (8.0)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for cudnn in (False, True):
        monkeypatch.setattr(partial, "_prefers_cudnn", lambda *_, cudnn=cudnn: cudnn)
        preferred = ["cudnn"] if cudnn and "flash" in kernels else []
        assert kernels_for(torch.device("cuda"), getattr(torch, dtype), dim) == preferred + kernels
    assert kernels_for(torch.device("mps"), torch.float16, 64) == []


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a package that is not installed in its place: exact, with its lse in another base, or with none."""

    def install(package, base):
        def sageattn(q, k, v, tensor_layout, is_causal, smooth_k, return_lse):
            assert tensor_layout == "HND" and not is_causal and not smooth_k and return_lse
            out, lse = sdpa_partial(CPU, q.dtype, q.shape[3]).forward(q, k, v)
            return out, lse * base

        def flash_attn_func(q, k, v, return_attn_probs):
            out, lse = sdpa_partial(CPU, q.dtype, q.shape[3]).forward(*(x.transpose(1, 2) for x in (q, k, v)))
            return out.transpose(1, 2), lse * base, None

        module = ModuleType(package)
        module.sageattn, module.flash_attn_func = sageattn, flash_attn_func
        monkeypatch.setitem(sys.modules, package, module)
        monkeypatch.setattr(partial, "_TRIED", {})

    return install


def attention_flash(*_, **__):
    raise AssertionError("the package is called, which tells its lse")


def attention_sage(*_, **__):
    raise AssertionError("the package is called, which tells its lse")


for function in (attention_flash, attention_sage):
    function.__module__ = partial._COMFYUI


def test_functions_of_the_same_name_from_elsewhere_are_not_taken_for_comfyui_s(stand_in):
    def attention_sage(*_, **__):
        raise AssertionError("it may call another of the package's kernels")

    stand_in("sageattention", 1.0)
    assert partial_of(attention_sage, CPU, torch.float32, 32) is None


@pytest.mark.parametrize(("function", "package"), [(attention_flash, "flash_attn"), (attention_sage, "sageattention")])
def test_the_packages_that_comfyui_calls_are_called_for_their_lse(oracle, stand_in, function, package, caplog):
    layout, pattern = TokenLayout(TokenGrid(5, 2, 3), 2), TilePattern(1, window=1)
    tensors = qkv(layout)
    stand_in(package, 1.0)
    dense = DenseCall(function, None, None, {})
    out = tile_attention(*tensors, layout, pattern, dense=dense, backend="parts")
    torch.testing.assert_close(out, expected(oracle, tensors, layout, pattern).float(), atol=1e-5, rtol=1e-5)
    stand_in(package, 1.4427)  # a version that tells base-2 logarithms would give wrong pictures without a word
    with (
        caplog.at_level("INFO"),
        pytest.raises(ValueError, match="does not tell its log-sum-exp .* Choose auto or frames"),
    ):
        tile_attention(*tensors, layout, pattern, dense=dense, backend="parts")
    assert "its log-sum-exp is off by" in caplog.text


@pytest.mark.parametrize("backend", ["frames", "parts", "auto"])
def test_a_call_that_asks_for_full_precision_never_reaches_sageattention(
    oracle, stand_in, own_cache, monkeypatch, backend
):
    """ComfyUI's function for it calls PyTorch's there; and such calls are told apart from the others where one of them was
    prepared."""
    low = []

    def attention_sage(q, k, v, heads, low_precision_attention=True, **_):
        low.append(low_precision_attention)
        return F.scaled_dot_product_attention(q, k, v)

    attention_sage.__module__ = partial._COMFYUI
    stand_in("sageattention", 1.0)
    monkeypatch.setattr(sys.modules["sageattention"], "sageattn", lambda *_, **__: pytest.fail("SageAttention"))
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
    layout, tensors = TokenLayout(TokenGrid(6, 2, 3)), qkv(TokenLayout(TokenGrid(6, 2, 3)))
    override = make_attention_override(TilePlan.uniform(1), AttentionReport(), backend=backend)
    form = {
        "skip_reshape": True,
        "skip_output_reshape": True,
        "transformer_options": {FORWARD_KEY: ForwardState(layout)},
    }
    out = override(attention_sage, *tensors, 2, low_precision_attention=False, **form)
    want = expected(oracle, tensors, layout, TilePattern(1)).float()
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert not any(low) and (low or backend == "parts")


def test_calls_that_ask_for_full_precision_are_prepared_and_measured_by_themselves(monkeypatch):
    names = []
    monkeypatch.setattr(
        choices_file, "measured_choice", lambda *_, dense: names.append(dense.name) or Choice("parts", {"parts": 1.0})
    )
    layout, shape = TokenLayout(TokenGrid(6, 2, 3)), CallShape(2, 2, 32, torch.float32, CPU)
    preparation = Preparation(TilePlan.uniform(1), report := AttentionReport())
    override, dense = attention_override(preparation), DenseCall(attention_sdpa, None, None, {})
    for step in range(2):
        state = ForwardState(layout, depth=1, heads=2, step=step)
        state = preparation.before_forward(state, shape, lambda _: dense)
        form = {"skip_reshape": True, "transformer_options": {FORWARD_KEY: state}}
        override(attention_sdpa, *qkv(layout), 2, low_precision_attention=False, **form)
    assert names == ["attention_sdpa", "attention_sdpa in full precision"]
    assert dict(report.computed) == {
        "attention_sdpa in full precision": 1,
        "attention_sdpa in full precision in parts": 1,
    }


def test_only_what_runs_in_the_end_is_replaced():
    def pytorch(*_, **__): ...

    pytorch.__name__, pytorch.__module__ = "attention_pytorch", partial._COMFYUI

    class ModelPatcher:
        def set_model_optimized_attention(self, optimized_attention):
            def optimized_attention_override(_, *args, **kwargs):
                return optimized_attention(*args, **kwargs)

            return optimized_attention_override

    chosen = ModelPatcher().set_model_optimized_attention(pytorch)
    chosen.__qualname__ = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
    shape = CallShape(1, 2, 32, torch.float32, CPU)
    assert partial_for(DenseCall(attention_sage, chosen, None, {}), shape) is sdpa_partial(CPU, torch.float32, 32)

    def of_another_node(func, *args, **kwargs):
        return pytorch(*args, **kwargs)

    assert partial_for(DenseCall(pytorch, None, None, {}), shape) is not None
    assert partial_for(DenseCall(pytorch, of_another_node, None, {}), shape) is None
    assert partial_of(lambda q, k, v: q, CPU, torch.float32, 32) is None


def test_a_function_that_does_not_tell_its_lse_goes_another_way(monkeypatch, tmp_path, caplog):
    book = ChoiceBook(tmp_path / "attention.json")
    monkeypatch.setattr(selection, "default_book", lambda: book)
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
    layout, shape = TokenLayout(TokenGrid(4, 5, 7), 3), CallShape(1, 2, 8, torch.float32, CPU)

    def dense(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    choose_backend(shape, layout, TilePattern(1), dense=dense)
    choose_backend(shape, layout, TilePattern(1))
    assert [set(c.milliseconds) for c in book.choices.values()] == [{"dense", "frames"}, {"dense", "frames", "parts"}]

    report = AttentionReport()
    call = DenseCall(lambda *a, **kw: None, None, None, {})
    settled = Preparation(TilePlan.uniform(1), report, backend="parts").choices.settle(
        shape, layout, TilePattern(1), call
    )
    assert settled == {TilePattern(1): "frames"} and "which the backend parts needs: frames is used" in caplog.text
    assert choices_file.partial_for(call, shape) is None


def test_a_training_step_is_measured_there_and_back(monkeypatch, tmp_path):
    book = ChoiceBook(tmp_path / "attention.json")
    monkeypatch.setattr(selection, "default_book", lambda: book)
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
    layout = TokenLayout(TokenGrid(4, 5, 7), 3)
    steps = []
    backward = partial._OF_TORCH["cpu"].backward
    counted = PartialAttention("counted", partial._OF_TORCH["cpu"].forward, lambda *x: steps.append(1) or backward(*x))
    monkeypatch.setattr(selection, "partial_of", lambda *_: counted)
    q, k, v = qkv(layout, 8, 1)
    tile_attention(q, k, v, layout, TilePattern(1))
    assert not steps
    tile_attention(q, k.requires_grad_(), v, layout, TilePattern(1))
    assert steps
    assert [key.endswith("forward and backward") for key in book.choices] == [False, True]
    monkeypatch.setattr(
        selection, "partial_of", lambda *_: PartialAttention("no way back", partial._OF_TORCH["cpu"].forward)
    )
    assert fits("parts", CallShape.of(q)) and not fits("parts", CallShape.of(q, k))
    with pytest.raises(ValueError, match="A gradient is wanted of the backend parts, and no way back gives none"):
        tile_attention(q, k, v, layout, TilePattern(1), backend="parts")


def test_other_devices_are_told_why():
    status = {b.name: b for b in available_backends("meta")}["parts"]
    assert not status.available and "does not tell its log-sum-exp" in status.reason


def test_a_wrong_gradient_costs_the_way_back_alone(caplog):
    cpu = partial._OF_TORCH["cpu"]

    def turned(*tensors):
        dq, dk, dv = cpu.backward(*tensors)
        return dq, -dk, dv

    with caplog.at_level("INFO"):
        assert partial.trusted(cpu, CPU, torch.float32, 32) is cpu and not caplog.text
        found = partial.trusted(PartialAttention("turned", cpu.forward, turned), CPU, torch.bfloat16, 64)
    assert found.forward is cpu.forward and found.backward is None
    assert "turned is not trained with in parts: the gradient of k is off by" in caplog.text


@pytest.mark.parametrize(
    "error", [partial.OUT_OF_MEMORY("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_memory_that_is_missing_for_a_moment_says_nothing_about_a_kernel(monkeypatch, error):
    known, key = partial._OF_TORCH["cpu"], ("sdpa", CPU, torch.float32, 40)

    def full(*_):
        raise error

    monkeypatch.delitem(partial._TRIED, key, raising=False)
    monkeypatch.setitem(partial._OF_TORCH, "cpu", PartialAttention("full", full))
    assert sdpa_partial(*key[1:]) is None and key not in partial._TRIED
    monkeypatch.setitem(partial._OF_TORCH, "cpu", known)
    assert sdpa_partial(*key[1:]) is known
