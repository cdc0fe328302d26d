"""The dense calls of the backend `frames` and nothing else: their keys lie ready, and nobody puts the results together.

No exact assembly of such calls can be faster, so the distance to the FLOPs' ideal falls into what the dense kernel loses on
short calls and what the assembly adds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..attention import TokenLayout
from ..attention.backends.spans import take
from ..attention.layout import global_spans
from ..tiles import TilePattern


def calls_alone(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern
) -> Callable[[], list[Tensor]]:
    """Makes the calls for q, k, v (B, H, N, D): the shared rows over all keys, and each other frame over what it sees."""
    references = pattern.reference_frames(layout.grid.t)
    shared, calls = global_spans(layout, references), []
    if shared:
        calls.append((take(q, shared, 2), k, v))
    for frame, near in pattern.neighbours(layout.grid.t).items():
        seen = global_spans(layout, tuple(sorted((*references, *near))))
        own = [layout.span(frame, frame + 1)]
        calls.append((take(q, own, 2), take(k, seen, 2).contiguous(), take(v, seen, 2).contiguous()))
    return lambda: [F.scaled_dot_product_attention(*call) for call in calls]
