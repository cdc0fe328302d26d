"""Times what the pack adds around the attention: its import, the patch, the index work of one attention call, and what
telling heads apart adds to a search.

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
    "attention.hook.override",
    "plan",
    "attention.backends.triton",
    "attention.backends.flex",
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
    attention, override, plan, triton, flex = modules[:5]
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
        triton.index_tables.__wrapped__(layout, tiles.TilePattern(2), 24, torch.device("cpu"))

    def mask() -> None:
        flex.block_mask.__wrapped__(layout, tiles.TilePattern(2), torch.device("cpu"))

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


def measure_search(repeats: int) -> list[dict[str, Any]]:
    """One row: a layer's probing under six candidates with the errors of its heads, beside one that knows the layer's alone.
    Half as much again is the limit of its time, and of the bytes of tensors."""
    import numpy as np
    import torch

    from ..attention import TokenLayout
    from ..attention.hook.state import FORWARD_KEY, ForwardState
    from ..search import ProbeRecord, make_probe_override
    from ..tiles import TilePattern, TokenGrid
    from ..training.live_bytes import LiveBytes
    from .turns import medians

    layout, heads = TokenLayout(TokenGrid(16, 1, 100)), 12
    q, k, v = (torch.randn(1, heads, layout.tokens, 64) for _ in range(3))
    candidates = tuple(TilePattern(k, window=window) for k in (1, 2, 4) for window in (0, 1))
    options = {FORWARD_KEY: ForwardState(layout, depth=1, heads=heads)}

    def dense(q: Any, k: Any, v: Any, heads: int, **_: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def of_layer(approximate: Any, exact: Any) -> tuple[float, Any]:
        return float((approximate - exact).norm() / exact.norm()), np.zeros(heads)

    def probe(compare: Any) -> None:
        override = make_probe_override(ProbeRecord(candidates), compare=compare)
        override(dense, q, k, v, heads, skip_reshape=True, skip_output_reshape=True, transformer_options=options)

    def peak(compare: Any) -> int:
        with LiveBytes() as bytes_held:
            probe(compare)
        return bytes_held.peak

    with torch.no_grad():
        times = medians({"layer": lambda: probe(of_layer), "heads": lambda: probe(None)}, q.device, repeats)
        bytes_by_layer, bytes_by_head = peak(of_layer), peak(None)
    row = {
        "what": "search by head, a layer of 12 x 1600 tokens", "milliseconds": 1000 * times["heads"],
        "limit": 1500 * times["layer"],
        "bytes": bytes_by_head, "bytes_limit": 1.5 * bytes_by_layer,
    }  # fmt: skip
    return [row]


def _median(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
