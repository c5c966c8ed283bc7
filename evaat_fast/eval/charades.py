"""Charades-Ego: mean average precision over action classes, as LaViLa and EgoVLP compute it.

    charades.report(sim, labels).metrics["mAP"]   # sim [videos, 157 classes], labels bool

For each class the videos are ranked, and the average precision is the ordinary one: the mean, over the videos that have the
class, of the share of such videos down to theirs. A video without any label is ranked last in every class. mAP is the mean
over the classes that some video has. In those code bases a class that none has makes the mean NaN, which happens as soon
as one evaluates part of the test set; here it is left out and counted. On the full test set there is none, and the
numbers are theirs, which their authors call approximate: the official script is in MATLAB.

Scores are compared across videos, within a class. That is why `softmax=True`, over the classes of a video, changes the
result: LaViLa's evaluation of fine-tuned models has it (of plain cosines, with no temperature), its zero-shot one not.
Ties: equal scores keep the order of the videos.
"""

import math

import numpy as np
import torch
from torch import Tensor

from evaat_fast.eval import checks
from evaat_fast.eval.result import Result

__all__ = ["average_precision", "report"]


def average_precision(sim: Tensor | np.ndarray, labels: Tensor | np.ndarray, softmax: bool = False) -> Tensor:
    """The average precision of every class.

    Args:
        sim: [videos, classes], any floating dtype. labels: bool [videos, classes], or numbers 0 and 1.
        softmax: over classes first.

    Returns:
        float64 [classes] in 0..1, nan where no video has the class.

    Raises:
        TypeError: sim is not floating point.
        ValueError: the shapes differ or are empty, a NaN in sim, labels other than 0 and 1.
    """
    sim, right = checks.scores("sim", sim), checks.dense("labels", labels)
    if sim.shape != right.shape:
        raise ValueError(f"sim, labels: expected two matrices of one shape, got {list(sim.shape)} and {list(right.shape)}")
    if not ((right == 0) | (right == 1)).all():
        raise ValueError("labels: expected 0 and 1")
    right = right.to(sim.device) == 1
    if softmax:
        sim = (sim if sim.dtype == torch.float64 else sim.float()).softmax(1)
    sim = sim.masked_fill(~right.any(1, keepdim=True), -math.inf)
    order = sim.sort(dim=0, descending=True, stable=True).indices
    hits = right.gather(0, order).double()
    ranks = torch.arange(1, len(sim) + 1, dtype=torch.float64, device=sim.device)[:, None]
    return (hits.cumsum(0) / ranks * hits).sum(0) / hits.sum(0)


def report(sim: Tensor | np.ndarray, labels: Tensor | np.ndarray, softmax: bool = False) -> Result:
    """mAP over the classes that occur.

    Args, Raises: as `average_precision`.

    Returns:
        A Result: "mAP" in per cent; counts "videos", "unlabelled" ones among them, "classes" and "absent" ones.
    """
    precision = average_precision(sim, labels, softmax)
    right = checks.dense("labels", labels) == 1
    videos, classes = right.shape
    present, everywhere, labelled = right.any(0), right.all(0), right.any(1)
    counts = {
        "videos": videos,
        "unlabelled": int((~labelled).sum()),
        "classes": classes,
        "absent": int((~present).sum()),
    }
    notes = []
    value = 100 * precision.nanmean().item()
    if not present.any():
        notes.append("mAP is not defined: no video has a label")
    elif everywhere[present].all():
        value = math.nan
        notes.append("mAP is not defined: every video has every class that occurs")
    elif counts["absent"]:
        notes.append(f"{counts['absent']} of {classes} classes are in no video: mAP is over the other {int(present.sum())}")
    return Result({"mAP": value}, counts, tuple(notes))
