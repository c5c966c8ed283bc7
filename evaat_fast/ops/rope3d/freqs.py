"""Frequencies of the rotary embeddings: float32 [3, D/2], one row per axis (t, h, w), one column per channel pair.

A token at position p = (t, h, w) turns its channel pair c by the angle p . F[:, c]. Every rotary embedding whose angle
is linear in the position is such an F, so one kernel serves them all. A zero leaves an axis out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaat_fast.ops._core.tensor import number, numbers


def joint_freqs(head_dim: int, theta: float = 10000.0, scale: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """The joint space-time frequencies of EVA02-AT: time turns all pairs, height the first half, width the second.

    F_t[c] = theta^(-2c/D) for every pair c; F_h[c] = theta^(-4c/D) for c < D/4, 0 beyond;
    F_w[c] = theta^(-4(c - D/4)/D) for c >= D/4, 0 before.

    Args:
        head_dim: D, a multiple of 4.
        theta: base of the geometric progression.
        scale: what positions are multiplied by, for (t, h, w). EVA-02 rescales to its pretraining grid of 16:
            (1, 16/14, 16/14) for patch 16 at 224 pixels.

    Returns:
        float32 [3, D/2].

    Raises:
        ValueError: head_dim is not a positive multiple of 4, theta is not positive, scale has not three numbers.

    Source: EVA02-AT (arXiv 2506.14356), section 3.2.
    """
    _check(head_dim, 4, theta)
    return joint(head_dim, theta, _numbers("scale", scale, 3))


def joint(
    head_dim: int, theta: float = 10000.0, scale: Sequence[float] = (1.0, 1.0, 1.0), device: torch.device | None = None
) -> Tensor:
    """`joint_freqs` on a device, unchecked."""
    wide, quarter = widest(device), head_dim // 4
    freqs = torch.zeros(3, 2 * quarter, dtype=wide, device=device)
    freqs[0] = _ladder(head_dim, theta, device) * scale[0]
    freqs[1, :quarter] = _ladder(head_dim // 2, theta, device) * scale[1]
    freqs[2, quarter:] = _ladder(head_dim // 2, theta, device) * scale[2]
    return freqs.float()


def spatial_freqs(head_dim: int, theta: float = 10000.0, scale: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """The 2-D frequencies of EVA-02: height turns the first half of the pairs, width the second, time none.

    Args:
        head_dim, theta: as for `joint_freqs`. scale: what positions are multiplied by, for (h, w).

    Returns:
        float32 [3, D/2] with a zero first row.

    Raises:
        ValueError: as `joint_freqs`.

    Source: EVA-02 (arXiv 2303.11331).
    """
    freqs = joint_freqs(head_dim, theta, (1.0, *_numbers("scale", scale, 2)))
    freqs[0] = 0.0
    return freqs


def split_freqs(
    head_dim: int, dims: Sequence[int], theta: float = 10000.0, scale: Sequence[float] = (1.0, 1.0, 1.0), restart: bool = True
) -> Tensor:
    """Axial frequencies: each axis turns channels of its own, in the order t, h, w; channels left over are not turned.

    Args:
        head_dim: D, even. theta, scale: as for `joint_freqs`.
        dims: (dt, dh, dw), even numbers of channels with a sum of at most D.
        restart: True: each axis begins at frequency 1 and spans the whole progression, theta^(-2j/d_axis). False: the
            axes are consecutive sections of one progression over the head, theta^(-2c/D), as in the M-RoPE of Qwen2-VL.

    Returns:
        float32 [3, D/2].

    Raises:
        ValueError: head_dim is not a positive even number, dims are not three even numbers that fit into it, theta is
            not positive, scale has not three numbers.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, without restart; V-JEPA 2 (arXiv 2506.09985) and CogVideoX
        (arXiv 2408.06072) with it.
    """
    _check(head_dim, 2, theta)
    sizes = _numbers("dims", dims, 3)
    if any(d < 0 or d % 2 for d in sizes) or sum(sizes) > head_dim:
        raise ValueError(f"dims: expected three even numbers of channels with a sum of at most {head_dim}, got {dims}")
    freqs = torch.zeros(3, head_dim // 2, dtype=torch.float64)
    first = 0
    for axis, (channels, factor) in enumerate(zip(map(int, sizes), _numbers("scale", scale, 3), strict=True)):
        last = first + channels // 2
        ladder = _ladder(channels, theta) if restart else _ladder(head_dim, theta)[first:last]
        freqs[axis, first:last] = ladder * factor
        first = last
    return freqs.float()


def widest(device: torch.device | None) -> torch.dtype:
    """The widest float that a device has."""
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def _ladder(channels, theta, device=None):
    """float64 [channels/2]: theta^(-2c/channels)."""
    return float(theta) ** (torch.arange(0, channels, 2, dtype=widest(device), device=device) / -max(channels, 1))


def _check(head_dim, multiple, theta):
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or head_dim < 1 or head_dim % multiple:
        raise ValueError(f"head_dim: expected a positive multiple of {multiple}, got {head_dim!r}")
    if not number("theta", theta) > 0:
        raise ValueError(f"theta: expected a positive number, got {theta!r}")


def _numbers(name, values, count):
    return numbers(name, values, count, f"{count} finite numbers")


def grid_positions(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """int64 [T * Hp * Wp, 3]: the (t, h, w) of each token, in the tokens' order."""
    axes = (torch.arange(n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
