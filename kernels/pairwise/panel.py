"""What the kernels of the pairwise losses share: tiles of products, and what is done to rows of features before and after them.

A panel is some videos times all N captions. Raw rows are multiplied, and the products scaled to cosines where a loss needs
them: rounding unit rows to 16 bits would move the cosines themselves.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import on

GROUP = tl.constexpr(8)  # tiles of rows that share a column of tiles in L2

# Two tensors [N, E] with contiguous rows, their strides and sizes.
Features = namedtuple("Features", "video text video_n text_n N E")


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
def prepare_kernel(f, unit_video, unit_text, norms, inverses, BLOCK_E: tl.constexpr):
    """Row i of video (program i, 0) or text (i, 1): norm and 1 / max(norm, 1e-8) as float32 [2, N], and the unit row."""
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
    tl.store(target + e, tl.div_rn(x, floored).to(target.dtype.element_ty), mask=e < f.E)


@triton.jit
def _floored(norm):
    return tl.where(norm < 1e-8, 1e-8, norm)  # NaN passes


@triton.jit
def diagonal_kernel(f, inv_video, inv_text, diagonal, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [N]: each pair's own cosine, as a tile of the whole matrix gives it."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = products(f, n, n, BLOCK, PRECISION)
    i = tl.arange(0, BLOCK)
    own = tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1)
    row, column = tl.load(inv_video + n, mask=n < f.N, other=0.0), tl.load(inv_text + n, mask=n < f.N, other=0.0)
    tl.store(diagonal + n, own * row * column, mask=n < f.N)


@triton.jit
def finish_kernel(
    f, norms, row_sum, col_sum, weight, grad_video, grad_text, factor, FIRST: tl.constexpr, BLOCK_E: tl.constexpr
):
    """In place, float32: adds the diagonal's slope to the gradient of each unit row, and goes through the normalisation.
    FIRST: the first side that has one, 0 the videos, 1 the captions.
    """
    i = tl.program_id(0).to(tl.int64)
    is_text = tl.program_id(1) + FIRST
    e = tl.arange(0, BLOCK_E)
    slope = -(tl.load(row_sum + i) + tl.load(col_sum + i)).to(tl.float32)
    if weight is not None:
        slope *= tl.load(weight + i)
    norm_v, norm_t = tl.load(norms + i), tl.load(norms + f.N + i)
    v = tl.load(f.video + i * f.video_n + e, mask=e < f.E, other=0.0).to(tl.float32)
    t = tl.load(f.text + i * f.text_n + e, mask=e < f.E, other=0.0).to(tl.float32)
    v, t = tl.div_rn(v, _floored(norm_v)), tl.div_rn(t, _floored(norm_t))
    if is_text == 0:
        x, other, norm, at = v, t, norm_v, grad_video + i * f.E + e
    else:
        x, other, norm, at = t, v, norm_t, grad_text + i * f.E + e
    g = (tl.load(at, mask=e < f.E, other=0.0) + slope * other) * factor
    g = tl.div_rn(g - x * tl.sum(g * x, 0), norm)
    tl.store(at, tl.where(norm < 1e-8, 0.0, g), mask=e < f.E)


def tiles(rows, N, block):
    """(down, across): how many tiles a panel has."""
    return triton.cdiv(rows, block), triton.cdiv(N, block)


def prepare(f, units, norms, inverses):
    """Norms of the rows, their inverses (both float32 [2, N]), and two times [N, E] unit rows in the dtype of units."""
    with on(f.video.device):
        prepare_kernel[(f.N, 2)](f, *units, norms, inverses, BLOCK_E=triton.next_power_of_2(f.E))


def own_cosines(f, inverses, diagonal):
    """diagonal: float32 [N]."""
    shape = config(f.video.dtype)
    with on(f.video.device):
        diagonal_kernel[(triton.cdiv(f.N, shape["BLOCK"]),)](f, *inverses, diagonal, **shape)


def finish(f, norms, sums, weight, grads, factor):
    """sums: int32 [2, N], of the slopes. grads: float32 [N, E] of the videos and of the captions, either may be None."""
    sides = sum(x is not None for x in grads)
    first, some = int(grads[0] is None), [norms if x is None else x for x in grads]  # a pointer that is not read
    with on(f.video.device):
        finish_kernel[(f.N, sides)](f, norms, *sums, weight, *some, factor, FIRST=first, BLOCK_E=triton.next_power_of_2(f.E))
