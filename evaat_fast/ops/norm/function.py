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


def _learns(*given: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def _of_weights(learns: bool, count: int, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """Room for so many sums, and for the gradients of weight and bias."""
    if weight is None or not learns:
        return [None, None, None]
    sums = torch.empty((count, 2, len(weight)), dtype=torch.float32, device=weight.device)
    return [sums, torch.empty_like(weight), None if bias is None else torch.empty_like(bias)]


def _statistics(x):
    return torch.empty((2, x.numel() // x.shape[-1]), dtype=torch.float32, device=x.device)


def add_norm(
    backend: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(normed, total) of a checked call."""
    given = _kernels(backend).add, x, residual, weight, bias, eps, dtype
    normed, total = _AddNorm.apply(*given) if _learns(x, residual, weight, bias) else _add_norm(*given)[:2]
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
    def forward(ctx, kernels, x, residual, weight, bias, eps, dtype):
        normed, total, saved = _add_norm(kernels, x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(*saved)
        ctx.kernels, ctx.dtypes = kernels, (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dY, dR):
        total, weight, bias, statistics = ctx.saved_tensors
        of_x, of_residual = ctx.dtypes
        if dY is None:  # the norm led nowhere
            dx, dr = (None if dR is None or kind is None else dR.to(kind) for kind in ctx.dtypes)
            return None, dx, dr, None, None, None, None
        # One gradient in two dtypes: x's, and float32 where the stream has that, or one whose range x's may not hold.
        wide = of_residual is not None and (of_x != of_residual or of_x == torch.float32)
        dr = torch.empty_like(total, dtype=torch.float32) if wide else None
        dx = None if wide and of_x == torch.float32 else torch.empty_like(total, dtype=of_x)
        count = ctx.kernels.count(dY.numel() // dY.shape[-1], dY.shape[-1], dY.device)
        of_weights = _of_weights(any(ctx.needs_input_grad[3:5]), count, weight, bias)
        ctx.kernels.backward(_memory(dY), _memory(dR), total, weight, statistics, dx, dr, *of_weights)
        given = None if of_residual is None else dx if dr is None else dr.to(of_residual)
        return None, dr if dx is None else dx, given, *of_weights[1:], None, None


def swiglu_norm(backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm of silu(gate) * value, of a checked call."""
    given = _kernels(backend).swiglu, x, weight, bias, eps, dtype
    return _SwigluNorm.apply(*given) if _learns(x, weight, bias) else _swiglu_norm(*given)[0]


def _swiglu_norm(kernels, x, weight, bias, eps, dtype):
    """(out, what the backward pass reads)."""
    x, weight, bias = _memory(x), _memory(weight), _memory(bias)
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=dtype, device=x.device)
    statistics = None if weight is None else _statistics(x)
    kernels.forward(x, weight, bias, out, statistics, eps)
    return out, (x, weight, bias, statistics)


class _SwigluNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, x, weight, bias, eps, dtype):
        out, saved = _swiglu_norm(kernels, x, weight, bias, eps, dtype)
        ctx.save_for_backward(*saved)
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dY):
        x, weight, bias, statistics = ctx.saved_tensors
        dx = torch.empty_like(x)
        count = ctx.kernels.count(dY.numel() // dY.shape[-1], dY.shape[-1], dY.device)
        of_weights = _of_weights(any(ctx.needs_input_grad[2:4]), count, weight, bias)
        ctx.kernels.backward(_memory(dY), x, weight, statistics, dx, *of_weights)
        return None, dx, *of_weights[1:], None, None
