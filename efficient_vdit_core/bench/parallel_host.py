"""What runs in the workers of `evdit bench parallel`: Open-Sora-Plan's blocks with random weights, on shared out tokens,
with whole weights and with shared out ones, or on rank 0 alone."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import TokenLayout
from ..attention.hook.override import make_attention_override
from ..attention.hook.state import FORWARD_KEY, ForwardState
from ..attention.report.report import AttentionReport
from ..attention.sdpa import OVERRIDE_KEY
from ..models.opensora_plan.config import OSP_29X720P, DiTConfig
from ..models.opensora_plan.transformer import OpenSoraT2V
from ..parallel.sharding.blocks import SHARDED_KEY, ShardedForward, block_hook
from ..parallel.sharding.override import make_sharded_override
from ..parallel.sharding.weights import GATHER_WEIGHTS, ShardedWeights
from ..plan import TilePlan
from ..tiles import TokenGrid

TEXT_TOKENS = 100


class BenchHost:
    """One thread a rank, float32 on a CPU; bfloat16 on GPUs."""

    def __init__(self, settings: Any, comm: Any) -> None:
        self.comm, self.device = comm, torch.device(settings.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def open(self, message: dict[str, Any]) -> dict[str, Any]:
        """Build ``depth`` blocks of the form ``config`` for ``grid`` tokens; the same numbers on each rank."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(message["seed"])
        config = DiTConfig(**{**vars(OSP_29X720P), **message["config"]})
        self.model = OpenSoraT2V(config, dtype=self.dtype, device=self.device).eval()
        t, h, w = message["grid"]
        self.layout, self.depth = TokenLayout(TokenGrid(t, h, w)), config.num_layers
        self.shared: ShardedWeights | None = None
        self.x = torch.randn(1, 4, t, 2 * h, 2 * w, dtype=self.dtype, device=self.device)
        self.text = torch.randn(1, TEXT_TOKENS, config.caption_channels, dtype=self.dtype, device=self.device)
        return {"held": [message["key"]]}  # it holds one

    def offload(self) -> None:
        """Nothing to free: the pool ends with the benchmark."""

    def step(self, message: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One forward; seconds from the moment all ranks are ready, bytes that this rank sent in its layers."""
        self._hold(message["weights"])
        before = self.comm.sent.copy()
        dist.barrier()
        start = time.perf_counter()
        out = None
        if message["scheme"] != "alone" or self.comm.rank == 0:
            plan = TilePlan.uniform(message["k"])
            options, timestep = self._options(message, plan), torch.full((1,), 500.0, device=self.device)
            out = self.model(self.x, timestep, self.text, transformer_options=options)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        sent = self.comm.sent - before
        layers = sum(count for name, count in sent.items() if name.startswith(("rb", "ulysses")))
        said = {"seconds": seconds, "bytes": layers, "gathered": sent[GATHER_WEIGHTS], "held": self._held()}
        return said, {} if out is None else {"out": out}

    def _hold(self, weights: str) -> None:
        """Keep the blocks' weights ``whole`` or ``sharded``."""
        if weights == "whole" and self.shared is not None:
            self.shared.remove()
            self.shared = None
        elif weights == "sharded" and self.shared is None:
            self.shared = ShardedWeights(self.model, list(self.model.transformer_blocks), self.comm, self.device)

    def _held(self) -> int:
        """Bytes of the blocks' weights that this rank computes from."""
        if self.shared is not None:
            return self.shared.nbytes
        return sum(x.nbytes for x in self.model.transformer_blocks.parameters())

    def _options(self, message: dict[str, Any], plan: TilePlan) -> dict[str, Any]:
        if message["scheme"] == "alone":
            return {
                OVERRIDE_KEY: make_attention_override(plan, AttentionReport()),
                FORWARD_KEY: ForwardState(self.layout),
            }
        patterns = [plan.pattern(i, self.depth) for i in range(self.depth)]
        return {
            OVERRIDE_KEY: make_sharded_override(),
            SHARDED_KEY: ShardedForward(self.layout, patterns, self.comm, message["scheme"]),
            "patches_replace": {
                "dit": {("double_block", i): block_hook(i, last=i == self.depth - 1) for i in range(self.depth)}
            },
        }
