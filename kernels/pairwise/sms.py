"""The max-margin losses in Triton: panels of similarities that are overwritten, in registers, by their integer slopes.

A program of `sms_kernel` multiplies a tile of raw features, scales it to cosines, reads the labels, and writes the slopes
g1 + g2 in {-2 .. 2}, which every dtype holds exactly; two plain matrix products turn a panel into gradients. Sums of slopes are
int32 atomics, whose order does not matter; losses go to one place per tile and are added up afterwards: two runs agree to the
last bit. Products and sums of the epilogue are not fused (enable_fp_fusion=False), so that a pair on a kink falls on the same
side as in the specification.
"""

from collections import namedtuple

import triton
import triton.language as tl
from evaat_fast.kernels.launch import cdiv, launch
from evaat_fast.kernels.pairwise.panel import config, place, products, strips, tiles

RULES = {"code": 0, "paper": 1, "charades": 2}


# table [V, C], or [2, V, C] for pairs of another verb and of the same; its strides and sizes; the tensors that choose in it, or
# None.
Labels = namedtuple("Labels", "table row column half V C video_index caption_index verb code_values")

# float32 [N]: of each pair the inverses of its norms, its own cosine, its own relevancy, and what its own loss counts, or None.
Pairs = namedtuple("Pairs", "inv_video inv_text cosine own weight")

# The numbers of a penalty, those of evaat_fast.ops.pairwise.reference.Penalty by name.
Penalty = namedtuple("Penalty", "margin relaxation eps")

# Of videos first .. last - 1 and all captions. panel: slopes [last - first, N], or None. row_sum, col_sum: int32 [N], sums of
# the slopes of the video's and of the caption's side. row_loss: float32 [tiles], and col_loss None; or of each pair: row_loss
# [across, last - first] and col_loss [down, N], sums of the video's and of the caption's side.
Out = namedtuple("Out", "panel row_sum col_sum row_loss col_loss first last")


def numbers(penalty):
    return Penalty(*(getattr(penalty, name) for name in Penalty._fields))


@triton.jit
def _place(index, i, N, size):
    """Rows or columns i of the table as int64, and whether they lie in it."""
    at, known = i.to(tl.int64), i < N
    if index is not None:
        at = tl.load(index + i, mask=known, other=0).to(tl.int64)
        known = known & (at >= 0) & (at < size)
    return at, known


@triton.jit
def _label(labels, at, known):
    """float32: relevancy at places of the table; NaN where they are not known."""
    at = labels.table + at
    if labels.code_values is not None:
        label = tl.load(labels.code_values + tl.load(at, mask=known, other=0).to(tl.int32))
    else:
        label = tl.load(at, mask=known, other=0.0).to(tl.float32)
    return tl.where(known, label, float("nan"))


@triton.jit
def labels_of(labels, m, n, N):
    """float32 [BLOCK_M, BLOCK_N]: relevancy of videos m and captions n; NaN where an index lies outside of the table."""
    row, in_rows = _place(labels.video_index, m, N, labels.V)
    column, in_columns = _place(labels.caption_index, n, N, labels.C)
    at = row[:, None] * labels.row + column[None, :] * labels.column
    if labels.verb is not None:
        if labels.half != 0:  # always; the branch keeps Triton 3.6 from holding verbs in registers, of which 22 would spill
            verb = labels.verb
            same = tl.load(verb + m, mask=m < N, other=0)[:, None] == tl.load(verb + n, mask=n < N, other=0)[None, :]
            at += same.to(tl.int64) * labels.half
    return _label(labels, at, in_rows[:, None] & in_columns[None, :])


@triton.jit
def own_labels(labels, n, N):
    """float32: relevancy of each pair itself."""
    row, in_rows = _place(labels.video_index, n, N, labels.V)
    column, in_columns = _place(labels.caption_index, n, N, labels.C)
    at = row * labels.row + column * labels.column
    if labels.verb is not None:
        at += labels.half
    return _label(labels, at, in_rows & in_columns)


@triton.jit
def diagonal_kernel(f, pairs, labels, LABELLED: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Each pair's own cosine, as a tile of the whole matrix gives it, and where there are labels its own relevancy. LABELLED:
    whether there are; Triton 3.6 compares no tuple that holds a None with None."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, BLOCK)
    own, inside = i[:, None] == i[None, :], n < f.N
    s = tl.sum(tl.where(own, products(f, n, n, BLOCK, PRECISION), 0.0), 1)
    row, column = tl.load(pairs.inv_video + n, mask=inside, other=0.0), tl.load(pairs.inv_text + n, mask=inside, other=0.0)
    tl.store(pairs.cosine + n, s * row * column, mask=inside)
    if LABELLED:
        tl.store(pairs.own + n, own_labels(labels, n, f.N), mask=inside)


@triton.jit
def side(own, label, cosine, s, penalty, keep, RULE: tl.constexpr, MASKED: tl.constexpr):
    """(penalty, slope) of pairs from one side; own, cosine: the anchor's relevancy and cosine. RULE: see RULES."""
    d = own - label
    gap = cosine - s
    m = penalty.margin * d - gap
    equal = tl.abs(d) < penalty.eps
    if RULE == 0:
        more, near = d > penalty.eps, m
    else:
        more, near = d >= penalty.eps, -gap
    cost = tl.where(equal, tl.abs(near) - penalty.relaxation, tl.where(more, m, -m))
    idle = cost <= 0.0  # not NaN
    if RULE == 2:
        idle = idle | (d <= -penalty.eps)
    if MASKED:
        idle = idle | ~keep
    source = tl.where(equal, near, m) if RULE != 0 else m
    sign = source.to(tl.int32, bitcast=True) & -2147483648 | 0x3F800000  # of 1.0
    return tl.where(idle, 0.0, cost), tl.where(idle, 0.0, sign.to(tl.float32, bitcast=True))


@triton.jit
def _strip(s, m, n, rows, pairs, labels, penalty, out, col_loss, N, RULE: tl.constexpr, MASKED: tl.constexpr):
    """Everything after the product, for the columns n of a tile; returns losses and slopes that count for the rows.

    rows: what the rows' pairs have, as `pairs`, loaded. col_loss: the tile's row of it.
    """
    inv_m, cosine_m, own_m, weight_m = rows
    in_m, in_n = m < out.last, n < N
    cosine_n, own_n = tl.load(pairs.cosine + n, mask=in_n, other=0.0), tl.load(pairs.own + n, mask=in_n, other=0.0)
    s = s * inv_m[:, None] * tl.load(pairs.inv_text + n, mask=in_n, other=0.0)[None, :]
    label = labels_of(labels, m, n, N)
    keep = in_m[:, None] & in_n[None, :] & (m[:, None] != n[None, :])
    loss_n, slope_n = side(own_n[None, :], label, cosine_n[None, :], s, penalty, keep, RULE, MASKED)
    loss_m, slope_m = side(own_m[:, None], label, cosine_m[:, None], s, penalty, keep, RULE, MASKED)
    if out.col_loss is not None:
        tl.store(col_loss + n, tl.sum(loss_n, 0), mask=in_n)
    else:
        loss_m += loss_n
    row_slope = slope_m
    if out.panel is not None:
        tl.atomic_add(out.col_sum + n, tl.sum(slope_n, 0).to(tl.int32), mask=in_n, sem="relaxed")
        if pairs.weight is not None:
            slope_m *= weight_m[:, None]
            slope_n *= tl.load(pairs.weight + n, mask=in_n, other=0.0)[None, :]
        at = out.panel + (m - out.first).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, (slope_m + slope_n).to(out.panel.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
    return loss_m, row_slope


@triton.jit
def sms_kernel(f, pairs, labels, penalty, out, RULE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    N, first, last = f.N, out.first, out.last
    tile_m, tile_n = place(tl.program_id(0), last - first, N, BLOCK)
    m = first + tile_m * BLOCK + tl.arange(0, BLOCK)
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    s = products(f, m, n, BLOCK, PRECISION)
    in_m = m < last
    inv_m, cosine_m = tl.load(pairs.inv_video + m, mask=in_m, other=0.0), tl.load(pairs.cosine + m, mask=in_m, other=0.0)
    own_m, weight_m = tl.load(pairs.own + m, mask=in_m, other=0.0), inv_m
    if pairs.weight is not None:
        weight_m = tl.load(pairs.weight + m, mask=in_m, other=0.0)
    rows, col_loss = (inv_m, cosine_m, own_m, weight_m), out.col_loss
    if col_loss is not None:
        col_loss += tile_m.to(tl.int64) * N
    quarters = strips(s, BLOCK)
    losses, slopes = tl.zeros((BLOCK, BLOCK // 4), tl.float32), tl.zeros((BLOCK, BLOCK // 4), tl.float32)
    # Within a row every kept pair but the own one counts, and few tiles have a row or a column beyond the end.
    masked = (tile_n * BLOCK + BLOCK > N) | (first + tile_m * BLOCK + BLOCK > last)
    masked = masked | (first + tile_m * BLOCK < tile_n * BLOCK + BLOCK) & (tile_n * BLOCK < first + tile_m * BLOCK + BLOCK)
    for i in tl.static_range(4):
        n = tile_n * BLOCK + i * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        if masked:
            loss, slope = _strip(quarters[i], m, n, rows, pairs, labels, penalty, out, col_loss, N, RULE, True)
        else:
            loss, slope = _strip(quarters[i], m, n, rows, pairs, labels, penalty, out, col_loss, N, RULE, False)
        losses += loss
        slopes += slope
    if out.panel is not None:
        tl.atomic_add(out.row_sum + m, tl.sum(slopes, 1).to(tl.int32), mask=in_m, sem="relaxed")
    if out.col_loss is not None:
        tl.store(out.row_loss + tile_n.to(tl.int64) * (last - first) + (m - first), tl.sum(losses, 1), mask=in_m)
    else:
        tl.store(out.row_loss + tile_m * tl.cdiv(N, BLOCK) + tile_n, tl.sum(tl.sum(losses, 1), 0))


def own_pairs(f, pairs, labels):
    """Fills the cosines of pairs, and where there are labels their own relevancies."""
    shape = config(f.video.dtype)
    grid, options = (cdiv(f.N, shape["BLOCK"]),), {"LABELLED": labels is not None, **shape}
    launch(diagonal_kernel, grid, (f, pairs, labels), options)


def sms_panel(f, pairs, labels, penalty, out):
    """penalty: has the fields of `Penalty` and a rule of RULES."""
    shape = config(f.video.dtype)
    down, across = tiles(out.last - out.first, f.N, shape["BLOCK"])
    places, options = (f, pairs, labels, numbers(penalty), out), {"RULE": RULES[penalty.rule], **shape}
    launch(sms_kernel, (down * across,), places, options)
