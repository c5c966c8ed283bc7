"""The specification of rope3d."""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops.rope3d.freqs import grid_positions, joint, widest


def rope3d_reference(q, k=None, grid=None, *, freqs=None, prefix_tokens=1, positions=None, interleaved=True, inverse=False):
    """(x, y) -> (x cos a - y sin a, y cos a + x sin a) with a = position . freqs[:, pair]."""
    cos, sin = cos_sin(freqs, positions, grid, prefix_tokens, q.shape[-1], q.device)
    if inverse:
        sin = -sin
    turned = tuple(turn(x, cos, sin, prefix_tokens, interleaved) for x in (q, k) if x is not None)
    return turned if k is not None else turned[0]


def turn(x: Tensor, cos: Tensor, sin: Tensor, prefix_tokens: int, interleaved: bool) -> Tensor:
    """x [B, H, N, D] by cosines and sines [1 or B, 1 or H, N - prefix_tokens, D/2]."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    rows = x[:, :, prefix_tokens:].to(wide)
    a, b = (rows[..., 0::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    rows = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((x[:, :, :prefix_tokens], rows.to(x.dtype)), 2)


def cos_sin(
    freqs: Tensor | None, positions: Tensor | None, grid: Any, prefix_tokens: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of all angles, [1 or B, 1 or H, N - prefix, D/2]; in float64, as time stamps may be large."""
    freqs = joint(head_dim, device=device) if freqs is None else freqs
    freqs = freqs if freqs.ndim == 3 else freqs[None]
    positions = grid_positions(grid, device) if positions is None else positions[..., prefix_tokens:, :]
    positions = positions if positions.ndim == 3 else positions[None]
    angles = positions[:, None].to(widest(device)) @ freqs.to(widest(device))
    return angles.cos(), angles.sin()
