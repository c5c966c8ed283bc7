"""The contrastive losses, InfoNCE and EgoNCE, in Triton: two sweeps over tiles of logits that never meet in memory.

The first sweep leaves, per tile, the log-sum-exp of its rows and of its columns, over positive pairs and over the others; the
second computes the tile again, knows the four totals of each pair, and writes the slopes
exp(s - all_row) - [positive] exp(s - positive_row) + the same of the columns
as a panel, which two plain matrix products turn into gradients: 8 N^2 E operations, the least there is without keeping N x N.
No atomics: two runs agree to the last bit.
"""

from collections import namedtuple
from functools import lru_cache

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, cdiv, generation, launch
from evaat_fast.kernels.pairwise import panel
from evaat_fast.kernels.pairwise.panel import place, products, strips, tiles

# Which pairs are positive beside each pair itself: none, those of a matrix [N, N], or those that share a verb and a noun.
OWN, DENSE, SHARED = 0, 1, 2


# inverses: of the norms, float32 [2, N], or None for products as they are; scale: float32 of one element; of the positives bool
# [N, N] and its strides, or the verb and the noun bits int32 [N, words], None where there are none.
Logits = namedtuple("Logits", "inverses scale dense row column verbs nouns")

# float32, of rows and of columns. [2, 2, N]: log-sum-exps of all pairs and of the positive ones, each as two numbers to add,
# since one float32 of 100 would round a probability by 4e-6. rest [N]: 1 - positives / all, what is left to learn. weight [N]:
# what each pair's own loss counts, or None.
Totals = namedtuple("Totals", "rows columns rest_rows rest_columns weight")

# Of videos first .. last - 1 and all captions. rows: float32 [2, 2, 4 across, last - first], log-sum-exps over each strip's
# columns of the pairs that are not positive and of those that are (but of OWN), each as two numbers to add; columns:
# [2, 2, down, N], the same over a tile's rows. own: float32 [N], each pair's own logit, for OWN.
Stats = namedtuple("Stats", "rows columns own first last")

# Of all pairs, panel after panel, float64 [2, N]. running: log-sum-exps of the columns so far; entries: what each pair costs by
# its row and by its column.
Sums = namedtuple("Sums", "running entries")

# panel [last - first, N]: slopes of the logits; scale_slope: float32 [tiles], their sum with the products.
Slopes = namedtuple("Slopes", "panel scale_slope first last")


@triton.jit
def _shares(words, m, n, N, WORDS: tl.constexpr):
    """Whether rows m and n of int32 words [N, WORDS] share a bit."""
    any_bit = (m[:, None] + n[None, :]) * 0
    for w in range(WORDS):
        a = tl.load(words + m * WORDS + w, mask=m < N, other=0)
        b = tl.load(words + n * WORDS + w, mask=n < N, other=0)
        any_bit = any_bit | (a[:, None] & b[None, :])
    return any_bit != 0


@triton.jit
def _logits(x, logits, m, n, N, VERB_WORDS: tl.constexpr, NOUN_WORDS: tl.constexpr):
    """(products or cosines, logits, whether positive) of videos m and captions n, from the raw products."""
    if logits.inverses is not None:
        row = tl.load(logits.inverses + m, mask=m < N, other=0.0)
        column = tl.load(logits.inverses + N + n, mask=n < N, other=0.0)
        x = x * row[:, None] * column[None, :]
    positive = m[:, None] == n[None, :]
    if logits.dense is not None:
        at = logits.dense + m.to(tl.int64)[:, None] * logits.row + n.to(tl.int64)[None, :] * logits.column
        positive = positive | (tl.load(at, mask=(m < N)[:, None] & (n < N)[None, :], other=0) != 0)
    if logits.verbs is not None:
        shared = _shares(logits.verbs, m, n, N, VERB_WORDS) & _shares(logits.nouns, m, n, N, NOUN_WORDS)
        positive = positive | shared
    return x, x * tl.load(logits.scale), positive


@triton.jit
def _log_sum_exp(s, keep, axis: tl.constexpr):
    """(a, b), a + b that of the kept logits along an axis: a the largest, b = -inf where there are none, NaN where one is."""
    s = tl.where(keep, s, float("-inf"))
    most = tl.max(s, axis)
    shift = tl.where(most == float("-inf"), 0.0, most)
    return shift, tl.log(tl.sum(tl.exp(s - tl.expand_dims(shift, axis)), axis))


@triton.jit
def _store_pair(target, half, pair, mask):
    tl.store(target, pair[0], mask=mask)
    tl.store(target + half, pair[1], mask=mask)


@triton.jit
def _probability(s, totals, N, i, mask, axis: tl.constexpr):
    """exp(s - total), a total being the sum of two floats; totals: [2, N]."""
    high, low = tl.load(totals + i, mask=mask, other=0.0), tl.load(totals + N + i, mask=mask, other=0.0)
    return tl.exp((s - tl.expand_dims(high, axis)) - tl.expand_dims(low, axis))


@triton.jit
def contrast_stats_kernel(
    f, logits, out, VERB_WORDS: tl.constexpr, NOUN_WORDS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    N, first, last = f.N, out.first, out.last
    tile_m, tile_n = place(tl.program_id(0), last - first, N, BLOCK)
    m = first + tile_m * BLOCK + tl.arange(0, BLOCK)
    quarters = strips(products(f, m, tile_n * BLOCK + tl.arange(0, BLOCK), BLOCK, PRECISION), BLOCK)
    height, down, across = last - first, tl.cdiv(last - first, BLOCK), tl.cdiv(N, BLOCK) * 4
    by_row, by_column = across.to(tl.int64) * height, down.to(tl.int64) * N
    for i in tl.static_range(4):
        n = tile_n * BLOCK + i * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        x, s, positive = _logits(quarters[i], logits, m, n, N, VERB_WORDS, NOUN_WORDS)
        inside = (m < last)[:, None] & (n < N)[None, :]
        others = inside & ~positive
        row = out.rows + (tile_n * 4 + i).to(tl.int64) * height + (m - first)
        column = out.columns + tile_m.to(tl.int64) * N + n
        _store_pair(row, by_row, _log_sum_exp(s, others, 1), m < last)
        _store_pair(column, by_column, _log_sum_exp(s, others, 0), n < N)
        if logits.dense is not None or logits.verbs is not None:
            _store_pair(row + 2 * by_row, by_row, _log_sum_exp(s, inside & positive, 1), m < last)
            _store_pair(column + 2 * by_column, by_column, _log_sum_exp(s, inside & positive, 0), n < N)
        elif (tile_n + 1) * BLOCK > first + tile_m * BLOCK and tile_n * BLOCK < first + (tile_m + 1) * BLOCK:
            own = tl.sum(tl.where(positive, s, 0.0), 0)
            tl.store(
                out.own + n, own, mask=(n >= first + tile_m * BLOCK) & (n < tl.minimum(last, first + (tile_m + 1) * BLOCK))
            )


@triton.jit
def _merge(parts, half, strips, size, mask):
    """float64: log-sum-exps over all strips, [size] each, of sums of two floats, `half` apart."""
    most = tl.full(mask.shape, float("-inf"), tl.float32)
    at = parts
    for _ in range(0, strips):
        most = tl.maximum(most, tl.load(at, mask=mask, other=float("-inf")))
        at += size
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros(mask.shape, tl.float64)
    at = parts
    for _ in range(0, strips):
        high, low = tl.load(at, mask=mask, other=float("-inf")), tl.load(at + half, mask=mask, other=0.0)
        total += tl.exp((high - most) + low).to(tl.float64)
        at += size
    return most.to(tl.float64) + tl.log(total)


@triton.jit
def log_add_exp(a, b):
    most = tl.maximum(a, b)
    shift = tl.where(most == float("-inf"), 0.0, most)
    return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit
def store_two_floats(target, half, x, mask):
    high = x.to(tl.float32)
    rest = tl.where(tl.abs(high) == float("inf"), 0.0, x - high.to(tl.float64))
    _store_pair(target, half, (high, rest.to(tl.float32)), mask)


@triton.jit
def contrast_totals_kernel(stats, sums, totals, halves, N, down, across, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a panel's statistics up, of its rows (programs (., 0)) and, with the panels before it, of the columns (., 1); where
    a sum is complete, makes its totals, and what it costs: log(1 + others / positives). EVERY: pairs have other positives than
    themselves. halves: the way to the second of two floats, of rows and of columns."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    side = tl.program_id(1)
    if side == 0:
        parts, half, strips, size, first = stats.rows, halves[0], across * 4, stats.last - stats.first, stats.first
        target, learned = totals.rows, totals.rest_rows
    else:
        parts, half, strips, size, first = stats.columns, halves[1], down * 1, N * 1, stats.first * 0
        target, learned = totals.columns, totals.rest_columns
    mask, at, parts = i < size, first + i, parts + i
    others = _merge(parts, half, strips, size, mask)
    if EVERY:
        positives = _merge(parts + 2 * half, half, strips, size, mask)
    else:
        positives = tl.load(stats.own + at, mask=mask, other=0.0).to(tl.float64)
    if side == 1:
        if stats.first > 0:
            others = log_add_exp(others, tl.load(sums.running + at, mask=mask, other=0.0))
            if EVERY:
                positives = log_add_exp(positives, tl.load(sums.running + N + at, mask=mask, other=0.0))
        tl.store(sums.running + at, others, mask=mask)
        if EVERY:
            tl.store(sums.running + N + at, positives, mask=mask)
    if (side == 0) | (stats.last == N):
        gap = others - positives
        odds = tl.exp(-tl.abs(gap))
        less = odds / (1.0 + odds)
        tl.store(learned + at, tl.where(gap > 0.0, 1.0 - less, less).to(tl.float32), mask=mask)
        store_two_floats(target + at, N, log_add_exp(others, positives), mask)
        store_two_floats(target + 2 * N + at, N, positives, mask)
        # log(1 + odds) without what the sum rounds off: a trained batch costs little.
        rounded = 1.0 + odds
        cost = tl.where(rounded == 1.0, odds, tl.log(rounded) * odds / (rounded - 1.0))
        tl.store(sums.entries + side * N + at, tl.where(gap > 0.0, gap + cost, cost), mask=mask)


@triton.jit
def contrast_slopes_kernel(
    f, logits, totals, out, VERB_WORDS: tl.constexpr, NOUN_WORDS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    N, first, last, row_totals, col_totals = f.N, out.first, out.last, totals.rows, totals.columns
    tile_m, tile_n = place(tl.program_id(0), last - first, N, BLOCK)
    m = first + tile_m * BLOCK + tl.arange(0, BLOCK)
    quarters = strips(products(f, m, tile_n * BLOCK + tl.arange(0, BLOCK), BLOCK, PRECISION), BLOCK)
    in_m, total = m < last, tl.zeros((BLOCK, BLOCK // 4), tl.float32)
    for i in tl.static_range(4):
        n = tile_n * BLOCK + i * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        in_n = n < N
        x, s, positive = _logits(quarters[i], logits, m, n, N, VERB_WORDS, NOUN_WORDS)
        of_row, of_col = _probability(s, row_totals, N, m, in_m, 1), _probability(s, col_totals, N, n, in_n, 0)
        # Of a positive e / all - e / positives = -e / positives * rest, of which the right side loses nothing.
        learned_row = tl.load(totals.rest_rows + m, mask=in_m, other=0.0)[:, None]
        learned_col = tl.load(totals.rest_columns + n, mask=in_n, other=0.0)[None, :]
        if logits.dense is not None or logits.verbs is not None:
            learned_row = learned_row * _probability(s, row_totals + 2 * N, N, m, in_m, 1)
            learned_col = learned_col * _probability(s, col_totals + 2 * N, N, n, in_n, 0)
        of_row, of_col = tl.where(positive, -learned_row, of_row), tl.where(positive, -learned_col, of_col)
        if totals.weight is not None:
            of_row *= tl.load(totals.weight + m, mask=in_m, other=0.0)[:, None]
            of_col *= tl.load(totals.weight + n, mask=in_n, other=0.0)[None, :]
        inside = in_m[:, None] & in_n[None, :]
        slope = of_row + of_col
        at = out.panel + (m - first).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, slope.to(out.panel.dtype.element_ty), mask=inside)
        total += tl.where(inside, slope * x, 0.0)
    tl.store(out.scale_slope + tile_m * tl.cdiv(N, BLOCK) + tile_n, tl.sum(tl.sum(total, 1), 0))


def config(dtype, kind, generation=9):
    """As `panel.config`; four totals and a mask leave registers for 64 x 64 in 4 warps, the bits of classes in 8.

    So many on Blackwell for all: of any other tiles there, Triton 3.6 cannot compile the slopes of 16-bit features.
    """
    shape = panel.config(dtype)
    if generation >= 10 or kind == SHARED:
        return shape | {"BLOCK": 64, "num_warps": 8}
    return shape if kind == OWN else shape | {"BLOCK": 64, "num_warps": 4}


def kind_of(logits):
    return DENSE if logits.dense is not None else SHARED if logits.verbs is not None else OWN


def _constants(f, logits):
    """What both kernels are compiled for."""
    kind, x = kind_of(logits), f.video
    words = (logits.verbs.shape[1], logits.nouns.shape[1]) if kind == SHARED else (1, 1)
    return _options(x.dtype, x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32, kind, *words, x.device)


@lru_cache(maxsize=64)
def _options(dtype, tf32, kind, verb_words, noun_words, device):
    """tf32: what `panel.config` asks torch, which may change its mind."""
    return {"VERB_WORDS": verb_words, "NOUN_WORDS": noun_words} | config(dtype, kind, generation(device))


def tiles_of(rows, f, logits):
    """(down, across): how many tiles a panel of `rows` videos has."""
    return tiles(rows, f.N, _constants(f, logits)["BLOCK"])


def stats(f, logits, out, sums, totals):
    """The statistics of a panel, and what they add to the totals."""
    (down, across), every, block = tiles_of(out.last - out.first, f, logits), kind_of(logits) != OWN, 64
    launch(contrast_stats_kernel, (down * across,), (f, logits, out), _constants(f, logits))
    halves = 4 * across * (out.last - out.first), down * f.N
    places = out, sums, totals, halves, f.N, down, across
    options = {"EVERY": every, "BLOCK": block, "num_warps": 2, **FUSED}
    launch(contrast_totals_kernel, (cdiv(f.N, block), 2), places, options)


def slopes(f, logits, totals, out):
    launch(contrast_slopes_kernel, (len(out.scale_slope),), (f, logits, totals, out), _constants(f, logits))
