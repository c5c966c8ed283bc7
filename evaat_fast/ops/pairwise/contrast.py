"""The contrastive losses over a batch of N videos and N captions: InfoNCE, as CLIP has it, and EgoNCE.

    loss = clip_loss(video, text, logit_scale.exp())
    loss = ego_nce_loss(video, text, VerbNounPositives(verbs, nouns))

The references below are the specification; they build the [N, N] matrix.
"""

import torch
from torch.nn.functional import cross_entropy

from evaat_fast.ops._core import dispatch as _dispatch
from evaat_fast.ops._core.tensor import memory_of, number
from evaat_fast.ops.pairwise.check import check_common, check_features, no_autocast, no_pair
from evaat_fast.ops.pairwise.positives import VerbNounPositives, as_positives
from evaat_fast.ops.pairwise.relevancy import FLOATS
from evaat_fast.ops.pairwise.sms import unit_rows
from evaat_fast.ops.pairwise.step import contrast_loss_step

__all__ = ["VerbNounPositives", "clip_loss", "clip_loss_reference", "ego_nce_loss", "ego_nce_loss_reference"]


def clip_loss_reference(video, text, logit_scale, reduction="mean"):
    """The specification: the mean of both directions' cross-entropies of logit_scale * t_i . v_j, in float32 or float64."""
    wide = torch.promote_types(video.dtype, torch.float32)
    logits = logit_scale * (text.to(wide) @ video.to(wide).T)
    target = torch.arange(video.shape[0], device=video.device)
    entries = [cross_entropy(x, target, reduction="none") for x in (logits, logits.T)]
    entries = (entries[0] + entries[1]) / 2
    return entries if reduction == "none" else entries.sum() / max(video.shape[0], 1)


def ego_nce_loss_reference(video, text, positives, temperature, reduction="mean"):
    """The specification. positives: bool [N, N], rows = videos; every pair is a positive of its own.

    With x the cosines over the temperature, the sum of both directions' mean -log(sum of exp(x) over positives / over all).
    """
    wide = torch.promote_types(video.dtype, torch.float32)
    x = unit_rows(video.to(wide)) @ unit_rows(text.to(wide)).T / temperature
    keep = positives | torch.eye(video.shape[0], dtype=torch.bool, device=video.device)
    only = x.masked_fill(~keep, -torch.inf)
    entries = sum(x.logsumexp(dim) - only.logsumexp(dim) for dim in (0, 1))
    return entries if reduction == "none" else entries.sum() / max(video.shape[0], 1)


def clip_loss(video, text, logit_scale, *, reduction="mean", group=None, grad_mode="ddp", backend=None):
    """Symmetric InfoNCE: ½ (CE(logit_scale * t v^T) + CE(logit_scale * v t^T)), every pair its own class.

    Args:
        video, text: [N, E], one dtype of float32, bfloat16, float16 and float64, any strides. Not normalised inside.
        logit_scale: the multiplier of the products itself (already exponentiated): a float, or a float tensor of one element on
            the features' device, which may require a gradient.
        reduction: "mean", or "none": [N], entry i = half the sum of row i of text->video and column i of video->text; its
            backward pass computes the products again.
        group: a torch.distributed group; not built yet. grad_mode: "ddp" or "sum", how gradients add up over it.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A scalar, float32, or float64 for float64 features; products and sums in that dtype. N = 0 and N = 1 give 0.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    video, text = check_features("clip_loss", video, text)
    check_common("clip_loss", reduction, group, grad_mode)
    logit_scale = _check_scale(logit_scale, video)
    backend = _dispatch.pick("clip_loss", video.device, video.dtype, backend)
    if backend != "reference":
        return contrast_loss_step(video, text, logit_scale, None, reduction, backend)
    if video.shape[0] == 1:
        video, text, logit_scale = no_pair(video, text, logit_scale)
    with no_autocast(video):
        return clip_loss_reference(video, text, logit_scale, reduction)


def ego_nce_loss(video, text, positives, *, temperature=0.05, reduction="mean", group=None, grad_mode="ddp", backend=None):
    """EgoVLP's EgoNCE: InfoNCE with several positives, -mean log(sum over positives / sum over all) of both directions, added.

    Args:
        video, text: [N, E], as `clip_loss`; normalised inside (eps 1e-8).
        positives: bool [N, N], rows = videos and columns = captions, or a VerbNounPositives. Every pair is a positive of its
            own, whatever they say.
        temperature: > 0, divides the cosines.
        reduction: "mean", or "none": [N], entry i = row i of text->video plus column i of video->text.
        group, grad_mode, backend: as `clip_loss`.

    Returns, Raises: as `clip_loss`.

    Source: EgoVLP (arXiv 2206.01670), equation 2, and its code, where both directions are added.
    """
    video, text = check_features("ego_nce_loss", video, text)
    check_common("ego_nce_loss", reduction, group, grad_mode)
    positives = as_positives(positives, video.shape[0], video.device)
    if not number("temperature", temperature) > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    backend = _dispatch.pick("ego_nce_loss", video.device, video.dtype, backend)
    if backend != "reference":
        scale = torch.full((), 1 / temperature, dtype=torch.promote_types(video.dtype, torch.float32), device=video.device)
        return contrast_loss_step(video, text, scale, positives, reduction, backend)
    if video.shape[0] == 1:
        video, text = no_pair(video, text)
    with no_autocast(video):
        return ego_nce_loss_reference(video, text, positives.rows(0, video.shape[0]), temperature, reduction)


def _check_scale(scale, video):
    """logit_scale as a tensor [] in the dtype of the computation."""
    wide = torch.promote_types(video.dtype, torch.float32)
    if not isinstance(scale, torch.Tensor):
        return torch.full((), number("logit_scale", scale), dtype=wide, device=video.device)
    if scale.dtype not in FLOATS:
        raise TypeError(f"logit_scale: expected a float or a float tensor, got {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"logit_scale: expected one element, got the shape {list(scale.shape)}")
    if scale.device != video.device:
        raise ValueError(f"logit_scale: expected the features' device {video.device}, got {scale.device}")
    return memory_of("clip_loss", "logit_scale", scale).reshape(()).to(wide)
