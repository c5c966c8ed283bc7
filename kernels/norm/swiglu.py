"""silu(gate) * value and its LayerNorm, and their gradients. The product is made again in the backward pass: it costs an
exponential, and to keep it would cost a pass over memory."""

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, launch
from evaat_fast.kernels.norm.rows import add_up, block, normalised, programs, row_gradient, size, stages, store_sums

CHANNELS = 512  # of a warp of the backward pass


@triton.jit
def over_sigmoid(x, y, EXACT: tl.constexpr):
    """y / (1 + exp(-x)). EXACT: to float32's last bits, which the exponent loses where x is large, and a quick division."""
    y = tl.where(x > -104.0, y, 0.0)  # where float32's exponential is infinite
    x = tl.minimum(tl.maximum(x, -87.0), 87.0)
    t = x * -1.4426950408889634
    e = tl.exp2(t)
    if EXACT:
        rest = tl.fma(x, -1.4426950408889634, -t) - x * 1.925963033500011e-8  # of the product, of its constant
        return tl.div_rn(y, 1.0 + e * (1.0 + rest * 0.6931471805599453))
    return y / (1.0 + e)


@triton.jit
def swiglu_norm_kernel(x, weight, bias, out, statistics, M, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr):
    """A row. Without a weight there is no norm."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    has, at = c < C, row * 2 * C + c
    gate = tl.load(x + at, mask=has, other=0.0).to(tl.float32)
    value = tl.load(x + at + C, mask=has, other=0.0).to(tl.float32)
    y = over_sigmoid(gate, gate, EXACT) * value
    if weight is not None:
        y = normalised(y, weight, bias, statistics, M, row, c, has, C, eps)
    tl.store(out + row * C + c, y, mask=has)


@triton.jit
def swiglu_norm_backward_kernel(
    dY, x, weight, statistics, dx, sums, M, C: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr, KINDS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many rows. weight and statistics: None without a norm. KINDS of sums of a column: 2, of weight and bias, or 4,
    of gates and values too; sums: None if nobody wants them. STAGES - 1 rows are on their way from memory while one is
    worked on."""
    c = tl.arange(0, BLOCK_C)
    has = c < C
    if weight is not None:
        w = tl.load(weight + c, mask=has, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    of_gate, of_value = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    first, step = tl.program_id(0).to(tl.int64) * C, tl.num_programs(0).to(tl.int64) * C
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        at = 2 * first + c
        d = tl.load(dY + first + c, mask=has, other=0.0).to(tl.float32)
        gate = tl.load(x + at, mask=has, other=0.0).to(tl.float32)
        value = tl.load(x + at + C, mask=has, other=0.0).to(tl.float32)
        s, silu = over_sigmoid(gate, 1.0, EXACT), over_sigmoid(gate, gate, EXACT)
        if weight is not None:
            mean, rstd = tl.load(statistics + row), tl.load(statistics + M + row)
            unit = (silu * value - mean) * rstd
            dweight += d * unit
            dbias += d
            d = row_gradient(d, unit, w, rstd, C)
        dgate, dvalue = d * value * s * (1.0 + gate * (1.0 - s)), d * silu
        tl.store(dx + at, dgate, mask=has)
        tl.store(dx + at + C, dvalue, mask=has)
        if KINDS == 4:
            of_gate += dgate
            of_value += dvalue
        first += step
    if sums is not None:
        to = store_sums(sums, dweight, dbias, c, has, C, KINDS)
        if KINDS == 4:
            tl.store(to, of_gate, mask=has)
            tl.store(to + C, of_value, mask=has)


def forward_config(C):
    """An H200 takes 0.144 ms with 512 channels a warp and 0.156 with 1,024 at C = 2,048, but 0.265 and 0.232 at 2,730."""
    return block(C, 512 if C <= 2048 else 1024)


@cache
def _forward_options(C, exact):
    return forward_config(C) | FUSED | {"EXACT": exact}


def forward(x, weight, bias, out, statistics, eps):
    """x: [..., 2 C], contiguous, the gates first; out: [..., C]; statistics: float32 [2, M], None as weight and bias are."""
    M, C = size(out)
    places = x, weight, bias, out, statistics, M, eps
    launch(swiglu_norm_kernel, (M,), places, _forward_options(C, x.dtype == torch.float32))


def backward_config(C, *itemsizes, of_x=False):
    """itemsizes: of dY, gates and values; of_x: whether columns of gates and values are summed up. An H200 takes 0.269 ms
    at C = 2,048 without, where a copy takes 0.248; with 256 a warp 0.276, and with no row ahead 0.381 and 0.368."""
    return block(C, CHANNELS, KINDS=4 if of_x else 2, STAGES=stages(C, itemsizes))


@cache
def _backward_options(C, exact, *itemsizes, of_x):
    return backward_config(C, *itemsizes, of_x=of_x) | FUSED | {"EXACT": exact}


@lru_cache(maxsize=256)
def count(M, C, device, of_x):
    """Programs of the backward pass: 8 warps of a multiprocessor are what 204 registers leave room for, or 246."""
    return programs(M, device, 8, block(C, CHANNELS)["num_warps"])


def backward(dY, x, weight, statistics, dx, sums, dweight, dbias, dx_bias):
    """As `forward`. sums: float32 [count(...), 2, C], with dx_bias [2 C] 4 for 2, or None if none of what they add up to is
    wanted."""
    (M, C), of_x = size(dY), dx_bias is not None
    places = dY, x, weight, statistics, dx, sums, M
    options = _backward_options(C, x.dtype == torch.float32, dY.itemsize, x.itemsize, x.itemsize, of_x=of_x)
    launch(swiglu_norm_backward_kernel, (count(M, C, x.device, of_x),), places, options)
    if sums is not None:
        add_up(sums, dweight, dbias, dx_bias)
