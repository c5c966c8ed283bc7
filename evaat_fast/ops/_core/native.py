"""Calls of the C++ and CUDA modules, which know nothing of torch: pointers, strides and codes in, an error code out."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

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


def module_of(backend: str) -> ModuleType:
    if backend == "cpu":
        from evaat_fast import _cpu

        return _cpu
    from evaat_fast import _cuda

    return _cuda


def run(x: Tensor, function: Callable[..., int], *arguments: Any, **named: Any) -> None:
    """Calls a function of a module for x's device, with its threads or its stream.

    Raises:
        RuntimeError: it returned an error.
    """
    if x.is_cuda:
        with torch.cuda.device(x.device):
            error = function(*arguments, **named, where=torch.cuda.current_stream().cuda_stream)
    else:
        error = function(*arguments, **named, where=torch.get_num_threads())
    if error:
        raise RuntimeError(f"{function.__name__}: error {error} of its kernel at shape {list(x.shape)}")
