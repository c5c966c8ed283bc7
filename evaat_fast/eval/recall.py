"""Recall@k and median rank of retrieval, with several right candidates for a query, and ties counted fairly.

    recall.report(sim, relevancy == 1).metrics   # R@1_v2t, ..., R@10_t2v in per cent, MedR_v2t, MedR_t2v

Recall@k is the share of queries that have at least one right candidate among the first k, as video retrieval counts it:
one is enough. A rank is that of the best right candidate, from 1. Queries without a right candidate are left out, and
counted.

Ties: candidates of equal similarity stand in no order, so a query counts with its chance under a random one, and its
rank is the expected one: n tied candidates with p right ones behind a better ones have it at a + (n + 1) / (p + 1). Equal
similarities therefore get what chance gets, where an order of the columns can get all or nothing.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evaat_fast.eval import checks
from evaat_fast.eval.result import Result

_TILE = 1 << 22  # elements compared at once

__all__ = ["per_row", "report"]


def per_row(sim: Tensor | np.ndarray, right: Tensor | np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> tuple[Tensor, Tensor]:
    """Each row's chances of a right column among the first k, and the expected rank of its best one.

    Args:
        sim: [Q, C] similarities, any floating dtype and device. right: bool [Q, C].
        ks: how many columns are looked at, each from 1.

    Returns:
        float64 [Q, len(ks)] in 0..1 and float64 [Q], from 1; nan for a row without a right column.

    Raises:
        TypeError: sim is not floating point, or right not bool.
        ValueError: the shapes differ or are empty, a NaN in sim, a k below 1.
    """
    sim, right = checks.scores("sim", sim), checks.dense("right", right)
    if right.dtype != torch.bool:
        raise TypeError(f"right: expected bool, as relevancy == 1 gives, got {right.dtype}")
    if sim.shape != right.shape:
        raise ValueError(f"sim, right: expected two matrices of one shape, got {list(sim.shape)} and {list(right.shape)}")
    if any(not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"ks: expected integers from 1, got {ks!r}")
    right, step = right.to(sim.device), max(1, _TILE // sim.shape[1])
    parts = [_tile(some, mine, ks) for some, mine in zip(sim.split(step), right.split(step), strict=True)]
    chances, ranks = map(torch.cat, zip(*parts, strict=True))
    return chances, ranks


def _tile(sim, right, ks):
    best = sim.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    above, tied = (sim > best).sum(1).double(), sim == best
    count, good = tied.sum(1).double(), (tied & right).sum(1).double()
    none = ~right.any(1)
    ranks = (above + (count + 1) / (good + 1)).masked_fill(none, math.nan)
    chances = []
    for k in ks:
        # None of the good ones among the first j of n: C(n - p, j) / C(n, j), as gammas.
        j = torch.minimum((k - above).clamp(min=0), count)
        left = count - good - j
        log = torch.lgamma(count - good + 1) - torch.lgamma(left.clamp(min=0) + 1)
        log += torch.lgamma(count - j + 1) - torch.lgamma(count + 1)
        chance = torch.where(left < 0, 1.0, -torch.expm1(log))
        # One right column, and all of them tied ones, are exact.
        chance = torch.where(good == count, (j > 0).double(), torch.where(good == 1, j / count, chance))
        chances.append(chance.masked_fill(none, math.nan))
    return torch.stack(chances, 1), ranks


def report(sim: Tensor | np.ndarray, right: Tensor | np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> Result:
    """Recall@k and median rank in both directions.

    Args, Raises: as `per_row`, rows being videos and columns captions.

    Returns:
        A Result: "R@1_v2t", "R@1_t2v", ... in per cent, and "MedR_v2t", "MedR_t2v", ranks from 1. What no order could
        change is nan, with a note: no right candidate, as many candidates as k, all candidates right.
    """
    sim, right = checks.scores("sim", sim), checks.dense("right", right)
    metrics: dict[str, float] = {}
    counts, notes = {"clips": sim.shape[0], "captions": sim.shape[1]}, []
    for way, scores, labels, query, candidate in (
        ("v2t", sim, right, "clip", "caption"),
        ("t2v", sim.T, right.T, "caption", "clip"),
    ):
        chances, ranks = per_row(scores, labels, ks)
        some, every = labels.any(1), labels.all(1)
        if not some.any():
            why = f"no {query} has a right {candidate}"
        else:
            why = f"every {candidate} is right" if every[some].all() else ""
        for k, values in zip(ks, chances.unbind(1), strict=True):
            reason = why or (f"there are {scores.shape[1]} {candidate}s only" if k >= scores.shape[1] else "")
            metrics[f"R@{k}_{way}"] = math.nan if reason else 100 * values.nanmean().item()
            if reason:
                notes.append(f"R@{k}_{way} is not defined: {reason}")
        metrics[f"MedR_{way}"] = math.nan if why else float(np.median(ranks[some].cpu().numpy()))
        if why:
            notes.append(f"MedR_{way} is not defined: {why}")
        counts[f"excluded_{way}"] = int((~some).sum())
    return Result(metrics, counts, tuple(notes))
