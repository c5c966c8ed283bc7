"""add_norm and swiglu_norm by kernels: what these write is allocated here, and autograd sees each as one function.

A backend's module has `add` and `swiglu`, each with forward, backward and the number of sums that backward wants room for.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core.register import once_differentiable


@functools.cache
def _kernels(backend: str) -> Any:
    return importlib.import_module(f"evaat_fast.ops.norm.{backend}")


def _memory(x: Any) -> Any:
    """x, or None, as contiguous memory that says what it is."""
    if x is None or (x.is_contiguous() and not x.is_neg() and not x._is_zerotensor()):
        return x
    return (x.clone() if x._is_zerotensor() else x.resolve_neg()).contiguous()


def learns(*given: Tensor | None) -> bool:
    """Whether a call with these has gradients."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def _of_weights(
    wanted: tuple[bool, ...], count: int, C: int, weight: Tensor | None, bias: Tensor | None, x_bias: Any
) -> list[Tensor | None]:
    """Room for so many sums of each column, and for the gradients of weight, bias and x's bias. wanted: of each of the three,
    whether its gradient is asked for; x_bias: (length, dtype, device), or None."""
    learn = weight is not None and any(wanted[:2])
    of_x = torch.empty(x_bias[0], dtype=x_bias[1], device=x_bias[2]) if wanted[2] else None
    if not learn and of_x is None:
        return [None, None, None, None]
    rows, device = 2 if of_x is None else 2 + len(of_x) // C, (of_x if weight is None else weight).device  # type: ignore[union-attr]
    sums = torch.empty((count, rows, C), dtype=torch.float32, device=device)
    return [sums, *(torch.empty_like(w) if learn and w is not None else None for w in (weight, bias)), of_x]


def _kind(x_bias):
    return None if x_bias is None else (len(x_bias), x_bias.dtype, x_bias.device)


def _statistics(x):
    return torch.empty((2, x.numel() // x.shape[-1]), dtype=torch.float32, device=x.device)


def add_norm(
    backend: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(normed, total) of a checked call."""
    kernels = _kernels(backend).add
    if learns(x, residual, weight, bias, x_bias):
        normed, total = _AddNorm.apply(kernels, x, residual, weight, bias, x_bias, eps, dtype)
    else:
        normed, total = _add_norm(kernels, x, residual, weight, bias, eps, dtype)[:2]
    return normed, x if residual is None else total


def _add_norm(kernels, x, residual, weight, bias, eps, dtype):
    """(normed, total, what the backward pass reads). Without a residual total is x, and not returned."""
    x, residual, weight, bias = _memory(x), _memory(residual), _memory(weight), _memory(bias)
    normed = torch.empty_like(x, dtype=dtype)  # half the price of torch.empty, given contiguous x
    total = None if residual is None else torch.empty_like(x, dtype=torch.float32)
    statistics = _statistics(x)
    kernels.forward(x, residual, weight, bias, normed, total, statistics, eps)
    return normed, total, (x if residual is None else total, weight, bias, statistics)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, residual, weight, bias, x_bias, eps, dtype):
        normed, total, saved = _add_norm(kernels, x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(*saved)
        ctx.kernels, ctx.dtypes, ctx.x_bias = kernels, (x.dtype, None if residual is None else residual.dtype), _kind(x_bias)
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dY, dR):
        total, weight, bias, statistics = ctx.saved_tensors
        of_x, of_residual = ctx.dtypes
        C, wanted = total.shape[-1], ctx.needs_input_grad[3:6]
        if dY is None:  # the norm led nowhere
            dx, dr = (None if dR is None or kind is None else dR.to(kind) for kind in ctx.dtypes)
            dx_bias = dR.reshape(-1, C).sum(0, dtype=torch.float32).to(ctx.x_bias[1]) if wanted[2] and dR is not None else None
            return None, dx, dr, None, None, dx_bias, None, None
        # One gradient in two dtypes: x's, and float32 where the stream has that, or one whose range x's may not hold.
        wide = of_residual is not None and (of_x != of_residual or of_x == torch.float32)
        dr = torch.empty_like(total, dtype=torch.float32) if wide else None
        dx = None if wide and of_x == torch.float32 else torch.empty_like(total, dtype=of_x)
        count = ctx.kernels.count(dY.numel() // C, C, dY.device, wanted[2])
        of_weights = _of_weights(wanted, count, C, weight, bias, ctx.x_bias)
        ctx.kernels.backward(_memory(dY), _memory(dR), total, weight, statistics, dx, dr, *of_weights)
        given = None if of_residual is None else dx if dr is None else dr.to(of_residual)
        return None, dr if dx is None else dx, given, *of_weights[1:], None, None


def swiglu_norm(
    backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The norm of silu(gate) * value, of a checked call."""
    kernels = _kernels(backend).swiglu
    if learns(x, weight, bias, x_bias):
        return _SwigluNorm.apply(kernels, x, weight, bias, x_bias, eps, dtype)
    return _swiglu_norm(kernels, x, weight, bias, eps, dtype)[0]


def _swiglu_norm(kernels, x, weight, bias, eps, dtype):
    """(out, what the backward pass reads)."""
    x, weight, bias = _memory(x), _memory(weight), _memory(bias)
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=dtype, device=x.device)
    statistics = None if weight is None else _statistics(x)
    kernels.forward(x, weight, bias, out, statistics, eps)
    return out, (x, weight, bias, statistics)


class _SwigluNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, weight, bias, x_bias, eps, dtype):
        out, saved = _swiglu_norm(kernels, x, weight, bias, eps, dtype)
        ctx.save_for_backward(*saved)
        ctx.kernels, ctx.x_bias = kernels, _kind(x_bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        x, weight, bias, statistics = ctx.saved_tensors
        C, dx, wanted = dY.shape[-1], torch.empty_like(x), ctx.needs_input_grad[2:5]
        count = ctx.kernels.count(dY.numel() // C, C, dY.device, wanted[2])
        of_weights = _of_weights(wanted, count, C, weight, bias, ctx.x_bias)
        ctx.kernels.backward(_memory(dY), x, weight, statistics, dx, *of_weights)
        return None, dx, *of_weights[1:], None, None
