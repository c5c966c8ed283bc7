"""Triton's add_norm and swiglu_norm: what the kernels write is allocated here, and autograd sees each as one function."""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.kernels.norm import add, swiglu
from evaat_fast.ops._core.register import once_differentiable


def _rows(x: Any, C: int) -> Any:
    """[M, C], contiguous, of a tensor or of None."""
    if x is None:
        return None
    x = x.clone() if x._is_zerotensor() else x.resolve_neg()  # no memory of its own, or none that says what it is
    return x.reshape(-1, C).contiguous()


def _of_weights(learns: bool, count: int, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """Room for the sums of so many programs, and for the gradients of weight and bias."""
    if weight is None or not learns:
        return [None, None, None]
    sums = torch.empty((count, 2, len(weight)), dtype=torch.float32, device=weight.device)
    return [sums, torch.empty_like(weight), None if bias is None else torch.empty_like(bias)]


class AddNorm(torch.autograd.Function):
    """(normed, total) of x, residual, weight, bias, eps, dtype. Without a residual total is x, and not returned."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dtype):
        C = x.shape[-1]
        rows, added = _rows(x, C), _rows(residual, C)
        normed = torch.empty(x.shape, dtype=dtype, device=x.device)
        total = None if residual is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        statistics = torch.empty((2, len(rows)), dtype=torch.float32, device=x.device)
        weight, bias = (None if w is None else _rows(w, C)[0] for w in (weight, bias))
        add.forward(rows, added, weight, bias, normed.view(-1, C), _rows(total, C), statistics, eps)
        ctx.save_for_backward(rows if residual is None else total, weight, bias, statistics)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dY, dR):
        total, weight, bias, statistics = ctx.saved_tensors
        of_x, of_residual = ctx.dtypes
        if dY is None:  # the norm led nowhere
            dx, dr = (None if dR is None or kind is None else dR.to(kind) for kind in ctx.dtypes)
            return dx, dr, None, None, None, None
        shape, C = dY.shape, dY.shape[-1]
        make = lambda dtype: torch.empty(shape, dtype=dtype, device=dY.device)  # noqa: E731
        # One gradient in two dtypes: x's, and float32 where the stream has that, or one whose range x's may not hold.
        wide = of_residual is not None and (of_x != of_residual or of_x == torch.float32)
        dr = make(torch.float32) if wide else None
        dx = None if wide and of_x == torch.float32 else make(of_x)
        count = add.count(dY.numel() // C, C, dY.device)
        sums, dweight, dbias = _of_weights(any(ctx.needs_input_grad[2:4]), count, weight, bias)
        outs = (_rows(dx, C), _rows(dr, C), sums, dweight, dbias)
        add.backward(_rows(dY, C), _rows(dR, C), _rows(total, C), weight, statistics, *outs)
        given = None if of_residual is None else dx if dr is None else dr.to(of_residual)
        return dr if dx is None else dx, given, dweight, dbias, None, None


class SwigluNorm(torch.autograd.Function):
    """The norm of silu(gate) * value, of x, weight, bias, eps, dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        C = x.shape[-1] // 2
        rows = _rows(x, 2 * C)
        out = torch.empty((*x.shape[:-1], C), dtype=dtype, device=x.device)
        statistics = None if weight is None else torch.empty((2, len(rows)), dtype=torch.float32, device=x.device)
        weight, bias = (None if w is None else _rows(w, C)[0] for w in (weight, bias))
        swiglu.forward(rows, weight, bias, out.view(-1, C), statistics, eps)
        ctx.save_for_backward(rows, weight, bias, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        rows, weight, bias, statistics = ctx.saved_tensors
        C = dY.shape[-1]
        dx = torch.empty_like(rows)
        count = swiglu.count(len(rows), C, dY.device)
        sums, dweight, dbias = _of_weights(any(ctx.needs_input_grad[1:3]), count, weight, bias)
        swiglu.backward(_rows(dY, C), rows, weight, statistics, dx, sums, dweight, dbias)
        return dx.view(*dY.shape[:-1], 2 * C), dweight, dbias, None, None
