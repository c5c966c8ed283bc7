"""The max-margin losses in Triton: panels of similarities that are overwritten, in registers, by their integer slopes.

A panel is `rows` videos times all N captions. A program of `sms_kernel` multiplies a tile of raw features, scales it to
cosines, reads the labels, and writes the slopes g1 + g2 in {-2 .. 2}, which every dtype holds exactly; two plain matrix
products turn a panel into gradients. Raw rows are multiplied because rounding unit rows to 16 bits would move the cosines
themselves. Sums of slopes are int32 atomics, whose order does not matter; losses go to one place per tile and are added up
afterwards: two runs agree to the last bit. Products and sums of the epilogue are not fused (enable_fp_fusion=False), so that a
pair on a kink falls on the same side as in the specification.
"""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 128  # rows and columns of a tile; two programs of 8 warps share an SM, so that one multiplies while the other compares
GROUP = 8  # tiles of rows that share a column of tiles in L2
NUM_WARPS = 8
NUM_STAGES = 3
RULES = {"code": 0, "paper": 1, "charades": 2}


def block_k(dtype):
    """Features of a step of the product: 3 stages of two operands within the shared memory of an SM of an A100, halved."""
    return 32 if dtype.itemsize == 4 else 64


def precision(dtype):
    """How float32 tiles are multiplied: as torch's matmul would, or in three TF32 products that keep float32's bits."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@triton.jit
def _cosines(
    video, text, video_n, text_n, inv_video, inv_text, m, n, N, E,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N]: cosines of videos m and captions n; computed nowhere else, so that ties are exact."""
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
    row = tl.load(inv_video + m, mask=m < N, other=0.0)
    column = tl.load(inv_text + n, mask=n < N, other=0.0)
    return total * row[:, None] * column[None, :]


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
    video, text, video_n, text_n, unit_video, unit_text, norms, inverses, N, E, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Row i of video (program i, 0) or text (i, 1): norm and 1 / max(norm, 1e-8) as float32 [2, N], the unit row."""
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
    tl.store(target + e, tl.div_rn(x, floored).to(target.dtype.element_ty), mask=e < E)


@triton.jit
def diagonal_kernel(
    video, text, video_n, text_n, inv_video, inv_text, diagonal, N, E,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [N]: each pair's own cosine, as a tile of the whole matrix gives it."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = _cosines(video, text, video_n, text_n, inv_video, inv_text, n, n, N, E, BLOCK, BLOCK, BLOCK_K, PRECISION)
    i = tl.arange(0, BLOCK)
    tl.store(diagonal + n, tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1), mask=n < N)


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
def _side(self, label, own, s, margin, relaxation, eps, keep, RULE: tl.constexpr):
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
    if RULE == 2:
        keep = keep & ~(d <= -eps)
    active = keep & ~(penalty <= 0.0)  # NaN too
    slope = tl.where(tl.where(equal, near, m) < 0.0, -1.0, 1.0)
    return tl.where(active, penalty, 0.0), tl.where(active, slope, 0.0)


@triton.jit
def sms_kernel(
    video, text, video_n, text_n, inv_video, inv_text, diagonal, self_relevancy,
    table, table_row, table_col, table_half, video_index, caption_index, verb, values, V, C,
    weight, panel, row_loss, col_loss, row_sum, col_sum, first, last, N, E, margin, relaxation, eps,
    INDEXED: tl.constexpr, CODES: tl.constexpr, RULE: tl.constexpr, WRITE: tl.constexpr, EACH: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Videos first .. last - 1 and all captions.

    panel: slopes [last - first, N], if WRITE; weight: float32 [N], what each pair's own loss counts, if WEIGHTED. row_sum,
    col_sum: int32 [N], sums of the slopes of the video's and of the caption's side. row_loss: float32 [tiles]; with EACH
    [across, last - first] and col_loss [down, N], sums of the video's and of the caption's side.
    """
    tile_m, tile_n = _place(tl.program_id(0), last - first, N, BLOCK_M, BLOCK_N, GROUP)
    m = first + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    s = _cosines(video, text, video_n, text_n, inv_video, inv_text, m, n, N, E, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    label = _labels(
        table, table_row, table_col, table_half, video_index, caption_index, verb, values, m, n, N, V, C, INDEXED, CODES
    )  # fmt: skip
    in_m, in_n = m < last, n < N
    keep = in_m[:, None] & in_n[None, :] & (m[:, None] != n[None, :])
    own_m, own_n = tl.load(diagonal + m, mask=in_m, other=0.0), tl.load(diagonal + n, mask=in_n, other=0.0)
    self_m = tl.load(self_relevancy + m, mask=in_m, other=0.0)
    self_n = tl.load(self_relevancy + n, mask=in_n, other=0.0)
    loss_n, slope_n = _side(self_n[None, :], label, own_n[None, :], s, margin, relaxation, eps, keep, RULE)
    loss_m, slope_m = _side(self_m[:, None], label, own_m[:, None], s, margin, relaxation, eps, keep, RULE)
    if EACH:
        tl.store(row_loss + tile_n.to(tl.int64) * (last - first) + (m - first), tl.sum(loss_m, 1), mask=in_m)
        tl.store(col_loss + tile_m.to(tl.int64) * N + n, tl.sum(loss_n, 0), mask=in_n)
    else:
        tl.store(row_loss + tile_m * tl.cdiv(N, BLOCK_N) + tile_n, tl.sum(tl.sum(loss_n + loss_m, 1), 0))
    if WRITE:
        tl.atomic_add(row_sum + m, tl.sum(slope_m.to(tl.int32), 1), mask=in_m, sem="relaxed")
        tl.atomic_add(col_sum + n, tl.sum(slope_n.to(tl.int32), 0), mask=in_n, sem="relaxed")
        if WEIGHTED:
            slope_m *= tl.load(weight + m, mask=in_m, other=0.0)[:, None]
            slope_n *= tl.load(weight + n, mask=in_n, other=0.0)[None, :]
        at = panel + (m - first).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(at, (slope_m + slope_n).to(panel.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


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


def on(tensor):
    """The device of a launch as a context."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def prepare(video, text, unit_video, unit_text, norms, inverses):
    """Norms of the rows, their inverses (both float32 [2, N]) and unit rows in the dtype of unit_*."""
    N, E = video.shape
    with on(video):
        prepare_kernel[(N, 2)](
            video, text, video.stride(0), text.stride(0), unit_video, unit_text, norms, inverses, N, E,
            BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip


def own_cosines(video, text, inverses, diagonal):
    """diagonal: float32 [N]."""
    N, E = video.shape
    with on(video):
        diagonal_kernel[(triton.cdiv(N, BLOCK),)](
            video, text, video.stride(0), text.stride(0), inverses[0], inverses[1], diagonal, N, E,
            BLOCK=BLOCK, BLOCK_K=block_k(video.dtype), PRECISION=precision(video.dtype),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=False,
        )  # fmt: skip


def tiles(rows, N):
    """(down, across): how many tiles a panel has."""
    return triton.cdiv(rows, BLOCK), triton.cdiv(N, BLOCK)


def sms_panel(features, vectors, labels, weight, panel, losses, sums, first, last, settings, rule):
    """features: video, text, inverses [2, N]. vectors: the pairs' own cosines and relevancies, float32 [N]. labels: (table
    [V, C] or [2, V, C], video_index, caption_index, verb, values). panel: [rows, N] or None. losses: as `sms_kernel` takes
    them, the second or None. sums: int32 [2, N]. settings: margin, relaxation, eps.
    """
    video, text, inverses = features
    table, video_index, caption_index, verb, values = labels
    N, E = video.shape
    down, across = tiles(last - first, N)
    nothing = video  # stands for a pointer that is not read
    pick = lambda x: nothing if x is None else x  # noqa: E731
    with on(video):
        sms_kernel[(down * across,)](
            video, text, video.stride(0), text.stride(0), inverses[0], inverses[1], *vectors,
            table, table.stride(-2), table.stride(-1), table.stride(0) if table.ndim == 3 else 0,
            pick(video_index), pick(caption_index), pick(verb), pick(values), *table.shape[-2:],
            pick(weight), pick(panel), losses[0], pick(losses[1]), sums[0], sums[1], first, last, N, E, *settings,
            INDEXED=video_index is not None, CODES=values is not None, RULE=RULES[rule], WRITE=panel is not None,
            EACH=losses[1] is not None, WEIGHTED=weight is not None, BLOCK_M=BLOCK, BLOCK_N=BLOCK,
            BLOCK_K=block_k(video.dtype), GROUP=GROUP, PRECISION=precision(video.dtype),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=False,
        )  # fmt: skip


def finish(video, text, norms, sums, weight, grad_video, grad_text, factor):
    """grad_video, grad_text: float32 [N, E], either may be None."""
    N, E = video.shape
    needs = [x is not None for x in (grad_video, grad_text)]
    nothing = norms
    with on(video):
        finish_kernel[(N, sum(needs))](
            video, text, video.stride(0), text.stride(0), norms, sums[0], sums[1],
            nothing if weight is None else weight, grad_video if needs[0] else nothing, grad_text if needs[1] else nothing,
            factor, N, E, WEIGHTED=weight is not None, NEED_VIDEO=needs[0], NEED_TEXT=needs[1],
            BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip
