"""What the kernels of the pairwise losses share: tiles of products, and what is done to rows of features before and after them.

A panel is some videos times all N captions. Raw rows are multiplied, and the products scaled to cosines where a loss needs
them: rounding unit rows to 16 bits would move the cosines themselves.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, cdiv, launch, next_power_of_2

GROUP = tl.constexpr(8)  # tiles of rows that share a column of tiles in L2

# Two tensors [N, E] with contiguous rows, their strides and sizes.
Features = namedtuple("Features", "video text video_n text_n N E")

# float32 [] or None: the loss, the sum of parts [count] divided by the integer `over`, and the gradient of the scale, that of
# slopes [tiles].
Ends = namedtuple("Ends", "loss parts count of_scale slopes tiles over")


def features(video, text):
    return Features(video, text, video.stride(0), text.stride(0), *video.shape)


def config(dtype):
    """Tiles and launch of the kernels that multiply features of `dtype`.

    16 bits: 128 x 128 in 8 warps, about 230 registers, none spilled. float32 is multiplied in three TF32 products, which keep
    its bits (in one where torch's own matmul may); their operands leave registers for 64 x 64 in 4 warps.
    """
    wide = dtype == torch.float32
    return {
        "BLOCK": 64 if wide else 128,
        "PRECISION": "tf32" if wide and torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
        "num_warps": 4 if wide else 8,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }


@triton.jit
def products(f, m, n, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [BLOCK, BLOCK]: raw videos m times captions n; computed nowhere else, so that ties are exact."""
    BLOCK_K: tl.constexpr = 32 if f.video.dtype.element_ty == tl.float32 else 64
    k = tl.arange(0, BLOCK_K)
    a = f.video + m.to(tl.int64)[:, None] * f.video_n + k[None, :]
    b = f.text + n.to(tl.int64)[None, :] * f.text_n + k[:, None]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, f.E, BLOCK_K):
        x = tl.load(a, mask=(m < f.N)[:, None] & (begin + k < f.E)[None, :], other=0.0)
        y = tl.load(b, mask=(n < f.N)[None, :] & (begin + k < f.E)[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a += BLOCK_K
        b += BLOCK_K
    return total


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def strips(x, BLOCK: tl.constexpr):
    """Four quarters of the columns of a tile, whose labels, losses and slopes all at once would not fit into registers."""
    left, right = _halves(x, BLOCK, BLOCK)
    return _halves(left, BLOCK, BLOCK // 2) + _halves(right, BLOCK, BLOCK // 2)


@triton.jit
def place(pid, rows, N, BLOCK: tl.constexpr):
    """(row, column) of a tile: GROUP rows at a time, so that the operands of programs that run together stay in L2."""
    down, across = tl.cdiv(rows, BLOCK), tl.cdiv(N, BLOCK)
    first = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = pid % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def prepare_kernel(f, unit_video, unit_text, norms, inverses, sums, BLOCK_E: tl.constexpr):
    """Row i of video (program i, 0) or text (i, 1): norm and 1 / max(norm, 1e-8) as float32 [2, N], the unit row, and where
    there are sums, int32 [2, N], a zero."""
    i = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        source, target = f.video + i * f.video_n, unit_video + i * f.E
    else:
        source, target = f.text + i * f.text_n, unit_text + i * f.E
    place = tl.program_id(1) * f.N + i
    e = tl.arange(0, BLOCK_E)
    x = tl.load(source + e, mask=e < f.E, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x, 0))
    floored = _floored(norm)
    tl.store(norms + place, norm)
    tl.store(inverses + place, tl.div_rn(1.0, floored))
    if sums is not None:
        tl.store(sums + place, 0)
    tl.store(target + e, tl.div_rn(x, floored).to(target.dtype.element_ty), mask=e < f.E)


@triton.jit
def _floored(norm):
    return tl.where(norm < 1e-8, 1e-8, norm)  # NaN passes


@triton.jit
def _total(parts, count):
    """The sum of a vector, in float64 and in one order."""
    total = tl.zeros((1024,), tl.float64)
    for begin in range(0, count, 1024):
        at = begin + tl.arange(0, 1024)
        total += tl.load(parts + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def finish_kernel(f, norms, sums, weight, grads, scale, ends, factor, rows, FIRST: tl.constexpr, BLOCK_E: tl.constexpr):
    """In place, float32: adds the diagonal's slope to the gradient of each unit row, where there are sums, times the factors;
    then goes through the normalisation, where there are norms. FIRST: the first side that has a gradient, 0 the videos, 1 the
    captions. The program beyond the rows adds up the loss, and the gradient of the scale."""
    i = tl.program_id(0).to(tl.int64)
    is_text = tl.program_id(1) + FIRST
    e = tl.arange(0, BLOCK_E)
    if scale is not None:
        factor *= tl.load(scale)
    if i < rows:
        if is_text == 0:
            at = grads[0] + i * f.E + e
        else:
            at = grads[1] + i * f.E + e
        g = tl.load(at, mask=e < f.E, other=0.0)
        if norms is None:
            tl.store(at, g * factor, mask=e < f.E)
        else:
            norm_v, norm_t = tl.load(norms + i), tl.load(norms + f.N + i)
            v = tl.load(f.video + i * f.video_n + e, mask=e < f.E, other=0.0).to(tl.float32)
            t = tl.load(f.text + i * f.text_n + e, mask=e < f.E, other=0.0).to(tl.float32)
            v, t = tl.div_rn(v, _floored(norm_v)), tl.div_rn(t, _floored(norm_t))
            if is_text == 0:
                x, other, norm = v, t, norm_v
            else:
                x, other, norm = t, v, norm_t
            if sums is not None:
                slope = -(tl.load(sums + i) + tl.load(sums + f.N + i)).to(tl.float32)
                if weight is not None:
                    slope *= tl.load(weight + i)
                g += slope * other
            g *= factor
            g = tl.div_rn(g - x * tl.sum(g * x, 0), norm)
            tl.store(at, tl.where(norm < 1e-8, 0.0, g), mask=e < f.E)
    elif is_text == FIRST:
        if ends.loss is not None:
            tl.store(ends.loss, (_total(ends.parts, ends.count) / ends.over).to(tl.float32))
        if ends.of_scale is not None:
            tl.store(ends.of_scale, (_total(ends.slopes, ends.tiles) / ends.over).to(tl.float32))


@triton.jit
def scale_kernel(factor, xs, outs, of_scale, to_scale, count, BLOCK: tl.constexpr):
    """outs = factor * xs, of [count] each, one pair a row of programs; and of one number."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(factor)
    for i in tl.static_range(len(xs)):
        if tl.program_id(1) == i:
            x = tl.load(xs[i] + at, mask=at < count, other=0.0) * by
            tl.store(outs[i] + at, x.to(outs[i].dtype.element_ty), mask=at < count)
    if of_scale is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(to_scale, (tl.load(of_scale) * by).to(to_scale.dtype.element_ty))


def tiles(rows, N, block):
    """(down, across): how many tiles a panel has."""
    return cdiv(rows, block), cdiv(N, block)


def prepare(f, units, norms, inverses, sums=None):
    """Norms of the rows, their inverses (both float32 [2, N]), and two times [N, E] unit rows in the dtype of units; zeros."""
    options = {"BLOCK_E": next_power_of_2(f.E), **FUSED}
    launch(prepare_kernel, (f.N, 2), (f, *units, norms, inverses, sums), options)


def finish(f, norms, sums, weight, grads, scale, ends, factor):
    """norms: float32 [2, N] or None; sums: int32 [2, N] of the slopes or None. grads: float32 [N, E] of the videos and of the
    captions, either may be None. scale: float32 of one element or None."""
    sides = sum(x is not None for x in grads)
    first = int(sides and grads[0] is None)
    some = [x for x in (*grads, f.video) if x is not None]  # for one that is None another's pointer, of its type, is not read
    some = [some[0] if x is None else x for x in grads]
    rows = f.N if sides else 0
    places = f, norms, sums, weight, tuple(some), scale, ends, factor, rows
    options = {"FIRST": first, "BLOCK_E": next_power_of_2(f.E), **FUSED}
    launch(finish_kernel, (rows + 1, max(sides, 1)), places, options)


def scale(factor, gradients, outs):
    """outs [i] = factor * gradients[i], in their dtypes: of features, and last, a number's, if there is one."""
    number = (gradients[-1], outs[-1]) if gradients[-1].ndim == 0 else (None, None)
    rows = [pair for pair in zip(gradients, outs, strict=True) if pair[0].ndim]
    count, block = (rows[0][0].numel() if rows else 0), 4096
    xs, ys = zip(*rows, strict=True) if rows else ((), ())
    grid, options = (max(cdiv(count, block), 1), max(len(rows), 1)), {"BLOCK": block, "num_warps": 8, **FUSED}
    launch(scale_kernel, grid, (factor, xs, ys, *number, count), options)
