"""Pairwise losses over a batch of N videos and N captions.

    loss = sms_loss(video, text, IndexedRelevancy(table, video_index, caption_index))
    loss = clip_loss(video, text, logit_scale.exp())

The references below are the specification; they build the [N, N] matrix.
"""

import contextlib

import torch
from torch.nn.functional import cross_entropy

from evaat_fast import _dispatch
from evaat_fast._check import memory_of, number
from evaat_fast.ops.pairwise_step import clip_loss_step, sms_loss_step
from evaat_fast.ops.relevancy import (
    FLOATS,
    DenseRelevancy,
    IndexedRelevancy,
    Labels,
    VerbNounPositives,
    VerbNounRelevancy,
    as_labels,
    no_gradient,
    quantize_relevancy,
)

__all__ = [
    "DenseRelevancy",
    "IndexedRelevancy",
    "VerbNounPositives",
    "VerbNounRelevancy",
    "adaptive_mi_mm_loss",
    "clip_loss",
    "clip_loss_reference",
    "ego_nce_loss",
    "mi_mm_loss",
    "quantize_relevancy",
    "sms_loss",
    "sms_loss_reference",
]

_EPS = {"code": 1.1 / 240, "paper": 0.1, "charades": 0.1}


def unit_rows(x):
    """x / |x| by rows; a row with |x| < 1e-8 is divided by 1e-8 and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    unit = x / norm.clamp_min(1e-8)
    return torch.where(norm < 1e-8, unit.detach(), unit)


def sms_loss_reference(video, text, relevancy, self_relevancy, margin, relaxation, eps, rule="code", reduction="mean"):
    """The specification. relevancy [N, N] (rows = videos) and self_relevancy [N] have the dtype of the computation: float32,
    or float64 for float64 features.

    x_ij = t_i . v_j of unit rows, c_ij = relevancy[j, i], w = self_relevancy. Every i != j counts twice, from text i and from
    video j: m1 = margin * (w_i - c_ij) - (x_ii - x_ij) and m2 = margin * (w_j - c_ij) - (x_jj - x_ij).
    """
    N, wide = video.shape[0], relevancy.dtype
    x = unit_rows(text.to(wide)) @ unit_rows(video.to(wide)).T
    diagonal = torch.eye(N, dtype=torch.bool, device=x.device)
    terms = []
    for anchor in (1, 0):  # text i stands in the rows, video j in the columns
        d = self_relevancy.unsqueeze(anchor) - relevancy.T
        gap = x.diagonal().unsqueeze(anchor) - x
        terms.append(penalty(d, gap, margin, relaxation, eps, rule).masked_fill(diagonal, 0.0))
    entries = (terms[0].sum(1) + terms[1].sum(0)) / max(2 * (N - 1), 1)
    return entries if reduction == "none" else entries.sum() / max(N, 1)


def penalty(d, gap, margin, relaxation, eps, rule):
    """f(m, d) of one side. The rules differ in what d == eps means, in whether equal labels keep their margin * d, and in
    whether a pair of a higher label than the anchor's own counts."""
    m = margin * d - gap
    equal, more = d.abs() < eps, (d > eps if rule == "code" else d >= eps)
    near = m if rule == "code" else -gap
    less = (-m).relu()
    if rule == "charades":
        less = less.masked_fill(d <= -eps, 0.0)
    return torch.where(equal, (near.abs() - relaxation).relu(), torch.where(more, m.relu(), less))


def clip_loss_reference(video, text, logit_scale, reduction="mean"):
    """The specification: the mean of both directions' cross-entropies of logit_scale * t_i . v_j, in float32 or float64."""
    wide = torch.promote_types(video.dtype, torch.float32)
    logits = logit_scale * (text.to(wide) @ video.to(wide).T)
    target = torch.arange(video.shape[0], device=video.device)
    entries = [cross_entropy(x, target, reduction="none") for x in (logits, logits.T)]
    entries = (entries[0] + entries[1]) / 2
    return entries if reduction == "none" else entries.sum() / max(video.shape[0], 1)


def sms_loss(
    video,
    text,
    relevancy,
    *,
    self_relevancy=None,
    margin=0.6,
    relaxation=0.1,
    eps=None,
    rule="code",
    reduction="mean",
    group=None,
    grad_mode="ddp",
    validate=None,
    backend=None,
):
    """The Symmetric Multi-Similarity loss for graded labels.

    With x_ij the cosine of caption i and video j, c_ij the relevancy of (video j, caption i) and w_i that of pair i itself:
    d = w_i - c_ij, m = margin * d - (x_ii - x_ij) and f = relu(m) if d > eps, relu(|m| - relaxation) if |d| < eps, relu(-m)
    otherwise; likewise with j as the anchor. The loss is the sum of both over i != j, divided by 2 N (N - 1).

    Args:
        video, text: [N, E], one dtype of float32, bfloat16, float16 and float64, any strides; normalised inside (eps 1e-8). The
            gradient of a row whose norm is below 1e-8 is zero.
        relevancy: float [N, N], rows = videos and columns = captions, or an IndexedRelevancy, VerbNounRelevancy or
            DenseRelevancy. Converted to
            float32 (float64 for float64 features) before anything is computed with it. No gradient.
        self_relevancy: float [N], w; None: the diagonal of relevancy.
        margin, relaxation: floats; relaxation >= 0.
        eps: labels that differ by less count as equal; None: 1.1 / 240 for rule "code", 0.1 for the others.
        rule: "code", the authors' code; "paper", its equation 16: d == eps belongs to the first branch, and equal labels have
            no margin (m = x_ij - x_ii); "charades", equation 17 for labels of 0 and 1: as "paper", and pairs of a higher label
            than the anchor's own do not count. The paper trains it with margin 0.3.
        reduction: "mean", or "none": [N], entry i = row i of text->video plus column i of video->text, scaled so that their
            mean is the loss; its backward pass computes the similarities again.
        group: a torch.distributed group; not built yet. grad_mode: "ddp" or "sum", how gradients add up over it.
        validate: False skips the check of IndexedRelevancy's indices where that would wait for a GPU; None: check on CPU only.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A scalar, float32, or float64 for float64 features. N = 0 and N = 1 give 0.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. IndexError: an index outside the table.

    Source: EVA02-AT (arXiv 2506.14356), section 3.3, and the authors' SMS-Loss code.
    """
    video, text = _check_features("sms_loss", video, text)
    _check_common("sms_loss", reduction, group, grad_mode)
    if not isinstance(rule, str) or rule not in _EPS:
        raise ValueError(f'rule: expected "code", "paper" or "charades", got {rule!r}')
    labels = as_labels(relevancy, video.shape[0], video.device)
    if self_relevancy is not None:
        self_relevancy = _check_self(self_relevancy, video)
    relaxation = number("relaxation", relaxation)
    if relaxation < 0:
        raise ValueError(f"relaxation: expected a float >= 0, got {relaxation}")
    eps = _EPS[rule] if eps is None else number("eps", eps)
    if validate or (validate is None and video.is_cpu and not torch.compiler.is_compiling()):
        labels.check_indices()
    settings = (number("margin", margin), relaxation, eps)
    return _max_margin("sms_loss", video, text, labels, self_relevancy, settings, rule, reduction, backend)


def _max_margin(op, video, text, labels, self_relevancy, settings, rule, reduction, backend):
    backend = _dispatch.pick(op, video, backend)
    if backend != "reference":
        return sms_loss_step(video, text, labels, self_relevancy, settings, rule, reduction, backend)
    wide = torch.promote_types(video.dtype, torch.float32)
    w = labels.diagonal(wide) if self_relevancy is None else self_relevancy.to(wide)
    if video.shape[0] == 1:
        video, text = _no_pair(video, text)
    with _no_autocast(video):
        return sms_loss_reference(video, text, labels.matrix(wide), w, *settings, rule, reduction)


def mi_mm_loss(video, text, *, margin=0.2, reduction="mean", group=None, grad_mode="ddp", backend=None):
    """The max-margin ranking loss of multi-instance retrieval: the sum of relu(margin - x_ii + x_ij) and
    relu(margin - x_jj + x_ij) over i != j, divided by 2 N (N - 1).

    Args, Returns, Raises: as `sms_loss`, of which this is the first branch with w = 1 and no relevancy between pairs.

    Source: EgoVLP (arXiv 2206.01670); EVA02-AT (arXiv 2506.14356), section 3.3.
    """
    video, text = _check_features("mi_mm_loss", video, text)
    w = video.new_ones(1, dtype=torch.promote_types(video.dtype, torch.float32)).expand(video.shape[0])
    return _first_branch("mi_mm_loss", video, text, w, margin, reduction, group, grad_mode, backend)


def adaptive_mi_mm_loss(
    video, text, self_relevancy, *, margin=0.4, reduction="mean", group=None, grad_mode="ddp", backend=None
):
    """`mi_mm_loss` with a margin of its own for each pair: margin * self_relevancy of the anchor.

    Args:
        self_relevancy: float [N]; no gradient. Others, Returns, Raises: as `sms_loss`.

    Source: EgoVLP (arXiv 2206.01670); EVA02-AT (arXiv 2506.14356), section 3.3.
    """
    video, text = _check_features("adaptive_mi_mm_loss", video, text)
    self_relevancy = _check_self(self_relevancy, video)
    return _first_branch("adaptive_mi_mm_loss", video, text, self_relevancy, margin, reduction, group, grad_mode, backend)


def _first_branch(op, video, text, self_relevancy, margin, reduction, group, grad_mode, backend):
    _check_common(op, reduction, group, grad_mode)
    N = video.shape[0]
    zeros = self_relevancy.new_zeros((1, 1)).expand(N, N)
    settings = (number("margin", margin), 0.0, -torch.inf)  # every d is above eps
    return _max_margin(op, video, text, Labels(zeros), self_relevancy, settings, "code", reduction, backend)


def ego_nce_loss(video, text, positives, *, temperature=0.05, reduction="mean", group=None, grad_mode="ddp", backend=None):
    """EgoVLP's EgoNCE: part of the contract, not built yet."""
    raise _dispatch.not_built("ego_nce_loss")


def clip_loss(video, text, logit_scale, *, reduction="mean", group=None, grad_mode="ddp", backend=None):
    """Symmetric InfoNCE: ½ (CE(logit_scale * t v^T) + CE(logit_scale * v t^T)), every pair its own class.

    Args:
        video, text: [N, E], one dtype of float32, bfloat16, float16 and float64, any strides. Not normalised inside.
        logit_scale: the multiplier of the products itself (already exponentiated): a float, or a float tensor of one element on
            the features' device, which may require a gradient.
        reduction: "mean", or "none": [N], entry i = half the sum of row i of text->video and column i of video->text;
            its backward pass computes the products again.
        group: a torch.distributed group; not built yet. grad_mode: "ddp" or "sum", how gradients add up over it.
        backend: "auto", "cpu" or "reference".

    Returns:
        A scalar, float32, or float64 for float64 features; products and sums in that dtype. N = 0 and N = 1 give 0.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    video, text = _check_features("clip_loss", video, text)
    _check_common("clip_loss", reduction, group, grad_mode)
    logit_scale = _check_scale(logit_scale, video)
    backend = _dispatch.pick("clip_loss", video, backend)
    if backend != "reference":
        return clip_loss_step(video, text, logit_scale, reduction, backend)
    if video.shape[0] == 1:
        video, text, logit_scale = _no_pair(video, text, logit_scale)
    with _no_autocast(video):
        return clip_loss_reference(video, text, logit_scale, reduction)


def _check_self(x, video):
    N, device = video.shape[0], video.device
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"self_relevancy: expected a float tensor [{N}], got {got}")
    if x.shape != (N,):
        raise ValueError(f"self_relevancy: expected the shape [{N}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"self_relevancy: expected the features' device {device}, got {x.device}")
    no_gradient("self_relevancy", x)
    return memory_of("the loss", "self_relevancy", x)


def _check_features(op, video, text):
    for name, x in (("video", video), ("text", text)):
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor [N, E], got {got}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: expected the shape [N, E] with E > 0, got {list(x.shape)}")
    if text.dtype != video.dtype:
        raise TypeError(f"text: expected video's dtype {video.dtype}, got {text.dtype}")
    if text.device != video.device:
        raise ValueError(f"text: expected video's device {video.device}, got {text.device}")
    if text.shape != video.shape:
        raise ValueError(f"text: expected video's shape {list(video.shape)}, got {list(text.shape)}")
    return memory_of(op, "video", video), memory_of(op, "text", text)


def _check_common(op, reduction, group, grad_mode):
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction: expected "mean" or "none", got {reduction!r}')
    if grad_mode not in ("ddp", "sum"):
        raise ValueError(f'grad_mode: expected "ddp" or "sum", got {grad_mode!r}')
    if group is not None:
        raise _dispatch.not_built(f"{op}(group=...)", "gather the features first, or leave group=None")


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


def _no_pair(*tensors):
    """What the reference is given for N = 1: there is no pair, so a NaN in the features must not reach loss or gradient."""
    return [x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0) for x in tensors]


def _no_autocast(x):
    """Products are computed in the dtype the reference names, also where the caller trains under autocast."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
