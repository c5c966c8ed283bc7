"""What the GPU backends of the pairwise losses share: kernels make panels of slopes, torch's products turn them into gradients.

Scratch is one panel, unit rows in the features' dtype and a few vectors. Nothing waits for the GPU.
"""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops.pairwise.step import Step

# Bytes of a panel. That it stays in L2 between the kernel that writes it and the products that read it matters less than that
# these are large: on an H200 SMS of 32k pairs takes 18.8 ms with 32 MiB, 15.6 with 128 and 15.2 with 256, CLIP 19.0, 13.3 and
# 12.5. Beyond N = 128k the least rows take more, 1 GiB for a million pairs: 512 rows cost 18 ps a pair at 32k; a kernel that
# multiplied twice and needed no panel took 29 at a million.
PANEL_BYTES = 128 << 20
LEAST_ROWS, MULTIPLE = 512, 128
# Whether torch multiplies 16-bit matrices into a float32 result (2.8 and later, CUDA).
OUT_DTYPE = hasattr(torch.ops.aten.addmm, "dtype_out")


class Gpu(Step):
    """A backend's class adds normalise(sums), which fills norms, their inverses and the unit rows, and makes sums zero;
    tiles(rows), (down, across) of a panel; and end(parts, slopes, over, sums, scale): the loss and the gradient of the scale,
    sums of parts and of slopes divided by `over`, and in place what is left to do to the gradients of the unit rows."""

    COLUMNS = 1  # a panel's rows are multiples of so many entries apart
    copied = 0  # bytes of what the backend has a copy of, for which a panel leaves room
    normalise: Any
    tiles: Any
    end: Any
    norms: Any
    inverses: Any

    def prepare(self) -> None:
        self.weight = None if self.weight is None else self.of_all(self.weight.float())

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def unit_rows(self) -> tuple[Tensor, Tensor]:
        """Room for them, in the features' dtype, and for norms and inverses."""
        self.norms, self.inverses = self.empty(2, 2, self.n)
        self.unit_video, self.unit_text = (self.empty(self.n, self.E, dtype=self.dtype) for _ in range(2))
        return self.unit_video, self.unit_text

    def begin(self) -> None:
        """Room for a panel, where slopes are asked for."""
        self.rows = self.panel_rows(self.dtype.itemsize, PANEL_BYTES - self.copied, LEAST_ROWS, MULTIPLE)
        stride = -(-self.N // self.COLUMNS) * self.COLUMNS
        self.panel = self.empty(self.rows, stride, dtype=self.dtype)[:, : self.N] if self.learns else None

    def tiles_before(self, row: int) -> int:
        """How many tiles the panels have that end before a row, or with it."""
        down, across = self.tiles(self.rows)
        return (row // self.rows * down + self.tiles(row % self.rows)[0]) * across

    def product(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        """In float32; 16-bit products are rounded once each where torch cannot keep their sums."""
        if a.dtype == out.dtype:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        elif a.is_cuda and OUT_DTYPE:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            part = torch.mm(a, b)
            out.add_(part) if add else out.copy_(part)


class Sms(Gpu):
    """A backend's class adds given(), which makes what its kernels are given of pairs and labels and returns the rows of a
    tile, and read(slopes, row_loss, col_loss, first, last), which reads a panel; losses are those of the tiles
    [down * across], or of each pair [across * rows] and [down, N]."""

    given: Any
    read: Any

    def prepare(self):
        super().prepare()
        N, each = self.N, self.work.each
        self.sums = torch.empty((2, N), dtype=torch.int32, device=self.device)
        self.normalise(self.sums if self.ranks is None else self.sums.zero_())
        self.begin()
        self.block = self.given()
        down, across = self.tiles(self.rows)
        self.losses: Any = torch.zeros((2, N), dtype=torch.float64, device=self.device) if each else None
        self.part = self.empty(across * self.rows if each else self.tiles_before(self.n))
        self.part_col: Any = self.empty(down, N) if each else None

    def tiles(self, rows):
        return -(-rows // self.block), -(-self.N // self.block)

    def sweeps(self):
        return (self.slopes,)

    def slopes(self, first, last):
        rows, each = last - first, self.work.each
        down, across = self.tiles(rows)
        slopes = self.panel[:rows] if self.learns else None
        part = self.part[: across * rows] if each else self.part[self.tiles_before(first) : self.tiles_before(last)]
        self.read(slopes, part, self.part_col, first, last)
        if each:
            self.losses[0, first:last] = part.view(across, rows).sum(0, dtype=torch.float64)
            self.losses[1] += self.part_col[:down].sum(0, dtype=torch.float64)
        return slopes

    def finish(self):
        over = 2 * (self.N - 1)
        if self.work.each:
            return (self.of_own(self.losses).sum(0) / over).float(), *self.gradients
        sums = self.of_own(self.sums) if self.learns else self.sums
        loss, _ = self.end(self.part, None, over * (self.N if self.weight is None else 1), sums)
        return loss, *self.gradients
