"""The pairwise losses in Triton."""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.kernels.pairwise import contrast, panel, sms
from evaat_fast.ops.pairwise import gpu


def scaled(factor: Tensor, gradients: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """factor * gradients in these dtypes, in one launch."""
    outs = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(gradients, dtypes, strict=True)]
    panel.scale(factor, gradients, outs)
    return outs


class _Triton(gpu.Gpu):
    def prepare(self) -> None:
        self.features = panel.features(self.video, self.text)
        super().prepare()

    def normalise(self, sums: Tensor | None = None) -> None:
        panel.prepare(self.features, self.unit_rows(), self.norms, self.inverses, sums)

    def end(
        self, parts: Tensor, slopes: Tensor | None, over: int, sums: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of the scale, sums of parts and of slopes divided by `over`; and what is left to do to the
        gradients, in the same launch."""
        loss, of_scale = self.empty(), self.empty()  # no views: a caller may divide the loss in place
        both = [(None, None, 0) if x is None else (y, x, x.numel()) for x, y in ((parts, loss), (slopes, of_scale))]
        grads = (self.grad_video, self.grad_text)
        panel.finish(self.features, self.norms, sums, self.weight, grads, scale, panel.Ends(*both[0], *both[1], over), 1 / over)
        return loss, of_scale


class Sms(gpu.Sms, _Triton):
    def given(self):
        of, own = self.settings.labels, self.settings.own
        half, row, column = (0, *of.table.stride())[-3:]
        indices, values = (of.video_index, of.caption_index, of.verb), None if of.values is None else of.values.float()
        self.labels = sms.Labels(of.table, row, column, half, *of.table.shape[-2:], *indices, values)
        of_own = self.empty(self.N) if own is None else own.to(self.wide).contiguous()
        self.pairs = sms.Pairs(*self.inverses, self.empty(self.N), of_own, self.weight)
        sms.own_pairs(self.features, self.pairs, self.labels if own is None else None)
        return panel.config(self.dtype)["BLOCK"]

    def read(self, slopes, row_loss, col_loss, first, last):
        out = sms.Out(slopes, *self.sums, row_loss, col_loss, first, last)
        sms.sms_panel(self.features, self.pairs, self.labels, self.settings.penalty, out)


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
