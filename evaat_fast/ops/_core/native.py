"""Calls of the C++ and CUDA modules, which know nothing of torch: pointers, strides and codes in, an error code out."""

import functools
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def dtype_codes(module: ModuleType) -> dict[torch.dtype, int]:
    """What a module calls torch's dtypes."""
    return {getattr(torch, name): code for name, code in module.DTYPES.items()}


def pointer(x: Tensor | None) -> int:
    """0 stands for a tensor that is not there."""
    return 0 if x is None else x.data_ptr()


def shared_stride(x: Tensor, dim: int) -> int:
    """The stride of a dimension, 0 where its one entry serves all."""
    return x.stride(dim) if x.shape[dim] > 1 else 0


def checked(op: str, shape: torch.Size, error: int) -> None:
    """Raises a RuntimeError unless a kernel returned 0."""
    if error:
        raise RuntimeError(f"{op}: error {error} of its kernel at shape {list(shape)}")
