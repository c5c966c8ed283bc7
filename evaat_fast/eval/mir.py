"""The metrics of the EPIC-Kitchens-100 multi-instance retrieval challenge, with all their particulars.

    mir.mean_average_precision(sim, relevancy)      # video -> text, for sim [videos, captions]
    mir.mean_average_precision(sim.T, relevancy.T)  # text -> video
    mir.evaluate(sim, relevancy)                    # both, their averages, and nDCG, in per cent

They are not what their names suggest. mAP: a hit is a candidate whose relevancy is exactly 1, but the precision at a
hit accumulates the graded relevancies of everything ranked down to it; a binary AP is 15 times smaller for random
scores. nDCG: only the first K candidates count, K being how many have a relevancy above 0; uncut, random scores get
60 % instead of 11. Equal similarities keep the order of the columns, as a stable sort does. Source: Damen et al.,
"Rescaling Egocentric Vision", IJCV 2022, and the challenge's evaluation code.
"""

import numpy as np
import torch
from torch import Tensor

_TILE = 1 << 21  # elements sorted at once: 9,668 x 3,842 then needs 0.25 GB beside its inputs instead of 1.8

__all__ = ["evaluate", "mean_average_precision", "ndcg", "per_row"]


def mean_average_precision(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> float:
    """Graded mean average precision of retrieving columns by rows.

    Args:
        sim: [Q, C] similarities, any floating dtype; infinities rank first or last. Tensors or arrays.
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


def evaluate(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> dict[str, float]:
    """Both metrics in both directions.

    Args, Raises: as `mean_average_precision`, rows being videos and columns captions.

    Returns:
        A dict of per cents, "mAP_v2t", "mAP_t2v", "mAP" (their average), "nDCG_v2t", "nDCG_t2v", "nDCG", and of the
        counts of queries without a hit, which mAP leaves out, "excluded_v2t" and "excluded_t2v".
    """
    sim, relevancy = _checked(sim, relevancy)
    metrics: dict[str, float] = {}
    for way, pair in {"v2t": (sim, relevancy), "t2v": (sim.T, relevancy.T)}.items():
        precision, gain = _per_row(*pair)
        metrics[f"mAP_{way}"] = 100 * precision.nanmean().item()
        metrics[f"nDCG_{way}"] = 100 * gain.nanmean().item()
        metrics[f"excluded_{way}"] = int(precision.isnan().sum())
    for name in ("mAP", "nDCG"):
        metrics[name] = (metrics[f"{name}_v2t"] + metrics[f"{name}_t2v"]) / 2
    return metrics


def per_row(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """The average precision and the nDCG of every row, float64 [Q] each, nan where they are not defined.

    Args, Raises: as `mean_average_precision`.
    """
    return _per_row(*_checked(sim, relevancy))


def _matrix(name: str, x: Tensor | np.ndarray) -> Tensor:
    try:
        x = torch.as_tensor(x).detach()
    except Exception:  # whatever torch or numpy say of what is no array
        raise TypeError(f"{name}: expected a tensor or an array of numbers, got {type(x).__name__}") from None
    if x.layout is not torch.strided or x.is_meta:
        raise TypeError(f"{name}: expected a dense tensor with values, got a {x.layout} one on {x.device}")
    return x


def _checked(sim: Tensor | np.ndarray, relevancy: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    sim, relevancy = _matrix("sim", sim), _matrix("relevancy", relevancy)
    if not sim.is_floating_point():
        raise TypeError(f"sim: expected floating point, got {sim.dtype}")
    if relevancy.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"relevancy: expected float32 or float64, which keep an exact 1 apart, got {relevancy.dtype}")
    if sim.ndim != 2 or sim.shape != relevancy.shape or sim.numel() == 0:
        raise ValueError(
            f"sim, relevancy: expected two matrices of one shape, not empty, got {list(sim.shape)} and {list(relevancy.shape)}"
        )
    if sim.isnan().any():
        row, column = sim.isnan().nonzero()[0].tolist()
        raise ValueError(f"sim: {int(sim.isnan().sum())} NaN, the first at row {row}, column {column}")
    if not ((relevancy >= 0) & (relevancy <= 1)).all():
        if relevancy.isnan().any():
            raise ValueError(f"relevancy: {int(relevancy.isnan().sum())} NaN")
        low, high = relevancy.min().item(), relevancy.max().item()
        raise ValueError(f"relevancy: expected values from 0 to 1, got {low} to {high}")
    return sim, relevancy.to(sim.device)


def _per_row(sim: Tensor, relevancy: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = sim.shape
    ranks = torch.arange(1, columns + 1, dtype=torch.float64, device=sim.device)
    discounts = 1 / (ranks + 1).log2()
    precision, gain = (torch.zeros(rows, dtype=torch.float64, device=sim.device) for _ in range(2))
    tile = max(1, _TILE // columns)
    for first in range(0, rows, tile):
        some = slice(first, first + tile)
        truth = relevancy[some].contiguous()
        order = sim[some].contiguous().sort(dim=1, descending=True, stable=True).indices
        ranked = truth.gather(1, order).double()
        hits = ranked == 1
        precision[some] = (ranked.cumsum(1) / ranks * hits).sum(1) / hits.sum(1)
        shown = ranks <= (truth > 0).sum(1, keepdim=True)
        best = truth.sort(dim=1, descending=True).values.double() @ discounts
        gain[some] = (ranked * shown) @ discounts / best
    return precision, gain
