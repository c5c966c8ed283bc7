"""The pairwise losses in Triton."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evaat_fast.kernels.pairwise import contrast, panel, sms
from evaat_fast.kernels.record import again
from evaat_fast.ops.pairwise import gpu
from evaat_fast.ops.pairwise.ranks import Ranks


def scaled(factor: Tensor, gradients: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
    """factor * gradients in these dtypes, in one launch."""

    def scale():
        outs = tuple(torch.empty_like(x, dtype=dtype) for x, dtype in zip(gradients, dtypes, strict=True))
        panel.scale(factor, gradients, outs)
        return outs

    return again(("scaled", dtypes), (factor, *gradients), scale)


class _Triton(gpu.Gpu):
    def prepare(self) -> None:
        self.features = self.whole = panel.features(self.video, self.text)
        super().prepare()
        if self.ranks is not None:  # a tile of the last videos reads up to 128 rows
            video = torch.nn.functional.pad(self.video, (0, 0, 0, -self.n % 128))
            self.whole = panel.features(video, self.of_all(self.text))._replace(N=self.N)

    def normalise(self, sums: Tensor | None = None) -> None:
        panel.prepare(self.features, self.unit_rows(), self.norms, self.inverses, sums)
        self.unit_text = self.of_all(self.unit_text) if self.work.need_video else self.unit_text

    def end(
        self, parts: Tensor, slopes: Tensor | None, over: int, sums: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of the scale, sums of parts and of slopes divided by `over`; and what is left to do to the
        gradients, in the same launch."""
        loss, of_scale = self.empty(), self.empty()  # no views: a caller may divide the loss in place
        both = [(None, None, 0) if x is None else (y, x, x.numel()) for x, y in ((parts, loss), (slopes, of_scale))]
        grads = (self.grad_video, self.grad_text)
        panel.finish(self.features, self.norms, sums, self.weight, grads, scale, panel.Ends(*both[0], *both[1], over), 1 / over)
        return self.total(loss, of_scale)


class Sms(gpu.Sms, _Triton):
    def given(self):
        of, own = self.settings.labels, self.settings.own
        half, row, column = (0, *of.table.stride())[-3:]
        indices, values = (of.video_index, of.caption_index, of.verb), None if of.values is None else of.values.float()
        self.labels = sms.Labels(of.table, row, column, half, *of.table.shape[-2:], *indices, values)
        of_own = self.empty(self.N) if own is None else own.to(self.wide).contiguous()
        self.pairs = sms.Pairs(*self.inverses, self.empty(self.n), of_own, self.weight)
        sms.own_pairs(self.features, self.pairs, self.labels if own is None else None)
        if self.ranks is not None:
            self.pairs = sms.Pairs(*self.ranks.vectors(torch.stack(self.pairs[:3])), of_own, self.weight)
        return panel.config(self.dtype)["BLOCK"]

    def read(self, slopes, row_loss, col_loss, first, last):
        out = sms.Out(slopes, *self.sums, row_loss, col_loss, first, last)
        sms.sms_panel(self.whole, self.pairs, self.labels, self.settings.penalty, out)


class Contrast(_Triton):
    of_scale: Any

    def prepare(self):
        super().prepare()
        N, normalise = self.N, self.settings.normalise
        self.unit_video, self.unit_text, self.norms, inverses = self.video, self.whole.text, None, None
        if normalise:
            self.normalise()
            inverses = self.inverses if self.ranks is None else self.ranks.vectors(self.inverses)
        self.begin()
        of = self.settings.positives
        strides = (None, None) if of.dense is None else of.dense.stride()
        self.logits = contrast.Logits(inverses, self.scale.reshape(1), of.dense, *strides, of.verbs, of.nouns)
        self.totals = contrast.Totals(*self.empty(2, 2, 2, N), *self.empty(2, N), self.weight)
        self.sums = contrast.Sums(*self.empty(2, 2, N, dtype=torch.float64))
        self.own = self.empty(N)
        down, across = self.tiles(self.rows)
        kinds = 1 if contrast.kind_of(self.logits) == contrast.OWN else 2
        self.of_rows, self.of_columns = self.empty(kinds, 2, 4 * across, self.rows), self.empty(kinds, 2, down, N)
        self.of_scale = self.empty(self.tiles_before(self.n)) if self.learns else None

    def tiles(self, rows):
        return contrast.tiles_of(rows, self.whole, self.logits)

    def sweeps(self):
        yield self.stats
        if self.ranks is not None:
            self.end_columns(self.ranks)
        if self.learns:
            yield self.slopes

    def stats(self, first, last):
        out = contrast.Stats(self.of_rows, self.of_columns, self.own, first, last)
        contrast.stats(self.whole, self.logits, out, self.sums, self.totals)

    def slopes(self, first, last):
        slopes, part = self.panel[: last - first], self.of_scale[self.tiles_before(first) : self.tiles_before(last)]
        contrast.slopes(self.whole, self.logits, self.totals, contrast.Slopes(slopes, part, first, last))
        return slopes

    def end_columns(self, ranks: Ranks) -> None:
        """What the kernel makes of the columns' sums behind the last video, here of the videos of all ranks."""
        many = contrast.kind_of(self.logits) != contrast.OWN
        sums = self.sums.running if many else self.sums.running[:1]
        largest, total = ranks.log_sum_exp(sums, torch.ones_like(sums))
        others, *positives = (largest + total.log()).unbind()
        positive = positives[0] if many else self.of_all(self.own[: self.n]).double()
        for target, x in zip(self.totals.columns, (torch.logaddexp(others, positive), positive), strict=True):
            target[0] = x  # rounded, and what that leaves
            target[1] = torch.where(x.isinf(), 0.0, x - target[0].double())
        self.totals.rest_columns.copy_((others - positive).sigmoid())
        self.sums.entries[1] = torch.nn.functional.softplus(others - positive, threshold=50)

    def finish(self):
        share = 1 if self.settings.normalise else 2  # both directions added, or their mean
        entries = self.sums.entries[:, : self.n].contiguous()
        over = share * (1 if self.weight is not None else self.N)
        loss, of_scale = self.end(entries, self.of_scale, over, None, self.scale)
        return (entries.sum(0) / share).float() if self.work.each else loss, *self.gradients, of_scale
