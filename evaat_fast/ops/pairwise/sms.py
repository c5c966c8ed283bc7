"""The max-margin losses over a batch of N videos and N captions: SMS, MI-MM and Adaptive MI-MM.

loss = sms_loss(video, text, IndexedRelevancy(table, video_index, caption_index))
"""

import functools

import torch
from torch import Tensor

from evaat_fast.ops._core.tensor import check_device, dense, number
from evaat_fast.ops.pairwise import step
from evaat_fast.ops.pairwise.check import FLOATS, GradMode, Options, Reduction, no_gradient
from evaat_fast.ops.pairwise.reference import Penalty, Rule, sms_loss_reference
from evaat_fast.ops.pairwise.relevancy import DenseRelevancy, IndexedRelevancy, Labels, VerbNounRelevancy

Relevancy = Tensor | DenseRelevancy | IndexedRelevancy | VerbNounRelevancy
_SOURCES = "[{n}, {N}], IndexedRelevancy, VerbNounRelevancy or DenseRelevancy"
_EPS = {"code": 1.1 / 240, "paper": 0.1, "charades": 0.1}


def sms_loss(
    video: Tensor,
    text: Tensor,
    relevancy: Relevancy,
    *,
    self_relevancy: Tensor | None = None,
    margin: float = 0.6,
    relaxation: float = 0.1,
    eps: float | None = None,
    rule: Rule = "code",
    reduction: Reduction = "mean",
    group: object = None,
    grad_mode: GradMode = "ddp",
    validate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The Symmetric Multi-Similarity loss for graded labels.

    With x_ij the cosine of caption i and video j, c_ij the relevancy of (video j, caption i) and w_i that of pair i itself:
    d = w_i - c_ij, m = margin * d - (x_ii - x_ij) and f = relu(m) if d > eps, relu(|m| - relaxation) if |d| < eps, relu(-m)
    otherwise; likewise with j as the anchor. The loss is the sum of both over i != j, divided by 2 N (N - 1).

    Args:
        video, text: [N, E], one dtype of float32, bfloat16, float16 and float64, any strides; normalised inside (eps 1e-8). The
            gradient of a row whose norm is below 1e-8 is zero.
        relevancy: float [N, N], rows = videos and columns = captions, or an IndexedRelevancy, VerbNounRelevancy or
            DenseRelevancy. Converted to float32 (float64 for float64 features) before it is used. No gradient.
        self_relevancy: float [N], w; None: the diagonal of relevancy.
        margin, relaxation: floats; relaxation >= 0.
        eps: labels that differ by less count as equal; None: 1.1 / 240 for rule "code", 0.1 for the others.
        rule: "code", the authors' code; "paper", its equation 16: d == eps belongs to the first branch, and equal labels have
            no margin (m = x_ij - x_ii); "charades", equation 17 for labels of 0 and 1: as "paper", and pairs of a higher label
            than the anchor's own do not count. The paper trains it with margin 0.3.
        reduction: "mean", or "none": [N], entry i = row i of text->video plus column i of video->text, scaled so that their
            mean is the loss; its backward pass computes the similarities again.
        group: a torch.distributed process group. Each of its W ranks passes n of the N = W n pairs: features, indices, ids and
            self_relevancy [n], of a dense relevancy its rows [n, N], the captions in the order of the ranks; tables and options
            are the same everywhere. All get the loss of all N, the same bits, or with "none" their own [n] of it. Every rank
            must call, and with "none" go backward. Not under torch.compile. None: this process alone.
        grad_mode: over a group, gradients of a rank's rows are "sum": those of one process that has the N pairs, or "ddp": W
            times those, so that the mean over the ranks that DDP and FSDP take of parameters is right. The factor that goes
            back through the loss is each rank's own, and should be the same; what goes back through [n] counts as in one
            process, so the mean of all is `entries.sum() / N`.
        validate: False skips the check of IndexedRelevancy's indices where that would wait for a GPU; None: check on CPU only.
        backend: "auto", "triton", "cuda" (16-bit features), "cpu" or "reference".

    Returns:
        A scalar, float32, or float64 for float64 features. N = 0 and N = 1 give 0.

    Ties: of a clip and caption that stand in the batch twice, x_ij is x_ii. "triton" and "cuda" get both from one kind of tile
        and scale them in one order: equal bits on a GPU. Elsewhere they may differ in the last bits, unless all products and
        sums are exact: "cpu" sums x_ii in double, and the products of "reference" and of Triton's interpreter may depend on a
        row's place. That noise decides a slope only on a kink: |m| = relaxation between equal labels, m = 0 between others.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. IndexError: an index outside the table.

    Source: EVA02-AT (arXiv 2506.14356), section 3.3, and the authors' SMS-Loss code.
    """
    if not isinstance(rule, str) or rule not in _EPS:
        raise ValueError(f'rule: expected "code", "paper" or "charades", got {rule!r}')
    relaxation = number("relaxation", relaxation)
    if relaxation < 0:
        raise ValueError(f"relaxation: expected a float >= 0, got {relaxation}")
    costs = Penalty(number("margin", margin), relaxation, _EPS[rule] if eps is None else number("eps", eps), rule)
    options = Options(reduction, group, grad_mode, backend, validate)
    if relevancy is None:
        raise TypeError(f"relevancy: expected a float tensor {_SOURCES.format(n='N', N='N')}, got NoneType")
    return max_margin("sms_loss", video, text, relevancy, self_relevancy, costs, options)


def mi_mm_loss(
    video: Tensor,
    text: Tensor,
    *,
    margin: float = 0.2,
    reduction: Reduction = "mean",
    group: object = None,
    grad_mode: GradMode = "ddp",
    backend: str | None = None,
) -> Tensor:
    """The max-margin ranking loss of multi-instance retrieval: the sum of relu(margin - x_ii + x_ij) and
    relu(margin - x_jj + x_ij) over i != j, divided by 2 N (N - 1).

    Args, Returns, Raises: as `sms_loss`, of which this is the first branch with w = 1 and no relevancy between pairs.

    Source: EgoVLP (arXiv 2206.01670); EVA02-AT (arXiv 2506.14356), section 3.3.
    """
    options = Options(reduction, group, grad_mode, backend)
    return max_margin("mi_mm_loss", video, text, None, None, _first_branch(margin), options)


def adaptive_mi_mm_loss(
    video: Tensor,
    text: Tensor,
    self_relevancy: Tensor,
    *,
    margin: float = 0.4,
    reduction: Reduction = "mean",
    group: object = None,
    grad_mode: GradMode = "ddp",
    backend: str | None = None,
) -> Tensor:
    """`mi_mm_loss` with a margin of its own for each pair: margin * self_relevancy of the anchor.

    Args:
        self_relevancy: float [N]; no gradient. Others, Returns, Raises: as `sms_loss`.

    Source: EgoVLP (arXiv 2206.01670); EVA02-AT (arXiv 2506.14356), section 3.3.
    """
    options = Options(reduction, group, grad_mode, backend)
    if self_relevancy is None:
        raise TypeError("self_relevancy: expected a float tensor [N], got NoneType")
    return max_margin("adaptive_mi_mm_loss", video, text, None, self_relevancy, _first_branch(margin), options)


def _first_branch(margin):
    return Penalty(number("margin", margin), 0.0, -torch.inf, "code")  # every d is above eps


def max_margin(
    op: str,
    video: Tensor,
    text: Tensor,
    relevancy: Relevancy | None,
    self_relevancy: Tensor | None,
    costs: Penalty,
    options: Options,
) -> Tensor:
    """relevancy None: nothing between pairs, and 1 of each itself."""

    def plan(call):
        n, N, dtype, device = call.n, call.N, call.dtype, call.device
        # C++ would read outside of the table, so its indices are checked whatever `validate` says: here, or where a compiler or
        # a mode hides the numbers, in the operator.
        as_asked = options.validate is None or call.backend != "reference"
        checked = bool(options.validate) or (device.type == "cpu" and not call.hidden and as_asked)
        in_kernel = call.backend == "triton" and call.ranks is None  # reads each pair's own label with the others
        own: Tensor | None
        if relevancy is None:
            labels, own = Labels(video.new_zeros((1, 1), dtype=dtype).expand(n, N)), video.new_ones(1, dtype=dtype).expand(n)
        elif isinstance(relevancy, (DenseRelevancy, IndexedRelevancy, VerbNounRelevancy)):
            labels, own = relevancy.labels(call, checked, None if in_kernel or self_relevancy is not None else dtype)
        else:
            labels = Labels(_floats("relevancy", relevancy, (n, N), device, _SOURCES.format(n=n, N=N)))
            own = None if in_kernel else labels.table.diagonal(call.first)
        if self_relevancy is not None:
            own = _floats("self_relevancy", self_relevancy, (n,), device, f"[{n}]")
        assert in_kernel or own is not None
        own = own if call.ranks is None or own is None else own.to(dtype)  # as every rank's

        def reference(video, text, labels=labels, own=own):
            assert own is not None
            of_all = labels.matrix(dtype), own.to(dtype)
            return sms_loss_reference(video, text, *of_all, **vars(costs), reduction=options.reduction)

        return functools.partial(step.SmsSettings, labels, own, costs, checked), reference

    known = {"relevancy": relevancy, "self_relevancy": self_relevancy, "penalty": costs}
    return step.loss(op, step.sms_step, video, text, options, plan, known)


def _floats(name, x, shape, device, expected):
    """x, a float tensor of that shape on the features' device, without a gradient."""
    x = dense("the loss", name, x, FLOATS, f"a float tensor {expected}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected the shape {expected if x.ndim != len(shape) else list(shape)}, got {list(x.shape)}")
    check_device(name, x.device, device, "the features'")
    no_gradient(name, x.requires_grad)
    return x
