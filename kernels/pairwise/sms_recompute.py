"""The max-margin losses in Triton without any panel: a program keeps its rows' gradient in registers and meets all other rows.

One kernel runs twice, once with the videos as the rows that stay and once with the captions. Either run computes the
similarities anew, 8 N^2 E operations instead of 6, but needs no memory beside its outputs, neither atomics nor partial sums.
"""

from collections import namedtuple

import triton
import triton.language as tl
from evaat_fast.kernels.launch import generation, on
from evaat_fast.kernels.pairwise.sms import RULES, labels_of, numbers, side

MOST_FEATURES = 256  # of which a gradient fits into registers

# Of the rows that stay. entries: float64 [N], sums of the penalties anchored at each; sums: int32 [N], of their slopes; grad:
# float32 [N, E] or None, sums of the slopes of both sides times the other's unit rows.
Out = namedtuple("Out", "entries sums grad")


def config(E, generation=9):
    """Tiles and launch for 16-bit features. Hopper and later: 128 rows in 8 warps, half of whose registers hold the gradient,
    so that only 16 columns at a time fit beside it without a spill (60 instructions a pair; 32 columns spill 8 to 144 bytes).
    Before Hopper the rows that stay take registers too, where E > 128.
    """
    block_e = max(16, triton.next_power_of_2(E))
    tall = generation >= 9 or block_e <= 128
    return {
        "BLOCK_M": 128 if tall else 32,
        "BLOCK_N": 16 if tall else 32,
        "BLOCK_E": block_e,
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": False,
    }


@triton.jit
def _rows(x, x_n, i, N, E, BLOCK_E: tl.constexpr):
    """Rows i of features [N, E], zeros beyond."""
    e = tl.arange(0, BLOCK_E)
    return tl.load(x + i.to(tl.int64)[:, None] * x_n + e[None, :], mask=(i < N)[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _cosines(x, y, inv_mine, inv_other, CAPTIONS: tl.constexpr):
    """float32: rows x times rows y, scaled in one order, videos first, so that both runs see the same numbers."""
    s = tl.dot(x, y.T, input_precision="tf32x3")
    if CAPTIONS:
        s = s * inv_other[None, :] * inv_mine[:, None]
    else:
        s = s * inv_mine[:, None] * inv_other[None, :]
    return s


@triton.jit
def recompute_diagonal_kernel(
    f, pairs, CAPTIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """float32 [N]: each pair's own cosine, from a tile of the shape that the next kernel multiplies, so that ties are exact."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    inv_m = tl.load(pairs.inv_video + m, mask=m < f.N, other=0.0)
    inv_n = tl.load(pairs.inv_text + n, mask=n < f.N, other=0.0)
    x, y = _rows(f.video, f.video_n, m, f.N, f.E, BLOCK_E), _rows(f.text, f.text_n, n, f.N, f.E, BLOCK_E)
    s = _cosines(x, y, inv_m, inv_n, CAPTIONS)
    tl.store(pairs.cosine + n, tl.sum(tl.where(m[:, None] == n[None, :], s, 0.0), 0), mask=n < f.N)


@triton.jit
def sms_recompute_kernel(
    f,
    pairs,
    labels,
    penalty,
    out,
    RULE: tl.constexpr,
    CAPTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """All rows that stay and all others. f, pairs, labels: the videos' side, which stay; with CAPTIONS the captions' side."""
    m, N = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), f.N
    in_m = m < N
    inv_m, cosine_m = tl.load(pairs.inv_video + m, mask=in_m, other=0.0), tl.load(pairs.cosine + m, mask=in_m, other=0.0)
    own_m, weight_m = tl.load(pairs.own + m, mask=in_m, other=0.0), inv_m
    if pairs.weight is not None:
        weight_m = tl.load(pairs.weight + m, mask=in_m, other=0.0)
    x = _rows(f.video, f.video_n, m, N, f.E, BLOCK_E)
    loss, slopes = tl.zeros((BLOCK_M,), tl.float64), tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        in_n = n < N
        y = _rows(f.text, f.text_n, n, N, f.E, BLOCK_E)
        inv_n = tl.load(pairs.inv_text + n, mask=in_n, other=0.0)
        cosine_n, own_n = tl.load(pairs.cosine + n, mask=in_n, other=0.0), tl.load(pairs.own + n, mask=in_n, other=0.0)
        s = _cosines(x, y, inv_m, inv_n, CAPTIONS)
        label = labels_of(labels, m, n, N)
        keep = in_m[:, None] & in_n[None, :] & (m[:, None] != n[None, :])
        loss_m, slope_m = side(own_m[:, None], label, cosine_m[:, None], s, penalty, keep, RULE, True)
        loss += tl.sum(loss_m, 1).to(tl.float64)
        slopes += tl.sum(slope_m, 1).to(tl.int32)
        if out.grad is not None:
            _, slope_n = side(own_n[None, :], label, cosine_n[None, :], s, penalty, keep, RULE, True)
            if pairs.weight is not None:
                slope_m *= weight_m[:, None]
                slope_n *= tl.load(pairs.weight + n, mask=in_n, other=0.0)[None, :]
            # The raw rows that are here already, and a rounded 1 / norm in the slope: as exact as a rounded unit row.
            slope = ((slope_m + slope_n) * inv_n[None, :]).to(y.dtype)
            total = tl.dot(slope, y, total, input_precision="tf32x3")
    tl.store(out.entries + m, loss, mask=in_m)
    tl.store(out.sums + m, slopes, mask=in_m)
    if out.grad is not None:
        e = tl.arange(0, BLOCK_E)
        tl.store(out.grad + m.to(tl.int64)[:, None] * f.E + e[None, :], total, mask=in_m[:, None] & (e < f.E)[None, :])


def sms_rows(f, pairs, labels, penalty, out, captions):
    """One run. pairs, labels, penalty: as `sms.sms_panel`; pairs.cosine is scratch. captions: whether they are the rows that
    stay.
    """
    if captions:  # the two sides change places
        f = f._replace(video=f.text, text=f.video, video_n=f.text_n, text_n=f.video_n)
        pairs, v = pairs._replace(inv_video=pairs.inv_text, inv_text=pairs.inv_video), labels
        labels = v._replace(row=v.column, column=v.row, V=v.C, C=v.V, video_index=v.caption_index, caption_index=v.video_index)
    shape, how = config(f.E, generation(f.video.device)), {"CAPTIONS": captions}
    with on(f.video.device):
        recompute_diagonal_kernel[(triton.cdiv(f.N, shape["BLOCK_N"]),)](f, pairs, **how, **shape)
        how["RULE"] = RULES[penalty.rule]
        sms_recompute_kernel[(triton.cdiv(f.N, shape["BLOCK_M"]),)](f, pairs, labels, numbers(penalty), out, **how, **shape)
