"""The arrow mask through PyTorch's FlexAttention, from a block mask that is computed, never sampled.

``create_block_mask`` evaluates the mask on all N x N pairs: 7e9 of them at 24 frames of 3600 tokens. Here each block of
128 tokens is summed up by three numbers (first and last ordinary frame in it, whether it holds a token that all see),
and those of two blocks tell whether their tile is empty, full or partial. Only partial tiles evaluate the mask, in the
kernel.

Heads that follow different patterns share a call, whose mask has tables for each head. They are gathered on the device
for each call: 40 heads of 21 x 3600 tokens take 112 MB of them, a twentieth of the q, k and v that a call a group gathers
where the heads of a group stand apart; kept for each of a model's 40 layers it would be 4.5 GB.

Shapes: B batch, H heads, N tokens, D head_dim, b blocks, G patterns.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...plan.head_patterns import LayerPattern, by_head
from ...tiles import TilePattern, TokenGrid
from ..gpu import missing_triton, too_old
from ..layout import TokenLayout, check_tensors
from .spans import in_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 128
OLDEST_TORCH = (2, 6)  # the first whose sequences may end inside a block
# Each dtype, shape and window takes a compilation, with gradients another one; torch allows eight to all who use
# FlexAttention, and a ComfyUI that runs for days sees many sizes.
MOST_KINDS = 4096
_TRUSTED = 0.05  # of the largest value: rounding is a hundredth, a wrong kernel is off by as much as it is large

log = logging.getLogger("efficient_vdit")


@dataclass(frozen=True)
class Kernel:
    """Which of FlexAttention's kernels, and the blocks of the mask that it works on."""

    rows: int = BLOCK
    columns: int = BLOCK
    options: tuple[tuple[str, Any], ...] = ()


_KERNELS: dict[tuple[torch.device, torch.dtype, int], tuple[Kernel, Kernel]] = {}  # heads alike, heads that differ


def flex_status(device: torch.device | str | None = None) -> tuple[bool, str]:
    """Whether ``attend_flex`` runs on ``device`` (default: this machine's GPU), and the reason, in plain words."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return False, f"PyTorch is {torch.__version__}, expected {'.'.join(map(str, OLDEST_TORCH))} or later"
    where = torch.device(device or "cuda")
    if where.type == "cpu":
        return False, "on a CPU FlexAttention has no backward, compiles for a minute and is no faster than frames"
    if where.type != "cuda" or not torch.cuda.is_available():
        return False, "no CUDA GPU was found" if where.type == "cuda" else f"FlexAttention does not run on {where.type}"
    if reason := missing_triton():
        return False, f"torch.compile needs it: {reason}"
    if reason := too_old(where):
        return False, reason
    return True, f"FlexAttention, compiled at its first call, on {torch.cuda.get_device_name(where)}"


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: LayerPattern) -> Tensor:
    """Attention of q over k, v (B, H, N, D) under ``pattern``, scaled by 1 / sqrt(D), in one call also where heads differ.
    Exact and differentiable.

    Any N, bf16, fp16 or fp32. A NaN or infinity in v reaches every row of the tiles of 128 x 128 that hold it and a row
    that sees it: their hidden values are multiplied by a weight of zero. Raises ValueError naming the argument that does
    not fit, or the reason why FlexAttention does not run here.
    """
    check_tensors(q, k, v, layout)
    if q.dtype not in DTYPES:
        raise ValueError(
            f"q is {q.dtype}, expected bfloat16, float16 or float32 for the flex backend. Choose the frames backend."
        )
    available, reason = flex_status(q.device)
    if not available:
        raise ValueError(f"The flex backend does not run here: {reason}. Choose the frames backend.")
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    differ = len(pattern.kinds) > 1
    return _attend(q, k, v, layout, pattern, kernel_of(q.device, q.dtype, q.shape[3], differ=differ))


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: LayerPattern, kernel: Kernel) -> Tensor:
    import torch._dynamo.config as compiler

    mask = mask_of(layout, pattern, q.shape[1], q.device, kernel.rows, kernel.columns)
    # The names of torch 2.6; later ones know them still.
    with compiler.patch(cache_size_limit=MOST_KINDS, accumulated_cache_size_limit=MOST_KINDS):
        return _compiled()(q, k, v, block_mask=mask, kernel_options=dict(kernel.options))


def kernel_of(device: torch.device, dtype: torch.dtype, dim: int, *, differ: bool = False) -> Kernel:
    """The kernel for tensors of this kind, whose heads are alike or ``differ``: FlashAttention-4 where it is installed and
    right, else FlexAttention's own. The answer is kept."""
    key = (device, dtype, dim)
    if key not in _KERNELS:
        alike, by_itself = TilePattern(1), by_head([TilePattern(1), TilePattern(0, window=1)])
        _KERNELS[key] = (_kernel(device, dtype, dim, alike), _kernel(device, dtype, dim, by_itself))
    return _KERNELS[key][differ]


def _kernel(device: torch.device, dtype: torch.dtype, dim: int, tried: LayerPattern) -> Kernel:
    flash = flash_kernel(device, dtype)
    right = flash is not None and _is_right(flash, device, dtype, dim, tried)
    return flash if flash is not None and right else triton_kernel(device, dtype, dim)


def triton_kernel(device: torch.device, dtype: torch.dtype, dim: int) -> Kernel:
    """PyTorch's tables for NVIDIA have tiles for head_dim 64, 128 and 256; what is not there falls to 64 x 64, at half the
    speed, and in float32 to more shared memory than most cards have."""
    options: dict[str, Any] = {"ROWS_GUARANTEED_SAFE": True}  # each token sees itself
    if device.type == "cuda" and torch.version.hip is None and dim not in (64, 128, 256) and dim <= 128:
        stages = 3 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 2
        tile = (64, 32, 4, 2) if dtype == torch.float32 else (128, 64, 8, stages)
        names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages")
        options |= dict(zip(names, tile, strict=True))
    return Kernel(options=tuple(options.items()))


def flash_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """FlashAttention-4's kernels under FlexAttention, in the blocks that they work on; None where they do not run."""
    from torch.nn.attention import flex_attention

    known = getattr(getattr(flex_attention, "FlexKernelOptions", None), "__annotations__", {})
    if device.type != "cuda" or dtype == torch.float32 or "BACKEND" not in known or not _installed("flash_attn.cute"):
        return None
    rows = {9: 128, 10: 256}.get(torch.cuda.get_device_capability(device)[0])
    return Kernel(rows, 128, (("BACKEND", "FLASH"),)) if rows else None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _is_right(kernel: Kernel, device: torch.device, dtype: torch.dtype, dim: int, pattern: LayerPattern) -> bool:
    """Whether a kernel runs here and gives the result and the gradients of PyTorch's dense attention on a few hundred
    tokens. Its backward has been wrong for some head_dims without a word."""
    layout = TokenLayout(TokenGrid(4, 1, 150))
    generator = torch.Generator().manual_seed(0)
    size = (1, 2, layout.tokens, dim)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
            token, head = torch.arange(layout.tokens, device=device), torch.arange(2, device=device)[:, None, None]
            sees = mask_of(layout, pattern, 2, device).mask_mod(head, head, token[:, None], token)
            found, wanted = (
                (out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
                for out in (
                    _attend(q, k, v, layout, pattern, kernel),
                    torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees),
                )
            )
        # A maximum of tensors, which keeps NaN.
        off = float(
            torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]).max()
        )
    except Exception as error:  # compilers raise anything
        log.info("Efficient-vDiT: FlashAttention-4 is not used: %s: %s", type(error).__name__, error)
        return False
    if not off <= _TRUSTED:
        log.warning("Efficient-vDiT: FlashAttention-4 is not used: it is off by %.2g for head_dim %d", off, dim)
    return off <= _TRUSTED


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past the limit of recompilations torch would otherwise go on without compiling, with N x N scores.
    # Symbolic sizes would have every block checked for its end.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


# Each mask keeps some megabytes of indices on the device; a plan has few different patterns.
@functools.lru_cache(maxsize=64)
def block_mask(
    layout: TokenLayout, pattern: TilePattern, device: torch.device, rows: int = BLOCK, columns: int = BLOCK
) -> BlockMask:
    """FlexAttention's BlockMask of the pattern in blocks of ``rows`` x ``columns``, the same for every batch entry and
    head. Cached."""
    with torch.inference_mode(False):  # a mask made in inference mode could not serve a training step later
        owner = token_owners(layout, pattern)
        live, full = live_and_full_tiles(owner, rows, columns, pattern.window)
        # For each block of rows the blocks of keys that it sees, and for the backward pass the other way round: the mask
        # is symmetric, so in square blocks that is the same.
        partial = live & ~full
        kv, full_kv = ([x.to(device) for x in _as_lists(tiles)] for tiles in (partial, full))
        q, full_q = kv, full_kv
        if rows != columns:
            q, full_q = ([x.to(device) for x in _as_lists(tiles)] for tiles in (partial.T, full.T))
        owner, window = owner.to(device), pattern.window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = owner[query], owner[key]
        return ((of_query - of_key).abs() <= window) | (of_query < 0) | (of_key < 0)

    return _mask_from(layout.tokens, (kv, full_kv, q, full_q), (rows, columns), sees)


def _mask_from(
    tokens: int, tables: tuple[list[Tensor], ...], block: tuple[int, int], sees: Callable[..., Tensor]
) -> BlockMask:
    """A mask whose ``tables`` are counts and indices of blocks: of partial and full keys, then of partial and full queries."""
    from torch.nn.attention.flex_attention import BlockMask

    kv, full_kv, q, full_q = tables
    return BlockMask(
        seq_lengths=(tokens, tokens),
        kv_num_blocks=kv[0], kv_indices=kv[1], full_kv_num_blocks=full_kv[0], full_kv_indices=full_kv[1],
        q_num_blocks=q[0], q_indices=q[1], full_q_num_blocks=full_q[0], full_q_indices=full_q[1],
        BLOCK_SIZE=block, mask_mod=sees,
    )  # fmt: skip


def mask_of(
    layout: TokenLayout,
    pattern: LayerPattern,
    heads: int,
    device: torch.device,
    rows: int = BLOCK,
    columns: int = BLOCK,
) -> BlockMask:
    """The mask of a call of ``heads``: that of their one pattern, or one whose tables (1, H, b) and (1, H, b, c) are those of
    each head. Raises ValueError for another number of heads."""
    groups = pattern.head_groups(heads)
    masks = [block_mask(layout, p, device, rows, columns) for p in groups]
    if len(masks) == 1:
        return masks[0]
    of_head, owners, windows = _heads(layout, tuple(groups.items()), device)
    owner, window = owners[of_head], windows[of_head]

    def tables(side: str) -> list[Tensor]:
        names = (f"{side}_num_blocks", f"{side}_indices")
        return [torch.cat([getattr(mask, name) for mask in masks], 1)[:, of_head] for name in names]

    kv, full_kv = tables("kv"), tables("full_kv")
    q, full_q = (kv, full_kv) if rows == columns else (tables("q"), tables("full_q"))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = owner[head, query], owner[head, key]
        return ((of_query - of_key).abs() <= window[head]) | (of_query < 0) | (of_key < 0)

    return _mask_from(layout.tokens, (kv, full_kv, q, full_q), (rows, columns), sees)


@functools.lru_cache(maxsize=256)
def _heads(
    layout: TokenLayout, groups: tuple[tuple[TilePattern, tuple[int, ...]], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(H,) the number of each head's group, (G, N) int32 the groups' ``token_owners`` and (G,) their windows. Cached, a
    megabyte for a long clip."""
    of_head = [group for _, group in sorted((h, g) for g, (_, members) in enumerate(groups) for h in members)]
    with torch.inference_mode(False):
        owners = torch.stack([token_owners(layout, p) for p, _ in groups]).to(device)
        windows = torch.tensor([p.window for p, _ in groups], dtype=torch.int32, device=device)
        return torch.tensor(of_head, device=device), owners, windows


def forget_masks() -> None:
    """Frees what masks keep on the device; each is made again where it is needed."""
    block_mask.cache_clear()
    _heads.cache_clear()


def token_owners(layout: TokenLayout, pattern: TilePattern) -> Tensor:
    """(N,) int32: each token's frame; -1 for those that see all and are seen by all (prefix, suffix, reference
    frames)."""
    frames = torch.arange(layout.grid.t, dtype=torch.int32)
    frames[list(pattern.reference_frames(layout.grid.t))] = -1
    ends = [torch.full((count,), -1, dtype=torch.int32) for count in (layout.prefix, layout.suffix)]
    return torch.cat([ends[0], frames.repeat_interleave(layout.grid.tokens_per_frame), ends[1]])


def live_and_full_tiles(owner: Tensor, rows: int, columns: int, window: int = 0) -> tuple[Tensor, Tensor]:
    """(b, c) bool twice: tiles with at least one pair that the mask keeps, and tiles inside N that keep all their pairs;
    b blocks of ``rows`` tokens, c of ``columns``."""
    of_rows, of_columns = _sums(owner, rows), _sums(owner, columns)
    first, last, shared, plain = (x[:, None] for x in of_rows)
    first_key, last_key, shared_key, plain_key = of_columns
    # Blocks of one size do not overlap and frames lie in order, so the nearest frames of two are at their ends.
    live = shared | shared_key | ((first <= last_key + window) & (first_key <= last + window))
    spans = (last - first_key <= window) & (last_key - first <= window)  # the frames furthest from one another
    full = ~plain | ~plain_key | spans
    if len(owner) % rows:
        full[-1] = False
    if len(owner) % columns:
        full[:, -1] = False
    return live, full


def _sums(owner: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each block: its first and last ordinary frame, whether a token in it sees all, and whether one does not."""
    blocks = -(-len(owner) // block)
    # Repeating the last token fills the last block without changing what is in it.
    padded = torch.cat([owner, owner[-1:].expand(blocks * block - len(owner))]).view(blocks, block)
    last = padded.amax(1)
    return torch.where(padded < 0, len(owner), padded).amin(1), last, padded.amin(1) < 0, last >= 0


def _as_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, b) counts of the tiles set in each row and (1, 1, b, b) their columns, in order from the left; both
    int32."""
    tiles = tiles.contiguous()
    counts = tiles.sum(1)
    rows, columns = tiles.nonzero(as_tuple=True)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    index = torch.zeros(tiles.shape, dtype=torch.int32)
    index[rows, place] = columns.int()
    return counts.int()[None, None], index[None, None]
