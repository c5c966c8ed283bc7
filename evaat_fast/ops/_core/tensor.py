"""What every op asks of a tensor before it reads its memory."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DISABLED = Tensor.__torch_dispatch__
# A private name, hence the getattr: without it such a tensor fails further down, with a less clear error.
_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda x: False)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a call with these is inside torch.func's transforms, or one has a forward-mode tangent: only torch's operators
    know."""
    if _transforms() is not None:  # whatever they are: the transforms take no autograd.Function of the old kind
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def memory_of(op: str, name: str, x: Tensor, rows: bool = False) -> Tensor:
    """x, or the same numbers in memory that can be read as its strides say; rows: with a contiguous last dimension. A tensor
    without strides is a TypeError; one inside torch.func's transforms or with a forward-mode tangent, for which the ops have no
    rule, a NotImplementedError."""
    if not torch.compiler.is_compiling():
        if x.layout is not torch.strided or x.is_nested or x.is_mkldnn:
            layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{name}: expected a dense tensor, got a {layout} one")
        if _wrapped(x):
            raise NotImplementedError(
                f"{name}: {op} has no vmap rule, nor any for torch.func's grad and jvp; use torch.autograd"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: {op} has no forward-mode derivative")
        if x.is_neg() or x._is_zerotensor():
            x = x.resolve_neg().clone()
    return contiguous_rows(x) if rows else x


def kind(x: object) -> str:
    """What an error says that came."""
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def dense(op: str, name: str, x: object, dtypes: Collection[torch.dtype], expected: str) -> Tensor:
    """x as `memory_of` has it, whose shape may be read then; a TypeError unless it is a tensor of one of these dtypes."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {expected}, got {kind(x)}")
    return memory_of(op, name, x)


def check_device(name: str, got: torch.device, device: torch.device, whose: str) -> None:
    if got != device:
        raise ValueError(f"{name}: expected {whose} device {device}, got {got}")


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy, with a contiguous last dimension, which every kernel reads as such."""
    return x if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def writable(op: str, name: str, x: Tensor) -> Tensor:
    """x, if a kernel may change it in place: rows with a contiguous last dimension, and memory of its own for every element;
    else a ValueError, or an error of `memory_of`."""
    _own_memory(op, name, x)
    if x.ndim and x.stride(-1) != 1:
        raise ValueError(f"{name}: in place needs a contiguous last dimension, got strides {list(x.stride())}")
    if overlaps(x):
        raise ValueError(f"{name}: in place needs memory of its own for every element, got strides {list(x.stride())}")
    return x


def _own_memory(op, name, x):
    if memory_of(op, name, x) is not x:
        raise ValueError(f"{name}: in place needs a tensor with memory of its own, got a lazily negated or zero one")


def overlaps(x: Tensor) -> bool:
    """Whether two elements of x may lie at one address."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end = (size - 1) * stride + end
    return False


def packed_base(op: str, qkv: Tensor, learns: bool) -> Tensor | None:
    """What autograd is to see changed in place where a packed projection is: the projection, or the tensor that it is a reshape
    of. Changing that replaces one node of the graph; changing the view would copy the gradient three times. None: no gradient.

    A tensor that is not contiguous, a leaf that requires a gradient or a view of a part of another one is a ValueError.
    """
    _own_memory(op, "qkv", qkv)
    if not qkv.is_contiguous():
        raise ValueError(f"qkv: expected a contiguous tensor, got strides {list(qkv.stride())}")
    if not (torch.is_grad_enabled() and (qkv.requires_grad or learns)):
        return None
    if qkv.is_leaf and qkv.requires_grad:
        raise ValueError("qkv: a leaf that requires a gradient cannot be changed in place; use rope3d")
    if torch.compiler.is_compiling() or not qkv._is_view():
        return qkv
    base = qkv._base
    if base is None or base.numel() != qkv.numel() or not base.is_contiguous():
        shape = None if base is None else list(base.shape)
        raise ValueError(
            f"qkv: is a view of a part of a tensor {shape}, for which autograd would copy whole gradients; "
            "pass the linear layer's own output, or use rope3d"
        )
    return base


def keeps_numbers_elsewhere(kind: type) -> bool:
    """Whether a tensor of this class is a wrapper (fake and distributed tensors, say)."""
    return kind not in PLAIN and issubclass(kind, Tensor) and kind.__torch_dispatch__ is not _DISABLED


def number(name: str, x: float | Tensor) -> float:
    """x as a Python float: an int or a float, or a tensor of one element that needs no gradient. Another type, such as a string
    or a bool, is a TypeError; what is not finite in float32 or requires a gradient a ValueError."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
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


def numbers(name: str, values: Iterable[float | Tensor], count: int, expected: str) -> list[float]:
    """`count` numbers, as `number` takes them; other ones, or no sequence, are a ValueError that says what was `expected`."""
    try:
        if isinstance(values, str):
            raise TypeError
        found = [number(name, v) for v in values]
    except (TypeError, ValueError):
        found = []
    if len(found) != count:
        raise ValueError(f"{name}: expected {expected}, got {values!r}")
    return found
