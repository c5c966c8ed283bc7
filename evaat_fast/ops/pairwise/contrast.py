"""The contrastive losses over a batch of N videos and N captions: InfoNCE, as CLIP has it, and EgoNCE.

loss = clip_loss(video, text, logit_scale.exp())
loss = ego_nce_loss(video, text, VerbNounPositives(verbs, nouns))
"""

import functools

import torch
from torch import Tensor

from evaat_fast.ops._core.tensor import check_device, dense, number
from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.check import FLOATS, GradMode, Options, Reduction
from evaat_fast.ops.pairwise.positives import Positives, VerbNounPositives, as_positives
from evaat_fast.ops.pairwise.reference import clip_loss_reference, ego_nce_loss_reference

_NONE = Positives()


def clip_loss(
    video: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    reduction: Reduction = "mean",
    group: object = None,
    grad_mode: GradMode = "ddp",
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE: ½ (CE(logit_scale * t v^T) + CE(logit_scale * v t^T)), every pair its own class.

    Args:
        video, text: [N, E], one dtype of float32, bfloat16, float16 and float64, any strides. Not normalised inside.
        logit_scale: the multiplier of the products itself (already exponentiated): a float, or a float tensor of one element on
            the features' device, which may require a gradient.
        reduction: "mean", or "none": [N], entry i = half the sum of row i of text->video and column i of video->text; its
            backward pass computes the products again.
        group: a torch.distributed process group, each of whose W ranks passes n of the N pairs, as in `sms_loss`.
        grad_mode: "ddp" or "sum", of features as in `sms_loss`. All ranks share logit_scale: each gets the gradient of one
            process by "ddp", so that the mean is right, and a W-th of it by "sum", so that the sum is.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A scalar, float32, or float64 for float64 features; products and sums in that dtype. N = 0 and N = 1 give 0.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    return contrast("clip_loss", video, text, logit_scale, None, Options(reduction, group, grad_mode, backend))


def ego_nce_loss(
    video: Tensor,
    text: Tensor,
    positives: Tensor | VerbNounPositives,
    *,
    temperature: float = 0.05,
    reduction: Reduction = "mean",
    group: object = None,
    grad_mode: GradMode = "ddp",
    backend: str | None = None,
) -> Tensor:
    """EgoVLP's EgoNCE: InfoNCE with several positives, -mean log(sum over positives / sum over all) of both directions, added.

    Args:
        video, text: [N, E], as `clip_loss`; normalised inside (eps 1e-8).
        positives: bool [N, N] (over a group [n, N], this rank's rows), rows = videos and columns = captions, or a
            VerbNounPositives. Every pair is a positive of its own, whatever they say.
        temperature: > 0, divides the cosines.
        reduction: "mean", or "none": [N], entry i = row i of text->video plus column i of video->text.
        group, grad_mode, backend: as `clip_loss`.

    Returns, Raises: as `clip_loss`.

    Source: EgoVLP (arXiv 2206.01670), equation 2, and its code, where both directions are added.
    """
    if not number("temperature", temperature) > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    options = Options(reduction, group, grad_mode, backend)
    return contrast("ego_nce_loss", video, text, 1 / number("temperature", temperature), positives, options)


def contrast(
    op: str,
    video: Tensor,
    text: Tensor,
    scale: float | Tensor,
    positives: Tensor | VerbNounPositives | None,
    options: Options,
) -> Tensor:
    """positives: of EgoNCE."""

    def plan(call):
        normalise = op == "ego_nce_loss"
        pairs = as_positives(positives, call) if normalise else _NONE

        def reference(video, text, multiplier, pairs=pairs):
            if normalise:
                return ego_nce_loss_reference(video, text, pairs.matrix(), 1 / scale, options.reduction)
            return clip_loss_reference(video, text, multiplier, options.reduction)

        multiplier = _check_scale(scale, call.device, call.dtype)
        return functools.partial(step.ContrastSettings, pairs, normalise), reference, multiplier

    return step.loss(op, step.contrast_step, video, text, options, plan, {"scale": scale, "positives": positives})


def _check_scale(scale, device, dtype):
    """logit_scale as a tensor [] in the dtype of the computation."""
    if not isinstance(scale, Tensor):
        return torch.full((), number("logit_scale", scale), dtype=dtype, device=device)
    scale = dense("clip_loss", "logit_scale", scale, FLOATS, "a float or a float tensor")
    if scale.numel() != 1:
        raise ValueError(f"logit_scale: expected one element, got the shape {list(scale.shape)}")
    check_device("logit_scale", scale.device, device, "the features'")
    # No views where there is nothing to change: each would be a node of autograd's.
    scale = scale if scale.ndim == 0 else scale.reshape(())
    return scale if scale.dtype == dtype else scale.to(dtype)
