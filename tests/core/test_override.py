import copy
import functools
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from efficient_vdit_core import tiles as tiles_file
from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.autotune.trial import Choice
from efficient_vdit_core.attention.backends import mean_frames
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.attention.dense_call import DenseCall, function_name
from efficient_vdit_core.attention.hook import backend_choices as choices_file
from efficient_vdit_core.attention.hook import override as override_file
from efficient_vdit_core.attention.hook.override import attention_override, make_attention_override
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, attention_sdpa, sdpa_attention
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern, TokenGrid

LAYOUT = TokenLayout(TokenGrid(5, 2, 3))
HEADS = 2


def flat(tokens=30, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, HEADS * dim, generator=generator) for _ in range(3)]


def call(override, tensors, state, mask=None, **options):
    all_options = {OVERRIDE_KEY: override, FORWARD_KEY: state, **options}
    return sdpa_attention(*tensors, HEADS, mask=mask, transformer_options=all_options)


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_sparse_in_every_tensor_form(oracle, skip_reshape, skip_output_reshape):
    report = AttentionReport()
    heads = [rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in flat()]
    options = {OVERRIDE_KEY: make_attention_override(TilePlan.uniform(1), report), FORWARD_KEY: ForwardState(LAYOUT)}
    out = sdpa_attention(*(heads if skip_reshape else flat()), HEADS, skip_reshape=skip_reshape,
                         skip_output_reshape=skip_output_reshape, transformer_options=options)  # fmt: skip
    want = oracle(*heads, 5, 6, [0]).float()
    torch.testing.assert_close(
        out, want if skip_output_reshape else rearrange(want, "b h n d -> b n (h d)"), atol=1e-5, rtol=1e-5
    )
    assert report.sparse == 1 and not report.dense


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no token grid", {"state": None}),
        ("cross-attention", {"keys": 7}),
        ("another sequence length", {"tokens": 12}),
        ("a single frame", {"state": ForwardState(TokenLayout(TokenGrid(1, 5, 6)))}),
        ("masked", {"mask": torch.zeros(1, 1, 1, 30)}),
        ("outside the step window", {"state": ForwardState(LAYOUT, reason="outside the step window")}),
        ("below min_tokens", {"min_tokens": 31}),
        (
            "below min_tokens",
            {"min_tokens": 31, "tokens": 37, "state": ForwardState(TokenLayout(TokenGrid(5, 2, 3), suffix=7))},
        ),
        ("full in the plan", {"plan": TilePlan.uniform(4)}),
        ("text or audio alone", {"tokens": 12, "state": ForwardState(LAYOUT, others=frozenset({12}))}),
        ("unexplained", {"state": ForwardState(None, reason="unexplained")}),
        ("too dense to pay", {"plan": TilePlan.uniform(3), "slow": True}),
        ("too few frames to pay", {"state": ForwardState(TokenLayout(TokenGrid(3, 2, 5))), "slow": True}),
        ("measured faster", {"slow": True, "fastest": "dense"}),
        ("more calls than layers", {"state": ForwardState(LAYOUT, depth=0)}),
    ],
)
def test_whatever_is_not_ours_stays_dense_and_is_counted(reason, change, monkeypatch):
    if "fastest" in change:
        monkeypatch.setattr(choices_file, "measured_choice", lambda *_, **__: Choice(change["fastest"], {}))
    report = AttentionReport()
    q, k, v = flat(change.get("tokens", 30))
    k, v = k[:, : change.get("keys", 40)], v[:, : change.get("keys", 40)]
    override = make_attention_override(
        change.get("plan", TilePlan.uniform(1)),
        report,
        min_tokens=change.get("min_tokens", 0),
        decline_slow=change.get("slow", False),
    )
    out = call(override, (q, k, v), change.get("state", ForwardState(LAYOUT)), mask=change.get("mask"))
    assert torch.equal(out, sdpa_attention(q, k, v, HEADS, mask=change.get("mask")))
    assert dict(report.dense) == {reason: 1} and report.sparse == 0


def test_a_sequence_of_another_length_is_warned_of_and_a_text_is_not(caplog):
    override = make_attention_override(TilePlan.uniform(1), AttentionReport())
    x, text, _ = flat()
    call(override, (x, text[:, :7], text[:, :7]), ForwardState(LAYOUT))
    assert not caplog.records
    call(override, flat(tokens=31), ForwardState(LAYOUT))
    assert "attention over 31 tokens stays dense" in caplog.text


def test_mean_frames_in_some_layers_are_refused_by_a_backend_without_them():
    """Before the run, and not in the middle of it."""
    plan = TilePlan(patterns=(TilePattern(1), TilePattern(1, means=2)))
    with pytest.raises(ValueError, match="mean frames"):
        Preparation(plan, AttentionReport(), backend="triton")


def test_four_frames_are_not_too_few():
    report = AttentionReport()
    override = make_attention_override(TilePlan.uniform(1), report, decline_slow=True)
    call(override, flat(), ForwardState(TokenLayout(TokenGrid(4, 2, 3), suffix=6)))
    assert report.sparse == 1 and not report.dense


def test_layers_are_given_or_counted():
    plan = TilePlan(patterns=(TilePattern(None), TilePattern(1)))
    for given in ({"block_index": 1}, {}):
        report = AttentionReport()
        override, state = make_attention_override(plan, report), ForwardState(LAYOUT)
        if not given:
            call(override, flat(), state)
            assert report.sparse == 0
            x, text, _ = flat()
            call(override, (x, text[:, :7], text[:, :7]), state)  # cross-attention is no layer of its own
        call(override, flat(), state, **given)
        assert report.sparse == 1


def test_a_previous_override_is_asked_for_every_dense_piece():
    seen = []

    def previous(func, q, k, v, heads, mask=None, **kwargs):
        seen.append(q.shape)
        assert kwargs["transformer_options"]["mark"] == 7
        return func(q, k, v, heads, mask=mask, **kwargs)

    report = AttentionReport()
    override = make_attention_override(TilePlan.uniform(1), report, previous=previous)
    plain = make_attention_override(TilePlan.uniform(1), AttentionReport())
    assert torch.equal(call(override, flat(), ForwardState(LAYOUT), mark=7), call(plain, flat(), ForwardState(LAYOUT)))
    assert len(seen) == 1 + 2 and report.sparse == 1  # the reference rows, and the other frames of each batch entry


def test_a_first_plan_below_another_node_s_override_leaves_the_attention_to_the_second():
    reports, plan = (AttentionReport(), AttentionReport()), TilePlan(patterns=(TilePattern(None), TilePattern(1)))
    first = make_attention_override(TilePlan.uniform(1), reports[0])
    preparation = Preparation(plan, reports[1])
    second = attention_override(preparation, previous=lambda func, *args, **kwargs: first(func, *args, **kwargs))
    alone = make_attention_override(TilePlan.uniform(1), AttentionReport())
    state = ForwardState(LAYOUT, depth=2, owner=preparation)
    assert torch.equal(call(second, flat(), state), sdpa_attention(*flat(), HEADS))
    assert torch.equal(call(second, flat(), state), call(alone, flat(), ForwardState(LAYOUT)))
    assert reports[1].summary() == "1 attention calls sparse at mean density 0.52; dense: 1 full in the plan"
    assert not reports[0].sparse and not reports[0].dense


def kernel(mode, step=0):
    """A factory's kernel, as nodes install theirs: every one has the same name."""

    def sage_func(func, *args, **kwargs):
        return func(*args, **kwargs) if mode and step >= 0 else None

    return sage_func


def test_kernels_of_one_name_are_told_apart_and_a_counter_is_none():
    def identity(previous):
        return DenseCall(attention_sdpa, previous, None, {}).identity

    assert identity(None) == "attention_sdpa"
    first = identity(kernel("auto"))
    assert first == identity(kernel("auto", step=7)) == identity(kernel("auto")) != identity(kernel("sageattn3"))
    assert first.startswith("sage_func over attention_sdpa ")
    around = functools.wraps(attention_sdpa)(lambda *args: attention_sdpa(*args) if first else None)
    assert DenseCall(around, None, None, {}).identity == identity(None)
    bound = functools.partial(kernel("auto"), kind="a"), functools.partial(kernel("auto"), kind="b")
    assert len({first, *map(identity, bound)}) == 3


def test_an_override_with_an_empty_cell_is_called_by_its_name():
    def make():
        def later(func, *args, **kwargs):
            return held(func, *args, **kwargs)

        yield later
        held = later

    later = next(make())
    assert function_name(later) == "later" and DenseCall(attention_sdpa, later, None, {}).function is None


def test_the_report_names_what_computes_mean_frames():
    """Nobody knows the log-sum-exp of another node's attention."""
    names = []
    for previous in (None, kernel("auto")):
        report = AttentionReport()
        override = make_attention_override(TilePlan.from_text("all:1+1"), report, previous=previous)
        call(override, flat(), ForwardState(LAYOUT))
        names += report.computed
    assert names == ["attention_sdpa in parts", "PyTorch's attention in parts"]


def test_deep_copies_share_the_report():
    report = AttentionReport()
    options = copy.deepcopy({"a": make_attention_override(TilePlan.uniform(1), report)})
    call(options["a"], flat(), ForwardState(LAYOUT))
    assert report.sparse == 1
    assert report.summary() == "1 attention calls sparse at mean density 0.52; dense: none"
    report.reset()
    assert report.summary() == "0 attention calls sparse; dense: none"


@pytest.mark.parametrize("backend", ["auto", "frames"])
def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch, backend):
    measured, used = [], []

    def choose(shape, layout, pattern, *, dense):
        measured.append(dense.name)
        q, k, v = shape.tensors(1, 7)  # a trial may take fewer heads and tokens
        assert dense(q, k, v).shape == (2, 1, 7, 16)
        return Choice(
            "dense", {"dense": 1.0, "frames": 2.0}
        )  # a slow pattern is declined only where that was asked for

    monkeypatch.setattr(choices_file, "measured_choice", choose)
    original = override_file.tile_attention
    monkeypatch.setattr(
        override_file, "tile_attention", lambda *a, **kw: used.extend(kw["backend"].values()) or original(*a, **kw)
    )
    report = AttentionReport()
    call(make_attention_override(TilePlan.uniform(1), report, backend=backend), flat(), ForwardState(LAYOUT))
    assert used == ["frames"] and report.sparse == 1
    assert measured == (["attention_sdpa"] if backend == "auto" else [])
    assert report.trials == ({"1:4": "dense 1.00, frames 2.00"} if backend == "auto" else {})


@pytest.mark.parametrize("wanting", ["q", "k", "v", ""])
def test_a_backend_is_chosen_by_what_the_call_is_computed_in(monkeypatch, wanting):
    """Which under autocast is neither q's dtype nor v's, and by the gradient that any of them wants."""
    shapes = []
    monkeypatch.setattr(
        choices_file, "measured_choice", lambda shape, *_, **__: shapes.append(shape) or Choice("frames", {})
    )
    q, k, v = flat()
    tensors = {"q": q, "k": k, "v": v.to(torch.bfloat16)}
    for name in wanting:
        tensors[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(
            make_attention_override(TilePlan.uniform(1), AttentionReport()), tensors.values(), ForwardState(LAYOUT)
        )
    assert [(s.batch, s.heads, s.head_dim, s.dtype, s.gradients) for s in shapes] == [
        (2, HEADS, 16, torch.bfloat16, bool(wanting))
    ]
    assert out.dtype == torch.bfloat16 and out.requires_grad == bool(wanting)


@pytest.mark.parametrize("backend", ["auto", "parts", "frames"])
def test_a_training_step_that_was_not_foreseen_keeps_no_copies(monkeypatch, backend):
    monkeypatch.setattr(choices_file, "measured_choice", lambda *_, **__: Choice("frames", {}))
    preparation = Preparation(TilePlan.uniform(2), AttentionReport(), backend=backend)
    state, override = ForwardState(LAYOUT, depth=3, heads=HEADS), attention_override(preparation)
    shape = CallShape(2, HEADS, 16, torch.float32, torch.device("cpu"))
    state = preparation.before_forward(state, shape, lambda _: DenseCall(attention_sdpa, None, None, {}))
    chosen = []
    original = override_file.tile_attention
    monkeypatch.setattr(
        override_file, "tile_attention", lambda *a, **kw: chosen.extend(kw["backend"].values()) or original(*a, **kw)
    )
    q, k, v = flat()
    call(override, (q, k, v), state)  # as it was foreseen
    call(override, (q.requires_grad_(), k, v), state)
    q, k, v = (x.detach().to(torch.bfloat16) for x in (q, k, v))
    call(override, (q, k, v), state)  # not foreseen, and nothing comes back
    foreseen = "parts" if backend == "parts" else "frames"
    assert chosen == [foreseen, "frames" if backend == "frames" else "parts", "frames"]


def test_threads_that_ask_for_a_layer_are_not_disturbed_by_one_that_forgets(monkeypatch):
    preparation, state = Preparation(TilePlan.uniform(2), AttentionReport()), ForwardState(LAYOUT, depth=4)
    mean, ended = TilePattern(1, means=1), threading.Event()

    def forget():
        while not ended.is_set():
            preparation.forget()
            tiles_file._AVERAGED.clear()
            mean_frames._TABLES.clear()

    before, thread = sys.getswitchinterval(), threading.Thread(target=forget)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert preparation.layer(state, 1).density < 1
            assert mean.mean_frames(5)
            mean_frames.make_tables(mean, LAYOUT, torch.device("cpu"), torch.float32)
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(before)


def test_another_node_s_attention_that_fails_in_a_trial_does_not_end_the_run(monkeypatch, caplog):
    def trial(*_, dense):
        q = torch.randn(1, 2, 7, 16)
        return Choice("frames", {"frames": 1.0}) if dense(q, q, q) is None else None

    def reads(func, *args, transformer_options, **kwargs):
        assert transformer_options["block_of_this_call"] == 0
        return func(*args, **kwargs)

    monkeypatch.setattr(choices_file, "measured_choice", trial)
    override = make_attention_override(TilePlan.uniform(1), AttentionReport(), previous=reads)
    with pytest.raises(KeyError):  # what it asks for is there while the model runs
        call(override, flat(), ForwardState(LAYOUT, settled=True))
    preparation = Preparation(TilePlan.uniform(1), AttentionReport())
    dense = DenseCall(sdpa_attention, reads, None, {"transformer_options": {}}, "reads")
    shape = CallShape(2, 2, 16, torch.float32, torch.device("cpu"))
    assert set(preparation.choices.settle(shape, LAYOUT, TilePattern(1), dense).values()) == {"frames"}
    assert (
        "reads over sdpa_attention cannot be timed before the model runs (KeyError: 'block_of_this_call')"
        in caplog.text
    )
    with pytest.raises(TypeError):  # ComfyUI's own attention has no reason to fail
        preparation.choices.settle(
            replace(shape, heads=1), LAYOUT, TilePattern(1), replace(dense, previous=None, func=None)
        )


def test_layers_are_counted_past_blocks_that_were_left_out():
    state = ForwardState(LAYOUT, depth=4, heads=2)
    assert [state.next_call({}, 2) for _ in range(2)] == [(0, 0, 0), (1, 0, 0)]
    state.count_from(3)
    assert [state.next_call({}, 2) for _ in range(2)] == [(3, 0, 0), None]
    streams = ForwardState(LAYOUT, depth=3, order=(0, 0, 1, 2, 2))
    streams.count_from(1)
    assert [streams.next_call({}) for _ in range(4)] == [(1, 0, 0), (2, 0, 0), (2, 1, 0), None]


def test_a_layer_that_attends_again_is_told_from_its_first_call():
    state = ForwardState(LAYOUT, depth=2, heads=4, order=(0, 0, 1))
    calls = ((0, 3), (0, 1), (0, 4), (1, 2), (1, 2))
    seen = [state.next_call({"block_index": index}, heads) for index, heads in calls]
    assert seen == [(0, 0, 0), (0, 0, 3), (0, 1, 0), (1, 0, 0), (1, 0, 2)]
    assert state.places([0, 1]) == [(0, 0), (0, 1), (1, 0)]
    assert state.again().next_call({"block_index": 0}, 4) == (0, 0, 0)


@pytest.mark.parametrize("offsets", [{"": 0}, {"double": 0, "single": 3}, {"double": 0}])
def test_what_the_model_says_of_a_layer_is_read_as_that_layer(offsets):
    state = ForwardState(LAYOUT, depth=5, offsets=offsets)
    assert [state.given_layer(state.named(layer)) for layer in range(5)] == list(range(5))


def test_layers_are_named_by_the_last_block_type_that_begins_before_them():
    state = ForwardState(LAYOUT, depth=5, offsets={"double": 0, "single": 2})
    named = [state.named(layer) for layer in range(5)]
    found = [(options["block_type"], options["block_index"]) for options in named]
    assert found == [("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)]
    assert {options["total_blocks"] for options in named} == {5}


def test_measurements_over_another_override_are_kept_apart(monkeypatch):
    names = []
    monkeypatch.setattr(
        choices_file, "measured_choice", lambda *_, dense: names.append(dense.name) or Choice("frames", {})
    )

    def sage(func, *args, **kwargs):
        return func(*args, **kwargs)

    call(make_attention_override(TilePlan.uniform(1), AttentionReport(), previous=sage), flat(), ForwardState(LAYOUT))
    assert names == ["sage over attention_sdpa"]


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize(
    ("prefix", "suffix", "padding"), [(2, 8, range(27, 30)), (8, 2, range(3, 6)), (8, 2, range(5, 8)), (8, 2, range(3))]
)
def test_masked_padding_is_left_out(oracle, prefix, suffix, padding, skip_output_reshape):
    layout, report = TokenLayout(TokenGrid(5, 2, 2), prefix, suffix), AttentionReport()
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in flat())
    mask = torch.zeros(1, 1, 30)
    mask[..., list(padding)] = torch.finfo(torch.float32).min
    options = {
        OVERRIDE_KEY: make_attention_override(TilePlan.uniform(1), report),
        FORWARD_KEY: ForwardState(layout, padding=padding),
    }
    out = sdpa_attention(
        q,
        k,
        v,
        HEADS,
        mask=mask,
        skip_reshape=True,
        skip_output_reshape=skip_output_reshape,
        transformer_options=options,
    )
    assert out.shape == (q.shape if skip_output_reshape else (2, 30, HEADS * 16)) and report.sparse == 1
    out = out if skip_output_reshape else rearrange(out, "b n (h d) -> b h n d", h=HEADS)
    real = [n for n in range(30) if n not in padding]
    in_prefix = sum(n < prefix for n in padding)
    want = oracle(
        *(x[:, :, real] for x in (q, k, v)), 5, 4, [0], prefix - in_prefix, suffix - len(padding) + in_prefix
    ).float()
    torch.testing.assert_close(out[:, :, real], want, atol=1e-5, rtol=1e-5)
    assert not out[:, :, list(padding)].any()


def test_a_mask_over_all_tokens_for_a_part_of_the_queries_is_masked_and_no_layer():
    report, state, x = AttentionReport(), ForwardState(LAYOUT), flat()[0]
    override = make_attention_override(TilePlan.uniform(1), report)
    call(override, (x[:, :20], x, x), state, mask=torch.zeros(1, 1, 1, 30))
    call(override, (x[:, 20:], x, x), state, mask=torch.zeros(1, 1, 10, 30))
    call(override, (x, x[:, :7], x[:, :7]), state, mask=torch.zeros(1, 1, 1, 7))  # a masked text
    assert dict(report.dense) == {"masked": 2, "cross-attention": 1} and state.counter.calls == 0


def test_a_mask_for_each_query_is_no_padding():
    layout, report = TokenLayout(TokenGrid(5, 2, 2), 2, 8), AttentionReport()
    override = make_attention_override(TilePlan.uniform(1), report)
    call(override, flat(), ForwardState(layout, padding=range(27, 30)), mask=torch.zeros(1, 1, 30, 30))
    assert dict(report.dense) == {"masked": 1}


@pytest.mark.parametrize("backend", ["auto", "flex"])
def test_a_scale_of_the_models_own_is_kept(oracle, backend):
    def scaled(func, q, k, v, heads, *args, scale, **kwargs):
        return func(q * (scale * q.shape[-1] ** 0.5), k, v, heads, *args, **kwargs)

    report, heads = AttentionReport(), [rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in flat()]
    override = make_attention_override(TilePlan.uniform(1), report, previous=scaled, backend=backend)
    options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(LAYOUT)}
    out = sdpa_attention(
        *heads, HEADS, skip_reshape=True, skip_output_reshape=True, scale=0.7, transformer_options=options
    )
    want = oracle(heads[0] * 0.7 * 16**0.5, *heads[1:], 5, 6, [0]).float()
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert report.sparse == 1


def test_rotating_reference_frames_follow_the_step(oracle):
    override = make_attention_override(TilePlan.uniform(1), AttentionReport(), placement="rotating")
    heads = [rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in flat()]
    for step in (0, 3, 6):
        want = rearrange(oracle(*heads, 5, 6, [step % 5]).float(), "b h n d -> b n (h d)")
        torch.testing.assert_close(call(override, flat(), ForwardState(LAYOUT, step=step)), want, atol=1e-5, rtol=1e-5)


def test_layers_follow_block_types_and_orders():
    plan = TilePlan(patterns=tuple(TilePattern(None if i % 2 else 1) for i in range(5)))
    report = AttentionReport()
    override = make_attention_override(plan, report)
    state = ForwardState(LAYOUT, offsets={"double": 0, "single": 2}, depth=5)
    for kind, index in (("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2)):
        call(override, flat(), state, block_type=kind, block_index=index)
    assert report.sparse == 3 and report.dense["full in the plan"] == 2
    report.reset()
    state = ForwardState(LAYOUT, order=(0, 0, 1, 1, 1), depth=5)  # a second stream attends once or twice a layer
    for _ in range(6):
        call(override, flat(), state)
    assert report.sparse == 2 and report.dense["full in the plan"] == 3 and report.dense["more calls than layers"] == 1


def test_torch_compile_around_it(oracle):
    report, state = AttentionReport(), ForwardState(LAYOUT)
    override = make_attention_override(TilePlan.uniform(1), report)
    compiled = torch.compile(lambda *qkv: 2 * call(override, qkv, state), backend="eager")
    heads = [rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in flat()]
    want = rearrange(oracle(*heads, 5, 6, [0]).float(), "b h n d -> b n (h d)")
    for calls in (1, 2, 3):
        torch.testing.assert_close(compiled(*flat()), 2 * want, atol=1e-5, rtol=1e-5)
        assert report.sparse == calls and not report.dense


def test_more_reference_frames_than_frames_are_said_once(caplog):
    override = make_attention_override(TilePlan.uniform(9), report := AttentionReport())
    for _ in range(3):
        call(override, flat(), ForwardState(LAYOUT))
    assert [r.getMessage() for r in caplog.records] == [
        "Efficient-vDiT: the plan has 9 reference frames and the run 5 latent frames: full attention."
    ]
    assert report.dense["full in the plan"] == 3
    caplog.clear()
    override = make_attention_override(TilePlan.uniform(9, frames=45), AttentionReport())
    with caplog.at_level("INFO"):
        for _ in range(3):
            call(override, flat(), ForwardState(LAYOUT))
    (record,) = [r for r in caplog.records if "the plan" in r.getMessage()]
    assert (
        "made for 45 latent frames and the run has 5" in record.getMessage() and "1 instead of 9" in record.getMessage()
    )
