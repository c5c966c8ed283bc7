"""What a rotation is besides the tensors it turns, and every check of it."""

import reprlib
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.tensor import check_device, dense

Grid = Sequence[int] | None
_POSITIONS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32)
# What a model passes as `positions` to many calls with the same constant freqs, with their table, which it makes once.
Placed = namedtuple("Placed", ("positions", "table"))
# grid, freqs, prefix_tokens, positions, interleaved: not checked
Rope = tuple[Grid, Tensor | None, int, Tensor | Placed | None, bool]


@dataclass(frozen=True)
class Rotation:
    """A checked rotation. freqs: float32 [3, D/2] or [H, 3, D/2], None for the joint ones. positions: [N, 3] or [B, N, 3], None
    where grid, (T, Hp, Wp) and else (), places the tokens. backend: of the kernel that turns. table: cosines, then sines that
    somebody else made, float32 [2, 1 or B, 1 or H, N - prefix_tokens, D/2], contiguous, in place of freqs and positions."""

    freqs: Tensor | None
    positions: Tensor | None
    grid: tuple[int, ...]
    prefix_tokens: int
    interleaved: bool
    inverse: bool
    backend: str
    table: Tensor | None = None

    def back(self) -> "Rotation":
        """The rotation that undoes this one."""
        return self.of(self.freqs, self.positions, self.table, turns_back=True)

    def bare(self) -> "Rotation":
        """Without its tensors, which autograd saves in its own way."""
        return self.of(None, None)

    def of(
        self, freqs: Tensor | None, positions: Tensor | None, table: Tensor | None = None, turns_back: bool = False
    ) -> "Rotation":
        """With these tensors, and the other way around if turns_back."""
        inverse = self.inverse != turns_back
        return Rotation(freqs, positions, self.grid, self.prefix_tokens, self.interleaved, inverse, self.backend, table)

    def learns(self) -> bool:
        """Whether a gradient is wanted of the frequencies."""
        return bool(needs(self.freqs))


def needs(freqs: object) -> tuple[str, ...]:
    """What a backend must have for these frequencies, not checked."""
    if freqs is None:  # the default, and a call's quickest way out
        return ()
    return (dispatch.LEARNED,) if isinstance(freqs, Tensor) and freqs.requires_grad and torch.is_grad_enabled() else ()


def plan(
    q: torch.Size,
    device: torch.device,
    k_heads: int | None,
    backend: str,
    rope: Rope,
    inverse: bool = False,
    of: str = "positions",
) -> Rotation:
    """The rotation of queries q [B, Hq, N, D] and keys with k_heads heads (None: there are none) on a device, checked. of: the
    name of `positions` in errors."""
    grid, freqs, prefix_tokens, positions, interleaved = rope
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved: expected True or False, got {interleaved!r}")
    if not isinstance(inverse, bool):
        raise TypeError(f"inverse: expected True or False, got {inverse!r}")
    B, Hq, N, D = q
    if D % 2 or not 2 <= D <= 256:
        raise ValueError(f"q: expected an even head dim from 2 to 256, got {D}")
    check_place(grid, prefix_tokens, positions)
    freqs = _checked_freqs(freqs, Hq, D, device, k_heads)
    if positions is not None:
        positions, table = positions if isinstance(positions, Placed) else (positions, None)
        positions = dense("rope3d", of, positions, _POSITIONS, "a tensor of integers or float32")
        if positions.shape != (N, 3) and positions.shape != (B, N, 3):
            raise ValueError(f"{of}: expected the shape [{N}, 3] or [{B}, {N}, 3], got {list(positions.shape)}")
        check_device(of, positions.device, device, "q's")
        if prefix_tokens > N:
            raise ValueError(f"prefix_tokens: expected at most N = {N}, got {prefix_tokens}")
        if backend != "reference" and positions.requires_grad and torch.is_grad_enabled():
            raise ValueError(f'{of}: requires a gradient, which only backend="reference" computes; pass it detached')
        return Rotation(freqs, positions, (), prefix_tokens, interleaved, inverse, backend, table)
    T, Hp, Wp = check_grid(grid)
    if N != prefix_tokens + T * Hp * Wp:
        raise ValueError(
            f"grid: {T} x {Hp} x {Wp} cells and prefix_tokens={prefix_tokens} make {prefix_tokens + T * Hp * Wp} "
            f"tokens, but q has N = {N}"
        )
    return Rotation(freqs, None, (T, Hp, Wp), prefix_tokens, interleaved, inverse, backend)


def _checked_freqs(freqs, Hq, D, device, k_heads):
    if freqs is None:
        if D % 4:
            raise ValueError(f"freqs: the default, joint_freqs, needs a head dim that is a multiple of 4, got {D}")
        return None
    freqs = dense("rope3d", "freqs", freqs, (torch.float32,), "a float32 tensor")
    if freqs.shape != (3, D // 2) and freqs.shape != (Hq, 3, D // 2):
        raise ValueError(f"freqs: expected the shape [3, {D // 2}] or [{Hq}, 3, {D // 2}], got {list(freqs.shape)}")
    if freqs.ndim == 3 and k_heads is not None and k_heads != Hq:
        raise ValueError(f"k: expected {Hq} heads, as freqs are per head, got {k_heads}")
    check_device("freqs", freqs.device, device, "q's")
    return freqs


def check_place(grid: Grid, prefix_tokens: int, positions: Tensor | Placed | None) -> None:
    if not isinstance(prefix_tokens, (int, torch.SymInt)) or isinstance(prefix_tokens, bool) or prefix_tokens < 0:
        raise ValueError(f"prefix_tokens: expected an int >= 0, got {prefix_tokens!r}")
    if (grid is None) == (positions is None):
        raise ValueError(f"grid, positions: expected exactly one of the two, got {'neither' if grid is None else 'both'}")


def check_grid(grid: Any) -> tuple[int, int, int]:
    try:
        T, Hp, Wp = grid
        for n in (T, Hp, Wp):
            if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool) or n < 1:
                raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"grid: expected three positive ints (T, Hp, Wp), got {grid!r}") from None
    return T, Hp, Wp


def wrong(name: str, expected: str, got: object) -> Exception:
    error = TypeError if not isinstance(got, Tensor) else ValueError
    shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else reprlib.repr(got)
    return error(f"{name}: expected {expected}, got {shown}")
