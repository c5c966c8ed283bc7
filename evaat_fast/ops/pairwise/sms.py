"""The max-margin losses over a batch of N videos and N captions: SMS, MI-MM and Adaptive MI-MM.

    loss = sms_loss(video, text, IndexedRelevancy(table, video_index, caption_index))

The reference below is the specification; it builds the [N, N] matrix.
"""

import torch

from evaat_fast.ops._core import dispatch as _dispatch
from evaat_fast.ops._core.register import traced
from evaat_fast.ops._core.tensor import memory_of, number
from evaat_fast.ops.pairwise.check import check_common, check_features, no_autocast, no_pair
from evaat_fast.ops.pairwise.relevancy import (
    FLOATS,
    DenseRelevancy,
    IndexedRelevancy,
    Labels,
    VerbNounRelevancy,
    as_labels,
    no_gradient,
    quantize_relevancy,
)
from evaat_fast.ops.pairwise.step import sms_loss_step

__all__ = [
    "DenseRelevancy",
    "IndexedRelevancy",
    "VerbNounRelevancy",
    "adaptive_mi_mm_loss",
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

    Ties: of a clip and caption that stand in the batch twice, x_ij is x_ii. "triton" gets both from one kind of tile and scales
        them in one order: equal bits on a GPU. Elsewhere they may differ in the last bits, unless all products and sums are
        exact: "cpu" sums x_ii in double, and the products of "reference" and of Triton's interpreter may depend on a row's
        place. That noise decides a slope only on a kink: |m| = relaxation between equal labels, m = 0 between others.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. IndexError: an index outside the table.

    Source: EVA02-AT (arXiv 2506.14356), section 3.3, and the authors' SMS-Loss code.
    """
    video, text = check_features("sms_loss", video, text)
    check_common("sms_loss", reduction, group, grad_mode)
    if not isinstance(rule, str) or rule not in _EPS:
        raise ValueError(f'rule: expected "code", "paper" or "charades", got {rule!r}')
    labels = as_labels(relevancy, video.shape[0], video.device)
    if self_relevancy is not None:
        self_relevancy = _check_self(self_relevancy, video)
    relaxation = number("relaxation", relaxation)
    if relaxation < 0:
        raise ValueError(f"relaxation: expected a float >= 0, got {relaxation}")
    eps = _EPS[rule] if eps is None else number("eps", eps)
    if validate or (validate is None and video.is_cpu and not torch.compiler.is_compiling() and not traced(type(video), type(text))):
        labels.check_indices()
    settings = (number("margin", margin), relaxation, eps)
    return _max_margin("sms_loss", video, text, labels, self_relevancy, settings, rule, reduction, backend)


def _max_margin(op, video, text, labels, self_relevancy, settings, rule, reduction, backend):
    backend = _dispatch.pick(op, video.device, video.dtype, backend)
    if backend != "reference":
        return sms_loss_step(video, text, labels, self_relevancy, settings, rule, reduction, backend)
    wide = torch.promote_types(video.dtype, torch.float32)
    w = labels.diagonal(wide) if self_relevancy is None else self_relevancy.to(wide)
    if video.shape[0] == 1:
        video, text = no_pair(video, text)
    with no_autocast(video):
        return sms_loss_reference(video, text, labels.matrix(wide), w, *settings, rule, reduction)


def mi_mm_loss(video, text, *, margin=0.2, reduction="mean", group=None, grad_mode="ddp", backend=None):
    """The max-margin ranking loss of multi-instance retrieval: the sum of relu(margin - x_ii + x_ij) and
    relu(margin - x_jj + x_ij) over i != j, divided by 2 N (N - 1).

    Args, Returns, Raises: as `sms_loss`, of which this is the first branch with w = 1 and no relevancy between pairs.

    Source: EgoVLP (arXiv 2206.01670); EVA02-AT (arXiv 2506.14356), section 3.3.
    """
    video, text = check_features("mi_mm_loss", video, text)
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
    video, text = check_features("adaptive_mi_mm_loss", video, text)
    self_relevancy = _check_self(self_relevancy, video)
    return _first_branch("adaptive_mi_mm_loss", video, text, self_relevancy, margin, reduction, group, grad_mode, backend)


def _first_branch(op, video, text, self_relevancy, margin, reduction, group, grad_mode, backend):
    check_common(op, reduction, group, grad_mode)
    N = video.shape[0]
    zeros = self_relevancy.new_zeros((1, 1)).expand(N, N)
    settings = (number("margin", margin), 0.0, -torch.inf)  # every d is above eps
    return _max_margin(op, video, text, Labels(zeros), self_relevancy, settings, "code", reduction, backend)


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
