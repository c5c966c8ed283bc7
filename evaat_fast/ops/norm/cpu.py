"""The norms in C++, called as Triton's launchers are (kernels/norm): what stands between them and pointers."""

import torch

from evaat_fast import _cpu
from evaat_fast.ops._core.native import dtype_codes, pointer, run

_CODES = dtype_codes(_cpu)


def _count(M, C, device, of_x):
    """Sums of so many rows each, whatever the number of threads."""
    return _cpu.norm_chunks(M)


def _rows(x):
    """Where rows lie, and their dtype's code."""
    return (0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype])


def _wide(x):
    """In float32, which the kernels take weights in."""
    return None if x is None else x.float()


def _forward(function, x, residual, weight, bias, out, total, statistics, eps):
    C = out.shape[-1]
    weight, bias = _wide(weight), _wide(bias)
    residual = residual if residual is None or residual.dtype in _CODES else residual.float()
    rows = *_rows(x), *_rows(residual), *_rows(out)
    places = pointer(weight), pointer(bias), pointer(total), pointer(statistics)
    run(function, x.shape, x.device, out.numel() // C, C, *rows, *places, eps)


def _backward(function, dY, dR, x, weight, statistics, dx, dr, sums, dweight, dbias, dx_bias):
    C, sums = dY.shape[-1], None if dweight is None else sums
    weight, wide = _wide(weight), [y if y is None or y.dtype == torch.float32 else y.float() for y in (dweight, dbias)]
    rows = *_rows(dY), *_rows(dR), *_rows(x), *_rows(dx)
    places = pointer(weight), pointer(statistics), pointer(dr), pointer(sums), *map(pointer, wide)
    run(function, x.shape, x.device, dY.numel() // C, C, *rows, *places)
    for y, sum_ in zip((dweight, dbias), wide, strict=True):
        if y is not sum_:
            y.copy_(sum_)
    if dx_bias is not None:
        dx_bias.copy_((dx if dr is None else dr).view(-1, len(dx_bias)).sum(0, dtype=torch.float32))


class add:
    count = staticmethod(_count)

    @staticmethod
    def forward(x, residual, weight, bias, normed, total, statistics, eps):
        _forward(_cpu.add_norm, x, residual, weight, bias, normed, total, statistics, eps)

    @staticmethod
    def backward(dY, dR, total, weight, statistics, dx, dr, *of_weights):
        _backward(_cpu.add_norm_backward, dY, dR, total, weight, statistics, dx, dr, *of_weights)


class swiglu:
    count = staticmethod(_count)

    @staticmethod
    def forward(x, weight, bias, out, statistics, eps):
        _forward(_cpu.swiglu_norm, x, None, weight, bias, out, None, statistics, eps)

    @staticmethod
    def backward(dY, x, weight, statistics, dx, *of_weights):
        _backward(_cpu.swiglu_norm_backward, dY, None, x, weight, statistics, dx, None, *of_weights)
