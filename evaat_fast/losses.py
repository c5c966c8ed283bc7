"""The losses as modules, with the constructors and the results of AVION, LaViLa, SMS-Loss and EgoVLP: change one import line.

    from evaat_fast.losses import SymmetricMultiSimiliarityLoss      # was: from avion.losses.losses import ...

What differs from theirs: no [N, N] matrix is built (but in EgoNCE, which is given one); a batch of one pair gives 0 where
theirs is NaN; the loss has the features' precision, float32 or float64, also where the weights are float64; horovod is not
supported.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaat_fast import ops
from evaat_fast.ops.pairwise import reference

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "AdaptiveMaxMarginRankingLoss",
    "ClipLoss",
    "EgoNCE",
    "MaxMarginRankingLoss",
    "SymmetricMultiSimilarityLoss",
    "SymmetricMultiSimiliarityLoss",
]

_ACCURACY_BYTES = 64 << 20  # of the logits that the accuracy is read from, a block of rows at a time


class _Gathers(nn.Module):
    """What the family shares: features of every rank, gathered as its `gather_features` does."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False; gather with torch.distributed")
        if local_loss and not gather_with_grad and world_size > 1:
            raise ValueError("local_loss: expected gather_with_grad=True with it, else the other ranks' rows get no gradient")
        self.local_loss, self.gather_with_grad, self.rank, self.world_size = local_loss, gather_with_grad, rank, world_size

    def gather(self, x: Tensor) -> Tensor:
        """x of all ranks in their order; gradients are summed over the ranks with gather_with_grad, else this rank's alone."""
        if self.world_size == 1:
            return x
        if self.gather_with_grad and x.requires_grad:
            from torch.distributed.nn import all_gather

            return torch.cat(all_gather(x.contiguous()))
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.detach().contiguous())
        if not self.local_loss:
            parts[self.rank] = x
        return torch.cat(parts)


class ClipLoss(_Gathers):
    """`ops.clip_loss` with the arguments of AVION's ClipLoss.

    forward(image_features [N, E], text_features [N, E], logit_scale) -> {"loss", "clip_acc": per cent of images whose own text
    has the largest logit}.

    Args:
        local_loss: a rank compares its own rows with all. cache_labels: accepted and not needed.
        gather_with_grad, rank, world_size: how the features of all ranks are gathered. use_horovod: False.

    Raises:
        ValueError: use_horovod, or local_loss of several ranks without gather_with_grad. forward: as `ops.clip_loss`.

    Source: AVION (arXiv 2309.16669), whose losses are open_clip's; CLIP (arXiv 2103.00020), figure 3.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, rank, world_size, use_horovod)
        self.cache_labels = cache_labels

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> dict[str, Tensor]:
        images, texts = self.gather(image_features), self.gather(text_features)
        if self.local_loss and self.world_size > 1:
            first, labels = self.rank * len(image_features), torch.arange(len(image_features), device=images.device)
            pairs = ((image_features, texts), (text_features, images))
            loss = sum(cross_entropy(logit_scale * a @ b.T, labels + first) for a, b in pairs) / 2
            return {"loss": loss, "clip_acc": _accuracy(image_features, texts, logit_scale, first)}
        loss = ops.clip_loss(images, texts, logit_scale)
        return {"loss": loss, "clip_acc": _accuracy(images, texts, logit_scale, 0)}


@torch.no_grad()
def _accuracy(images, texts, logit_scale, first):
    """Per cent of rows i of images whose largest logit is that of text first + i."""
    rows = max(1, _ACCURACY_BYTES // max(1, len(texts) * images.element_size()))
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    for begin in range(0, len(images), rows):
        guess = (logit_scale * images[begin : begin + rows] @ texts.T).argmax(1)
        right += (guess == torch.arange(first + begin, first + begin + len(guess), device=guess.device)).sum()
    return 100 * right / max(1, len(images))


class _MaxMargin(_Gathers):
    def __init__(self, margin: float, fix_norm: bool, gather_with_grad: bool, rank: int, world_size: int, use_horovod: bool):
        super().__init__(False, gather_with_grad, rank, world_size, use_horovod)
        self.margin, self.fix_norm = margin, fix_norm

    def result(self, loss: Tensor, own: Tensor) -> dict[str, Tensor]:
        """own [N]: what the diagonal adds without fix_norm, where theirs averages it in."""
        if not self.fix_norm:
            N = len(own)
            loss = loss * ((N - 1) / N) + own.mean() / N
        return {"loss": loss, "max_margin_loss": loss.detach().clone()}


class MaxMarginRankingLoss(_MaxMargin):
    """`ops.mi_mm_loss` with the arguments of AVION's MaxMarginRankingLoss.

    forward(image_features [N, E], text_features [N, E], weight=None) -> {"loss", "max_margin_loss"}; weight is not used.

    Args:
        margin: as `ops.mi_mm_loss`. fix_norm: leave each pair's own margin out of the mean. local_loss: accepted and not used.
        gather_with_grad, rank, world_size: how the features of all ranks are gathered. use_horovod: False.

    Raises:
        ValueError: use_horovod. forward: as `ops.mi_mm_loss`.

    Source: AVION (arXiv 2309.16669) and EgoVLP (arXiv 2206.01670), their MaxMarginRankingLoss.
    """

    def __init__(
        self,
        margin: float = 0.2,
        fix_norm: bool = True,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(margin, fix_norm, gather_with_grad, rank, world_size, use_horovod)

    def forward(self, image_features: Tensor, text_features: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        images, texts = self.gather(image_features), self.gather(text_features)
        loss = ops.mi_mm_loss(images, texts, margin=self.margin)
        return self.result(loss, loss.new_full((len(images),), max(self.margin, 0.0)))


class AdaptiveMaxMarginRankingLoss(_MaxMargin):
    """`ops.adaptive_mi_mm_loss` with the arguments of AVION's AdaptiveMaxMarginRankingLoss.

    forward(image_features [N, E], text_features [N, E], weight [N]) -> {"loss", "max_margin_loss"}; weight: the relevancy of
    each pair itself.

    Args:
        margin: as `ops.adaptive_mi_mm_loss`. temperature: accepted and not used, as in theirs. fix_norm, local_loss and the
            rest: as `MaxMarginRankingLoss`.

    Raises:
        ValueError: use_horovod. forward: TypeError without a weight; others as `ops.adaptive_mi_mm_loss`.

    Source: EgoVLP (arXiv 2206.01670) and AVION (arXiv 2309.16669), their AdaptiveMaxMarginRankingLoss.
    """

    def __init__(
        self,
        margin: float = 0.4,
        temperature: float = 0.05,
        fix_norm: bool = True,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(margin, fix_norm, gather_with_grad, rank, world_size, use_horovod)

    def forward(
        self, image_features: Tensor, text_features: Tensor, weight: Tensor | None = None, **ignored: object
    ) -> dict[str, Tensor]:
        if weight is None:
            raise TypeError("weight: expected a tensor [N], the relevancy of each pair itself, got None")
        images, texts, weight = self.gather(image_features), self.gather(text_features), _floating(self.gather(weight))
        loss = ops.adaptive_mi_mm_loss(images, texts, weight, margin=self.margin)
        return self.result(loss, (self.margin * weight).relu().to(loss.dtype))


class SymmetricMultiSimilarityLoss(_Gathers):
    """`ops.sms_loss` with the arguments of SMS-Loss's SymmetricMultiSimiliarityLoss (an alias of this).

    forward(image_features [N, E], text_features [N, E], weight [N], relevancy_weight) -> {"loss", "max_margin_loss"}; weight:
    the relevancy of each pair itself. relevancy_weight [2N]: the captions' columns in matrix, then the clips' rows; None: no
    pair is relevant to another.

    Args:
        margin: as `ops.sms_loss`. thres: its relaxation. matrix: [V, C], relevancy of all training clips and captions, numpy or
            torch; kept as uint8 codes of 240 steps, truncated as theirs. fix_norm: True. local_loss: accepted and not used.
        gather_with_grad, rank, world_size: how the features of all ranks are gathered. use_horovod: False.

    Raises:
        ValueError: fix_norm=False, use_horovod, a matrix as for `ops.quantize_relevancy`. forward: TypeError without a weight,
        ValueError for a relevancy_weight without a matrix; others as `ops.sms_loss`.

    Source: EVA02-AT (arXiv 2506.14356), section 3.3, and the authors' SMS-Loss code.
    """

    correlation_matrix: Tensor  # this and the next only with a matrix
    code_values: Tensor

    def __init__(
        self,
        margin: float = 0.6,
        thres: float = 0.1,
        matrix: "Tensor | np.ndarray | None" = None,
        fix_norm: bool = True,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(False, gather_with_grad, rank, world_size, use_horovod)
        if not fix_norm:
            raise ValueError("fix_norm: expected True, the only norm that this loss has")
        self.margin, self.thres, self.fix_norm, self.uint_factor = margin, thres, fix_norm, 240
        self.eps = 1.1 / self.uint_factor
        if matrix is not None:
            codes, _ = ops.quantize_relevancy(torch.as_tensor(matrix), self.uint_factor)
            self.register_buffer("correlation_matrix", codes, persistent=False)
            values = torch.arange(256).to(torch.uint8) / self.uint_factor  # divided as theirs are, in torch's default dtype
            self.register_buffer("code_values", values, persistent=False)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        weight: Tensor | None = None,
        relevancy_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if weight is None:
            raise TypeError("weight: expected a tensor [N], the relevancy of each pair itself, got None")
        images, texts, weight = self.gather(image_features), self.gather(text_features), _floating(self.gather(weight))
        if relevancy_weight is None:
            relevancy = weight.new_zeros((1, 1)).expand(len(images), len(images))
        elif not hasattr(self, "correlation_matrix"):
            raise ValueError("relevancy_weight: expected None, as the loss was made without a matrix")
        else:
            if self.correlation_matrix.device != images.device:
                self.to(images.device)
            columns, rows = self.gather(relevancy_weight).view(self.world_size, 2, -1).unbind(1)
            indices = rows.reshape(-1), columns.reshape(-1)
            relevancy = ops.IndexedRelevancy(self.correlation_matrix, *indices, self.code_values)
        loss = ops.sms_loss(
            images, texts, relevancy, self_relevancy=weight, margin=self.margin, relaxation=self.thres, eps=self.eps
        )
        return {"loss": loss, "max_margin_loss": loss.detach().clone()}


SymmetricMultiSimiliarityLoss = SymmetricMultiSimilarityLoss  # as SMS-Loss spells it


class EgoNCE(nn.Module):
    """EgoVLP's EgoNCE on a matrix of cosines, with logarithms that do not underflow.

    forward(x [N, N], mask_v [N, N], mask_n [N, N]) -> the loss. Positive are pairs whose mask, the product of both (or the
    one that `noun` and `verb` leave), is above 0, and each pair itself. `ops.ego_nce_loss` takes features and builds no matrix.

    Args:
        temperature: divides the cosines. noun, verb: whether the nouns' and the verbs' mask count.

    Raises:
        RuntimeError: forward, from torch, for shapes that do not fit one another.

    Source: EgoVLP (arXiv 2206.01670), equation 2, and its code, where both directions are added.
    """

    def __init__(self, temperature: float = 0.05, noun: bool = True, verb: bool = True):
        super().__init__()
        self.temperature, self.noun, self.verb = temperature, noun, verb

    def forward(self, x: Tensor, mask_v: Tensor, mask_n: Tensor) -> Tensor:
        mask = mask_v * mask_n if self.noun and self.verb else mask_n if self.noun else mask_v
        positive = (mask > 0) | torch.eye(len(x), dtype=torch.bool, device=x.device)
        logits = (x / self.temperature, x.t() / self.temperature)
        rows, columns = (reference.cross_entropy(s, positive, 1).mean() for s in logits)
        return rows + columns


def _floating(x):
    """Weights as the losses take them: theirs may be integers, too."""
    return x if x.is_floating_point() else x.float()
