"""patchify: uint8 video to the rows that a linear patch embedding multiplies.

A convolution with stride = kernel is a matrix product over patches. `patchify` makes that product's left side straight from
the decoder's bytes: crop views are read in place, the normalisation costs a table look-up, and no float video ever exists.

    rows = patchify(video, 16, mean, std, torch.bfloat16)                    # [B, T*Hp*Wp, 768]
    tokens = torch.nn.functional.linear(rows, conv.weight.flatten(1), conv.bias)
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.native import module_of, run
from evaat_fast.ops._core.register import register, traced
from evaat_fast.ops._core.tensor import dense, numbers


def patchify_reference(video: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The specification: normalise in float32, round once to `dtype`, cut into patches."""
    B, T, H, W, _ = video.shape
    Hp, Wp = H // patch, W // patch
    table = _table(tuple(mean), tuple(std), dtype, video.device)
    x = torch.stack([table[c][video[..., c].long()] for c in range(3)], 2)  # [B, T, 3, H, W]
    x = x.reshape(B, T, 3, Hp, patch, Wp, patch)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, T * Hp * Wp, 3 * patch * patch)


@lru_cache(maxsize=32)
def _table(mean, std, dtype, device):
    """[3, 256]: what a byte of each channel becomes. A table makes all backends equal to the last bit."""
    levels = torch.arange(256, dtype=torch.float32)
    mean = torch.tensor(mean, dtype=torch.float32)[:, None]
    std = torch.tensor(std, dtype=torch.float32)[:, None]
    return ((levels - mean) / std).to(dtype).to(device)


def _fake(video, patch, mean, std, dtype, backend):
    B, T, H, W, _ = video.shape
    return video.new_empty((B, T * (H // patch) * (W // patch), 3 * patch * patch), dtype=dtype)


@register("patchify(Tensor video, int patch, float[] mean, float[] std, ScalarType dtype, str backend) -> Tensor", _fake)
def _patchify(video, patch, mean, std, dtype, backend):
    if backend == "reference":
        return patchify_reference(video, patch, mean, std, dtype)
    if video.stride(4) != 1 or video.stride(3) != 3:
        video = video.contiguous()
    out, table = _fake(video, patch, mean, std, dtype, backend), _table(tuple(mean), tuple(std), dtype, video.device)
    (B, T, H, W, _), (stride_b, stride_t, stride_h, _, _) = video.shape, video.stride()
    places = video.data_ptr(), table.data_ptr(), out.data_ptr(), out.element_size()
    run(module_of(backend).patchify, video.shape, video.device, *places, B, T, H, W, stride_b, stride_t, stride_h, patch)
    return out


def patchify(
    video: Tensor,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """Cuts a uint8 video into normalised patches.

    Args:
        video: uint8 [B, T, H, W, 3], any strides; crops of packed frames are read without a copy.
        patch: side of a patch in pixels; H and W must be multiples of it.
        mean, std: three floats each, in units of 0..255.
        dtype: float32, bfloat16 or float16; the normalisation is computed in float32 and rounded once.
        backend: "auto", "cuda", "cpu" or "reference".

    Returns:
        [B, T * H/patch * W/patch, 3 * patch * patch], tokens in the order (t, h, w) and columns in the order (c, py, px), which
        is that of `conv.weight.reshape(out_channels, -1)`.

    Raises:
        TypeError: video is not a uint8 tensor, or dtype is not one of the three.
        ValueError: another shape, a patch that does not divide H and W, mean or std of another length, a std of 0.
        RuntimeError: a backend that was asked for by name cannot serve the call.

    Source: ViT (arXiv 2010.11929), section 3.1: a convolution whose stride is its kernel's size, as a product over patches.
    """
    video = dense("patchify", "video", video, (torch.uint8,), "a uint8 tensor")
    if video.ndim != 5 or video.shape[-1] != 3:
        raise ValueError(f"video: expected the shape [B, T, H, W, 3], got {list(video.shape)}")
    if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
        raise ValueError(f"patch: expected a positive int, got {patch!r}")
    if video.shape[2] % patch or video.shape[3] % patch:
        raise ValueError(f"video: height and width must be multiples of patch={patch}, got {list(video.shape[2:4])}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    three = "three floats in units of 0..255"
    mean, std = numbers("mean", mean, 3, three), numbers("std", std, 3, three)
    if 0.0 in std:
        raise ValueError(f"std: expected three non-zero floats, got {std}")
    backend = dispatch.pick("patchify", video.device, dtype, backend)
    return _patchify.at(traced(type(video)))(video, patch, mean, std, dtype, backend)
