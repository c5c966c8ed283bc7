"""The losses of AVION and of SMS-Loss, whose module has the same name.

    from evaat_fast.losses.avion import ClipLoss      # was: from avion.losses.losses import ClipLoss

gather_with_grad: gradients are summed over the ranks, right after DDP's mean. Without it each rank has the gradient of its own
rows alone, and after DDP's mean 1/W of the whole batch's, as in theirs. Every rank computes the loss of the whole batch, except
of a local ClipLoss. world_size 1 gathers nothing, and needs no process group.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaat_fast import ops
from evaat_fast.losses import _max_margin
from evaat_fast.losses._contrast import Contrastive, per_cent
from evaat_fast.losses._gather import Gathers, alike

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "AdaptiveMaxMarginRankingLoss",
    "ClipLoss",
    "MaxMarginRankingLoss",
    "SymmetricMultiSimilarityLoss",
    "SymmetricMultiSimiliarityLoss",
]


class ClipLoss(Contrastive):
    """`ops.clip_loss` with the arguments of AVION's ClipLoss.

    forward(image_features [N, E], text_features [N, E], logit_scale) -> {"loss", "clip_acc": per cent of images whose own text
    has the largest logit}.

    Args:
        local_loss: a rank compares its own rows with all, whose [n, N] logits are there. Without gather_with_grad the gradient
            is that of the rows alone, not of what they are compared with: theirs, and not the whole batch's.
        cache_labels: keep the labels of a local loss.
        gather_with_grad, rank, world_size: how the features of all ranks are gathered. use_horovod: False.

    Raises:
        ValueError: use_horovod. forward: as `ops.clip_loss`.

    Source: AVION (arXiv 2309.16669), whose losses are open_clip's; CLIP (arXiv 2103.00020), figure 3.
    """

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> dict[str, Tensor]:
        batch = self.batch(image_features, text_features)
        return {"loss": batch.loss(logit_scale), "clip_acc": per_cent(batch.hits(logit_scale))}


class _MaxMargin(Gathers):
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
        super().__init__(local_loss, gather_with_grad, rank, world_size, use_horovod)
        self.margin, self.fix_norm = margin, fix_norm

    def features(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        images, texts = alike(images, texts)
        return self.gather(images), self.gather(texts)


class MaxMarginRankingLoss(_MaxMargin):
    """`ops.mi_mm_loss` with the arguments of AVION's MaxMarginRankingLoss.

    forward(image_features [N, E], text_features [N, E], weight=None) -> {"loss", "max_margin_loss"}; weight is not used.

    Args:
        margin: as `ops.mi_mm_loss`. fix_norm: leave each pair's own margin out of the mean.
        local_loss: accepted and not used; in theirs, without gather_with_grad, it leaves the loss without a gradient.
        gather_with_grad, rank, world_size: how the features of all ranks are gathered. use_horovod: False.

    Raises:
        ValueError: use_horovod. forward: as `ops.mi_mm_loss`.

    Source: AVION (arXiv 2309.16669) and EgoVLP (arXiv 2206.01670), their MaxMarginRankingLoss.
    """

    def forward(self, image_features: Tensor, text_features: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        images, texts = self.features(image_features, text_features)
        return _max_margin.results(_max_margin.mi_mm(images, texts, self.margin, self.fix_norm))


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
        super().__init__(margin, fix_norm, local_loss, gather_with_grad, rank, world_size, use_horovod)

    def forward(
        self, image_features: Tensor, text_features: Tensor, weight: Tensor | None = None, **ignored: object
    ) -> dict[str, Tensor]:
        weight = self.gather(_max_margin.required(weight))
        images, texts = self.features(image_features, text_features)
        return _max_margin.results(_max_margin.adaptive(images, texts, weight, self.margin, self.fix_norm))


class SymmetricMultiSimilarityLoss(_MaxMargin):
    """`ops.sms_loss` with the arguments of SMS-Loss's SymmetricMultiSimiliarityLoss (an alias of this).

    forward(image_features [N, E], text_features [N, E], weight [N], relevancy_weight) -> {"loss", "max_margin_loss"}; weight:
    the relevancy of each pair itself. relevancy_weight [2N]: the captions' columns in matrix, then the clips' rows; None: no
    pair is relevant to another.

    Args:
        margin: as `ops.sms_loss`. thres: its relaxation. matrix: [V, C], relevancy of all training clips and captions, numpy or
            torch; kept as uint8 codes of 240 steps, truncated as theirs, on the features' device (theirs: of the global rank's
            number). None: only for calls without relevancy_weight.
        fix_norm: True; without it theirs fails at the first step. local_loss and the rest: as `MaxMarginRankingLoss`.

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
        super().__init__(margin, fix_norm, local_loss, gather_with_grad, rank, world_size, use_horovod)
        if not fix_norm:
            raise ValueError("fix_norm: expected True, the only norm that this loss has")
        self.thres, self.uint_factor = thres, 240
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
        weight = _max_margin.floating(self.gather(_max_margin.required(weight)))
        images, texts = self.features(image_features, text_features)
        relevancy: Tensor | ops.IndexedRelevancy
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
        return _max_margin.results(loss)


SymmetricMultiSimiliarityLoss = SymmetricMultiSimilarityLoss  # as SMS-Loss spells it
