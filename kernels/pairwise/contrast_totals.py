"""What the sweeps of `contrast_sm90.py` leave to be added up, and the sums where float32 cannot hold what they add."""

from collections import namedtuple

import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, cdiv, launch
from evaat_fast.kernels.pairwise.contrast import log_add_exp, store_two_floats

# float32. rows [blocks of 128 captions, last - first] and columns [4 ranges, N]: what exponentials of others add up to; own
# [N]: each pair's own product. again: int32 [1], whether the sums are of no use.
Sums = namedtuple("Sums", "rows columns own again")
# Of videos and of captions. float32: logs [2, 2, N], of the sums of all exponentials of a row to the base of 2, as two numbers
# to add; inverse [2, N], 1 / such a sum in units of `_shift`; rest [2, N], what is left to learn; weight [N], what a pair's own
# loss counts, or None.
Totals = namedtuple("Totals", "logs inverse rest weight")
# float64: running [N], columns' sums so far; entries [2, N], what each pair costs by its row and by its column.
Costs = namedtuple("Costs", "running entries")

LN2 = tl.constexpr(0.6931471805599453)
# Between what bounds, in units of `_shift`, the logs of sums to the base of 2 are exact: exponentials below 2 ** -126 are lost.
LEAST, MOST = tl.constexpr(-80.0), tl.constexpr(120.0)


@triton.jit
def _finish(others, own, i, mask, side, N, totals, costs):
    """From the logs, float64, of others' exponentials and of each pair's own: what the second sweep and the loss need."""
    gap = others - own
    odds = tl.exp(-tl.abs(gap))
    less = odds / (1.0 + odds)
    tl.store(totals.rest + side * N + i, tl.where(gap > 0.0, 1.0 - less, less).to(tl.float32), mask=mask)
    rounded = 1.0 + odds  # log(1 + odds) without what the sum rounds off: a trained batch costs little
    cost = tl.where(rounded == 1.0, odds, tl.log(rounded) * odds / (rounded - 1.0))
    tl.store(costs.entries + side * N + i, tl.where(gap > 0.0, gap + cost, cost), mask=mask)
    total = log_add_exp(others, own)
    store_two_floats(totals.logs + side * 2 * N + i, N, total * (1 / LN2), mask)
    return total


@triton.jit
def _units(scale):
    """(what logits in units of ln 2 are products times, `_shift`), as the sweeps have them."""
    scale2 = tl.load(scale) * 1.4426950408889634
    scale2 = tl.where((scale2 < 1e-30) & (scale2 > -1e-30), 1e-30, scale2)
    return scale2, tl.maximum(tl.abs(scale2) - 110.0, 0.0)


@triton.jit
def contrast_totals_sm90_kernel(sums, totals, costs, scale, N, first, last, strips, parts, BLOCK: tl.constexpr):
    """Adds sums up, of the rows first .. last - 1 (programs (., 0)), which are whole, and of the columns (., 1), with those
    before; where they are whole, makes totals and costs, and says whether float32 has held them."""
    MANY: tl.constexpr = 16
    i, side = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    if side == 0:
        at, count, size, begin = sums.rows, strips * 1, last - first, first * 1
    else:
        at, count, size, begin = sums.columns, parts * 1, N * 1, first * 0
    mask, total = i < size, tl.zeros((BLOCK,), tl.float64)
    for j in range(0, count, MANY):
        strip = j + tl.arange(0, MANY)
        x = tl.load(
            at + strip.to(tl.int64)[:, None] * size + i[None, :], mask=(strip < count)[:, None] & mask[None, :], other=0.0
        )
        total += tl.sum(x.to(tl.float64), 0)
    i += begin
    if side == 1:
        if first > 0:
            total += tl.load(costs.running + i, mask=mask, other=0.0)
        tl.store(costs.running + i, total, mask=mask)
    if (side == 0) | (last == N):
        scale2, shift = _units(scale)
        others = tl.log(total) + shift.to(tl.float64) * LN2
        own = tl.load(sums.own + i, mask=mask, other=0.0).to(tl.float64) * scale2.to(tl.float64) * LN2
        all_of_it = _finish(others, own, i, mask, side, N, totals, costs)
        above = shift.to(tl.float64) * LN2
        tl.store(totals.inverse + side * N + i, tl.exp(above - all_of_it).to(tl.float32), mask=mask)
        held = (others - above >= LEAST * LN2) & (others - above <= MOST * LN2) & (own - above <= MOST * LN2)
        tl.store(sums.again + i * 0, 1, mask=mask & ~held)


@triton.jit
def contrast_again_kernel(f, sums, totals, costs, scale, rows, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where float32 has not held the sums: makes totals and costs of `rows` videos (programs (., 0)) and of the N captions
    (., 1), each about its own largest logit."""
    if tl.load(sums.again) == 0:
        return
    side, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if side == 0:
        mine, mine_n, others, others_n, size, across = f.video, f.video_n * 1, f.text, f.text_n * 1, rows * 1, f.N * 1
    else:
        mine, mine_n, others, others_n, size, across = f.text, f.text_n * 1, f.video, f.video_n * 1, f.N * 1, rows * 1
    scale2, _ = _units(scale)
    most, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float64)
    own = tl.zeros((BLOCK,), tl.float32)
    k = tl.arange(0, BLOCK_K)
    for begin in range(0, across, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        s = tl.zeros((BLOCK, BLOCK), tl.float32)
        for e in range(0, f.E, BLOCK_K):
            inside = (e + k < f.E)[None, :]
            x = tl.load(mine + i.to(tl.int64)[:, None] * mine_n + e + k[None, :], mask=(i < size)[:, None] & inside, other=0.0)
            y = tl.load(
                others + n.to(tl.int64)[:, None] * others_n + e + k[None, :], mask=(n < across)[:, None] & inside, other=0.0
            )
            s = tl.dot(x, tl.trans(y), s)
        s *= scale2
        own += tl.sum(tl.where(i[:, None] == n[None, :], s, 0.0), 1)
        s = tl.where((n < across)[None, :] & (i[:, None] != n[None, :]), s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(most - shift).to(tl.float64) + tl.sum(tl.exp2(s - shift[:, None]), 1).to(tl.float64)
        most = new
    others_all = tl.log(total) + tl.where(most == float("-inf"), 0.0, most).to(tl.float64) * LN2
    _finish(others_all, own.to(tl.float64) * LN2, i, i < size, side, f.N, totals, costs)


def add(sums, totals, costs, scale, N, first, last, strips, parts):
    """What rows first .. last - 1 add to the totals: strips sums of each row, and parts of each column."""
    places = sums, totals, costs, scale, N, first, last, strips, parts
    launch(contrast_totals_sm90_kernel, (cdiv(N, 64), 2), places, {"BLOCK": 64, "num_warps": 2, **FUSED})


def again(f, sums, totals, costs, scale, rows):
    """The totals where float32 has not held the sums, of so many videos and all captions; f: `panel.Features`."""
    options = {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2, **FUSED}
    launch(contrast_again_kernel, (cdiv(f.N, 64), 2), (f, sums, totals, costs, scale, rows), options)
