"""Patch dropout: in training a clip is shown with some of its patches only, each where it was.

    patches = draw_patches(len(video), model.config.grid, 0.5)
    model.encode_video(video, patches=patches.to(video.device))

Every clip has patches of its own. Ones that a batch shares would spare reading a table of rotations for each clip, some 4 % of
what a rotation reads and under 0.1 % of a step, and show all clips of a step the same places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops.rope3d.rotation import Placed, Rotation
from evaat_fast.ops.rope3d.table import table_of


def draw_patches(clips: int, grid: tuple[int, int, int], dropped: float, generator: torch.Generator | None = None) -> Tensor:
    """The patches that clips keep, drawn for each alone from all of its frames.

    Args:
        clips: B. grid: (T, Hp, Wp). dropped: which share of the patches goes, from 0 to below 1, as AVION's and open_clip's
            `patch_dropout`; at least one stays. The class token is none of them. generator: on the CPU; None: torch's own.

    Returns:
        int64 [B, N'] on the CPU: rising numbers of cells of the grid, in row-major order.

    Raises:
        ValueError: `dropped` out of range.

    Source: FLIP (arXiv 2212.00794); AVION (arXiv 2309.16669).
    """
    if not 0 <= dropped < 1:
        raise ValueError(f"dropped: expected a share from 0 to below 1, got {dropped!r}")
    count = grid[0] * grid[1] * grid[2]
    kept = max(1, int(count * (1 - dropped)))
    return torch.rand(clips, count, generator=generator, device="cpu").topk(kept).indices.sort().values


def check_patches(patches: Tensor, clips: int, grid: tuple[int, int, int], device: torch.device) -> None:
    """Raises TypeError or ValueError unless `patches` are of clips of this grid; their values are read on the CPU only."""
    if not isinstance(patches, Tensor) or patches.dtype != torch.int64:
        got = patches.dtype if isinstance(patches, Tensor) else type(patches).__name__
        raise TypeError(f"patches: expected int64 numbers of patches (draw_patches makes them), got {got}")
    count = grid[0] * grid[1] * grid[2]
    if patches.ndim != 2 or patches.shape[0] != clips or not 1 <= patches.shape[1] <= count:
        raise ValueError(f"patches: expected [{clips}, 1 to {count}], got {list(patches.shape)}")
    if patches.device != device:
        raise ValueError(f"patches: expected a tensor on {device} as the video, got {patches.device}")
    if device.type == "cpu" and patches.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in patches.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"patches: expected numbers from 0 to {count - 1}, got {low if low < 0 else high}")


def place(patches: Tensor, grid: tuple[int, int, int], freqs: Tensor, dtype: torch.dtype) -> Tensor | Placed:
    """int64 [B, 1 + N', 3]: (t, h, w) of the class token, which counts for nothing, and of patches [B, N']. Where no compiler
    looks and no freqs learn, with their table, made once and not in each pass of each block; dtype: of the tokens, float64 or
    another."""
    _, rows, columns = grid
    places = torch.stack((patches // (rows * columns), patches // columns % rows, patches % columns), -1)
    positions = F.pad(places, (0, 0, 1, 0))
    if torch.compiler.is_compiling() or freqs.requires_grad:
        return positions
    backend = dispatch.pick("rope3d", positions.device, dtype)
    rotation = Rotation(freqs, positions, (), prefix_tokens=1, interleaved=True, inverse=False, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Placed(positions, table_of(rotation, 2 * freqs.shape[-1], positions.device, wide))


def pick(rows: Tensor, patches: Tensor) -> Tensor:
    """rows [B, N, C] of all patches -> [B, N', C] of these."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], patches]
