"""Tables of cosines and sines, made once and kept, since a table costs more than the rotation by it."""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from evaat_fast.ops._core import dispatch
from evaat_fast.ops.rope3d.freqs import grid_positions, joint
from evaat_fast.ops.rope3d.reference import cos_sin
from evaat_fast.ops.rope3d.rotation import Rotation

# A model asks for the same table in every layer, or in both passes of each. The ones used last are kept, up to 64 MB, and for
# ever those that a CUDA graph has captured: it replays their addresses.
_TABLES: OrderedDict[tuple, tuple[tuple, Tensor]] = OrderedDict()
_CAPTURED: dict[tuple, Tensor] = {}
_MOST_BYTES = 2**26
# Of frequencies whose owner promised not to change them: their version then, and their tables, which live as long as they do.
_CONSTANT: Any = WeakIdKeyDictionary()


def hold_constant(freqs: Tensor) -> Tensor:
    """freqs, a model's own, which will not be written to: on a GPU their tables are kept, where otherwise each call makes one.
    What changes them through torch is noticed, what writes through `.data` is not."""
    if freqs not in _CONSTANT and not freqs.is_inference():
        _CONSTANT[freqs] = (freqs._version, {})
    return freqs


def _constant_table(
    rotation: Rotation, make: Callable, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """On CUDA: the kept table of frequencies that are constant, made at need; None if they are not."""
    freqs = rotation.freqs
    held = None if freqs is None or freqs.requires_grad or rotation.positions is not None else _CONSTANT.get(freqs)
    if freqs is None or held is None or held[0] != freqs._version:
        return None
    key = rotation.grid, dtype
    if key not in held[1]:
        if torch.cuda.is_current_stream_capturing():
            return None  # it would lie in the graph's memory
        held[1][key] = make(rotation, head_dim, dtype, device)
        torch.cuda.current_stream(device).synchronize()  # so that every stream may read it afterwards
    table = held[1][key]
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED[("constant", table.data_ptr())] = table  # which the graph reads when the frequencies are gone, too
    return table


def table_of(rotation: Rotation, head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 1 or B, 1 or H, N - prefix, D/2]: cosines, then sines. Nobody may write to it."""
    # CUDA C++ has no kernel for tables: Triton's, where it is there, takes one launch for a dozen.
    on_gpu = rotation.backend == "cuda" and device.type == "cuda" and dispatch.why_not("triton") is None
    make = triton_table if rotation.backend == "triton" or on_gpu else torch_table
    if device.type == "cuda" and (constant := _constant_table(rotation, make, head_dim, dtype, device)) is not None:
        return constant
    user = [x for x in (rotation.freqs, rotation.positions) if x is not None]
    # User tensors on a GPU cannot be compared with a kept table's without waiting for the GPU, and their version
    # counters do not see writes through .data.
    if device.type != "cpu" and (user or device.type != "cuda"):
        return make(rotation, head_dim, dtype, device)
    prefix = None if rotation.positions is None else rotation.prefix_tokens
    key: tuple = (rotation.grid, prefix, head_dim, dtype, device, rotation.freqs is None)
    if user:
        key += tuple((x.shape, x.dtype, x.data_ptr()) for x in user)
    kept = _TABLES.get(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The kept table, so that the graph has no launch for it, where a call before the capture has made it; else one of the
        # graph's own memory, made by its first nodes.
        captured = _CAPTURED.get(key, None if kept is None else kept[1])
        return make(rotation, head_dim, dtype, device) if captured is None else _CAPTURED.setdefault(key, captured)
    if kept is not None and (not user or all(map(torch.equal, kept[0], user))):
        _TABLES[key] = _TABLES.pop(key, kept)  # now the last used; another thread may have dropped it
        return kept[1]
    # Made on the CPU and copied: the copy waits, so that every CUDA stream may read the table afterwards.
    table = torch_table(rotation, head_dim, dtype, torch.device("cpu")).to(device)
    _TABLES[key] = (tuple(x.detach().clone() for x in user), table)
    while _TABLES and sum(t.nbytes for _, t in list(_TABLES.values())) > _MOST_BYTES:
        _TABLES.popitem(last=False)
    return table


def rows_of(rotation: Rotation, device: torch.device) -> Tensor:
    """float32 [1 or B, N - prefix, 3], contiguous: the positions of all tokens that are rotated."""
    positions = rotation.positions
    rows = grid_positions(rotation.grid, device) if positions is None else positions[..., rotation.prefix_tokens :, :]
    return (rows if rows.ndim == 3 else rows[None]).float().contiguous()


def triton_table(rotation: Rotation, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch_table` in one launch."""
    from evaat_fast.kernels.rope3d.table import fill

    with torch.no_grad():
        freqs, positions = rotation.freqs, rotation.positions
        if freqs is None:
            captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            freqs = joint(head_dim, device=device) if captured else _kept_joint(head_dim, device)
        freqs = (freqs if freqs.ndim == 3 else freqs[None]).contiguous()
        rows = None if positions is None else positions[..., rotation.prefix_tokens :, :]
        rows = rows if rows is None or rows.ndim == 3 else rows[None]
        clips, tokens = (1, math.prod(rotation.grid)) if rows is None else rows.shape[:2]
        table = torch.empty((2, clips, len(freqs), tokens, head_dim // 2), dtype=dtype, device=device)
        if table.numel():
            fill(table, freqs, rows, rotation.grid)
    return table


@lru_cache(maxsize=64)
def _kept_joint(head_dim, device):
    """`joint_freqs` on a device, where nobody but the kernels sees them."""
    return joint(head_dim).to(device)


def torch_table(rotation: Rotation, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new table."""
    with torch.no_grad():
        both = cos_sin(rotation.freqs, rotation.positions, rotation.grid, rotation.prefix_tokens, head_dim, device)
        return torch.stack(both).to(dtype)
