"""EgoVLP's losses, of a matrix of similarities.

    from evaat_fast.losses import egovlp as module_loss      # was: import model.loss as module_loss

The matrix exists, in memory and in the gradient, and its cost is paid: these are plain torch on it, the same numbers, the
max-margin losses without lists of N^2 indices, made on the host, and concatenated copies. No kernel of ours helps from here on;
`ops.mi_mm_loss`, `ops.adaptive_mi_mm_loss`, `ops.ego_nce_loss` and `ops.clip_loss` take features and never build the matrix.

Nothing is gathered: EgoVLP's trainer does that, and as it hands each rank the gradient of its own rows alone, it is 1/W of the
whole batch's after DDP's mean. CrossEntropy is torch's, and not here.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from evaat_fast.losses import _max_margin
from evaat_fast.losses._gather import check_tensor
from evaat_fast.ops.pairwise import reference

__all__ = ["AdaptiveMaxMarginRankingLoss", "EgoNCE", "MaxMarginRankingLoss", "NormSoftmaxLoss"]


class NormSoftmaxLoss(nn.Module):
    """InfoNCE of a matrix of cosines, both directions added (twice `ops.clip_loss`).

    forward(x [N, M]) -> a scalar, float32, or float64 for a float64 matrix: -mean_i log softmax(x / temperature)_ii of the rows
    plus that of the columns, i below min(N, M). Computed as log(1 + the others / the own), which keeps small losses.

    Args:
        temperature: divides the cosines.

    Raises:
        ValueError: forward, unless x has two dimensions.

    Source: EgoVLP (arXiv 2206.01670), its code.
    """

    def __init__(self, temperature: float = 0.05):
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x, "N", "M")
        logits = x.to(reference.wide(x.dtype)) / self.temperature
        own, pairs = logits.diagonal().clone(), max(1, min(x.shape))
        others = logits.fill_diagonal_(-torch.inf)
        one, other = (others.logsumexp(dim)[: len(own)] - own for dim in (1, 0))
        return _sum(one) / pairs + _sum(other) / pairs


def _sum(x):
    # Beyond the threshold log(1 + exp(x)) is x, to the last bit of float64.
    return softplus(x, threshold=50).sum()


class EgoNCE(nn.Module):
    """EgoVLP's EgoNCE on a matrix of cosines, with logarithms that do not underflow.

    forward(x [N, N], mask_v [N, N], mask_n [N, N]) -> the loss. Positive are pairs whose mask, the product of both (or the
    one that `noun` and `verb` leave), is above 0, and each pair itself. Both directions read the mask by its rows, as theirs
    do. For the logarithms it keeps 19 bytes of every pair for the backward pass, in float32, where theirs keeps 9, and takes
    longer: `ops.ego_nce_loss`, of features, builds no matrix.

    Args:
        temperature: divides the cosines. noun, verb: whether the nouns' and the verbs' mask count.

    Raises:
        TypeError, ValueError: forward, unless x and the masks that count are tensors [N, N].

    Source: EgoVLP (arXiv 2206.01670), equation 2, and its code, where both directions are added.
    """

    def __init__(self, temperature: float = 0.05, noun: bool = True, verb: bool = True):
        super().__init__()
        self.temperature, self.noun, self.verb = temperature, noun, verb

    def forward(self, x: Tensor, mask_v: Tensor, mask_n: Tensor) -> Tensor:
        check_tensor("x", x, "N", "N")
        for name, mask, counts in (("mask_v", mask_v, self.verb or not self.noun), ("mask_n", mask_n, self.noun)):
            if counts:
                check_tensor(name, mask, *x.shape)
        mask = mask_v * mask_n if self.noun and self.verb else mask_n if self.noun else mask_v
        positive = (mask > 0) | torch.eye(len(x), dtype=torch.bool, device=x.device)
        x = x.to(reference.wide(x.dtype))
        logits = (x / self.temperature, x.t() / self.temperature)
        rows, columns = (reference.cross_entropy(s, positive, 1).mean() for s in logits)
        return rows + columns


class MaxMarginRankingLoss(_max_margin.Ranking):
    """The max-margin ranking loss (`ops.mi_mm_loss`) of a matrix of similarities.

    forward(x [N, N], weight=None) -> a scalar, float32, or float64 for a float64 matrix; weight is not used, as in theirs.

    Args:
        margin: as `ops.mi_mm_loss`. fix_norm: leave each pair's own margin out of the mean.

    Raises:
        ValueError: forward, unless x is square.

    Source: EgoVLP (arXiv 2206.01670), its code.
    """

    def __init__(self, margin: float = 0.2, fix_norm: bool = True):
        super().__init__(margin, fix_norm)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return _max_margin.of_matrix(x, self.margin, self.fix_norm)


class AdaptiveMaxMarginRankingLoss(_max_margin.Ranking):
    """`MaxMarginRankingLoss` with the margin of pair i times weight[i] (`ops.adaptive_mi_mm_loss`).

    forward(x [N, N], weight [N]) -> a scalar, float32, or float64 where x or weight is.

    Args:
        margin: as `ops.adaptive_mi_mm_loss`. fix_norm: leave each pair's own margin out of the mean.

    Raises:
        ValueError: forward, unless x is square and weight fits it. TypeError: without a weight.

    Source: EgoVLP (arXiv 2206.01670), its code.
    """

    def __init__(self, margin: float = 0.4, fix_norm: bool = True):
        super().__init__(margin, fix_norm)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = _max_margin.required(weight)
        check_tensor("x", x, "N", "N")
        check_tensor("weight", weight, len(x))
        return _max_margin.of_matrix(x, weight * self.margin, self.fix_norm)
