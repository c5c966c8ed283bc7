"""What every op asks of a tensor before it reads its memory."""

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# A private name, hence the getattr: without it such a tensor fails further down, with a less clear error.
_is_transformed = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda x: False)


def memory_of(op, name, x):
    """x, or the same numbers in memory that can be read as its strides say.

    Raises:
        TypeError: a sparse, nested or other tensor without strides. NotImplementedError: a tensor inside torch.func's
        transforms or with a forward-mode tangent, for which the ops have no rule.
    """
    if torch.compiler.is_compiling():
        return x
    if x.layout is not torch.strided or x.is_nested or x.is_mkldnn:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
    if _is_transformed(x):
        raise NotImplementedError(f"{name}: {op} has no vmap rule, nor any for torch.func's grad and jvp; use torch.autograd")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name}: {op} has no forward-mode derivative")
    if x.is_neg() or x._is_zerotensor():
        return x.resolve_neg().clone()
    return x


def is_wrapper(x):
    """Whether x is a tensor of a class that keeps its numbers elsewhere (fake and distributed tensors, say)."""
    return isinstance(x, torch.Tensor) and type(x) not in _PLAIN and type(x).__torch_dispatch__ is not _DISABLED


_DISABLED = torch.Tensor.__torch_dispatch__


def number(name, x):
    """x as a Python float: an int or a float, or a tensor of one element that needs no gradient.

    Raises:
        TypeError: another type, such as a string or a bool. ValueError: not finite in float32, or requires a gradient.
    """
    if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and none is computed for it; pass a number")
    try:
        if isinstance(x, (bool, str, bytes)):
            raise TypeError
        value = float(x)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a float, got {x!r}") from None
    except OverflowError:
        value = float("inf")
    if not abs(value) <= 3e38:
        raise ValueError(f"{name}: expected a finite float, got {x!r}")
    return value
