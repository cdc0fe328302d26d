import copy

import pytest
import torch
from einops import rearrange

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.override import FORWARD_KEY, AttentionReport, ForwardState, make_attention_override
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
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
    torch.testing.assert_close(out, want if skip_output_reshape else rearrange(want, "b h n d -> b n (h d)"), atol=1e-5, rtol=1e-5)
    assert report.sparse == 1 and not report.dense


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no token grid", {"state": None}),
        ("cross-attention", {"keys": 7}),
        ("another sequence length", {"tokens": 12}),
        ("a single frame", {"state": ForwardState(TokenLayout(TokenGrid(1, 5, 6)))}),
        ("masked", {"mask": torch.zeros(1, 1, 1, 30)}),
        ("outside the step window", {"state": ForwardState(LAYOUT, active=False)}),
        ("below min_tokens", {"min_tokens": 31}),
        ("full in the plan", {"plan": TilePlan.uniform(4)}),
    ],
)
def test_whatever_is_not_ours_stays_dense_and_is_counted(reason, change):
    report = AttentionReport()
    q, k, v = flat(change.get("tokens", 30))
    k, v = k[:, : change.get("keys", 30)], v[:, : change.get("keys", 30)]
    override = make_attention_override(change.get("plan", TilePlan.uniform(1)), report, min_tokens=change.get("min_tokens", 0))
    out = call(override, (q, k, v), change.get("state", ForwardState(LAYOUT)), mask=change.get("mask"))
    assert torch.equal(out, sdpa_attention(q, k, v, HEADS, mask=change.get("mask")))
    assert dict(report.dense) == {reason: 1} and report.sparse == 0


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
    assert len(seen) == 2 and report.sparse == 1


def test_deep_copies_share_the_report():
    report = AttentionReport()
    options = copy.deepcopy({"a": make_attention_override(TilePlan.uniform(1), report)})
    call(options["a"], flat(), ForwardState(LAYOUT))
    assert report.sparse == 1
    assert report.summary() == "1 attention calls sparse at mean density 0.52; dense: none"
    report.reset()
    assert report.summary() == "0 attention calls sparse; dense: none"
