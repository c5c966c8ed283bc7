"""What the pairwise losses check of their features, and the contexts they compute in."""

import contextlib

import torch

from evaat_fast.ops._core import dispatch as _dispatch
from evaat_fast.ops._core.tensor import memory_of
from evaat_fast.ops.pairwise.relevancy import FLOATS


def check_features(op, video, text):
    for name, x in (("video", video), ("text", text)):
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor [N, E], got {got}")
        memory_of(op, name, x)  # a nested tensor has no shape to speak of
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: expected the shape [N, E] with E > 0, got {list(x.shape)}")
    if text.dtype != video.dtype:
        raise TypeError(f"text: expected video's dtype {video.dtype}, got {text.dtype}")
    if text.device != video.device:
        raise ValueError(f"text: expected video's device {video.device}, got {text.device}")
    if text.shape != video.shape:
        raise ValueError(f"text: expected video's shape {list(video.shape)}, got {list(text.shape)}")
    return memory_of(op, "video", video), memory_of(op, "text", text)


def check_common(op, reduction, group, grad_mode):
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: expected "mean" or "none", got {reduction!r}')
    if grad_mode not in ("ddp", "sum"):
        raise ValueError(f'grad_mode: expected "ddp" or "sum", got {grad_mode!r}')
    if group is not None:
        raise _dispatch.not_built(f"{op}(group=...)", "gather the features first, or leave group=None")


def no_pair(*tensors):
    """What the reference is given for N = 1: there is no pair, so a NaN in the features must not reach loss or gradient."""
    return [x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0) for x in tensors]


def no_autocast(x):
    """Products are computed in the dtype the reference names, also where the caller trains under autocast."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
