"""LaViLa's losses, of the dictionary that its models return.

    from evaat_fast.losses import lavila as loss      # was: from lavila.models import loss

outputs: {"image_embed": [N, E], "text_embed": [N, E], "logit_scale"}, other entries are ignored. Gathering as LaViLa's
gather_from_all (the max-margin losses, and use_vissl) asks the default process group who there is, and sums gradients over it:
right after DDP's mean. CaptionLoss, of a language model's logits, is not here.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evaat_fast.losses import _max_margin
from evaat_fast.losses._contrast import Batch, Contrastive, per_cent
from evaat_fast.losses._gather import alike, check_tensor, gather_from_all

__all__ = ["AdaptiveMaxMarginRankingLoss", "CLIPLoss", "MaxMarginRankingLoss", "SSLCLIPLoss"]


def _of_all_ranks(outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    images, texts = alike(outputs["image_embed"], outputs["text_embed"])
    return gather_from_all(images), gather_from_all(texts)


class CLIPLoss(Contrastive):
    """`ops.clip_loss` with the arguments of LaViLa's CLIPLoss.

    forward(outputs) -> {"loss", "clip_loss": the same tensor, "clip_acc": per cent of images whose own text has the largest
    logit}.

    Args:
        use_vissl: gather with gradients summed over the ranks; local_loss and gather_with_grad then do not count.
        local_loss: a rank compares its own rows with all, as `avion.ClipLoss`. cache_labels: keep the labels of a local loss.
        gather_with_grad, rank, world_size: as `avion.ClipLoss`, without use_vissl. world_size 1 gathers nothing.

    Raises:
        KeyError: forward, for an entry that outputs lacks. Others as `ops.clip_loss`.

    Source: LaViLa (arXiv 2212.04501), its code; CLIP (arXiv 2103.00020), figure 3.
    """

    def __init__(
        self,
        use_vissl: bool = False,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)
        self.use_vissl = use_vissl

    def forward(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.use_vissl and self.world_size > 1:
            batch = Batch.whole(*_of_all_ranks(outputs))
        else:
            batch = self.batch(outputs["image_embed"], outputs["text_embed"])
        loss = batch.loss(outputs["logit_scale"])
        return {"loss": loss, "clip_loss": loss, "clip_acc": per_cent(batch.hits(outputs["logit_scale"]))}


class SSLCLIPLoss(Contrastive):
    """`CLIPLoss` whose pseudo-labelled pairs have a temperature of their own, learned by this module.

    forward(outputs, gt_indicators [N], 1 for a pair that people labelled and 0 for a pseudo-labelled one) -> {"loss",
    "clip_loss": the same tensor, "num_gt" and "num_pseudo": int64 [1] on the features' device, "clip_acc", and
    "clip_acc_gt", "clip_acc_pseudo": of such pairs alone, NaN where there are none}.

    The scale of a logit is the geometric mean of both pairs' scales, so its roots go to the rows, and no matrix of scales is
    built, or of logits.

    Args:
        use_vissl: accepted and not used: features of several ranks are gathered as with it, where theirs without it fails.
        local_loss, gather_with_grad, cache_labels, rank: accepted and not used, as in theirs.
        world_size: 1 gathers nothing.
        scale_init: 1 / the first scale of pseudo-labelled pairs. freeze_scale: do not learn it.

    Raises:
        KeyError: forward, for an entry that outputs lacks. Others as `ops.clip_loss`.

    Source: LaViLa (arXiv 2212.04501), its code.
    """

    def __init__(
        self,
        use_vissl: bool = False,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        scale_init: float = 0.08,
        freeze_scale: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size)
        self.use_vissl = use_vissl
        self.logit_scale_pseudo = nn.Parameter(torch.tensor(math.log(1 / scale_init)), requires_grad=not freeze_scale)

    def forward(self, outputs: Mapping[str, Tensor], gt_indicators: Tensor) -> dict[str, Tensor]:
        images, texts = alike(outputs["image_embed"], outputs["text_embed"])
        check_tensor("gt_indicators", gt_indicators, len(images))
        if images.dtype != texts.dtype:
            raise TypeError(f"text features: expected the image features' dtype {images.dtype}, got {texts.dtype}")
        if not images.is_floating_point():
            raise TypeError(f"image features: expected a floating-point tensor, got {images.dtype}")
        if self.world_size > 1:
            images, texts, gt_indicators = (gather_from_all(x) for x in (images, texts, gt_indicators))
        labelled = gt_indicators == 1
        scales = torch.where(labelled, outputs["logit_scale"], self.logit_scale_pseudo.exp())
        root = scales.to(torch.promote_types(images.dtype, torch.float32)).sqrt().unsqueeze(1)
        batch = Batch.whole(images * root, texts * root)
        loss, hits = batch.loss(1.0), batch.hits(1.0)
        pseudo = gt_indicators == 0
        return {
            "loss": loss,
            "clip_loss": loss,
            "num_gt": labelled.sum().reshape(1),
            "num_pseudo": pseudo.sum().reshape(1),
            "clip_acc": per_cent(hits),
            "clip_acc_gt": 100 * (hits & labelled).sum() / labelled.sum(),
            "clip_acc_pseudo": 100 * (hits & pseudo).sum() / pseudo.sum(),
        }


class MaxMarginRankingLoss(_max_margin.Ranking):
    """`ops.mi_mm_loss` with the arguments of LaViLa's MaxMarginRankingLoss.

    forward(outputs, weight=None) -> {"loss", "max_margin_loss"}; weight is not used.

    Args:
        margin: as `ops.mi_mm_loss`. fix_norm: leave each pair's own margin out of the mean.

    Raises:
        KeyError: forward, for an entry that outputs lacks. Others as `ops.mi_mm_loss`.

    Source: LaViLa (arXiv 2212.04501) and EgoVLP (arXiv 2206.01670), their code.
    """

    def __init__(self, margin: float = 0.2, fix_norm: bool = True):
        super().__init__(margin, fix_norm)

    def forward(self, outputs: Mapping[str, Tensor], weight: Tensor | None = None) -> dict[str, Tensor]:
        return _max_margin.results(_max_margin.mi_mm(*_of_all_ranks(outputs), self.margin, self.fix_norm))


class AdaptiveMaxMarginRankingLoss(_max_margin.Ranking):
    """`ops.adaptive_mi_mm_loss` with the arguments of LaViLa's AdaptiveMaxMarginRankingLoss.

    forward(outputs, weight [N]) -> {"loss", "max_margin_loss"}; weight: the relevancy of each pair itself.

    Args:
        margin: as `ops.adaptive_mi_mm_loss`. fix_norm: leave each pair's own margin out of the mean.

    Raises:
        TypeError: forward, without a weight. KeyError: for an entry that outputs lacks. Others as `ops.adaptive_mi_mm_loss`.

    Source: LaViLa (arXiv 2212.04501) and EgoVLP (arXiv 2206.01670), their code.
    """

    def __init__(self, margin: float = 0.4, fix_norm: bool = True):
        super().__init__(margin, fix_norm)

    def forward(self, outputs: Mapping[str, Tensor], weight: Tensor | None = None) -> dict[str, Tensor]:
        weight = gather_from_all(_max_margin.required(weight))
        loss = _max_margin.adaptive(*_of_all_ranks(outputs), weight, self.margin, self.fix_norm)
        return _max_margin.results(loss)
