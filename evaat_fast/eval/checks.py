"""What the metrics ask of their arguments."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["dense", "scores"]


def dense(name: str, x: Tensor | np.ndarray) -> Tensor:
    """x as a dense tensor without a gradient; TypeError where it is none."""
    try:
        x = torch.as_tensor(x).detach()
    except Exception:  # whatever torch or numpy say of what is no array
        raise TypeError(f"{name}: expected a tensor or an array of numbers, got {type(x).__name__}") from None
    if x.layout is not torch.strided or x.is_meta:
        raise TypeError(f"{name}: expected a dense tensor with values, got a {x.layout} one on {x.device}")
    return x


def scores(name: str, x: Tensor | np.ndarray) -> Tensor:
    """x as a matrix of floating-point similarities, not empty; infinities may be there, NaN may not."""
    x = dense(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {x.dtype}")
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name}: expected a matrix, not empty, got {list(x.shape)}")
    if x.element_size() == 1:  # torch compares no float8
        x = x.float()
    if x.max().isnan():  # a maximum passes NaN on, and needs no matrix of its own
        row, column = x.isnan().nonzero()[0].tolist()
        raise ValueError(f"{name}: {int(x.isnan().sum())} NaN, the first at row {row}, column {column}")
    return x
