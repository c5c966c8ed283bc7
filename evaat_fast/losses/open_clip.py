"""open_clip's ClipLoss. Its other losses are not here: SigLipLoss, CoCaLoss, DistillClipLoss, GenLipLoss.

from evaat_fast.losses.open_clip import ClipLoss      # was: from open_clip.loss import ClipLoss
"""

from typing import Literal, overload

from torch import Tensor
from torch.nn.functional import cross_entropy

from evaat_fast.losses._contrast import Contrastive

__all__ = ["ClipLoss"]


class ClipLoss(Contrastive):
    """`ops.clip_loss` with the arguments of open_clip's ClipLoss.

    forward(image_features [N, E], text_features [N, E], logit_scale, logit_bias=None, output_dict=False) -> the loss, or
    {"contrastive_loss": the loss}.

    logit_bias: of one element it moves all logits alike: the loss does not depend on it, and its gradient is exactly 0 (theirs
    is rounding). Of more elements, or where a subclass overrides get_logits or get_ground_truth, the logits are built as
    get_logits gives them.

    Args:
        local_loss: a rank compares its own rows with all, whose [n, N] logits are there. Without gather_with_grad the gradient
            is that of the rows alone, not of what they are compared with: theirs, and not the whole batch's.
        cache_labels: keep the labels that get_ground_truth makes.
        gather_with_grad: gradients are summed over the ranks, right after DDP's mean; without it they are those of a rank's own
            rows, and after DDP's mean 1/W of the whole batch's. rank, world_size: how the features of all ranks are gathered.
        use_horovod: False; an argument up to open_clip 3.3.

    Raises:
        ValueError: use_horovod. forward: as `ops.clip_loss`.

    Source: open_clip's code; CLIP (arXiv 2103.00020), figure 3.
    """

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both directions' logits, [N, N] of all ranks or [n, N] of a local loss: forward does without them."""
        batch = self.batch(image_features, text_features)
        pairs = ((batch.image_rows, batch.texts), (batch.text_rows, batch.images))
        per_image, per_text = (logit_scale * rows @ others.T for rows, others in pairs)
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self._needs_logits(logit_bias):
            per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            labels = self.get_ground_truth(image_features.device, len(per_image))
            loss = (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2
        else:
            loss = self.batch(image_features, text_features).loss(logit_scale)
            if isinstance(logit_bias, Tensor):  # which DDP expects to have a gradient
                loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _needs_logits(self, logit_bias):
        own = type(self)
        overridden = own.get_logits is not ClipLoss.get_logits or own.get_ground_truth is not ClipLoss.get_ground_truth
        return overridden or (isinstance(logit_bias, Tensor) and logit_bias.numel() != 1)
