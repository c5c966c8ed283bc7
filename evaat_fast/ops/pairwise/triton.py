"""The pairwise losses in Triton."""

import torch

from evaat_fast.kernels.pairwise import contrast, panel, sms
from evaat_fast.ops.pairwise import gpu


class _Triton(gpu.Gpu):
    def prepare(self) -> None:
        self.features = panel.features(self.video, self.text)
        super().prepare()

    def normalise(self) -> None:
        panel.prepare(self.features, self.unit_rows(), self.norms, self.inverses)

    def through_norms(self, sums, weight, factor):
        panel.finish(self.features, self.norms, sums, weight, (self.grad_video, self.grad_text), factor)


class Sms(gpu.Sms, _Triton):
    def given(self):
        of, own = self.settings.labels, self.settings.own.to(self.wide).contiguous()
        half, row, column = (0, *of.table.stride())[-3:]
        indices, values = (of.video_index, of.caption_index, of.verb), None if of.values is None else of.values.float()
        self.labels = sms.Labels(of.table, row, column, half, *of.table.shape[-2:], *indices, values)
        self.pairs = sms.Pairs(*self.inverses, self.empty(self.N), own, self.weight)
        panel.own_cosines(self.features, self.inverses, self.pairs.cosine)
        return panel.config(self.dtype)["BLOCK"]

    def read(self, slopes, row_loss, col_loss, first, last):
        out = sms.Out(slopes, *self.sums, row_loss, col_loss, first, last)
        sms.sms_panel(self.features, self.pairs, self.labels, self.settings.penalty, out)


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
