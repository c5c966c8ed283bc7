"""add_norm and swiglu_norm: LayerNorm in one pass over memory with what stands before it in a transformer's block.

normed, stream = add_norm(branch, stream, norm.weight, norm.bias)      # stream = stream + branch; normed = LayerNorm(stream)
hidden = swiglu_norm(fc1(normed), inner.weight, inner.bias)            # LayerNorm(silu(gate) * value), EVA-02's MLP
"""

import math

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.autocast import autocast_dtype
from evaat_fast.ops._core.register import traced
from evaat_fast.ops._core.tensor import check_device, is_transformed, kind, number
from evaat_fast.ops.norm import function
from evaat_fast.ops.norm.reference import add_norm_reference, swiglu_norm_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_CHANNELS = 16384  # of a Triton program, which holds a row
# Numbers of x, of float32 and of 16 bits, from which C++ overtakes torch's operators in a call with gradients; one without is
# always its own. Of add_norm in float32 torch's two passes are as fast, and autograd calls them without Python.
OVERTAKES = {"add_norm": (math.inf, 1 << 16), "swiglu_norm": (1 << 15, 0)}


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual over the last dimension, and the sum.

    Args:
        x: [..., C] of float32, bfloat16, float16 or float64, any strides: what a branch of a block returned.
        residual: of x's shape, float32 where precision matters, or None.
        weight: [C]. bias: [C], or None. Of any floating dtype, float32 as a rule.
        eps: added to the variance.
        dtype: of the product that takes normed, where that is not x's: x may be a float32 stream, its weights bfloat16.
        x_bias: [C], the bias of the linear layer that made x, and in x already: given for its gradient alone, the column sums
            of x's, which kernels make in float32 as they make x's, where torch would pass over that once more. The layer then
            has none to learn: `F.linear(h, W, b.detach())`, and here `x_bias=b`. None without a residual.
        backend: "auto", "triton", "cpu" or "reference". Under torch.compile, and whatever else traces, "auto" is plain torch,
            which the compiler fuses with its neighbours.

    Returns:
        (normed, total): normed [..., C] in `dtype` (x's by default), under autocast in autocast's, as the product that takes it
        would cast it; total = x + residual in float32 (float64 if one of them is), x itself without a residual; statistics
        likewise. Gradients have the dtypes of what they are of; those of weight and bias have the same bits every time.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
        RuntimeError: a backend that was asked for by name cannot serve the call.

    Source: Layer Normalization (arXiv 1607.06450); pre-norm blocks as EVA-02's (arXiv 2303.11331).
    """
    _check_rows("x", x)
    if residual is not None:
        _check_rows("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected x's shape {list(x.shape)}, got {list(residual.shape)}")
        check_device("residual", residual.device, x.device, "x's")
    _check_weights(x, weight, bias, x.shape[-1], "x")
    _check_x_bias(x, x_bias)
    if x_bias is not None and residual is None:
        raise ValueError("x_bias: expected None without a residual, where the sum is x itself")
    eps, dtype = _eps(eps), _dtype(x, dtype)
    given = [y for y in (x, residual, weight, bias, x_bias) if y is not None]
    chosen = _pick("add_norm", x.shape[-1], given, dtype, backend)
    if chosen == "reference":
        return add_norm_reference(x, residual, weight, bias, x_bias, eps, dtype)
    return function.add_norm(chosen, x, residual, weight, bias, x_bias, eps, dtype)


def swiglu_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    x_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm of silu(gate) * value, where x holds the gates and then the values: the inside of EVA-02's MLP.

    Args:
        x: [..., 2 C] of float32, bfloat16, float16 or float64, any strides: the output of the first linear layer.
        weight, bias: [C] of the norm, of any floating dtype; bias may be None. weight None: no norm, and no bias.
        x_bias: [2 C], which x has in it already, for its gradient alone, as for `add_norm`.
        eps, backend: as for `add_norm`.

    Returns:
        [..., C] in x's dtype, under autocast in autocast's. The product, its statistics and the norm are float32 (float64 for
        float64), rounded once.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
        RuntimeError: a backend that was asked for by name cannot serve the call.

    Source: SwiGLU (arXiv 2002.05202) with the inner norm of EVA-02 (arXiv 2303.11331), section 2.
    """
    _check_rows("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected gates and as many values in the last dimension, got the shape {list(x.shape)}")
    if weight is not None:
        _check_weights(x, weight, bias, x.shape[-1] // 2, "half of x")
    elif bias is not None:
        raise ValueError("bias: given without weight, where there is no norm")
    _check_x_bias(x, x_bias)
    eps, dtype = _eps(eps), _dtype(x)
    given = [y for y in (x, weight, bias, x_bias) if y is not None]
    chosen = _pick("swiglu_norm", x.shape[-1] // 2, given, dtype, backend)
    if chosen == "reference":
        return swiglu_norm_reference(x, weight, bias, x_bias, eps, dtype)
    return function.swiglu_norm(chosen, x, weight, bias, x_bias, eps, dtype)


def sums_columns(op: str, x: Tensor) -> bool:
    """Whether a call of "add_norm" or "swiglu_norm" with rows of x's dtype and device makes x_bias's gradient as it passes by.
    Else a linear layer had better make it."""
    if x.is_cpu and op not in dispatch.DEFAULT:  # at a tenth of the price
        return False
    return dispatch.pick(op, x.device, x.dtype) == "triton"


def _pick(op, C, given, dtype, backend):
    """The backend of checked tensors, for a result of that dtype. Of none there is nothing to launch."""
    x = given[0]
    count, is_traced = x.numel(), traced(*map(type, given)) or is_transformed(*given)
    needs = ((dispatch.TRACED,) if is_traced else ()) + ((dispatch.WIDE_ROWS,) if C > MOST_CHANNELS else ())
    if x.is_cpu and not is_traced and (backend == "auto" or (backend is None and op not in dispatch.DEFAULT)):
        if count < OVERTAKES[op][x.itemsize == 2] and function.learns(*given):
            needs += (dispatch.TORCHS_GRADIENTS,)
    widest = torch.float64 if dtype == torch.float64 or any(y.dtype == torch.float64 for y in given) else x.dtype
    chosen = dispatch.pick(op, x.device, widest, backend, needs)
    return chosen if count else "reference"


def _check_rows(name, x):
    if isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided and not x.is_nested and x.ndim:
        return
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind(x)}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a {'nested' if x.is_nested else x.layout} one")
    raise ValueError(f"{name}: expected the shape [..., C], got []")


def _check_weights(x, weight, bias, C, of):
    _check_weight("weight", weight, x, C, of)
    if bias is not None:
        _check_weight("bias", bias, x, C, of)


def _check_x_bias(x, x_bias):
    if x_bias is not None:
        _check_weight("x_bias", x_bias, x, x.shape[-1], "x")


def _check_weight(name, w, x, C, of):
    _check_rows(name, w)
    if w.shape != (C,):
        raise ValueError(f"{name}: expected the shape [{C}], as {of} is {list(x.shape)}, got {list(w.shape)}")
    if w.device != x.device:
        check_device(name, w.device, x.device, "x's")


def _eps(eps):
    if type(eps) is float and 0 <= eps <= 1:  # what models have
        return eps
    value = number("eps", eps)
    if value < 0:
        raise ValueError(f"eps: expected a float >= 0, got {eps!r}")
    return value


def _dtype(x, asked=None):
    if asked not in (None, *DTYPES):
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {asked!r}")
    dtype = autocast_dtype(x.device.type)
    return asked or x.dtype if dtype is None or x.dtype == torch.float64 else dtype
