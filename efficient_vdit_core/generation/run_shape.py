"""What one run of the pipeline is to its attention: the tokens, the calls of a layer, what they hold, and what each forward
tells them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from ..attention.call_shape import CallShape
from ..attention.hook.override import attention_override
from ..attention.hook.prepare import Preparation
from ..attention.hook.residual import Room
from ..attention.hook.state import FORWARD_KEY, ForwardState
from ..attention.layout import TokenLayout
from ..attention.sdpa import OVERRIDE_KEY
from ..limits.memory import check_memory
from ..tiles import TokenGrid
from .request import VideoRequest


class RunShape:
    """Of a request to an OpenSoraT2V ``transformer`` that works on ``device``.

    prompts: how many texts a step sees: guidance has two.
    """

    def __init__(self, transformer: Any, device: torch.device, request: VideoRequest) -> None:
        self.transformer, self.device, self.request = transformer, device, request
        self.prompts = 1 if request.guidance == 1.0 else 2
        t, h, w = request.latent_size
        p = transformer.config.patch_size
        self.layout = TokenLayout(TokenGrid(t, -(-h // p), -(-w // p)))

    @property
    def calls(self) -> CallShape:
        """The shape of a layer's self-attention."""
        config = self.transformer.config
        return CallShape(
            self.prompts, config.num_attention_heads, config.attention_head_dim, self.transformer.dtype, self.device
        )

    @property
    def block_bytes(self) -> int:
        """Queries, keys, values, the residual and its norm, and the MLP's four widths, in the weights' precision."""
        tokens = self.layout.grid.tokens * self.prompts
        return 9 * tokens * self.transformer.config.hidden_size * self.transformer.dtype.itemsize

    def state(self, step: int = 0) -> ForwardState:
        """What the forward of a step tells its attention."""
        return ForwardState(
            self.layout, depth=self.transformer.config.num_layers, step=step, steps=self.request.steps or 0,
            branches=tuple((prompt, 1) for prompt in range(self.prompts)),
        )  # fmt: skip

    def check_memory(self, preparation: Preparation | None) -> None:
        """Raises ValueError, before any work, where one block's tensors, or the cached residual beside them, are more
        than is free."""
        advice = "Use fewer frames or a smaller size."
        check_memory(self.block_bytes, self.request.describe(), advice, str(self.device))
        if preparation is not None:
            self.residual_room(preparation)

    def residual_room(self, preparation: Preparation) -> Room | None:
        """Where the cached residual is kept, and its bytes; None where none is. Raises ValueError where there is no memory
        for it beside a block and the weights that are still to come to the device."""
        to_come = sum(p.nbytes for p in self.transformer.parameters() if p.device.type != self.device.type)
        return preparation.residual_room(self.state(), self.calls, beside=self.block_bytes + to_come)

    def attention_options(self, preparation: Preparation | None) -> Callable[[], dict[str, Any]]:
        """Makes the transformer_options of one forward pass, which is a step."""
        if preparation is None:
            return dict
        override, counted = attention_override(preparation), itertools.count()

        def options() -> dict[str, Any]:
            state = preparation.keep_residual(self.state(next(counted)), self.calls)
            return {OVERRIDE_KEY: override, FORWARD_KEY: state}

        return options
