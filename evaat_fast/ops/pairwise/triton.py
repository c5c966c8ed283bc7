"""The pairwise losses on a GPU: Triton's kernels make panels of slopes, torch's products turn them into gradients.

Scratch is one panel, unit rows in the features' dtype and a few vectors. Nothing waits for the GPU.
"""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.kernels.pairwise import contrast, panel, sms
from evaat_fast.ops.pairwise.step import Step

# Bytes of a panel. That it stays in L2 between the kernel that writes it and the products that read it matters less than that
# these are large: on an H200 SMS of 32k pairs takes 18.8 ms with 32 MiB, 15.6 with 128 and 15.2 with 256, CLIP 19.0, 13.3 and
# 12.5. Beyond N = 128k the least rows take more, 1 GiB for a million pairs: 512 rows cost 18 ps a pair at 32k; a kernel that
# multiplied twice and needed no panel took 29 at a million.
PANEL_BYTES = 128 << 20
LEAST_ROWS, MULTIPLE = 512, 128
# Whether torch multiplies 16-bit matrices into a float32 result (2.8 and later, CUDA).
OUT_DTYPE = hasattr(torch.ops.aten.addmm, "dtype_out")


def scaled(factor: Tensor, gradients: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """factor * gradients in these dtypes, in one launch."""
    outs = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(gradients, dtypes, strict=True)]
    panel.scale(factor, gradients, outs)
    return outs


class _Triton(Step):
    def prepare(self) -> None:
        self.features = panel.features(self.video, self.text)
        self.weight = None if self.weight is None else self.weight.float()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def normalise(self, sums: Tensor | None = None) -> None:
        """Norms, their inverses, and the unit rows in the features' dtype; sums become zero."""
        self.norms, self.inverses = self.empty(2, 2, self.N)
        self.unit_video, self.unit_text = self.empty(2, self.N, self.E, dtype=self.dtype)
        panel.prepare(self.features, (self.unit_video, self.unit_text), self.norms, self.inverses, sums)

    def begin(self) -> None:
        """Room for a panel, where slopes are asked for."""
        self.rows = self.panel_rows(self.dtype.itemsize, PANEL_BYTES, LEAST_ROWS, MULTIPLE)
        self.panel = self.empty(self.rows, self.N, dtype=self.dtype) if self.learns else None

    def tiles(self, rows: int) -> tuple[int, int]:
        """(down, across) of a panel."""
        raise NotImplementedError

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

    def end(
        self, parts: Tensor, slopes: Tensor | None, over: int, sums: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of the scale, sums of parts and of slopes divided by `over`; and what is left to do to the
        gradients, in the same launch."""
        loss, of_scale = self.empty(2)
        both = [(None, None, 0) if x is None else (y, x, x.numel()) for x, y in ((parts, loss), (slopes, of_scale))]
        grads = (self.grad_video, self.grad_text)
        panel.finish(self.features, self.norms, sums, self.weight, grads, scale, panel.Ends(*both[0], *both[1], over), 1 / over)
        return loss, of_scale


class Sms(_Triton):
    def prepare(self):
        super().prepare()
        N, each = self.N, self.work.each
        self.sums = torch.empty((2, N), dtype=torch.int32, device=self.device)
        self.normalise(self.sums)
        of, own = self.settings.labels, self.settings.own
        half, row, column = (0, *of.table.stride())[-3:]
        indices, values = (of.video_index, of.caption_index, of.verb), None if of.values is None else of.values.float()
        self.labels = sms.Labels(of.table, row, column, half, *of.table.shape[-2:], *indices, values)
        of_own = self.empty(N) if own is None else own.to(self.wide).contiguous()
        self.pairs = sms.Pairs(*self.inverses, self.empty(N), of_own, self.weight)
        self.begin()
        sms.own_pairs(self.features, self.pairs, self.labels if own is None else None)
        self.block = panel.config(self.dtype)["BLOCK"]
        down, across = self.tiles(self.rows)
        self.losses: Any = torch.zeros((2, N), dtype=torch.float64, device=self.device) if each else None
        self.part = self.empty(across * self.rows if each else self.tiles_before(N))
        self.part_col: Any = self.empty(down, N) if each else None

    def tiles(self, rows):
        return panel.tiles(rows, self.N, self.block)

    def sweeps(self):
        return (self.slopes,)

    def slopes(self, first, last):
        rows, each = last - first, self.work.each
        down, across = self.tiles(rows)
        slopes = self.panel[:rows] if self.learns else None
        part = self.part[: across * rows] if each else self.part[self.tiles_before(first) : self.tiles_before(last)]
        out = sms.Out(slopes, *self.sums, part, self.part_col, first, last)
        sms.sms_panel(self.features, self.pairs, self.labels, self.settings.penalty, out)
        if each:
            self.losses[0, first:last] = part.view(across, rows).sum(0, dtype=torch.float64)
            self.losses[1] += self.part_col[:down].sum(0, dtype=torch.float64)
        return slopes

    def finish(self):
        over = 2 * (self.N - 1)
        if self.work.each:
            return (self.losses.sum(0) / over).float(), *self.gradients
        loss, _ = self.end(self.part, None, over * (self.N if self.weight is None else 1), self.sums)
        return loss, *self.gradients


class Contrast(_Triton):
    of_scale: Any

    def prepare(self):
        super().prepare()
        N, normalise = self.N, self.settings.normalise
        self.unit_video, self.unit_text, self.norms, self.inverses = self.video, self.text, None, None
        if normalise:
            self.normalise()
        self.begin()
        of = self.settings.positives
        strides = (None, None) if of.dense is None else of.dense.stride()
        self.logits = contrast.Logits(self.inverses, self.scale.reshape(1), of.dense, *strides, of.verbs, of.nouns)
        self.totals = contrast.Totals(*self.empty(2, 2, 2, N), *self.empty(2, N), self.weight)
        self.sums = contrast.Sums(*self.empty(2, 2, N, dtype=torch.float64))
        self.own = self.empty(N)
        down, across = self.tiles(self.rows)
        kinds = 1 if contrast.kind_of(self.logits) == contrast.OWN else 2
        self.of_rows, self.of_columns = self.empty(kinds, 2, 4 * across, self.rows), self.empty(kinds, 2, down, N)
        self.of_scale = self.empty(self.tiles_before(N)) if self.learns else None

    def tiles(self, rows):
        return contrast.tiles_of(rows, self.features, self.logits)

    def sweeps(self):
        return (self.stats, self.slopes) if self.learns else (self.stats,)

    def stats(self, first, last):
        out = contrast.Stats(self.of_rows, self.of_columns, self.own, first, last)
        contrast.stats(self.features, self.logits, out, self.sums, self.totals)

    def slopes(self, first, last):
        slopes, part = self.panel[: last - first], self.of_scale[self.tiles_before(first) : self.tiles_before(last)]
        contrast.slopes(self.features, self.logits, self.totals, contrast.Slopes(slopes, part, first, last))
        return slopes

    def finish(self):
        share, entries = 1 if self.settings.normalise else 2, self.sums.entries  # both directions added, or their mean
        over = share * (1 if self.weight is not None else self.N)
        loss, of_scale = self.end(entries, self.of_scale, over, None, self.scale)
        return (entries.sum(0) / share).float() if self.work.each else loss, *self.gradients, of_scale
