"""What the attention calls of a model look like: all that a backend is chosen by beside the layout and the pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .autocast import autocast_dtype


@dataclass(frozen=True)
class CallShape:
    """What attention calls look like: (batch, heads, N, head_dim) of a dtype on a device; the layout gives N.

    ``gradients``: whether they are part of a training step, which comes back through them.
    """

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    gradients: bool = False

    @classmethod
    def of(cls, q: Tensor, *others: Tensor) -> CallShape:
        """The shape of calls with queries like q (B, H, N, D), and keys and values like ``others``, as autocast has them."""
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *others))
        return cls(q.shape[0], q.shape[1], q.shape[3], autocast_dtype(q), q.device, gradients)

    def tensors(self, heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v (batch, heads, tokens, head_dim) of this kind; the same each time, and the device's own random
        numbers, which a run's noise may come from, stay as they are."""
        size, generator = (self.batch, heads, tokens, self.head_dim), torch.Generator(self.device).manual_seed(0)
        about = {"device": self.device, "dtype": self.dtype, "requires_grad": self.gradients}
        q, k, v = (torch.randn(size, generator=generator, **about) for _ in range(3))
        return q, k, v
