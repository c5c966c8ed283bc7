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


class _Triton(Step):
    def prepare(self) -> None:
        self.features = panel.features(self.video, self.text)
        self.weight = None if self.weight is None else self.weight.float()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def normalise(self) -> None:
        """Norms, their inverses, and the unit rows in the features' dtype."""
        self.norms, self.inverses = self.empty(2, 2, self.N)
        self.unit_video, self.unit_text = self.empty(2, self.N, self.E, dtype=self.dtype)
        panel.prepare(self.features, (self.unit_video, self.unit_text), self.norms, self.inverses)

    def begin(self) -> None:
        """Room for a panel, where slopes are asked for."""
        self.rows = self.panel_rows(self.dtype.itemsize, PANEL_BYTES, LEAST_ROWS, MULTIPLE)
        self.panel = self.empty(self.rows, self.N, dtype=self.dtype) if self.learns else None

    def product(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        """In float32; 16-bit products are rounded once each where torch cannot keep their sums."""
        if a.dtype == out.dtype:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        elif a.is_cuda and OUT_DTYPE:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            part = torch.mm(a, b)
            out.add_(part) if add else out.copy_(part)

    def through_norms(self, sums: Tensor, weight: Tensor | None, factor: float) -> None:
        panel.finish(self.features, self.norms, sums, weight, (self.grad_video, self.grad_text), factor)


class Sms(_Triton):
    def prepare(self):
        super().prepare()
        N, each = self.N, self.work.each
        self.normalise()
        of, own = self.settings.labels, self.settings.own.to(self.wide).contiguous()
        half, row, column = (0, *of.table.stride())[-3:]
        indices, values = (of.video_index, of.caption_index, of.verb), None if of.values is None else of.values.float()
        self.labels = sms.Labels(of.table, row, column, half, *of.table.shape[-2:], *indices, values)
        self.pairs = sms.Pairs(*self.inverses, self.empty(N), own, self.weight)
        self.begin()
        panel.own_cosines(self.features, self.inverses, self.pairs.cosine)
        self.block = panel.config(self.dtype)["BLOCK"]
        down, across = panel.tiles(self.rows, N, self.block)
        self.sums = torch.zeros((2, N), dtype=torch.int32, device=self.device)
        self.losses: Tensor = torch.zeros((2, N) if each else (), dtype=torch.float64, device=self.device)
        self.part = self.empty(across * self.rows if each else down * across)
        self.part_col: Any = self.empty(down, N) if each else None

    def sweeps(self):
        return (self.slopes,)

    def slopes(self, first, last):
        rows, each = last - first, self.work.each
        down, across = panel.tiles(rows, self.N, self.block)
        slopes = self.panel[:rows] if self.learns else None
        part = self.part[: across * rows if each else down * across]
        out = sms.Out(slopes, *self.sums, part, self.part_col, first, last)
        sms.sms_panel(self.features, self.pairs, self.labels, self.settings.penalty, out)
        if each:
            self.losses[0, first:last] = part.view(across, rows).sum(0, dtype=torch.float64)
            self.losses[1] += self.part_col[:down].sum(0, dtype=torch.float64)
        else:
            self.losses += part.sum(dtype=torch.float64)
        return slopes

    def finish(self):
        N = self.N
        loss = self.losses.sum(0) / (2 * (N - 1)) if self.work.each else self.losses / (2 * N * (N - 1))
        if self.learns:
            self.through_norms(self.sums, self.weight, 1 / (2 * (N - 1) * (N if self.weight is None else 1)))
        return loss.float(), *self.gradients


def _two_floats(x):
    """float64 [2, N] -> float32 [2, 2, N] whose second dimension adds up to it."""
    high = x.float()
    low = torch.where(high.isfinite(), x - high, 0.0)
    return torch.stack((high, low.float()), 1)


class Contrast(_Triton):
    def prepare(self):
        super().prepare()
        N, normalise = self.N, self.settings.normalise
        self.unit_video, self.unit_text, self.inverses = self.video, self.text, None
        if normalise:
            self.normalise()
        self.begin()
        of = self.settings.positives
        strides = (None, None) if of.dense is None else of.dense.stride()
        self.logits = contrast.Logits(self.inverses, self.scale.reshape(1), of.dense, *strides, of.verbs, of.nouns)
        self.row_totals, self.col_totals = torch.full((2, 2, N), -torch.inf, dtype=torch.float64, device=self.device)
        self.grad_scale = torch.zeros((), dtype=torch.float64, device=self.device)

    def sweeps(self):
        yield self.stats
        self.total()
        if self.learns:
            yield self.slopes

    def stats(self, first, last):
        down, across = contrast.tiles_of(last - first, self.features, self.logits)
        of_rows, of_columns = self.empty(2, 2, 4 * across, last - first), self.empty(2, 2, down, self.N)
        contrast.stats(self.features, self.logits, contrast.Stats(of_rows, of_columns, first, last))
        self.row_totals[:, first:last] = of_rows.sum(1, dtype=torch.float64).logsumexp(1)
        self.col_totals = torch.logaddexp(self.col_totals, of_columns.sum(1, dtype=torch.float64).logsumexp(1))

    def total(self) -> None:
        if self.logits.dense is None and self.logits.verbs is None:  # the own logits, from the same products
            own, ones = self.empty(self.N), torch.ones((2, self.N), device=self.device)
            panel.own_cosines(self.features, ones if self.inverses is None else self.inverses, own)
            self.row_totals[1] = self.col_totals[1] = own * self.scale
        every = self.row_totals, self.col_totals
        both = [_two_floats(torch.stack((torch.logaddexp(*x), x[1]))) for x in every]
        rests = ((others - positive).sigmoid().float() for others, positive in every)
        self.totals = contrast.Totals(*both, *rests, self.weight)

    def slopes(self, first, last):
        down, across = contrast.tiles_of(last - first, self.features, self.logits)
        slopes, part = self.panel[: last - first], self.empty(down * across)
        contrast.slopes(self.features, self.logits, self.totals, contrast.Slopes(slopes, part, first, last))
        self.grad_scale += part.sum(dtype=torch.float64)
        return slopes

    def finish(self):
        share = 1.0 if self.settings.normalise else 0.5
        gaps = torch.stack([others - positive for others, positive in (self.row_totals, self.col_totals)])
        entries = share * torch.logaddexp(gaps, torch.zeros_like(gaps)).sum(0)
        loss = (entries if self.work.each else entries.sum() / self.N).float()
        share = share if self.weight is not None else share / self.N
        for grad in self.gradients:
            grad.mul_(self.scale * share)
        if self.learns and self.settings.normalise:
            self.through_norms(torch.zeros((2, self.N), dtype=torch.int32, device=self.device), None, 1.0)
        return loss, *self.gradients, (self.grad_scale * share).float()
