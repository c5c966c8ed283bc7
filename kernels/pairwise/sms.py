"""The max-margin losses in Triton: panels of similarities that are overwritten, in registers, by their integer slopes.

A panel is `rows` videos times all N captions. A program of `sms_kernel` multiplies a tile of raw features, scales it to
cosines, reads the labels, and writes the slopes g1 + g2 in {-2 .. 2}, which every dtype holds exactly; two plain matrix
products turn a panel into gradients. Raw rows are multiplied because rounding unit rows to 16 bits would move the cosines
themselves. Sums of slopes are int32 atomics, whose order does not matter; losses go to one place per tile and are added up
afterwards: two runs agree to the last bit. Products and sums of the epilogue are not fused (enable_fp_fusion=False), so that a
pair on a kink falls on the same side as in the specification.
"""

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import on

GROUP = 8  # tiles of rows that share a column of tiles in L2
RULES = {"code": 0, "paper": 1, "charades": 2}


def plan(dtype):
    """Tiles and launch of the kernels that multiply features of `dtype`.

    16 bits: 128 x 128 in 8 warps, about 230 registers, none spilled. float32 is multiplied in three TF32 products, which keep
    its bits (in one where torch's own matmul may); their operands leave registers for 64 x 64 in 4 warps.
    """
    wide = dtype == torch.float32
    return {
        "BLOCK": 64 if wide else 128,
        "BLOCK_K": 32 if wide else 64,
        "PRECISION": "tf32" if wide and torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
        "num_warps": 4 if wide else 8,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }


def tiles(rows, N, dtype):
    """(down, across): how many tiles a panel has."""
    block = plan(dtype)["BLOCK"]
    return triton.cdiv(rows, block), triton.cdiv(N, block)


@triton.jit
def _products(
    video, text, video_n, text_n, m, n, N, E,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N]: raw videos m times captions n; computed nowhere else, so that ties are exact."""
    k = tl.arange(0, BLOCK_K)
    a = video + m.to(tl.int64)[:, None] * video_n + k[None, :]
    b = text + n.to(tl.int64)[None, :] * text_n + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, E, BLOCK_K):
        x = tl.load(a, mask=(m < N)[:, None] & (begin + k < E)[None, :], other=0.0)
        y = tl.load(b, mask=(n < N)[None, :] & (begin + k < E)[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a += BLOCK_K
        b += BLOCK_K
    return total


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _place(pid, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile: GROUP rows at a time, so that the operands of programs that run together stay in L2."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = pid % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def prepare_kernel(
    video, text, video_n, text_n, unit_video, unit_text, norms, inverses, N, E, UNITS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Row i of video (program i, 0) or text (i, 1): norm and 1 / max(norm, 1e-8) as float32 [2, N], if UNITS the unit row."""
    i = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        source, target = video + i * video_n, unit_video + i * E
    else:
        source, target = text + i * text_n, unit_text + i * E
    place = tl.program_id(1) * N + i
    e = tl.arange(0, BLOCK_E)
    x = tl.load(source + e, mask=e < E, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 0))
    floored = tl.where(norm < 1e-8, 1e-8, norm)  # NaN passes
    tl.store(norms + place, norm)
    tl.store(inverses + place, tl.div_rn(1.0, floored))
    if UNITS:
        tl.store(target + e, tl.div_rn(x, floored).to(target.dtype.element_ty), mask=e < E)


@triton.jit
def diagonal_kernel(
    video, text, video_n, text_n, inv_video, inv_text, diagonal, N, E,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [N]: each pair's own cosine, as a tile of the whole matrix gives it."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = _products(video, text, video_n, text_n, n, n, N, E, BLOCK, BLOCK, BLOCK_K, PRECISION)
    i = tl.arange(0, BLOCK)
    own = tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1)
    row, column = tl.load(inv_video + n, mask=n < N, other=0.0), tl.load(inv_text + n, mask=n < N, other=0.0)
    tl.store(diagonal + n, own * row * column, mask=n < N)


@triton.jit
def _labels(
    table, table_row, table_col, table_half, video_index, caption_index, verb, values, m, n, N, V, C,
    INDEXED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N]: relevancy of videos m and captions n; NaN where an index lies outside of the table."""
    row, column, inside = m.to(tl.int64), n.to(tl.int64), (m < N)[:, None] & (n < N)[None, :]
    known = inside
    if INDEXED:
        row = tl.load(video_index + m, mask=m < N, other=0).to(tl.int64)
        column = tl.load(caption_index + n, mask=n < N, other=0).to(tl.int64)
        known = inside & ((row >= 0) & (row < V))[:, None] & ((column >= 0) & (column < C))[None, :]
    at = table + row[:, None] * table_row + column[None, :] * table_col
    if table_half != 0:  # two tables: pairs of another verb, pairs of the same
        same = tl.load(verb + m, mask=m < N, other=0)[:, None] == tl.load(verb + n, mask=n < N, other=0)[None, :]
        at += same.to(tl.int64) * table_half
    if CODES:
        label = tl.load(values + tl.load(at, mask=known, other=0).to(tl.int32))
    else:
        label = tl.load(at, mask=known, other=0.0).to(tl.float32)
    return tl.where(known, label, float("nan"))


@triton.jit
def _side(self, label, own, s, margin, relaxation, eps, keep, RULE: tl.constexpr, MASKED: tl.constexpr):
    """(penalty, slope) of pairs from one side; self, own: the anchor's relevancy and cosine. RULE: see RULES."""
    d = self - label
    gap = own - s
    m = margin * d - gap
    equal = tl.abs(d) < eps
    if RULE == 0:
        more, near = d > eps, m
    else:
        more, near = d >= eps, -gap
    penalty = tl.where(equal, tl.abs(near) - relaxation, tl.where(more, m, -m))
    idle = penalty <= 0.0  # not NaN
    if RULE == 2:
        idle = idle | (d <= -eps)
    if MASKED:
        idle = idle | ~keep
    source = tl.where(equal, near, m) if RULE != 0 else m
    sign = source.to(tl.int32, bitcast=True) & -2147483648 | 0x3F800000  # of 1.0
    return tl.where(idle, 0.0, penalty), tl.where(idle, 0.0, sign.to(tl.float32, bitcast=True))


@triton.jit
def _strip(
    s, m, n, inv_m, own_m, self_m, weight_m, inv_text, diagonal, self_relevancy, weight,
    table, table_row, table_col, table_half, video_index, caption_index, verb, values, V, C,
    panel, col_loss, col_sum, first, last, N, margin, relaxation, eps,
    INDEXED: tl.constexpr, CODES: tl.constexpr, RULE: tl.constexpr, WRITE: tl.constexpr, EACH: tl.constexpr,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Everything after the product, for the columns n of a tile; returns losses and slopes that count for the rows."""
    in_m, in_n = m < last, n < N
    own_n, self_n = tl.load(diagonal + n, mask=in_n, other=0.0), tl.load(self_relevancy + n, mask=in_n, other=0.0)
    s = s * inv_m[:, None] * tl.load(inv_text + n, mask=in_n, other=0.0)[None, :]
    label = _labels(
        table, table_row, table_col, table_half, video_index, caption_index, verb, values, m, n, N, V, C, INDEXED, CODES
    )  # fmt: skip
    keep = in_m[:, None] & in_n[None, :] & (m[:, None] != n[None, :])
    loss_n, slope_n = _side(self_n[None, :], label, own_n[None, :], s, margin, relaxation, eps, keep, RULE, MASKED)
    loss_m, slope_m = _side(self_m[:, None], label, own_m[:, None], s, margin, relaxation, eps, keep, RULE, MASKED)
    if EACH:
        tl.store(col_loss + n, tl.sum(loss_n, 0), mask=in_n)
    else:
        loss_m += loss_n
    row_slope = slope_m
    if WRITE:
        tl.atomic_add(col_sum + n, tl.sum(slope_n, 0).to(tl.int32), mask=in_n, sem="relaxed")
        if WEIGHTED:
            slope_m *= weight_m[:, None]
            slope_n *= tl.load(weight + n, mask=in_n, other=0.0)[None, :]
        at = panel + (m - first).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, (slope_m + slope_n).to(panel.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
    return loss_m, row_slope


@triton.jit
def sms_kernel(
    video, text, video_n, text_n, inv_video, inv_text, diagonal, self_relevancy,
    table, table_row, table_col, table_half, video_index, caption_index, verb, values, V, C,
    weight, panel, row_loss, col_loss, row_sum, col_sum, first, last, N, E, margin, relaxation, eps,
    INDEXED: tl.constexpr, CODES: tl.constexpr, RULE: tl.constexpr, WRITE: tl.constexpr, EACH: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Videos first .. last - 1 and all captions.

    panel: slopes [last - first, N], if WRITE; weight: float32 [N], what each pair's own loss counts, if WEIGHTED. row_sum,
    col_sum: int32 [N], sums of the slopes of the video's and of the caption's side. row_loss: float32 [tiles]; with EACH
    [across, last - first] and col_loss [down, N], sums of the video's and of the caption's side.
    """
    tile_m, tile_n = _place(tl.program_id(0), last - first, N, BLOCK, BLOCK, GROUP)
    m = first + tile_m * BLOCK + tl.arange(0, BLOCK)
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    s = _products(video, text, video_n, text_n, m, n, N, E, BLOCK, BLOCK, BLOCK_K, PRECISION)
    in_m = m < last
    inv_m, own_m = tl.load(inv_video + m, mask=in_m, other=0.0), tl.load(diagonal + m, mask=in_m, other=0.0)
    self_m, weight_m = tl.load(self_relevancy + m, mask=in_m, other=0.0), inv_m
    if WEIGHTED:
        weight_m = tl.load(weight + m, mask=in_m, other=0.0)
    if EACH:
        col_loss += tile_m.to(tl.int64) * N
    # A strip of a quarter of the columns at a time: the whole tile's labels, losses and slopes would not fit into registers.
    left, right = _halves(s, BLOCK, BLOCK)
    strips = _halves(left, BLOCK, BLOCK // 2) + _halves(right, BLOCK, BLOCK // 2)
    losses, slopes = tl.zeros((BLOCK, BLOCK // 4), tl.float32), tl.zeros((BLOCK, BLOCK // 4), tl.float32)
    # Within a row every kept pair but the own one counts, and few tiles have a row or a column beyond the end.
    masked = (tile_n * BLOCK + BLOCK > N) | (first + tile_m * BLOCK + BLOCK > last)
    masked = masked | (first + tile_m * BLOCK < tile_n * BLOCK + BLOCK) & (tile_n * BLOCK < first + tile_m * BLOCK + BLOCK)
    for i in tl.static_range(4):
        n = tile_n * BLOCK + i * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        if masked:
            loss, slope = _strip(
                strips[i], m, n, inv_m, own_m, self_m, weight_m, inv_text, diagonal, self_relevancy, weight,
                table, table_row, table_col, table_half, video_index, caption_index, verb, values, V, C,
                panel, col_loss, col_sum, first, last, N, margin, relaxation, eps,
                INDEXED, CODES, RULE, WRITE, EACH, WEIGHTED, True,
            )  # fmt: skip
        else:
            loss, slope = _strip(
                strips[i], m, n, inv_m, own_m, self_m, weight_m, inv_text, diagonal, self_relevancy, weight,
                table, table_row, table_col, table_half, video_index, caption_index, verb, values, V, C,
                panel, col_loss, col_sum, first, last, N, margin, relaxation, eps,
                INDEXED, CODES, RULE, WRITE, EACH, WEIGHTED, False,
            )  # fmt: skip
        losses += loss
        slopes += slope
    if WRITE:
        tl.atomic_add(row_sum + m, tl.sum(slopes, 1).to(tl.int32), mask=in_m, sem="relaxed")
    if EACH:
        tl.store(row_loss + tile_n.to(tl.int64) * (last - first) + (m - first), tl.sum(losses, 1), mask=in_m)
    else:
        tl.store(row_loss + tile_m * tl.cdiv(N, BLOCK) + tile_n, tl.sum(tl.sum(losses, 1), 0))


@triton.jit
def finish_kernel(
    video, text, video_n, text_n, norms, row_sum, col_sum, weight, grad_video, grad_text, factor, N, E,
    WEIGHTED: tl.constexpr, NEED_VIDEO: tl.constexpr, NEED_TEXT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """In place, float32: adds the diagonal's slope to the gradient of each unit row, and goes through the normalisation."""
    i = tl.program_id(0).to(tl.int64)
    is_text = tl.program_id(1) + (0 if NEED_VIDEO else 1)
    e = tl.arange(0, BLOCK_E)
    slope = -(tl.load(row_sum + i) + tl.load(col_sum + i)).to(tl.float32)
    if WEIGHTED:
        slope *= tl.load(weight + i)
    norm_v, norm_t = tl.load(norms + i), tl.load(norms + N + i)
    v = tl.load(video + i * video_n + e, mask=e < E, other=0.0).to(tl.float32)
    t = tl.load(text + i * text_n + e, mask=e < E, other=0.0).to(tl.float32)
    v, t = tl.div_rn(v, tl.where(norm_v < 1e-8, 1e-8, norm_v)), tl.div_rn(t, tl.where(norm_t < 1e-8, 1e-8, norm_t))
    if is_text == 0:
        x, other, norm, at = v, t, norm_v, grad_video + i * E + e
    else:
        x, other, norm, at = t, v, norm_t, grad_text + i * E + e
    g = (tl.load(at, mask=e < E, other=0.0) + slope * other) * factor
    g = tl.div_rn(g - x * tl.sum(g * x, 0), norm)
    tl.store(at, tl.where(norm < 1e-8, 0.0, g), mask=e < E)


def prepare(video, text, units, norms, inverses):
    """Norms of the rows, their inverses (both float32 [2, N]), and unit rows in the dtype of units [2, N, E], or None."""
    N, E = video.shape
    targets = (video, text) if units is None else units
    with on(video.device):
        prepare_kernel[(N, 2)](
            video, text, video.stride(0), text.stride(0), *targets, norms, inverses, N, E,
            UNITS=units is not None, BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip


def own_cosines(video, text, inverses, diagonal):
    """diagonal: float32 [N]."""
    N, E = video.shape
    with on(video.device):
        diagonal_kernel[(tiles(N, N, video.dtype)[0],)](
            video, text, video.stride(0), text.stride(0), inverses[0], inverses[1], diagonal, N, E, **plan(video.dtype)
        )


def sms_panel(features, vectors, labels, weight, panel, losses, sums, first, last, settings, rule):
    """features: video, text, inverses [2, N]. vectors: the pairs' own cosines and relevancies, float32 [N]. labels: (table
    [V, C] or [2, V, C], video_index, caption_index, verb, values). panel: [rows, N] or None. losses: as `sms_kernel` takes
    them, the second or None. sums: int32 [2, N]. settings: margin, relaxation, eps.
    """
    video, text, inverses = features
    table, video_index, caption_index, verb, values = labels
    N, E = video.shape
    down, across = tiles(last - first, N, video.dtype)
    nothing = video  # stands for a pointer that is not read
    pick = lambda x: nothing if x is None else x  # noqa: E731
    with on(video.device):
        sms_kernel[(down * across,)](
            video, text, video.stride(0), text.stride(0), inverses[0], inverses[1], *vectors,
            table, table.stride(-2), table.stride(-1), table.stride(0) if table.ndim == 3 else 0,
            pick(video_index), pick(caption_index), pick(verb), pick(values), *table.shape[-2:],
            pick(weight), pick(panel), losses[0], pick(losses[1]), sums[0], sums[1], first, last, N, E, *settings,
            INDEXED=video_index is not None, CODES=values is not None, RULE=RULES[rule], WRITE=panel is not None,
            EACH=losses[1] is not None, WEIGHTED=weight is not None, GROUP=GROUP, **plan(video.dtype),
        )  # fmt: skip


def finish(video, text, norms, sums, weight, grad_video, grad_text, factor):
    """grad_video, grad_text: float32 [N, E], either may be None."""
    N, E = video.shape
    needs = [x is not None for x in (grad_video, grad_text)]
    nothing = norms
    with on(video.device):
        finish_kernel[(N, sum(needs))](
            video, text, video.stride(0), text.stride(0), norms, sums[0], sums[1],
            nothing if weight is None else weight, grad_video if needs[0] else nothing, grad_text if needs[1] else nothing,
            factor, N, E, WEIGHTED=weight is not None, NEED_VIDEO=needs[0], NEED_TEXT=needs[1],
            BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip
