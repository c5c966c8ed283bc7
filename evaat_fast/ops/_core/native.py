"""Calls of the C++ and CUDA modules, which know nothing of torch: pointers, strides and codes in, an error code out."""

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_HERE = contextlib.nullcontext()
# The address of a device's current stream. A private name, which Triton takes, too: torch's own makes an object first.
_stream: Callable[[int | None], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


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


@functools.cache  # as the statement costs 0.7 us a call, of 19
def _cpu_module() -> Any:
    from evaat_fast import _cpu

    return _cpu


def module_of(backend: str) -> Any:
    """The module of the backend "cpu" or "cuda", imported where it is needed."""
    if backend == "cpu":
        return _cpu_module()
    from evaat_fast import _cuda

    return _cuda


def run(function: Callable[..., int], shape: torch.Size, device: torch.device, *arguments: Any, **named: Any) -> None:
    """Calls a module's function, where the device's threads or stream are; a RuntimeError unless it returns 0."""
    if device.type == "cuda":
        with _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device):
            error = function(*arguments, **named, where=_stream(device.index))
    else:
        error = function(*arguments, **named, where=torch.get_num_threads())
    if error:
        raise RuntimeError(f"{function.__name__}: error {error} of its kernel at shape {list(shape)}")
