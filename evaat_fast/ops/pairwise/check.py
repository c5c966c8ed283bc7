"""What the pairwise losses take as options, what they check alike, and the context they compute in."""

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from evaat_fast.ops._core.autocast import autocast_dtype

Reduction = Literal["mean", "none"]
GradMode = Literal["ddp", "sum"]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """What every loss takes beside its own arguments. panel_rows: as `step.Work` has it; no public function sets it."""

    reduction: Reduction = "mean"
    group: object = None
    grad_mode: GradMode = "ddp"
    backend: str | None = None
    validate: bool | None = None
    panel_rows: int | None = None

    def check(self) -> None:
        if self.reduction not in ("mean", "none"):
            raise ValueError(f'reduction: expected "mean" or "none", got {self.reduction!r}')
        if self.grad_mode not in ("ddp", "sum"):
            raise ValueError(f'grad_mode: expected "ddp" or "sum", got {self.grad_mode!r}')


def no_gradient(name: str, requires_grad: bool) -> None:
    if requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and the losses compute none for labels; pass it detached")


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Products are computed in the dtype the reference names, also where the caller trains under autocast."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
