"""InfoNCE on Hopper, by kernels that do not run elsewhere; `triton.py` has it for all GPUs."""

import torch

from evaat_fast.kernels.pairwise import contrast_sm90, contrast_totals
from evaat_fast.ops.pairwise import triton
from evaat_fast.ops.pairwise.positives import Positives

# Bytes of what the first sweep leaves of rows, after which it is added up.
SUMS_BYTES = 32 << 20


class Contrast(triton.Contrast):
    """Of features that `contrast_sm90.serves`, on one rank, each pair its own only positive."""

    COLUMNS = 8  # TMA wants rows that are multiples of 16 bytes apart

    def prepare(self):
        assert self.ranks is None and not self.settings.normalise and self.settings.positives == Positives()
        super(triton.Contrast, self).prepare()
        self.unit_video, self.unit_text, self.norms = self.video, self.text, None
        self.begin()
        N, self.of = self.N, (self.video, self.text, self.scale.reshape(1))
        logs, inverse, rest = self.empty(2, 2, N), self.empty(2, N), self.empty(2, N)
        self.totals = contrast_totals.Totals(logs, inverse, rest, self.weight)
        running, entries = self.empty(N, dtype=torch.float64), self.empty(2, N, dtype=torch.float64)
        self.sums = contrast_totals.Costs(running, entries)
        self.again = torch.empty(1, dtype=torch.int32, device=self.device)
        panels, last = divmod(N, self.rows)
        self.shares = contrast_sm90.shares(self.rows, N, self.device)
        count = panels * self.shares + (contrast_sm90.shares(last, N, self.device) if last else 0)
        self.of_scale = self.empty(count) if self.learns else None

    def sweeps(self):
        self.add_up()
        if self.learns:
            yield self.slopes

    def add_up(self):
        N, strips = self.N, contrast_sm90.strips(self.N)
        rows = min(max(SUMS_BYTES // 4 // strips // 128, 1) * 128, -(-N // 128) * 128)
        parts = max(contrast_sm90.ranges(min(rows, N - first), N, self.device) for first in range(0, N, rows))
        sums = contrast_totals.Sums(self.empty(strips, min(rows, N)), self.empty(parts, N), self.empty(N), self.again)
        for first in range(0, N, rows):
            contrast_sm90.stats(*self.of, sums, self.totals, self.sums, first, min(first + rows, N))
        contrast_totals.again(self.features, sums, self.totals, self.sums, self.of[2], N)

    def slopes(self, first, last):
        slopes, begin = self.panel[: last - first], first // self.rows * self.shares
        part = self.of_scale[begin : begin + contrast_sm90.shares(last - first, self.N, self.device)]
        contrast_sm90.slopes(*self.of, self.totals, part, self.again, slopes, first, last)
        return slopes
