"""The max-margin losses in Triton without any panel: a program keeps its rows' gradient in registers and meets all other rows.

One kernel runs twice, once with the videos as the rows that stay and once with the captions. Either run computes the
similarities anew, 8 N^2 E operations instead of 6, but needs no memory beside its outputs, neither atomics nor partial sums.
"""

import triton
import triton.language as tl
from evaat_fast.kernels.launch import generation, on
from evaat_fast.kernels.pairwise.sms import RULES, _labels, _side

MOST_FEATURES = 256  # of which a gradient fits into registers


def recompute_plan(E, generation=9):
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
    mine, other, mine_n, other_n, inv_mine, inv_other, diagonal, N, E,
    CAPTIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """float32 [N]: each pair's own cosine, from a tile of the shape that the next kernel multiplies, so that ties are exact."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    inv_m, inv_n = tl.load(inv_mine + m, mask=m < N, other=0.0), tl.load(inv_other + n, mask=n < N, other=0.0)
    s = _cosines(_rows(mine, mine_n, m, N, E, BLOCK_E), _rows(other, other_n, n, N, E, BLOCK_E), inv_m, inv_n, CAPTIONS)
    tl.store(diagonal + n, tl.sum(tl.where(m[:, None] == n[None, :], s, 0.0), 0), mask=n < N)


@triton.jit
def sms_recompute_kernel(
    mine, other, mine_n, other_n, inv_mine, inv_other, diagonal, self_relevancy,
    table, table_mine, table_other, table_half, mine_index, other_index, verb, values, V, C,
    weight, entries, sums, grad, N, E, margin, relaxation, eps,
    CAPTIONS: tl.constexpr, INDEXED: tl.constexpr, CODES: tl.constexpr, RULE: tl.constexpr, WRITE: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows of `mine`, which are the videos, or with CAPTIONS the captions, and all rows of `other`.

    entries: float64 [N], sums of the penalties anchored at each row; sums: int32 [N], of their slopes. grad, if WRITE: float32
    [N, E], sums of the slopes of both sides times the other's unit rows; weight: float32 [N], what each pair's own loss counts,
    if WEIGHTED. table_mine, table_other: strides of the labels; V, C: their sizes along mine and other.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < N
    inv_m, own_m = tl.load(inv_mine + m, mask=in_m, other=0.0), tl.load(diagonal + m, mask=in_m, other=0.0)
    self_m, weight_m = tl.load(self_relevancy + m, mask=in_m, other=0.0), inv_m
    if WEIGHTED:
        weight_m = tl.load(weight + m, mask=in_m, other=0.0)
    x = _rows(mine, mine_n, m, N, E, BLOCK_E)
    loss, slopes = tl.zeros((BLOCK_M,), tl.float64), tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        in_n = n < N
        y = _rows(other, other_n, n, N, E, BLOCK_E)
        inv_n = tl.load(inv_other + n, mask=in_n, other=0.0)
        own_n, self_n = tl.load(diagonal + n, mask=in_n, other=0.0), tl.load(self_relevancy + n, mask=in_n, other=0.0)
        s = _cosines(x, y, inv_m, inv_n, CAPTIONS)
        label = _labels(
            table, table_mine, table_other, table_half, mine_index, other_index, verb, values, m, n, N, V, C, INDEXED, CODES
        )  # fmt: skip
        keep = in_m[:, None] & in_n[None, :] & (m[:, None] != n[None, :])
        loss_m, slope_m = _side(self_m[:, None], label, own_m[:, None], s, margin, relaxation, eps, keep, RULE, True)
        loss += tl.sum(loss_m, 1).to(tl.float64)
        slopes += tl.sum(slope_m, 1).to(tl.int32)
        if WRITE:
            _, slope_n = _side(self_n[None, :], label, own_n[None, :], s, margin, relaxation, eps, keep, RULE, True)
            if WEIGHTED:
                slope_m *= weight_m[:, None]
                slope_n *= tl.load(weight + n, mask=in_n, other=0.0)[None, :]
            # The raw rows that are here already, and a rounded 1 / norm in the slope: as exact as a rounded unit row.
            slope = ((slope_m + slope_n) * inv_n[None, :]).to(y.dtype)
            total = tl.dot(slope, y, total, input_precision="tf32x3")
    tl.store(entries + m, loss, mask=in_m)
    tl.store(sums + m, slopes, mask=in_m)
    if WRITE:
        e = tl.arange(0, BLOCK_E)
        tl.store(grad + m.to(tl.int64)[:, None] * E + e[None, :], total, mask=in_m[:, None] & (e < E)[None, :])


def sms_rows(features, diagonal, own, labels, weight, entries, sums, grad, settings, rule, captions):
    """One run. features: video, text, inverses of their norms [2, N]; diagonal: float32 [N], scratch. labels, settings, rule:
    as `pairwise.sms_panel`. weight, grad: None, or as the kernel takes them. captions: whether they are the rows that stay.
    """
    video, text, inverses = features
    table, video_index, caption_index, verb, values = labels
    N, E = video.shape
    both = [(video, inverses[0], video_index, -2), (text, inverses[1], caption_index, -1)]
    (mine, inv_mine, mine_index, down), (other, inv_other, other_index, across) = both[::-1] if captions else both
    pick = lambda x: video if x is None else x  # stands for a pointer that is not read  # noqa: E731
    plan = recompute_plan(E, generation(video.device))
    shared = (mine, other, mine.stride(0), other.stride(0), inv_mine, inv_other, diagonal)
    with on(video.device):
        recompute_diagonal_kernel[(triton.cdiv(N, plan["BLOCK_N"]),)](*shared, N, E, CAPTIONS=captions, **plan)
        sms_recompute_kernel[(triton.cdiv(N, plan["BLOCK_M"]),)](
            *shared, own, table, table.stride(down), table.stride(across), table.stride(0) if table.ndim == 3 else 0,
            pick(mine_index), pick(other_index), pick(verb), pick(values), table.shape[down], table.shape[across],
            pick(weight), entries, sums, pick(grad), N, E, *settings,
            CAPTIONS=captions, INDEXED=mine_index is not None, CODES=values is not None, RULE=RULES[rule],
            WRITE=grad is not None, WEIGHTED=weight is not None, **plan,
        )  # fmt: skip
