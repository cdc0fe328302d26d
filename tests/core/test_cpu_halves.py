"""Attention in bfloat16 on a CPU, with its gradient, against PyTorch's in float32."""

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.attention import cpu_halves, sdpa
from efficient_vdit_core.attention.sdpa import attention_sdpa

HEADS = 3


def asked(x, attention):
    """The result of ``attention`` for q, k and v, and its gradients."""
    leaves = [t.clone().requires_grad_(True) for t in x]
    out = attention(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out.float() * weights).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def words_masked(keys, *, as_bool):
    """What a batch of padded texts hides, one of them nothing."""
    seen = torch.arange(keys) < torch.tensor([7, 3, 1, 5, 2]).view(-1, 1, 1, 1)
    return seen if as_bool else torch.zeros(5, 1, 1, keys).masked_fill(~seen, -10000.0)


@pytest.mark.parametrize("scores", [1, 2000, 2**19])
@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_result_and_gradients_are_pytorchs(monkeypatch, scores, mask, dtype, off):
    """However many entries of the batch are taken at a time."""
    monkeypatch.setattr(cpu_halves, "_SCORES", scores)
    torch.manual_seed(0)
    keys = 7 if mask else 23
    x = [torch.randn(5, HEADS, n, 12) for n in (23, keys, keys)]
    told = words_masked(keys, as_bool=mask == "bool") if mask else None
    expected = asked(x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=told))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = asked(x, lambda q, k, v: cpu_halves.attend(q, k, v, told))
    for wanted, got in zip(expected, found, strict=True):
        assert (got - wanted).abs().max() <= off * wanted.abs().max()


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_mask_of_fewer_dimensions_is_broadcast_as_pytorch_does(rank):
    x = [torch.randn(2, HEADS, n, 12) for n in (4, 7, 7)]
    mask = torch.linspace(-2, 2, 28).reshape(4, 7).expand(*[1] * (rank - 2), 4, 7)
    expected = asked(x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    found = asked(x, lambda q, k, v: cpu_halves.attend(q, k, v, mask))
    for wanted, got in zip(expected, found, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_mask_gets_its_gradient():
    """A learnt bias: from PyTorch, for this has none."""
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(2, 8, HEADS * 4, dtype=torch.bfloat16, requires_grad=True)
    attention_sdpa(x, x, x, HEADS, mask=mask).float().square().sum().backward()
    assert mask.grad is not None and mask.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("about", "taken"),
    [
        ({}, True),
        ({"grad": False}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float32, "autocast": True}, True),
        ({"tokens": 1200}, False),
        ({"device": "meta"}, False),
    ],
)
def test_it_is_taken_where_a_gradient_of_short_sequences_is_asked_for(monkeypatch, about, taken):
    asked_here = []
    monkeypatch.setattr(sdpa, "attend", lambda q, *_: asked_here.append(q) or q)
    about = {"grad": True, "dtype": torch.bfloat16, "autocast": False, "tokens": 8, "device": "cpu", **about}
    x = torch.zeros(1, about["tokens"], HEADS * 4, dtype=about["dtype"], device=about["device"])
    with torch.autocast("cpu", torch.bfloat16, enabled=about["autocast"]):
        out = attention_sdpa(x.requires_grad_(about["grad"]), x, x, HEADS)
    assert bool(asked_here) == taken and out.shape == x.shape
