"""The pairwise losses on CPU: torch multiplies panels of similarities, the C++ kernels read and overwrite them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evaat_fast import _cpu
from evaat_fast.ops._core.native import dtype_codes, pointer
from evaat_fast.ops.pairwise.step import Step

# Bytes of a panel, and its least rows. With one thread 4 to 16 MB are alike (1.05 x the bare products); with two, every product
# waits for the slower thread, so fewer and larger ones win wherever something else runs.
PANEL_BYTES = 16 << 20
LEAST_ROWS = 256
# From here on bfloat16 rows are multiplied as such, where the CPU can; below, the time is not in the products.
BF16_ROWS = 1024

_CODES = dtype_codes(_cpu)


def native_bf16() -> bool:
    """Whether bfloat16 products are faster than float32 ones here."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _done(status):
    if status:
        raise TypeError("the C++ kernels of the pairwise losses: dtype not supported")


class _Cpu(Step):
    part: Tensor  # of a product in bfloat16

    def begin(self, dtype: torch.dtype) -> None:
        """Room for a panel of that dtype."""
        self.rows = self.panel_rows(dtype.itemsize, PANEL_BYTES, LEAST_ROWS, 64)
        self.panel, self.threads = torch.empty((self.rows, self.N), dtype=dtype), torch.get_num_threads()

    def normalise(self, video: bool, text: bool) -> None:
        """Norms, each pair's own cosine, and the unit rows that are asked for, in the dtype of the panel."""
        norms = torch.empty((3, self.n), dtype=self.wide)
        dtype, shape, strides = self.panel.dtype, (self.n, self.E), (self.video.stride(0), self.text.stride(0))
        self.unit_video, self.unit_text = (torch.empty(shape, dtype=dtype) if x else None for x in (video, text))
        features = {"video": self.video, "text": self.text, "video_stride": strides[0], "text_stride": strides[1]}
        codes = {"dtype": _CODES[self.dtype], "wide": _CODES[self.wide]}
        self.pairs = _cpu.PairFeatures(N=self.n, E=self.E, norms=norms, **codes, **features)
        units = pointer(self.unit_video), pointer(self.unit_text)
        _done(_cpu.pair_prepare(self.pairs, *units, dtype != self.wide, self.threads))
        self.norms, self.of_panel = norms, self.pairs
        if self.ranks is not None:
            self.norms, self.unit_text = self.ranks.vectors(norms), self.of_all(self.unit_text)
            self.of_panel = _cpu.PairFeatures(N=self.N, E=self.E, norms=self.norms, **codes)

    def through_norms(self, slope: Tensor, factor: float) -> None:
        """In place: factor * (gradients of the unit rows + slope * the pair's other one), through the normalisation."""
        for of_text, grad in ((False, self.grad_video), (True, self.grad_text)):
            if grad is not None:
                _done(_cpu.pair_finish(self.pairs, of_text, slope.data_ptr(), grad.data_ptr(), factor, self.threads))

    def multiply(self, left: Tensor, right: Tensor, first: int, last: int) -> Tensor:
        return torch.mm(left[first:last], right.T, out=self.panel[: last - first])

    def on_panel(self, function: Callable, step: object, s: Tensor, first: int, last: int) -> Tensor:
        """s, overwritten where the function does so."""
        _done(function(step, s.data_ptr(), first, last - first, self.threads))
        return s

    def product(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        if a.dtype != out.dtype:  # the products of bfloat16 panels are rounded once each and added up in float32
            part = torch.mm(a, b, out=self.part[: len(out)])
            out.add_(part) if add else out.copy_(part)
        else:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)


class Sms(_Cpu):
    def prepare(self) -> None:
        N, wide, work, weight = self.N, self.wide, self.work, self.weight
        # Slopes are integers, which bfloat16 holds, unless each pair counts differently.
        low = self.dtype == torch.bfloat16 and weight is None and N >= BF16_ROWS and native_bf16()
        self.begin(torch.bfloat16 if low else wide)
        # In bfloat16 the raw rows are multiplied and the products scaled: rounding the unit rows costs five times the error.
        self.normalise(video=work.need_text or not low, text=work.need_video or not low)
        self.factors: Any = (self.video, self.of_all(self.text)) if low else (self.unit_video, self.unit_text)
        scales = self.norms[:2].clamp_min(1e-8).reciprocal() if low else None
        if low and self.learns:
            self.part = torch.empty((N if work.need_text else self.rows, self.E), dtype=torch.bfloat16)
        mode = "each" if work.each else "weighted" if weight is not None else "slopes" if self.learns else "loss"
        self.weight = None if weight is None else self.of_all(weight.to(wide))
        self.losses = torch.zeros((1 + self.threads if work.each else 1, N), dtype=torch.float64)
        self.sums = torch.zeros((1 + self.threads, N), dtype=torch.int32)
        how = {"dtype": _CODES[self.panel.dtype], "mode": _cpu.SMS_MODES[mode], "penalty": _penalty(self.settings.penalty)}
        known = {"own": self.settings.own.to(wide).contiguous(), "labels": _labels(self.settings.labels, wide)}
        out = {"losses": self.losses, "sums": self.sums}
        self.step = _cpu.SmsStep(pairs=self.of_panel, scales=scales, weight=self.weight, **how, **known, **out)

    def sweeps(self):
        return (self.slopes,)

    def slopes(self, first, last):
        s = self.multiply(self.factors[0], self.factors[1], first, last)
        return self.on_panel(_cpu.sms_panel, self.step, s, first, last)

    def finish(self):
        N, weight = self.N, self.weight
        if self.learns:
            slope = -self.of_own(self.sums).sum(0, dtype=torch.int32).to(self.wide)
            slope = slope if weight is None else slope * weight[: self.n]
            self.through_norms(slope, 1 / (2 * (N - 1) * (N if weight is None else 1)))
        if self.work.each:
            losses = self.of_own(self.losses)
            return ((losses[0] + losses[1:].sum(0)) / (2 * (N - 1))).to(self.wide), *self.gradients
        (loss,) = self.total(self.losses.sum())
        return (loss / (2 * N * (N - 1))).to(self.wide), *self.gradients


@functools.lru_cache(maxsize=64)
def _penalty(costs):
    """A penalty as the kernel takes it. Kept: a training run has one, and to make it is 2 us of a call."""
    return _cpu.Penalty(**vars(costs) | {"rule": _cpu.SMS_RULES[costs.rule]})


def _labels(labels, wide):
    """The labels as the kernel takes them."""
    table, indices = labels.table, ("video_index", "caption_index", "verb")
    given = {name: x.long().contiguous() for name in indices if (x := getattr(labels, name)) is not None}
    if labels.values is None:
        given["dtype"] = _CODES[table.dtype]
    else:
        given |= {"dtype": _cpu.LABEL_CODES, "values": labels.values.to(wide).contiguous()}
    return _cpu.PairLabels(table=table, strides=(0, *table.stride())[-3:], **given)


class Contrast(_Cpu):
    """A panel is multiplied once in each sweep, unless a single one holds all the products."""

    def prepare(self) -> None:
        N, wide = self.N, self.wide
        self.begin(wide)
        # Narrow features are widened: rounding logits of 100 to bfloat16 would be an error of 0.25 in the exponent.
        if self.settings.normalise:
            self.normalise(video=True, text=True)
        else:
            self.unit_video, self.unit_text = self.video.to(wide), self.of_all(self.text).to(wide)
        self.totals, self.row_slope = torch.zeros((4, 2, N), dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
        self.totals[:, 0].fill_(-torch.inf)
        self.weight = None if self.weight is None else self.of_all(self.weight.double())
        of = self.settings.positives
        self.many = of.dense is not None or of.verbs is not None
        known = {"scale": float(self.scale), "positives": _positives(of, self.rows, N)}
        out = {"totals": self.totals, "row_slope": self.row_slope}
        self.step = _cpu.ContrastStep(wide=_CODES[wide], N=N, weight=self.weight, **known, **out)

    def sweeps(self):
        yield self.stats
        if self.ranks is not None:
            of = self.totals[1 : 4 if self.many else 2 : 2]  # of the columns; a positive that is alone has its rank's
            of[:, 0], of[:, 1] = self.ranks.log_sum_exp(of[:, 0], of[:, 1])
        if self.learns:
            yield self.slopes

    def stats(self, first, last):
        self.on_panel(_cpu.contrast_stats, self.step, self.multiply(self.unit_video, self.unit_text, first, last), first, last)

    def slopes(self, first, last):
        s = self.panel if self.rows >= self.n else self.multiply(self.unit_video, self.unit_text, first, last)
        return self.on_panel(_cpu.contrast_slopes, self.step, s, first, last)

    def finish(self):
        row, column, positive_row, positive_column = self.totals[:, 0] + self.totals[:, 1].log()
        share = 1.0 if self.settings.normalise else 0.5
        entries = share * ((row - positive_row) + (column - positive_column))
        entries = entries if self.ranks is None else entries[: self.n]
        loss, of_scale = self.total(entries.sum(), self.row_slope.sum())
        loss = (entries if self.work.each else loss / self.N).to(self.wide)
        share = share if self.weight is not None else share / self.N
        if self.learns and self.settings.normalise:
            self.through_norms(torch.zeros(self.n, dtype=self.wide), float(self.scale) * share)
        elif self.learns:
            for grad in self.gradients:
                grad.mul_(float(self.scale) * share)
        return loss, *self.gradients, (of_scale * share).to(self.wide)


def _positives(positives, rows, N):
    """The positives as the kernel takes them, with room for a panel's mask."""
    dense, verbs, nouns = positives.dense, positives.verbs, positives.nouns
    if dense is None and verbs is None:
        return _cpu.PairPositives()
    mask = torch.empty((rows, -(-N // _cpu.MASK_BLOCK) * _cpu.MASK_BLOCK), dtype=torch.uint8)
    if dense is not None:
        return _cpu.PairPositives(dense=dense, strides=dense.stride(), mask=mask)
    verbs, nouns = verbs.T.contiguous(), nouns.T.contiguous()
    return _cpu.PairPositives(verbs=verbs, nouns=nouns, verb_words=len(verbs), noun_words=len(nouns), mask=mask)
