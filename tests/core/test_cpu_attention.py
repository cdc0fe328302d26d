"""The attention of trainings on a CPU against PyTorch's in float32, of which it is the same in halves."""

import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.training import cpu_attention as module
from efficient_vdit_core.training.cpu_attention import cpu_attention

HEADS = 3


def asked(x, mask, attention):
    """The result of ``attention`` for q, k and v, and its gradients."""
    leaves = [t.clone().requires_grad_(True) for t in x]
    out = attention(*leaves, mask)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out.float() * weights).sum().backward()
    return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def reference(q, k, v, mask):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scores", [1, 2000, 2**19])
@pytest.mark.parametrize("keys", [None, 7])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_result_and_gradients_are_pytorchs(monkeypatch, scores, keys, dtype, off):
    """However many clips are taken at a time; with the mask of padded texts too, one of them without a word masked."""
    monkeypatch.setattr(module, "_SCORES", scores)
    torch.manual_seed(0)
    x = [torch.randn(5, n, HEADS * 12) for n in (23, keys or 23, keys or 23)]
    mask = None
    if keys:
        words = torch.tensor([7, 3, 1, 5, 2])
        mask = torch.zeros(5, 1, 1, keys).masked_fill(torch.arange(keys) >= words.view(-1, 1, 1, 1), -10000.0)
    expected = asked(x, mask, reference)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = asked(x, mask, lambda q, k, v, mask: cpu_attention(None, q, k, v, HEADS, mask=mask))
    for wanted, got in zip(expected, found, strict=True):
        assert (got - wanted).abs().max() <= off * wanted.abs().max()
