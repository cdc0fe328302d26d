"""What a forward costs in FLOPs, and the most that a plan can save of it (Amdahl's bound)."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import TokenLayout


@dataclass(frozen=True)
class StepCost:
    """The blocks of one forward of one clip; what runs once a forward or over the text alone is left out.

    Attributes:
        layout: the sequence that every layer attends over.
        heads, head_dim: of that attention.
        depth: the number of layers.
        weights: elements of the matrices that every token of the sequence is multiplied with, all layers together.
    """

    layout: TokenLayout
    heads: int
    head_dim: int
    depth: int
    weights: int

    @property
    def attention(self) -> float:
        """FLOPs of dense self-attention: two products of N x N x head_dim for each head, a multiplication and an
        addition each."""
        return 4.0 * self.layout.tokens**2 * self.heads * self.head_dim * self.depth

    @property
    def matrices(self) -> float:
        """FLOPs of the matrices."""
        return 2.0 * self.layout.tokens * self.weights

    @property
    def video_share(self) -> float:
        """The share of the sequence that a plan can make sparse, 0 to 1."""
        return self.layout.grid.tokens / self.layout.tokens

    def attention_share(self, attention_rate: float = 1.0) -> float:
        """The share of a dense step in attention, which runs at ``attention_rate`` times the matrices' FLOP/s."""
        attention = self.attention / attention_rate
        return attention / (attention + self.matrices)

    def bound(self, density: float, attention_rate: float = 1.0) -> float:
        """How many times faster a step becomes at most, where ``density`` of the attention's FLOPs are left."""
        share = self.attention_share(attention_rate)
        return 1.0 / (1.0 - share + share * density)
