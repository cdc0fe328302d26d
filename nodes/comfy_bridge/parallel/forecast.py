"""What a shardable MODEL will cost: the layers that its plan leaves on a clip, and how long ranks of measured rates take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....efficient_vdit_core.attention import TokenLayout
from ....efficient_vdit_core.attention.hook.state import ForwardState
from ....efficient_vdit_core.parallel.sharding.division import Seconds
from ....efficient_vdit_core.parallel.sharding.forecast import LayerShape, Rates, forward_seconds, rates_of, weights_of
from ....efficient_vdit_core.plan.head_patterns import LayerPattern
from ....efficient_vdit_core.tiles import TilePattern, TokenGrid
from ..families import uncompiled
from ..forward import compute_dtype
from ..hook import hook_of
from .sharding import find_shardable

Tests = Sequence[Mapping[str, Any]]  # what the ranks measured of one another


@dataclass(frozen=True)
class Measured:
    """FLOPs a second of each rank, the shares of unlike ones (else ()), and bytes a second that the slowest sends."""

    rates: tuple[float, ...]
    weights: tuple[int, ...]
    link: float

    @classmethod
    def of(cls, tests: Tests) -> Measured:
        about = [test["device"] for test in tests], [test["flops_per_second"] for test in tests]
        link = min(test["gigabytes_per_second"] for test in tests)
        return cls(rates_of(*about), weights_of(*about), link * 1e9)


@dataclass(frozen=True)
class Layers:
    """The layers of a forward, and the bytes of weights that a rank gathers in it."""

    shape: LayerShape
    patterns: tuple[LayerPattern, ...]
    gathered: int

    @classmethod
    def of(cls, model: Any, layout: TokenLayout, gathered: int = 0) -> Layers:
        """Those of a shardable MODEL under its plan."""
        diffusion_model, hook = uncompiled(model.get_model_object("diffusion_model")), hook_of(model)
        family, _ = find_shardable(model)
        depth = family.depth(diffusion_model)
        state = ForwardState(layout, depth=depth)
        patterns = tuple(
            TilePattern(None) if hook is None else hook.preparation.pattern_of(state, layer) for layer in range(depth)
        )
        heads, head_dim = family.head_count(diffusion_model), family.head_dim(diffusion_model)
        weights = family.token_weights(diffusion_model) // depth
        shape = LayerShape(layout, heads, head_dim, compute_dtype(model.model).itemsize, text=0, weights=weights)
        return cls(shape, patterns, gathered)

    def seconds(self, measured: Measured, scheme: str) -> Seconds:
        """Of a forward over some branches on some ranks, with nothing overlapped but the gather of weights."""

        def found(branches: int, ranks: tuple[int, ...]) -> float:
            flops = math.fsum(measured.rates[rank] for rank in ranks) / len(ranks)
            rates = Rates("measured", flops, measured.link)
            return forward_seconds(
                self.shape, self.patterns, len(ranks), scheme, rates, gathered=self.gathered, batch=branches
            )

        return found

    def alone(self, measured: Measured, branches: int = 1) -> float:
        """Seconds of the fastest rank with whole weights."""
        rates = Rates("measured", max(measured.rates), measured.link)
        return forward_seconds(self.shape, self.patterns, 1, "auto", rates, batch=branches)


def clip_layout(model: Any, clip: tuple[int, int, int]) -> TokenLayout:
    """Where the tokens of a ``clip`` of (frames, height, width) stand, nothing beside the video."""
    _, rule = find_shardable(model)
    pixels, (frames, *sides) = rule.pixels(uncompiled(model.get_model_object("diffusion_model"))), clip
    grid = TokenGrid(
        (frames - 1) // pixels[0] + 1, *(side // size for side, size in zip(sides, pixels[1:], strict=True))
    )
    return TokenLayout(grid)
