"""Frequencies of the rotary embeddings, and the tables of cosines and sines made from them.

Frequencies are float32 [3, D/2], one row per axis (t, h, w), one column per channel pair.

A token at position p = (t, h, w) turns its channel pair c by the angle p . F[:, c]. Every rotary embedding whose angle
is linear in the position is such an F, so one kernel serves them all. A zero leaves an axis out.
"""

import math
from collections import OrderedDict
from functools import lru_cache

import torch

from evaat_fast.ops._core.tensor import number


def joint_freqs(head_dim, theta=10000.0, scale=(1.0, 1.0, 1.0)):
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
    return _joint(head_dim, theta, _numbers("scale", scale, 3))


def _joint(head_dim, theta=10000.0, scale=(1.0, 1.0, 1.0), device=None):
    wide, quarter = _wide(device), head_dim // 4
    freqs = torch.zeros(3, 2 * quarter, dtype=wide, device=device)
    freqs[0] = _ladder(head_dim, theta, device) * scale[0]
    freqs[1, :quarter] = _ladder(head_dim // 2, theta, device) * scale[1]
    freqs[2, quarter:] = _ladder(head_dim // 2, theta, device) * scale[2]
    return freqs.float()


def spatial_freqs(head_dim, theta=10000.0, scale=(1.0, 1.0)):
    """The 2-D frequencies of EVA-02: height turns the first half of the pairs, width the second, time none.

    Args:
        head_dim: D, a multiple of 4.
        theta: base of the geometric progression.
        scale: what positions are multiplied by, for (h, w).

    Returns:
        float32 [3, D/2] with a zero first row.

    Raises:
        ValueError: as `joint_freqs`.

    Source: EVA-02 (arXiv 2303.11331).
    """
    freqs = joint_freqs(head_dim, theta, (1.0, *_numbers("scale", scale, 2)))
    freqs[0] = 0.0
    return freqs


def split_freqs(head_dim, dims, theta=10000.0, scale=(1.0, 1.0, 1.0), restart=True):
    """Axial frequencies: each axis turns channels of its own, in the order t, h, w; channels left over are not turned.

    Args:
        head_dim: D, even.
        dims: (dt, dh, dw), even numbers of channels with a sum of at most D.
        theta: base of the geometric progression.
        scale: what positions are multiplied by, for (t, h, w).
        restart: True: each axis begins at frequency 1 and spans the whole progression, theta^(-2j/d_axis). False: the
            axes are consecutive sections of one progression over the head, theta^(-2c/D), as in the M-RoPE of Qwen2-VL.

    Returns:
        float32 [3, D/2].

    Raises:
        ValueError: head_dim is not a positive even number, dims are not three even numbers that fit into it, theta is
            not positive, scale has not three numbers.
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


def _wide(device):
    return torch.float32 if device is not None and device.type == "mps" else torch.float64


def _ladder(channels, theta, device=None):
    """float64 [channels/2]: theta^(-2c/channels)."""
    return float(theta) ** (torch.arange(0, channels, 2, dtype=_wide(device), device=device) / -max(channels, 1))


def _check(head_dim, multiple, theta):
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or head_dim < 1 or head_dim % multiple:
        raise ValueError(f"head_dim: expected a positive multiple of {multiple}, got {head_dim!r}")
    if not number("theta", theta) > 0:
        raise ValueError(f"theta: expected a positive number, got {theta!r}")


def _numbers(name, values, count):
    try:
        if isinstance(values, str):
            raise TypeError
        numbers = [number(name, v) for v in values]
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected {count} finite numbers, got {values!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count} finite numbers, got {values!r}")
    return numbers


def grid_positions(grid, device=None):
    """int64 [T * Hp * Wp, 3]: the (t, h, w) of each token, in the tokens' order."""
    axes = (torch.arange(n, device=device) for n in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def rows_of(positions, grid, prefix_tokens, device):
    """float32 [1 or B, N - prefix, 3], contiguous: the positions of all tokens that are rotated."""
    rows = grid_positions(grid, device) if positions is None else positions[..., prefix_tokens:, :]
    return (rows if rows.ndim == 3 else rows[None]).float().contiguous()


def cos_sin(freqs, positions, grid, prefix_tokens, head_dim, device):
    """cos and sin of all angles, [1 or B, 1 or H, N - prefix, D/2]; in float64, as time stamps may be large."""
    freqs = _joint(head_dim, device=device) if freqs is None else freqs
    freqs = freqs if freqs.ndim == 3 else freqs[None]
    positions = grid_positions(grid, device) if positions is None else positions[..., prefix_tokens:, :]
    positions = positions if positions.ndim == 3 else positions[None]
    angles = positions[:, None].to(_wide(device)) @ freqs.to(_wide(device))
    return angles.cos(), angles.sin()


# A table costs more than the rotation by it, and a model asks for the same in every layer, or in both passes of each. The ones
# used last are kept, up to 64 MB.
_TABLES = OrderedDict()
_MOST_BYTES = 2**26


def table_of(freqs, positions, grid, prefix_tokens, head_dim, device, backend, dtype=torch.float32):
    """[2, 1 or B, 1 or H, N - prefix, D/2]: cosines, then sines. Nobody may write to it."""
    arguments = (freqs, positions, grid, prefix_tokens, head_dim, dtype)
    user = tuple(x for x in (freqs, positions) if x is not None)
    # User tensors on a GPU cannot be compared with a kept table's without waiting for the GPU, and their version
    # counters do not see writes through .data. A CUDA graph replays the addresses it captured, so it owns its table.
    if device.type != "cpu" and (user or device.type != "cuda" or torch.cuda.is_current_stream_capturing()):
        return (_triton_table if backend == "triton" else _new_table)(*arguments, device)
    key = (*grid, None if positions is None else prefix_tokens, head_dim, dtype, device, freqs is None)
    key += tuple((x.shape, x.dtype, x.data_ptr()) for x in user)
    kept = _TABLES.get(key)
    if kept is not None and all(map(torch.equal, kept[0], user)):
        _TABLES[key] = _TABLES.pop(key, kept)  # now the last used; another thread may have dropped it
        return kept[1]
    # Made on the CPU and copied: the copy waits, so that every CUDA stream may read the table afterwards.
    table = _new_table(*arguments, torch.device("cpu")).to(device)
    _TABLES[key] = (tuple(x.detach().clone() for x in user), table)
    while _TABLES and sum(t.nbytes for _, t in list(_TABLES.values())) > _MOST_BYTES:
        _TABLES.popitem(last=False)
    return table


def _triton_table(freqs, positions, grid, prefix_tokens, head_dim, dtype, device):
    """`_new_table` in one launch."""
    from evaat_fast.kernels.rope3d.table import fill

    with torch.no_grad():
        if freqs is None:
            captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            freqs = _joint(head_dim, device=device) if captured else _kept_joint(head_dim, device)
        freqs = (freqs if freqs.ndim == 3 else freqs[None]).contiguous()
        rows = None if positions is None else positions[..., prefix_tokens:, :]
        rows = rows if rows is None or rows.ndim == 3 else rows[None]
        clips, tokens = (1, math.prod(grid)) if rows is None else rows.shape[:2]
        table = torch.empty((2, clips, len(freqs), tokens, head_dim // 2), dtype=dtype, device=device)
        if table.numel():
            fill(table, freqs, rows, grid)
    return table


@lru_cache(maxsize=64)
def _kept_joint(head_dim, device):
    """`joint_freqs` on a device, where nobody but the kernels sees them."""
    return _joint(head_dim).to(device)


def _new_table(freqs, positions, grid, prefix_tokens, head_dim, dtype, device):
    with torch.no_grad():
        return torch.stack(cos_sin(freqs, positions, grid, prefix_tokens, head_dim, device)).to(dtype)
