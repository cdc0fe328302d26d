"""What the ranks of the tests of sequence-parallel training do, each in the place of one process."""

import torch

from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.attention.spans import take
from efficient_vdit_core.head_patterns import by_head
from efficient_vdit_core.parallel.sharding.attend import sharded_attention
from efficient_vdit_core.parallel.sharding.layout import by_frames, by_tokens
from efficient_vdit_core.parallel.sharding.wire import Wire
from efficient_vdit_core.tiles import TilePattern, TokenGrid

HEADS, DIM = 5, 8
PATTERNS = {
    "full": TilePattern(None),
    "no reference": TilePattern(0),
    "1": TilePattern(1),
    "2": TilePattern(2),
    "0~1": TilePattern(0, window=1),
    "1~1": TilePattern(1, window=1),
    "2~2": TilePattern(2, window=2),
    "heads": by_head(
        [TilePattern(1, window=1), TilePattern(2), TilePattern(None), TilePattern(0, window=2), TilePattern(2)]
    ),
}


def attention_gradients(rank, ranks):
    """The worst error of this rank's result and of its gradients of q, k and v, in float64, by case."""
    found, wire = {}, Wire()
    for frames, (prefix, suffix) in ((5, (3, 2)), (8, (0, 0)), (11, (4, 0))):
        layout = TokenLayout(TokenGrid(frames, 2, 3), prefix, suffix)
        generator = torch.Generator().manual_seed(frames)
        draw = lambda: torch.randn(2, HEADS, layout.tokens, DIM, generator=generator, dtype=torch.float64)  # noqa: B023,E731
        slope, *qkv = (draw() for _ in range(4))
        for name, pattern in PATTERNS.items():
            want = differentiated(lambda *x: tile_attention(*x, layout, pattern), qkv, slope)  # noqa: B023
            cut = TilePattern(2) if name == "heads" else pattern
            for kind, shard in {"whole": by_frames(layout, ranks), "cut": by_tokens(layout, ranks, cut)}.items():
                mine = lambda x: take(x, shard.spans[rank], 2)  # noqa: B023,E731
                for scheme in ("rb", "ulysses"):
                    attend = lambda *x: sharded_attention(*x, shard, pattern, wire, scheme=scheme)  # noqa: B023,E731
                    got = differentiated(attend, [mine(x) for x in qkv], mine(slope))
                    errors = [float((a - mine(b)).abs().max()) for a, b in zip(got, want, strict=True)]
                    found[f"T={frames} {name} {kind} {scheme}"] = max(errors)
    return found


@torch.enable_grad()
def differentiated(attend, qkv, slope):
    """The result, and the gradients of q, k and v."""
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, slope)]
