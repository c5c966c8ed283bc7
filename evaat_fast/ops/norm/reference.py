"""The specification of add_norm and swiglu_norm: in float32 (float64 where an input is), rounded once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of x + residual in `dtype`, the sum)."""
    x = _learning(x, x_bias)
    total = x if residual is None else widened(x, residual) + widened(residual, x)
    return _norm(widened(total), weight, bias, eps).to(dtype), total


def swiglu_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm of silu(gate) * value in `dtype`, where x is gate and value side by side; no norm without a weight."""
    gate, value = widened(_learning(x, x_bias)).chunk(2, -1)
    out = F.silu(gate) * value
    return (out if weight is None else _norm(out, weight, bias, eps)).to(dtype)


def _learning(x, x_bias):
    """x, which has x_bias in it already, with the way on which that gets the column sums of x's gradient."""
    return x if x_bias is None else widened(x) + (x_bias - x_bias.detach()).to(widened(x).dtype)


def _norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def widened(x: Tensor, *others: Tensor) -> Tensor:
    """x in float32, or in float64 if it or another is."""
    return x.to(torch.float64 if torch.float64 in (x.dtype, *(y.dtype for y in others)) else torch.float32)
