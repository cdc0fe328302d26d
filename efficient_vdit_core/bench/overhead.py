"""Times what the pack adds around the attention: its import, the patch, and the index work of one attention call.

Nothing of the engine is imported at the top: the import is one of the things to be timed.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

ENGINE = (
    "attention",
    "attention.override",
    "plan",
    "sampling.consistency",
    "models.opensora_plan.transformer",
    "models.opensora_plan.vae",
)


def measure(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds (the import once, the others as medians of ``repeats``), each beside its limit."""
    import torch

    start = time.perf_counter()
    modules = [importlib.import_module(f"..{name}", __package__) for name in ENGINE]
    imported = 1000 * (time.perf_counter() - start)
    attention, override, plan = modules[:3]
    tiles = importlib.import_module("..tiles", __package__)
    layout = attention.TokenLayout(tiles.TokenGrid(24, 45, 80))
    # Tensors without memory: what is left is the work of Python and of PyTorch's dispatcher.
    q, k, v = (torch.empty(1, 24, layout.tokens, 96, dtype=torch.bfloat16, device="meta") for _ in range(3))

    def install() -> None:
        override.make_attention_override(plan.TilePlan.uniform(2, layers=32), override.AttentionReport())

    def one_call() -> None:
        attention.tile_attention(
            q, k, v, layout, tiles.TilePattern(2), backend="frames", dense=lambda q, k, v: torch.empty_like(q)
        )

    # Both are cached: what is timed here is the making.
    def tables() -> None:
        attention.triton.index_tables.__wrapped__(layout, tiles.TilePattern(2), torch.device("cpu"))

    def mask() -> None:
        attention.flex.block_mask.__wrapped__(layout, tiles.TilePattern(2), torch.device("cpu"))

    return [
        {"what": "import of the engine beyond torch", "milliseconds": imported, "limit": 100.0},
        {"what": "building the override for 32 layers", "milliseconds": _median(install, repeats), "limit": 5.0},
        {
            "what": "index work of one call, T = 24, S = 3600, k = 2",
            "milliseconds": _median(one_call, repeats),
            "limit": 5.0,
        },
        {"what": "tables of the fused kernel, once a pattern", "milliseconds": _median(tables, repeats), "limit": 5.0},
        {"what": "block mask of FlexAttention, once a pattern", "milliseconds": _median(mask, repeats), "limit": 5.0},
    ]


def _median(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
