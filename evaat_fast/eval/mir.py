"""The metrics of the EPIC-Kitchens-100 multi-instance retrieval challenge, with all their particulars.

    mir.mean_average_precision(sim, relevancy)      # video -> text, for sim [videos, captions]
    mir.mean_average_precision(sim.T, relevancy.T)  # text -> video
    mir.evaluate(sim, relevancy)                    # both, their averages, and nDCG, in per cent
    mir.report(sim, relevancy).notes                # what to know before believing them

They are not what their names suggest. mAP: a hit is a candidate whose relevancy is exactly 1, but the precision at a
hit accumulates the graded relevancies of everything ranked down to it; a binary AP is 15 times smaller for random
scores. nDCG: only the first K candidates count, K being how many have a relevancy above 0; uncut, random scores get
60 % instead of 11.

Ties: the challenge's mAP sorts negated similarities, so that equal ones keep the order of the columns; its nDCG reverses
an ascending order, so that they come last to first. Both are done here. NumPy's default sort, which the challenge uses,
keeps no order among equals: these are its numbers with a stable one, and elsewhere they move by 1e-2 in bfloat16.

A metric that would be the same for any similarities is nan, never 100: `report` says why.
Source: Damen et al., "Rescaling Egocentric Vision", IJCV 2022, and the challenge's evaluation code.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaat_fast.eval import checks
from evaat_fast.eval.ranking import Ranked, rank
from evaat_fast.eval.result import Result

__all__ = ["evaluate", "mean_average_precision", "ndcg", "per_row", "report"]


def mean_average_precision(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> float:
    """Graded mean average precision of retrieving columns by rows.

    Args:
        sim: [Q, C] similarities, any floating dtype; infinities rank first or last. Tensors, on any device, or arrays.
        relevancy: [Q, C] in 0..1, float32 or float64: exactly 1 is a hit.

    Returns:
        A float in 0..1: the mean over the rows that have a hit; nan where none has.

    Raises:
        TypeError: sim is not floating point, or relevancy is neither float32 nor float64.
        ValueError: the shapes differ or are empty, a NaN in sim, a relevancy outside 0..1.
    """
    return per_row(sim, relevancy)[0].nanmean().item()


def ndcg(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> float:
    """Normalised discounted cumulative gain of retrieving columns by rows, cut at the number of non-zero relevancies.

    Args, Raises: as `mean_average_precision`.

    Returns:
        A float in 0..1: the mean over the rows that have a relevancy above 0; nan where none has.
    """
    return per_row(sim, relevancy)[1].nanmean().item()


def per_row(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """The average precision and the nDCG of every row, float64 [Q] each, nan where they are not defined.

    Args, Raises: as `mean_average_precision`.
    """
    ranked = rank(*_checked(sim, relevancy))
    return ranked.precision / ranked.hits, ranked.gain / ranked.best


def evaluate(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> dict[str, float]:
    """Both metrics in both directions.

    Args, Raises: as `mean_average_precision`, rows being videos and columns captions.

    Returns:
        A dict of per cents, "mAP_v2t", "mAP_t2v", "mAP" (their average), "nDCG_v2t", "nDCG_t2v", "nDCG", nan where the
        labels leave nothing to measure, and of the counts of queries without a hit, which mAP leaves out,
        "excluded_v2t" and "excluded_t2v".
    """
    result = report(sim, relevancy)
    return {**result.metrics, **{f"excluded_{way}": result.counts[f"excluded_{way}"] for way in ("v2t", "t2v")}}


def report(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> Result:
    """What `evaluate` returns, the counts behind it, and notes.

    Args, Raises: as `mean_average_precision`, rows being videos and columns captions.

    Returns:
        A Result. Its notes name each metric that says nothing (no query has a hit; every candidate is as relevant as
        every other, or the only one: any order gets 100 %), queries that are left out or get 100 % in any case, and
        similarities that are all equal.
    """
    sim, relevancy = _checked(sim, relevancy)
    metrics: dict[str, float] = {}
    counts = {"clips": sim.shape[0], "captions": sim.shape[1]}
    notes = []
    if sim.numel() > 1 and sim.min() == sim.max():
        notes.append("all similarities are equal: the metrics are those of the order of the files")
    ways = {"v2t": (sim, relevancy, "clip", "caption"), "t2v": (sim.T, relevancy.T, "caption", "clip")}
    for way, (scores, labels, query, candidate) in ways.items():
        ranked = rank(scores, labels)
        for name, values, void, why in _judged(ranked, scores.shape[1], query, candidate):
            metrics[f"{name}_{way}"] = math.nan if why else 100 * values.nanmean().item()
            if why:
                notes.append(f"{name}_{way} is not defined: {why}")
            elif void:
                notes.append(f"{name}_{way}: {void} of {len(values)} {query}s get 100 % whatever the similarities are")
        counts[f"excluded_{way}"] = int((ranked.hits == 0).sum())
        counts[f"excluded_nDCG_{way}"] = int((ranked.relevant == 0).sum())
    for name in ("mAP", "nDCG"):
        metrics[name] = (metrics[f"{name}_v2t"] + metrics[f"{name}_t2v"]) / 2
    return Result(metrics, counts, tuple(notes))


def _judged(ranked: Ranked, columns: int, query: str, candidate: str) -> Iterator[tuple[str, Tensor, int, str]]:
    """Of each metric: its name, the rows' values, how many of them no order can change, and why it is void, or ""."""
    everywhere = f"there is one {candidate} only" if columns == 1 else f"every {candidate} is as relevant as any other"
    precision, gain = ranked.precision / ranked.hits, ranked.gain / ranked.best
    for name, values, defined, fixed, missing in (
        ("mAP", precision, ranked.hits > 0, ranked.hits == columns, f"no {query} has a {candidate} of relevancy 1"),
        ("nDCG", gain, ranked.relevant > 0, ranked.constant, f"no {query} has a {candidate} of a relevancy above 0"),
    ):
        void, total = int((fixed & defined).sum()), int(defined.sum())
        yield name, values, void, missing if total == 0 else f"{everywhere}: any order gets 100 %" if void == total else ""


def _checked(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    relevancy = checks.dense("relevancy", relevancy)
    if relevancy.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"relevancy: expected float32 or float64, which keep an exact 1 apart, got {relevancy.dtype}")
    sim = checks.dense("sim", sim)
    if sim.ndim != 2 or sim.shape != relevancy.shape or sim.numel() == 0:
        raise ValueError(
            f"sim, relevancy: expected two matrices of one shape, not empty, got {list(sim.shape)} and {list(relevancy.shape)}"
        )
    sim = checks.scores("sim", sim)
    low, high = relevancy.min().item(), relevancy.max().item()
    if math.isnan(high):
        raise ValueError(f"relevancy: {int(relevancy.isnan().sum())} NaN")
    if low < 0 or high > 1:
        raise ValueError(f"relevancy: expected values from 0 to 1, got {low} to {high}")
    return sim, relevancy.to(sim.device)
