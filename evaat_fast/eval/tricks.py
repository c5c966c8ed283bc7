"""What raises numbers without a better model. None of it happens unless it is asked for by name, and a result that has it
says so: `TRICKS` are the names that the command line, its table and its JSON know.

The paper's numbers are of one view of each clip and of cosines. EgoVLP's "EgoVLP+" has the dual softmax, which looks at the
whole test set at once: a query's result then depends on the other queries, which no one who searches for one thing has.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRICKS = {
    "flip": "mean embedding of each clip and its mirror image",
    "three-crops": "mean embedding of three square crops along the longer side",
    "dual-softmax": "similarities reweighted by those of all other queries of the test set",
    "ensemble": "mean similarity of several checkpoints",
}

__all__ = ["TRICKS", "crops", "dual_softmax", "ensemble", "flip", "mean_view"]


def flip(video: Tensor) -> Tensor:
    """Mirrors clips [..., W, 3], left to right. Actions to the left become actions to the right."""
    return video.flip(-2)


def crops(video: Tensor, count: int = 3) -> list[Tensor]:
    """Square crops of clips [..., H, W, 3] at equal distances along the longer side, first to last; of a square all of it.

    Raises:
        ValueError: count is below 1.
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected an integer from 1, got {count!r}")
    height, width = video.shape[-3], video.shape[-2]
    side, room = min(height, width), abs(height - width)
    starts = [round(i * room / (count - 1)) for i in range(count)] if count > 1 else [room // 2]
    axis = -3 if height > width else -2
    return [video.narrow(axis, start, side) for start in starts]


def mean_view(encode: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """The mean of the views' normalised embeddings, normalised again.

    Args:
        encode: of a batch of clips, gives embeddings [B, E]. views: batches of one shape, one a view.
    """
    total: Tensor | None = None
    for view in views:
        embeddings = F.normalize(encode(view), dim=-1)
        total = embeddings if total is None else total + embeddings
    if total is None:
        raise ValueError("views: expected at least one")
    return F.normalize(total, dim=-1)


def dual_softmax(sim: Tensor, temperature: float = 500.0) -> Tensor:
    """EgoVLP's: a softmax over the clips of each caption, at `temperature`, times sim, then one over each clip's captions.

    Args:
        sim: [clips, captions]. EgoVLP's are products of embeddings that are not normalised, of all narrations with their
            repetitions; its temperature of 500 does nothing to cosines, for which 0.01 to 0.1 is usual.

    Returns:
        Probabilities [clips, captions]: float32, float64 for float64.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    if sim.dtype != torch.float64:
        sim = sim.float()
    return ((sim / temperature).softmax(0) * sim).softmax(1)


def ensemble(sims: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The weighted mean of several models' similarities; equal weights without any.

    Raises:
        ValueError: no similarities, shapes or counts that differ, weights that are negative or sum to 0.
    """
    if not sims or any(sim.shape != sims[0].shape for sim in sims):
        raise ValueError(f"sims: expected similarities of one shape, got {[list(sim.shape) for sim in sims]}")
    weights = [1.0] * len(sims) if weights is None else list(weights)
    if len(weights) != len(sims) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"weights: expected {len(sims)} numbers from 0, not all 0, got {weights!r}")
    mean = torch.zeros_like(sims[0], dtype=torch.float64 if sims[0].dtype == torch.float64 else torch.float32)
    for sim, weight in zip(sims, weights, strict=True):
        mean += sim * (weight / sum(weights))
    return mean
