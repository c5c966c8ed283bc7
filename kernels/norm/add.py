"""LayerNorm of a sum, and its gradients: x and residual are read once, their sum and its norm written once."""

from functools import cache, lru_cache

import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, launch, next_power_of_2
from evaat_fast.kernels.norm.rows import add_up, block, normalised, programs, row_gradient, size, stages, store_sums

# Neighbouring channels of a thread: 16 bytes of float32, 8 of 16 bits. With 8 a thread what is stored in float32 passes through
# shared memory first: on an H200, at 768 channels, the backward pass of a bfloat16 branch takes 0.232 ms instead of 0.163.
VECTOR = tl.constexpr(4)


@triton.jit
def add_norm_kernel(x, residual, weight, bias, normed, total, statistics, M, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A row. Without a residual there is no total to write."""
    row, c = tl.program_id(0).to(tl.int64), tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR)
    has, at = c < C, row * C + c
    t = tl.load(x + at, mask=has, other=0.0).to(tl.float32)
    if residual is not None:
        t += tl.load(residual + at, mask=has, other=0.0).to(tl.float32)
        tl.store(total + at, t, mask=has)
    out = normalised(t, weight, bias, statistics, M, row, c, has, C, eps)
    tl.store(normed + at, out, mask=has)


@triton.jit
def add_norm_backward_kernel(
    dY, dR, total, weight, statistics, dx, dr, sums, M, C: tl.constexpr, BLOCK_C: tl.constexpr, KINDS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many rows. dR: the gradient of total from elsewhere, or None. dx, dr: the same numbers in two dtypes, either may
    be None. KINDS of sums of a column: 2, of weight and bias, or 3, of dx too; sums: None if nobody wants them. STAGES: as in
    swiglu_norm_backward_kernel."""
    c = tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR)
    has = c < C
    w = tl.load(weight + c, mask=has, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    columns = tl.zeros((BLOCK_C,), tl.float32)
    at, step = tl.program_id(0).to(tl.int64) * C + c, tl.num_programs(0).to(tl.int64) * C
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        dy = tl.load(dY + at, mask=has, other=0.0).to(tl.float32)
        t = tl.load(total + at, mask=has, other=0.0).to(tl.float32)
        mean, rstd = tl.load(statistics + row), tl.load(statistics + M + row)
        unit = (t - mean) * rstd
        d = row_gradient(dy, unit, w, rstd, C)
        if dR is not None:
            d += tl.load(dR + at, mask=has, other=0.0).to(tl.float32)
        if dr is not None:
            tl.store(dr + at, d, mask=has)
        if dx is not None:
            tl.store(dx + at, d, mask=has)
        dweight += dy * unit
        dbias += dy
        if KINDS == 3:
            columns += d
        at += step
    if sums is not None:
        to = store_sums(sums, dweight, dbias, c, has, C, KINDS)
        if KINDS == 3:
            tl.store(to, columns, mask=has)


def forward_config(C):
    """Widths of a warp from 256 to 1,024 were as fast, but without a residual, where fewer took 13 and 35 % longer."""
    return block(C, 1024)


@cache
def _forward_options(C):
    return forward_config(C) | FUSED


def forward(x, residual, weight, bias, normed, total, statistics, eps):
    """[..., C], contiguous, and total and statistics [2, M] float32. residual and total, and bias, may be None."""
    M, C = size(x)
    places = x, residual, weight, bias, normed, total, statistics, M, eps
    launch(add_norm_kernel, (M,), places, _forward_options(C))


def channels(C, of_x):
    """Of a warp of the backward pass. of_x: it sums up x's columns, too. Rows of 512 and 1,024 would then take 154 and 143
    registers, where 16 warps a multiprocessor have 128; they take 91 and 80."""
    return 256 if of_x and next_power_of_2(C) == C else 512


def backward_config(C, *itemsizes, of_x=False):
    """itemsizes: of dY, total and dR; of_x: as `channels` has it. With 1,024 channels a warp the backward pass takes over 200
    registers; 8 or 32 warps a multiprocessor were slower. With dR a third row ahead takes 147 registers, and 16 warps have
    128. Rows of 1,024 are not fetched ahead: on an H200 that took add_norm's backward from 0.145 to 0.157 ms, layer_norm's from
    0.065 to 0.076."""
    ahead = 0 if C == 1024 else 3 if len(itemsizes) == 2 else 2
    return block(C, channels(C, of_x), KINDS=3 if of_x else 2, STAGES=stages(C, itemsizes, ahead))


@cache
def _backward_options(C, *itemsizes, of_x):
    return backward_config(C, *itemsizes, of_x=of_x) | FUSED


@lru_cache(maxsize=256)
def count(M, C, device, of_x):
    """Programs of the backward pass."""
    return programs(M, device, 16, block(C, channels(C, of_x))["num_warps"])


def backward(dY, dR, total, weight, statistics, dx, dr, sums, dweight, dbias, dx_bias):
    """As `forward`. dR: [..., C] of any dtype, or None; dx, of x, and dr, float32: either may be None; sums: float32
    [count(...), 2, C], with dx_bias 3 for 2, or None if none of what they add up to is wanted."""
    (M, C), of_x = size(total), dx_bias is not None
    places = dY, dR, total, weight, statistics, dx, dr, sums, M
    sizes = (dY.itemsize, total.itemsize) if dR is None else (dY.itemsize, total.itemsize, dR.itemsize)
    launch(add_norm_backward_kernel, (count(M, C, dY.device, of_x),), places, _backward_options(C, *sizes, of_x=of_x))
    if sums is not None:
        add_up(sums, dweight, dbias, dx_bias)
