"""What the norms share: a row of C numbers is one program's, all of it in registers."""

import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, launch, multiprocessors, next_power_of_2


def block(C, channels, **constants):
    """The block that covers a row, its warps of so many channels, and other constants of a kernel."""
    BLOCK_C = next_power_of_2(C)
    return {"C": C, "BLOCK_C": BLOCK_C, "num_warps": max(1, BLOCK_C // channels), **constants}


def stages(C, itemsizes, most=3):
    """Of a loop over rows of C numbers of each of these sizes: up to so many rows are on their way in shared memory, 48 KB of a
    program, while one is worked on. Less than two are none, as one alone is waited for: on an H200 layer_norm at 768 channels
    took 0.083 ms without, 0.119 with one and 0.066 with three, where a copy takes 0.057."""
    ahead = min(most, 49152 // (next_power_of_2(C) * sum(itemsizes)))
    return 1 + ahead if ahead > 1 else 1


def size(x):
    """(rows, channels) of x [..., C]."""
    return x.numel() // x.shape[-1], x.shape[-1]


def programs(M, device, warps, num_warps):
    """Programs of a backward pass, each of which adds up the gradients of weight and bias over its rows before memory does: as
    many as a GPU runs at a time, `warps` a multiprocessor. More would wait for the others, and then run alone."""
    return min(M, multiprocessors(device) * max(1, warps // num_warps))


@triton.jit
def moments(x, has, C: tl.constexpr, eps):
    """Mean and 1 / standard deviation of a row, the second from its deviations, as squares of large numbers cancel. Divisions
    are rounded right: one that is quick is off by two bits for the whole row."""
    width = tl.full((), C, tl.float32)
    mean = tl.div_rn(tl.sum(x, 0), width)
    deviation = tl.where(has, x - mean, 0.0)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(deviation * deviation, 0), width) + eps))


@triton.jit
def normalised(x, weight, bias, statistics, M, row, c, has, C: tl.constexpr, eps):
    """A row x after its norm, whose statistics it stores. bias may be None."""
    mean, rstd = moments(x, has, C, eps)
    tl.store(statistics + row, mean)
    tl.store(statistics + M + row, rstd)
    out = (x - mean) * rstd * tl.load(weight + c, mask=has, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + c, mask=has, other=0.0).to(tl.float32)
    return out


@triton.jit
def row_gradient(dY, unit, weight, rstd, C: tl.constexpr):
    """The gradient of a row before its norm. unit: after it, before weight and bias. dY is 0 beyond the row."""
    d, width = dY * weight, tl.full((), C, tl.float32)
    return (d - tl.div_rn(tl.sum(d, 0), width) - unit * tl.div_rn(tl.sum(d * unit, 0), width)) * rstd


@triton.jit
def store_sums(sums, dweight, dbias, c, has, C: tl.constexpr, KINDS: tl.constexpr):
    """A program's first two of KINDS rows of C; returns where its third begins."""
    at = sums + tl.program_id(0).to(tl.int64) * KINDS * C + c
    tl.store(at, dweight, mask=has)
    tl.store(at + C, dbias, mask=has)
    return at + 2 * C


@triton.jit
def sums_kernel(
    sums, dweight, dbias, dx_bias, P, C: tl.constexpr, KINDS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Adds up float32 [P, KINDS, C], the shares of P programs, always in one order: (i, 0) makes dweight, (i, 1) dbias, the
    others dx_bias, of C numbers or 2 C. Each may be None."""
    p, c = tl.arange(0, BLOCK_P), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which, has = tl.program_id(1), c < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        at = ((first + p) * KINDS + which).to(tl.int64)[:, None] * C + c[None, :]
        total += tl.load(sums + at, mask=(first + p < P)[:, None] & has[None, :], other=0.0)
    column = tl.sum(total, 0)
    if which == 0:
        if dweight is not None:
            tl.store(dweight + c, column, mask=has)
    elif which == 1:
        if dbias is not None:
            tl.store(dbias + c, column, mask=has)
    elif dx_bias is not None:
        tl.store(dx_bias + (which - 2) * C + c, column, mask=has)


SUMS = {"BLOCK_P": 128, "BLOCK_C": 32, "num_warps": 8}


def add_up(sums, dweight, dbias, dx_bias):
    """sums: float32 [P, 2 or more, C]. The others may be None."""
    P, count, C = sums.shape
    grid, options = (-(-C // SUMS["BLOCK_C"]), count), {"C": C, "KINDS": count, **SUMS, **FUSED}
    launch(sums_kernel, grid, (sums, dweight, dbias, dx_bias, P), options)
