"""The one loop over panels: some videos times all captions, for every loss on every backend."""

from typing import Any

from torch import Tensor


def run(step: Any) -> tuple[Tensor, ...]:
    """The loss and the gradients of a step (`step.Step`).

    Memory is linear in N: a sweep reads one panel of similarities and may turn it into slopes, of which two products make the
    gradients of the unit rows. The max-margin losses need one sweep, as their slopes depend on nothing but the diagonal of the
    similarities; the contrastive ones two, for the totals come first.
    """
    step.prepare()
    for sweep in step.sweeps():
        for first in range(0, step.N, step.rows):
            last = min(first + step.rows, step.N)
            slopes = sweep(first, last)
            if slopes is not None and step.grad_video is not None:
                step.product(slopes, step.unit_text, step.grad_video[first:last])
            if slopes is not None and step.grad_text is not None:
                step.product(slopes.T, step.unit_video[first:last], step.grad_text, add=first > 0)
    return step.finish()
