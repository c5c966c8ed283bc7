"""The max-margin ranking losses, of features and of a matrix of similarities that exists."""

import torch
from torch import Tensor, nn

from evaat_fast import ops
from evaat_fast.losses._gather import check_tensor


class Ranking(nn.Module):
    """What LaViLa's and EgoVLP's modules hold."""

    def __init__(self, margin: float, fix_norm: bool):
        super().__init__()
        self.fix_norm, self.margin = fix_norm, margin
        self.loss = nn.MarginRankingLoss(margin)  # there in theirs, and not used


def mi_mm(images: Tensor, texts: Tensor, margin: float, fix_norm: bool) -> Tensor:
    """fix_norm: leave each pair's own margin out of the mean."""
    loss = ops.mi_mm_loss(images, texts, margin=margin)
    return loss if fix_norm else _with_own(loss, loss.new_full((len(images),), max(margin, 0.0)))


def adaptive(images: Tensor, texts: Tensor, weight: Tensor, margin: float, fix_norm: bool) -> Tensor:
    """As `mi_mm`, with the margin of pair i times weight[i]."""
    weight = floating(weight)
    loss = ops.adaptive_mi_mm_loss(images, texts, weight, margin=margin)
    return loss if fix_norm else _with_own(loss, (margin * weight).relu().to(loss.dtype))


def _with_own(loss, own):
    """own [N]: what the diagonal adds to a mean over all of both matrices."""
    N = len(own)
    return loss * ((N - 1) / N) + own.mean() / N if N else loss


def results(loss: Tensor) -> dict[str, Tensor]:
    # Two tensors, as theirs are: scripts divide the first in place.
    return {"loss": loss, "max_margin_loss": loss.clone()}


def required(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise TypeError("weight: expected a tensor [N], the relevancy of each pair itself, got None")
    return weight


def floating(x: Tensor) -> Tensor:
    """Weights as the losses take them: theirs may be integers, too."""
    return x if x.is_floating_point() else x.float()


def of_matrix(x: Tensor, margin: float | Tensor, fix_norm: bool) -> Tensor:
    """The mean of relu(margin_i - (x_ii - x_ij)) and relu(margin_i - (x_ii - x_ji)) of all i and j, or of i != j with fix_norm.

    x [N, N]; margin a number, or [N]. Every term has the bits that the originals' has, which ties at 0 decide by.
    """
    check_tensor("x", x, "N", "N")
    N, x = len(x), x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(margin, Tensor):
        margin = margin.unsqueeze(1)
    own, total = x.diagonal().unsqueeze(1), x.new_zeros(())
    for other in (x, x.T):
        terms = margin - (own - other)
        if fix_norm:
            terms.fill_diagonal_(0.0)
        total = total + terms.relu_().sum()
    return total / max(1, 2 * N * (N - 1) if fix_norm else 2 * N * N)
