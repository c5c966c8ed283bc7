"""The learning rate as a function of the step."""

import math
from typing import Literal


def warmup(
    step: int,
    *,
    lr: float,
    steps: int,
    warmup_steps: int,
    start_lr: float = 0.0,
    end_lr: float = 0.0,
    name: Literal["cosine", "constant"] = "cosine",
) -> float:
    """Linear warm-up, then a half cosine or a constant.

    Args:
        step: from 0 to steps - 1. lr: the peak, reached at warmup_steps. steps: of the whole run.
        start_lr: at step 0 of a warm-up. end_lr: what the cosine approaches; it would be reached at `steps`.
        name: "cosine" or "constant".

    Returns:
        The learning rate of that step.
    """
    if step < warmup_steps:
        return start_lr + (lr - start_lr) * (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return lr
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end_lr + (lr - end_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
