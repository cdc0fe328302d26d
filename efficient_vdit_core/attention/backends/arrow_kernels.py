"""Triton kernels of the arrow mask: flash attention whose key loop visits only what the mask keeps.

Imported only where Triton is installed. The sequence is cut into spans: the prefix, the suffix and each frame, which
sees other keys under each pattern of a layer's heads. A block of rows belongs to one span, and three small tables
(``triton.py`` builds them) say what a span sees, and which is computed when:

    spans       (any, 4) int32: first token, end token, first key range, end key range; prefix, suffix, then the frames
    key_ranges  (any, 2) int32: first token, end token, end exclusive; neighbours joined
    schedule    (H T, 2) int32: head and span of each frame, those that see most first

The arrow mask is symmetric, so the same tables say which rows see a block of keys: the dK/dV kernel walks them too.
Whole blocks of a key range run without a mask, and only its last, broken one with (MASKED: all of them). Online softmax
and recomputation in the backward follow FlashAttention-2 (arXiv 2307.08691), in base 2: the scale is folded into one multiply-add.

head_dim is D0 + D1, two tiles whose widths are powers of two (96 = 64 + 32), so nothing is padded; D1 = 0 where one is
enough, and every second tile then stands for nothing. Strides are (batch, head, token, channel) in elements; addresses
are 64-bit. Scores and sums are float32.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# Kernels take dozens of arguments, which read better in rows than one to a line.
# fmt: off

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every score that can occur, yet finite: a row whose first scores are all -inf must not become NaN.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def _probe():
    pass


INTERPRETED = tl.constexpr(type(_probe).__name__ == "InterpretedFunction")


# (rows, columns, warps, stages), and the head_dims at which the compiler spills at most 64 bytes a thread and the tile can
# be launched (`evdit bench compile`): on Hopper (sm_90), Blackwell's data centre cards (sm_100) and its others (sm_120),
# NVIDIA's older ones (sm_80 to sm_89, some with 99 KiB of shared memory), AMD's CDNA (64 KiB). What is between two of these
# head_dims needs no more registers than the larger.
SIZES = (64, 96, 128)
Tiles = dict[str, dict[tuple[int, int, int, int], tuple[int, ...]]]
FORWARD: Tiles = {
    "sm_90": {(128, 64, 8, 3): SIZES, (128, 128, 8, 2): (64, 128)},
    "sm_100": {(128, 64, 8, 3): SIZES},
    "sm_120": {(128, 64, 8, 3): SIZES, (64, 32, 4, 3): SIZES},
    "nvidia": {(128, 64, 8, 3): SIZES, (64, 32, 4, 3): SIZES},
    "amd": {(128, 64, 4, 1): SIZES, (64, 32, 4, 2): SIZES},
}
QUERY_GRADIENT: Tiles = {
    "sm_90": {(128, 64, 8, 2): SIZES},
    "sm_100": {(128, 64, 8, 2): SIZES},
    "sm_120": {(64, 64, 4, 2): (64, 128), (64, 32, 4, 2): SIZES},
    "nvidia": {(64, 64, 4, 2): SIZES, (64, 32, 4, 2): SIZES},
    "amd": {(64, 32, 4, 1): SIZES},
}
KEY_VALUE_GRADIENT: Tiles = {
    "sm_90": {(128, 32, 8, 3): SIZES, (64, 32, 4, 3): (64, 96)},
    "sm_100": {(128, 32, 8, 3): SIZES, (64, 32, 4, 3): (64, 96)},
    "sm_120": {(64, 64, 8, 2): (64, 128), (64, 32, 8, 2): SIZES, (64, 16, 4, 2): SIZES, (128, 32, 8, 3): (64,)},
    "nvidia": {(64, 64, 8, 2): (64, 128), (64, 32, 8, 2): SIZES, (64, 16, 4, 2): SIZES, (128, 32, 8, 3): SIZES},
    "amd": {(64, 32, 4, 1): SIZES},
}


def architecture() -> str:
    """The key of the current GPU in the tables above."""
    target: Any = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "amd"
    return {90: "sm_90", 100: "sm_100", 103: "sm_100", 120: "sm_120", 121: "sm_120"}.get(target.arch, "nvidia")


def _tuned(tiles: Tiles):
    """Autotune over the tiles of the GPU's architecture and the head_dim, measured once for each frame size class, head_dim
    and dtype.

    Under the interpreter there is nothing to tune: the caller passes the block sizes. On sm_100 all blocks of keys are
    masked: two ways through the loop's body would have it move the sum to another layout and back at every step.
    """
    if INTERPRETED:
        return lambda kernel: kernel
    configs = {
        (name, size): [triton.Config({"ROWS": r, "COLS": c, "MASKED": name == "sm_100"}, num_warps=w, num_stages=s)
                       for (r, c, w, s), sizes in shapes.items() if size in sizes]
        for name, shapes in tiles.items() for size in SIZES
    }
    every = [config for offered in configs.values() for config in offered]

    def offered(*_: Any, D0: int, D1: int, **__: Any) -> list[Any]:
        return configs[architecture(), min(size for size in SIZES if size >= D0 + D1)]

    return triton.autotune(every, key=["size_class", "D0", "D1"], prune_configs_by={"early_config_prune": offered})


@triton.jit
def _locate(program, spans, schedule, batch, heads, frame_tokens, prefix, suffix, BLOCK: tl.constexpr, AGAIN: tl.constexpr = False):
    """Head index of this program, and of its block: first token, tokens left in the span, first and end key range. AGAIN: read
    anew, so that nothing of it takes a register in between.

    Blocks that see most keys run longest, so those of all batch entries and heads start first: prefix and suffix, then
    the frames as ``schedule`` has them.
    """
    prefix_blocks = tl.cdiv(prefix, BLOCK)
    outer_blocks = prefix_blocks + tl.cdiv(suffix, BLOCK)
    first_of_frames = batch * heads * outer_blocks
    if program < first_of_frames:
        head = program // outer_blocks
        block = program % outer_blocks
        span = 0
        if block >= prefix_blocks:
            span = 1
            block -= prefix_blocks
    else:
        frame_blocks = tl.cdiv(frame_tokens, BLOCK)
        frame = (program - first_of_frames) // frame_blocks
        block = (program - first_of_frames) % frame_blocks
        head = frame % batch * heads + tl.load(schedule + 2 * (frame // batch), volatile=AGAIN)
        span = tl.load(schedule + 2 * (frame // batch) + 1, volatile=AGAIN)
    row = spans + 4 * span
    start = tl.load(row, volatile=AGAIN) + block * BLOCK
    return head, start, tl.load(row + 1, volatile=AGAIN) - start, tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _of_head(tensor, strides, head, heads):
    """Pointer to the first token of one (batch, head)."""
    return tensor + tl.cast(head // heads, tl.int64) * strides[0] + tl.cast(head % heads, tl.int64) * strides[1]


@triton.jit
def _addresses(tensor, strides, start, FIRST: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    tokens = tl.arange(0, TOKENS)[:, None] * strides[2]
    channels = (FIRST + tl.arange(0, WIDTH))[None, :] * strides[3]
    return tensor + tl.cast(start, tl.int64) * strides[2] + (tokens + channels)


@triton.jit
def _load(tensor, strides, start, left, D0: tl.constexpr, D1: tl.constexpr, TOKENS: tl.constexpr, EDGE: tl.constexpr):
    """Two tiles (TOKENS, D0) and (TOKENS, D1); where EDGE, zeros stand for tokens from ``left`` on."""
    inside = tl.arange(0, TOKENS)[:, None] < left
    at0 = _addresses(tensor, strides, start, 0, D0, TOKENS)
    if EDGE:
        x0 = tl.load(at0, mask=inside, other=0.0)
    else:
        x0 = tl.load(at0)
    x1 = x0
    if D1 > 0:
        at1 = _addresses(tensor, strides, start, D0, D1, TOKENS)
        if EDGE:
            x1 = tl.load(at1, mask=inside, other=0.0)
        else:
            x1 = tl.load(at1)
    return x0, x1


@triton.jit
def _store(tensor, strides, start, left, x0, x1, D0: tl.constexpr, D1: tl.constexpr, TOKENS: tl.constexpr):
    inside = tl.arange(0, TOKENS)[:, None] < left
    kind = tensor.dtype.element_ty
    tl.store(_addresses(tensor, strides, start, 0, D0, TOKENS), x0.to(kind), mask=inside)
    if D1 > 0:
        tl.store(_addresses(tensor, strides, start, D0, D1, TOKENS), x1.to(kind), mask=inside)


@triton.jit
def _load_rows(tensor, start, left, TOKENS: tl.constexpr, EDGE: tl.constexpr):
    """TOKENS float32 values, one a token; where EDGE, zeros from ``left`` on."""
    at = tensor + start + tl.arange(0, TOKENS)
    if EDGE:
        return tl.load(at, mask=tl.arange(0, TOKENS) < left, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _zeros(D0: tl.constexpr, D1: tl.constexpr, TOKENS: tl.constexpr):
    x0 = tl.zeros([TOKENS, D0], tl.float32)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros([TOKENS, D1], tl.float32)
    return x0, x1


@triton.jit
def _dot(a, b, sum_):
    if INTERPRETED:  # the interpreter keeps bf16 as raw 16-bit integers and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum_, input_precision="ieee")


@triton.jit
def _scores(a0, a1, b0, b1, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """a b^T over the whole head_dim: (ROWS, COLS)."""
    result = _dot(a0, tl.trans(b0), tl.zeros([ROWS, COLS], tl.float32))
    if D1 > 0:
        result = _dot(a1, tl.trans(b1), result)
    return result


@triton.jit
def _accumulate(sum0, sum1, p, x0, x1, D1: tl.constexpr):
    """sum + p x, for both tiles."""
    p = p.to(x0.dtype)
    sum0 = _dot(p, x0, sum0)
    if D1 > 0:
        sum1 = _dot(p, x1, sum1)
    return sum0, sum1


@triton.jit
def _attend(out0, out1, m_i, l_i, q0, q1, k, v, k_strides, v_strides, start, left, scale,
            D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr):
    """One step of the online softmax: out, running maximum (base 2) and sum after the COLS keys from ``start``."""
    k0, k1 = _load(k, k_strides, start, left, D0, D1, COLS, EDGE)
    scores = _scores(q0, q1, k0, k1, D1, ROWS, COLS)
    if EDGE:
        scores = tl.where(tl.arange(0, COLS)[None, :] < left, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    out0 = out0 * alpha[:, None]
    if D1 > 0:
        out1 = out1 * alpha[:, None]
    v0, v1 = _load(v, v_strides, start, left, D0, D1, COLS, EDGE)
    out0, out1 = _accumulate(out0, out1, p, v0, v1, D1)
    return out0, out1, m_new, l_i


@_tuned(FORWARD)
@triton.jit
def forward_kernel(q, k, v, out, lse, spans, key_ranges, schedule, q_strides, k_strides, v_strides, out_strides,
                   batch, heads, tokens, frame_tokens, prefix, suffix, size_class, scale,
                   D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """Rows of ``out`` (B, H, N, D) and ``lse`` (B, H, N) float32, natural log. ``scale`` multiplies q k^T, times log2 e."""
    head, start, left, key_range, last = _locate(tl.program_id(0), spans, schedule, batch, heads, frame_tokens, prefix, suffix, ROWS)
    k = _of_head(k, k_strides, head, heads)
    v = _of_head(v, v_strides, head, heads)
    q0, q1 = _load(_of_head(q, q_strides, head, heads), q_strides, start, left, D0, D1, ROWS, True)
    out0, out1 = _zeros(D0, D1, ROWS)
    m_i = tl.full([ROWS], LOWEST, tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    for index in range(key_range, last):
        first = tl.load(key_ranges + 2 * index)
        end = tl.load(key_ranges + 2 * index + 1)
        whole = end if MASKED else first + (end - first) // COLS * COLS
        for at in range(first, whole, COLS):
            out0, out1, m_i, l_i = _attend(out0, out1, m_i, l_i, q0, q1, k, v, k_strides, v_strides, at, end - at, scale,
                                             D0, D1, ROWS, COLS, MASKED)
        if not MASKED:
            if whole < end:
                out0, out1, m_i, l_i = _attend(out0, out1, m_i, l_i, q0, q1, k, v, k_strides, v_strides, whole, end - whole,
                                                 scale, D0, D1, ROWS, COLS, True)
    out0 = out0 / l_i[:, None]
    if D1 > 0:
        out1 = out1 / l_i[:, None]
    head, start, left, _, _ = _locate(tl.program_id(0), spans, schedule, batch, heads, frame_tokens, prefix, suffix, ROWS, True)
    _store(_of_head(out, out_strides, head, heads), out_strides, start, left, out0, out1, D0, D1, ROWS)
    row_lse = (m_i + tl.math.log2(l_i)) * LN_2
    offset = tl.arange(0, ROWS)
    tl.store(lse + tl.cast(head, tl.int64) * tokens + start + offset, row_lse, mask=offset < left)


@triton.jit
def _dq_step(dq0, dq1, q0, q1, dout0, dout1, lse, delta, k, v, k_strides, v_strides, start, left, scale,
                D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr):
    k0, k1 = _load(k, k_strides, start, left, D0, D1, COLS, EDGE)
    v0, v1 = _load(v, v_strides, start, left, D0, D1, COLS, EDGE)
    p = tl.math.exp2(_scores(q0, q1, k0, k1, D1, ROWS, COLS) * scale - lse[:, None])
    if EDGE:
        p = tl.where(tl.arange(0, COLS)[None, :] < left, p, 0.0)
    ds = p * (_scores(dout0, dout1, v0, v1, D1, ROWS, COLS) - delta[:, None])
    return _accumulate(dq0, dq1, ds, k0, k1, D1)


@_tuned(QUERY_GRADIENT)
@triton.jit
def query_gradient_kernel(q, k, v, out, lse, dout, dlse, dq, delta, spans, key_ranges, schedule,
                          q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides,
                          batch, heads, tokens, frame_tokens, prefix, suffix, size_class, scale,
                          WITH_DLSE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                          MASKED: tl.constexpr):
    """dQ, and ``delta`` (B, H, N) float32 = rowsum(out * dout) - dlse, which the dK/dV kernel reads afterwards."""
    head, start, left, key_range, last = _locate(tl.program_id(0), spans, schedule, batch, heads, frame_tokens, prefix, suffix, ROWS)
    row = tl.cast(head, tl.int64) * tokens
    k = _of_head(k, k_strides, head, heads)
    v = _of_head(v, v_strides, head, heads)
    q0, q1 = _load(_of_head(q, q_strides, head, heads), q_strides, start, left, D0, D1, ROWS, True)
    out0, out1 = _load(_of_head(out, out_strides, head, heads), out_strides, start, left, D0, D1, ROWS, True)
    dout0, dout1 = _load(_of_head(dout, dout_strides, head, heads), dout_strides, start, left, D0, D1, ROWS, True)
    row_delta = tl.sum(out0.to(tl.float32) * dout0.to(tl.float32), 1)
    if D1 > 0:
        row_delta += tl.sum(out1.to(tl.float32) * dout1.to(tl.float32), 1)
    if WITH_DLSE:
        row_delta -= _load_rows(dlse + row, start, left, ROWS, True)
    offset = tl.arange(0, ROWS)
    tl.store(delta + row + start + offset, row_delta, mask=offset < left)
    lse_2 = _load_rows(lse + row, start, left, ROWS, True) * LOG2_E
    dq0, dq1 = _zeros(D0, D1, ROWS)
    for index in range(key_range, last):
        first = tl.load(key_ranges + 2 * index)
        end = tl.load(key_ranges + 2 * index + 1)
        whole = end if MASKED else first + (end - first) // COLS * COLS
        for at in range(first, whole, COLS):
            dq0, dq1 = _dq_step(dq0, dq1, q0, q1, dout0, dout1, lse_2, row_delta, k, v, k_strides, v_strides, at, end - at, scale,
                                   D0, D1, ROWS, COLS, MASKED)
        if not MASKED:
            if whole < end:
                dq0, dq1 = _dq_step(dq0, dq1, q0, q1, dout0, dout1, lse_2, row_delta, k, v, k_strides, v_strides, whole, end - whole,
                                       scale, D0, D1, ROWS, COLS, True)
    dq0 = dq0 * (scale * LN_2)
    dq1 = dq1 * (scale * LN_2)
    head, start, left, _, _ = _locate(tl.program_id(0), spans, schedule, batch, heads, frame_tokens, prefix, suffix, ROWS, True)
    _store(_of_head(dq, dq_strides, head, heads), dq_strides, start, left, dq0, dq1, D0, D1, ROWS)


@triton.jit
def _dkv_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse, delta, q_strides, dout_strides, start, left, scale,
                 D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr):
    """Here ROWS are keys, which stay, and COLS are queries, which pass. Missing queries are zero and add nothing."""
    q0, q1 = _load(q, q_strides, start, left, D0, D1, COLS, EDGE)
    lse_2 = _load_rows(lse, start, left, COLS, EDGE) * LOG2_E
    p = tl.math.exp2(_scores(k0, k1, q0, q1, D1, ROWS, COLS) * scale - lse_2[None, :])
    dout0, dout1 = _load(dout, dout_strides, start, left, D0, D1, COLS, EDGE)
    dv0, dv1 = _accumulate(dv0, dv1, p, dout0, dout1, D1)
    row_delta = _load_rows(delta, start, left, COLS, EDGE)
    ds = p * (_scores(v0, v1, dout0, dout1, D1, ROWS, COLS) - row_delta[None, :])
    dk0, dk1 = _accumulate(dk0, dk1, ds, q0, q1, D1)
    return dk0, dk1, dv0, dv1


@_tuned(KEY_VALUE_GRADIENT)
@triton.jit
def key_value_gradient_kernel(q, k, v, lse, dout, delta, dk, dv, spans, key_ranges, schedule,
                              q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
                              batch, heads, tokens, frame_tokens, prefix, suffix, size_class, scale,
                              D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """dK and dV of a block of keys, over all rows that see it."""
    head, start, left, key_range, last = _locate(tl.program_id(0), spans, schedule, batch, heads, frame_tokens, prefix, suffix, ROWS)
    row = tl.cast(head, tl.int64) * tokens
    q = _of_head(q, q_strides, head, heads)
    dout = _of_head(dout, dout_strides, head, heads)
    k0, k1 = _load(_of_head(k, k_strides, head, heads), k_strides, start, left, D0, D1, ROWS, True)
    v0, v1 = _load(_of_head(v, v_strides, head, heads), v_strides, start, left, D0, D1, ROWS, True)
    dk0, dk1 = _zeros(D0, D1, ROWS)
    dv0, dv1 = _zeros(D0, D1, ROWS)
    for index in range(key_range, last):
        first = tl.load(key_ranges + 2 * index)
        end = tl.load(key_ranges + 2 * index + 1)
        whole = end if MASKED else first + (end - first) // COLS * COLS
        for at in range(first, whole, COLS):
            dk0, dk1, dv0, dv1 = _dkv_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse + row, delta + row, q_strides,
                                              dout_strides, at, end - at, scale, D0, D1, ROWS, COLS, MASKED)
        if not MASKED:
            if whole < end:
                dk0, dk1, dv0, dv1 = _dkv_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse + row, delta + row, q_strides,
                                                  dout_strides, whole, end - whole, scale, D0, D1, ROWS, COLS, True)
    dk0 = dk0 * (scale * LN_2)
    dk1 = dk1 * (scale * LN_2)
    head, start, left, _, _ = _locate(tl.program_id(0), spans, schedule, batch, heads, frame_tokens, prefix, suffix, ROWS, True)
    _store(_of_head(dk, dk_strides, head, heads), dk_strides, start, left, dk0, dk1, D0, D1, ROWS)
    _store(_of_head(dv, dv_strides, head, heads), dv_strides, start, left, dv0, dv1, D0, D1, ROWS)
