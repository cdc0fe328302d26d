"""The arrow mask through PyTorch's FlexAttention, from a block mask that is computed, never sampled.

``create_block_mask`` evaluates the mask on all N x N pairs: 7e9 of them at 24 frames of 3600 tokens. Here each block of
128 tokens is summed up by three numbers (first and last ordinary frame in it, whether it holds a token that all see),
and those of two blocks tell whether their tile is empty, full or partial. Only partial tiles evaluate the mask, in the
kernel.

Shapes: B batch, H heads, N tokens, D head_dim, b blocks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tiles import TilePattern
from .gpu import too_old
from .layout import TokenLayout, check_tensors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 128
OLDEST_TORCH = (2, 6)  # the first whose sequences may end inside a block
# Each dtype, number of heads and head_dim takes two compilations, of which torch allows eight to all who use
# FlexAttention.
MOST_KINDS = 128


def flex_status(device: torch.device | str | None = None) -> tuple[bool, str]:
    """Whether ``attend_flex`` runs on ``device`` (default: this machine's GPU), and the reason, in plain words."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return False, f"PyTorch is {torch.__version__}, expected {'.'.join(map(str, OLDEST_TORCH))} or later"
    where = torch.device(device or "cuda")
    if where.type == "cpu":
        return False, "on a CPU FlexAttention has no backward, compiles for a minute and is no faster than frames"
    if where.type != "cuda" or not torch.cuda.is_available():
        return False, "no CUDA GPU was found" if where.type == "cuda" else f"FlexAttention does not run on {where.type}"
    if importlib.util.find_spec("triton") is None:
        return False, "torch.compile needs the package triton, which is not installed"
    if reason := too_old(where):
        return False, reason
    return True, f"FlexAttention, compiled at its first call, on {torch.cuda.get_device_name(where)}"


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: TilePattern) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``, scaled by 1 / sqrt(D). Exact and differentiable.

    Any N, bf16, fp16 or fp32. NaN and infinity reach the rows that see their token and no others; in the backward pass
    a NaN in the output's gradient reaches all tokens of the blocks of 128 that see its own. Raises ValueError naming
    the argument that does not fit, or the reason why FlexAttention does not run here.
    """
    check_tensors(q, k, v, layout)
    if q.dtype not in DTYPES:
        raise ValueError(
            f"q is {q.dtype}, expected bfloat16, float16 or float32 for the flex backend. Choose the frames backend."
        )
    available, reason = flex_status(q.device)
    if not available:
        raise ValueError(f"The flex backend does not run here: {reason}. Choose the frames backend.")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # its kernels read whole rows
    # It multiplies the hidden values of a partial tile by a weight of zero, which leaves NaN as it is.
    finite = torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0)
    import torch._dynamo.config as compiler

    with compiler.patch(recompile_limit=MOST_KINDS):
        out = _compiled()(q, k, finite, block_mask=block_mask(layout, pattern, q.device))
    return _with_the_rest(out, (v - finite).detach(), layout, pattern)


def _with_the_rest(out: Tensor, rest: Tensor, layout: TokenLayout, pattern: TilePattern) -> Tensor:
    """``out`` plus, in every row, the sum of ``rest`` over the tokens that the row sees: zeros, but for NaN and
    infinity.

    Slices only: indexing by a list would copy it to the device, and wait.
    """
    frames, size, first, last = (
        layout.grid.t,
        layout.grid.tokens_per_frame,
        layout.prefix,
        layout.tokens - layout.suffix,
    )
    of_frame = rest[:, :, first:last].unflatten(2, (frames, size)).sum(3)  # (B, H, T, D)
    everything = rest.sum(2)
    shared = rest[:, :, :first].sum(2) + rest[:, :, last:].sum(2)
    references = pattern.reference_frames(frames)
    for f in references:
        shared = shared + of_frame[:, :, f]
    near = of_frame.clone()
    for away in range(1, min(pattern.window, frames - 1) + 1):  # reference frames count twice: not finite is not finite
        near[:, :, away:] += of_frame[:, :, :-away]
        near[:, :, :-away] += of_frame[:, :, away:]
    seen = near + shared[:, :, None]
    for f in references:
        seen[:, :, f] = everything
    out = out.clone() if out.requires_grad else out  # the backward pass reads what FlexAttention returned
    out[:, :, :first] += everything[:, :, None]
    out[:, :, last:] += everything[:, :, None]
    out[:, :, first:last].unflatten(2, (frames, size)).add_(seen[:, :, :, None])
    return out


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past the limit of recompilations torch would otherwise go on without compiling, with N x N scores.
    return torch.compile(flex_attention, fullgraph=True)


# Each mask keeps some megabytes of indices on the device; a plan has few different patterns.
@functools.lru_cache(maxsize=64)
def block_mask(layout: TokenLayout, pattern: TilePattern, device: torch.device, block: int = BLOCK) -> BlockMask:
    """FlexAttention's BlockMask of the pattern, the same for every batch entry and head. Cached."""
    from torch.nn.attention.flex_attention import BlockMask

    with torch.inference_mode(False):  # a mask made in inference mode could not serve a training step later
        owner = token_owners(layout, pattern)
        live, full = live_and_full_tiles(owner, block, pattern.window)
        partial_count, partial_index = (x.to(device) for x in _as_lists(live & ~full))
        full_count, full_index = (x.to(device) for x in _as_lists(full))
        owner, window = owner.to(device), pattern.window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = owner[query], owner[key]
        return ((of_query - of_key).abs() <= window) | (of_query < 0) | (of_key < 0)

    return BlockMask(
        seq_lengths=(layout.tokens, layout.tokens),
        kv_num_blocks=partial_count, kv_indices=partial_index, full_kv_num_blocks=full_count, full_kv_indices=full_index,
        # The backward pass asks which queries see a block of keys: the mask is symmetric.
        q_num_blocks=partial_count, q_indices=partial_index, full_q_num_blocks=full_count, full_q_indices=full_index,
        BLOCK_SIZE=(block, block), mask_mod=sees,
    )  # fmt: skip


def token_owners(layout: TokenLayout, pattern: TilePattern) -> Tensor:
    """(N,) int32: each token's frame; -1 for those that see all and are seen by all (prefix, suffix, reference
    frames)."""
    frames = torch.arange(layout.grid.t, dtype=torch.int32)
    frames[list(pattern.reference_frames(layout.grid.t))] = -1
    ends = [torch.full((count,), -1, dtype=torch.int32) for count in (layout.prefix, layout.suffix)]
    return torch.cat([ends[0], frames.repeat_interleave(layout.grid.tokens_per_frame), ends[1]])


def live_and_full_tiles(owner: Tensor, block: int, window: int = 0) -> tuple[Tensor, Tensor]:
    """(b, b) bool twice: tiles with at least one pair that the mask keeps, and tiles inside N that keep all their
    pairs."""
    blocks = -(-len(owner) // block)
    # Repeating the last token fills the last block without changing what is in it.
    padded = torch.cat([owner, owner[-1:].expand(blocks * block - len(owner))]).view(blocks, block)
    last = padded.amax(1)
    first = torch.where(padded < 0, len(owner), padded).amin(1)
    shared, plain = padded.amin(1) < 0, last >= 0
    # Blocks do not overlap and frames lie in order, so the nearest frames of two blocks are at the ends of their ranges.
    near = first[:, None] <= last + window
    live = shared[:, None] | shared | (near & near.T)
    spans = last[:, None] - first <= window  # from the first frame of the one to the last of the other
    full = ~plain[:, None] | ~plain | (spans & spans.T)
    if len(owner) % block:
        full[-1] = full[:, -1] = False
    return live, full


def _as_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, b) counts of the tiles set in each row and (1, 1, b, b) their columns, in order from the left; both
    int32."""
    counts = tiles.sum(1)
    rows, columns = tiles.nonzero(as_tuple=True)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    index = torch.zeros(tiles.shape, dtype=torch.int32)
    index[rows, place] = columns.int()
    return counts.int()[None, None], index[None, None]
