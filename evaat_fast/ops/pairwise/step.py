"""A step of a pairwise loss as a torch operator, loss and gradients together, and what autograd keeps of it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.register import Operator, register, traced
from evaat_fast.ops._core.tensor import check_device, dense, keeps_numbers_elsewhere
from evaat_fast.ops.pairwise.check import FLOATS, Options, no_autocast
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.ranks import Across, Batch, Ranks, across, eager, reference_step
from evaat_fast.ops.pairwise.reference import Penalty, wide
from evaat_fast.ops.pairwise.relevancy import Labels

# From so many pairs on a max-margin step in CUDA C++ is faster than in Triton, which launches less; see dispatch.AUTO.
_OVERTAKES = 2048


@dataclass(frozen=True)
class Work:
    """What a step computes, and how.

    each: the loss is [N], as `reduction="none"`, and there are no gradients. panel_rows: videos of a panel; None: as the
    backend chooses.
    """

    each: bool
    need_video: bool
    need_text: bool
    need_scale: bool
    backend: str
    panel_rows: int | None

    def needs(self) -> tuple[bool, bool, bool]:
        return self.need_video, self.need_text, self.need_scale


@dataclass(frozen=True)
class SmsSettings:
    """A max-margin loss: the labels of all pairs, checked or not, and [N] those of each pair itself, None for a
    kernel that reads them with the others."""

    labels: Labels
    own: Tensor | None
    penalty: Penalty
    checked: bool
    work: Work

    def known(self) -> tuple:
        return self.labels, self.own

    def parts(self) -> tuple[tuple, tuple]:
        """(numbers, tensors)."""
        of = self.labels
        return (self.penalty, self.work), (of.table, of.video_index, of.caption_index, of.verb, of.values, self.own)

    def across(self, ranks: Ranks) -> "SmsSettings":
        """With what the other ranks know."""
        assert self.own is not None
        return replace(self, labels=self.labels.across(ranks, self.own.dtype), own=ranks.gather(self.own))


@dataclass(frozen=True)
class ContrastSettings:
    """A log-sum-exp loss. normalise: EgoNCE, of cosines and with both directions added; else InfoNCE, of products and their
    mean."""

    positives: Positives
    normalise: bool
    work: Work

    def known(self) -> tuple:
        return (self.positives,)

    def parts(self) -> tuple[tuple, tuple]:
        """As of `SmsSettings`."""
        of = self.positives
        return (self.normalise, self.work), (of.dense, of.verbs, of.nouns)

    def across(self, ranks: Ranks) -> "ContrastSettings":
        """As of `SmsSettings`."""
        return replace(self, positives=self.positives.across(ranks))


class Step:
    """One step on one backend: what it is given, and room for the gradients.

    A backend's class adds what `_run` calls: prepare(); sweeps(), functions of (first, last) that read those rows of the
    similarities and return their slopes or None; product(a, b, out, add), out (+)= a @ b; finish(), the loss and all gradients.
    Over ranks features, norms and gradients are of this rank's n pairs, the first of N, until `of_all` gathers them.
    """

    panel: Any
    unit_video: Any
    unit_text: Any

    def __init__(self, video: Tensor, text: Tensor, scale: Any, weight: Any, settings: Any, ranks: Ranks | None = None):
        self.n, self.E = video.shape
        self.N, self.ranks = self.n if ranks is None else self.n * ranks.W, ranks
        self.video, self.text = (x if x.stride(1) == 1 or self.E == 1 else x.contiguous() for x in (video, text))
        self.scale, self.weight, self.settings, self.work = scale, weight, settings, settings.work
        self.dtype, self.wide, self.device = video.dtype, wide(video.dtype), video.device
        needs = self.work.needs()
        rows = zip((self.n, self.N), needs, strict=False)
        self.gradients = [torch.empty((m, self.E) if x else 0, dtype=self.wide, device=self.device) for m, x in rows]
        self.grad_video, self.grad_text = (g if x else None for g, x in zip(self.gradients, needs, strict=False))
        self.learns = any(needs)

    def panel_rows(self, size: int, most: int, least: int, multiple: int) -> int:
        """Rows of a panel of `most` bytes whose elements have `size`, a multiple and at least so many."""
        return min(self.n, self.work.panel_rows or max(least, most // (self.N * size) // multiple * multiple))

    def of_all(self, x: Any) -> Any:
        """[n, ...] of this rank as [N, ...] of all."""
        return x if self.ranks is None or x is None else self.ranks.gather(x)

    def of_own(self, parts: Tensor) -> Tensor:
        """What rows [0] and columns [1:] of N pairs add up to, of this rank's n."""
        if self.ranks is None:
            return parts
        return torch.stack((parts[0, : self.n], self.ranks.scatter(parts[1:].sum(0, dtype=parts.dtype))))

    def total(self, *numbers: Tensor) -> Any:
        return numbers if self.ranks is None else self.ranks.total(*numbers)


def _outputs(inputs, work):
    """Loss and gradients, not yet written: empty where they are not asked for, but for the scale's."""
    dtype = wide(inputs[0].dtype)
    loss = inputs[0].new_empty(inputs[0].shape[:1] if work.each else (), dtype=dtype)
    asked = zip(inputs, work.needs(), strict=False)
    return loss, *(x.new_empty(x.shape if need or x.ndim == 0 else (0,), dtype=dtype) for x, need in asked)


def _run(name, inputs, weight, settings, ranks):
    video, work = inputs[0], settings.work
    if video.shape[0] < (2 if ranks is None else 1):  # no pair: the softmax of one is one, whatever the logit
        return tuple(x.zero_() for x in _outputs(inputs, work))
    backend = _module_of(work.backend)
    given = (*inputs, weight) if len(inputs) == 3 else (*inputs, None, weight)
    make = lambda: run(getattr(backend, name)(*given, settings, ranks))  # noqa: E731
    with no_autocast(video.device.type):
        if work.backend != "triton" or ranks is not None:
            return make()
        # A step like one before launches the same again.
        tf32 = video.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        numbers, tensors = settings.parts()
        return backend.again((name, tf32, *numbers), (*given, *tensors), make)


@functools.cache  # as the statement costs 1 us a call
def _module_of(backend: str) -> Any:
    if backend == "triton":
        from evaat_fast.ops.pairwise import triton

        return triton
    if backend == "cuda":
        from evaat_fast.ops.pairwise import cuda

        return cuda
    from evaat_fast.ops.pairwise import cpu

    return cpu


def run(step: Any) -> tuple:
    """The loss and all gradients of a backend's `Step`.

    Memory is linear in N: a sweep reads a panel, some videos times all captions, and may turn it into slopes. The max-margin
    losses need one sweep, as their slopes depend on nothing but the diagonal of the similarities; the contrastive ones two, for
    the totals come first.
    """
    step.prepare()
    for sweep in step.sweeps():
        for first in range(0, step.n, step.rows):
            last = min(first + step.rows, step.n)
            slopes = sweep(first, last)
            if slopes is not None and step.grad_video is not None:
                step.product(slopes, step.unit_text, step.grad_video[first:last])
            if slopes is not None and step.grad_text is not None:
                step.product(slopes.T, step.unit_video[first:last], step.grad_text, add=first > 0)
    slopes = None  # or the panel would stay while gradients are put in another order: 32 MiB of 260 at 32,768 pairs
    if step.ranks is not None and step.grad_text is not None:
        step.grad_text = step.gradients[1] = step.ranks.scatter(step.grad_text)
    return step.finish()


@register(
    "sms_step(Tensor video, Tensor text, Tensor? weight, {settings}) -> (Tensor, Tensor, Tensor)",
    lambda video, text, weight, settings: _outputs((video, text), settings.work),
    SmsSettings,
)
def sms_step(video: Tensor, text: Tensor, weight: Tensor | None, settings: SmsSettings, ranks: Ranks | None = None) -> tuple:
    """(loss, gradients asked for, empty otherwise), in float32, or float64 for float64 features.

    weight [N]: the gradients are those of the sum of weight * entries, else of the mean.
    """
    if video.is_cpu and not (settings.checked and weight is None):  # a backward pass: what they lie in may have changed
        settings.labels.check_indices()
    return _run("Sms", (video, text), weight, settings, ranks)


@register(
    "contrast_step(Tensor video, Tensor text, Tensor scale, Tensor? weight, {settings}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda video, text, scale, weight, settings: _outputs((video, text, scale), settings.work),
    ContrastSettings,
)
def contrast_step(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    settings: ContrastSettings,
    ranks: Ranks | None = None,
) -> tuple:
    """As `sms_step`, with the gradient of scale, [] in the dtype of the computation."""
    return _run("Contrast", (video, text, scale), weight, settings, ranks)


def _call(step, inputs, weight, settings):
    return step.at(traced(*map(type, inputs[:2])))(*inputs, weight, settings)


def _given(gradients, inputs_dtypes, work):
    """What a backward pass returns for the inputs."""
    asked = zip(gradients, inputs_dtypes, work.needs(), strict=False)
    return (gradient.to(dtype) if need else None for gradient, dtype, need in asked)


def _scaled(factor, gradients, dtypes, work):
    """`_given` of the gradients times a factor."""
    if work.backend != "triton" or traced(type(factor)):
        return _given([gradient * factor for gradient in gradients], dtypes, work)
    needs, scaled = work.needs()[: len(gradients)], _module_of("triton").scaled
    if all(needs):
        return scaled(factor, gradients, dtypes)
    some = [(gradient, dtype) for gradient, dtype, need in zip(gradients, dtypes, needs, strict=True) if need]
    made = iter(scaled(factor, *zip(*some, strict=True)))
    return (next(made) if need else None for need in needs)


def _refuse_double_backward():
    # Grad mode is on in a backward pass only under create_graph=True. torch's once_differentiable would let it pass where the
    # incoming gradient is a constant, and a gradient penalty would silently be none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError('the losses have no double backward (create_graph=True) in a kernel; use backend="reference"')


class Mean(torch.autograd.Function):
    """Saves the gradients and nothing else. They stay in float32 until the factor of the backward pass is known, so that a
    loss scale reaches them before float16 rounds them."""

    @staticmethod
    def forward(ctx, step, hidden, settings, *inputs):
        loss, *gradients = step.at(hidden)(*inputs, None, settings)
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.work = tuple([x.dtype for x in inputs]), settings.work
        return loss

    @staticmethod
    def backward(ctx, factor):
        _refuse_double_backward()
        return None, None, None, *_scaled(factor, ctx.saved_tensors, ctx.dtypes, ctx.work)


class Each(torch.autograd.Function):
    """Each pair's own loss: the backward pass computes the similarities again, now that it knows what each counts."""

    @staticmethod
    def forward(ctx, step, entries, gradients, *inputs):
        parts = [vars(x).values() if is_dataclass(x) else (x,) for x in vars(gradients).values()]
        ctx.save_for_backward(*inputs, *(x for part in parts for x in part if isinstance(x, Tensor)))
        ctx.step, ctx.settings, ctx.count = step, gradients, len(inputs)
        return _call(step, inputs, None, entries)[0]

    @staticmethod
    def backward(ctx, weight):
        _refuse_double_backward()
        inputs = ctx.saved_tensors[: ctx.count]  # which also finds out whether the labels have changed
        _, *gradients = _call(ctx.step, inputs, weight.contiguous(), ctx.settings)
        return None, None, None, *_given(gradients, [x.dtype for x in inputs], ctx.settings.work)


@dataclass(frozen=True)
class Call(Batch):
    """What a loss plans by: the batch, the dtype of the computation, the backend, and whether a compiler, a mode or a wrapper
    may hide the numbers."""

    dtype: torch.dtype
    backend: str
    hidden: bool


def loss(
    op: str,
    step: Operator,
    video: Tensor,
    text: Tensor,
    options: Options,
    plan: Callable[[Call], tuple],
    known: Mapping[str, object],
) -> Tensor:
    """Checks a call, plans it, and runs it.

    plan: returns the step's settings as a function of their work, the reference as one of the inputs, and what the inputs are
    beside the features. known: what else must be the same on every rank.
    """
    if options.group is not None:
        return eager(_over_group)(op, step, video, text, options, plan, known)
    return _served(step, options, _planned(op, video, text, options, plan, None), None)


def _over_group(op, step, video, text, options, plan, known):
    ranks = across(options.group)
    if ranks is None:
        return _served(step, options, _planned(op, video, text, options, plan, None), None)
    planned: Any = None
    error, found = None, {}
    try:
        planned = _planned(op, video, text, options, plan, ranks)
        found = {"backend": planned[1], "gradients": _needs(planned[0])}
    except Exception as raised:  # the others must not wait for this rank
        error = raised
    given = {"reduction": options.reduction, "grad_mode": options.grad_mode}
    ranks.agree({"loss": op, "video": video, "text": text, **known, **given, **found}, error)
    return _served(step, options, planned, ranks if len(video) else None)  # of no pair there is nothing more to say


def _planned(op, video, text, options, plan, ranks):
    """The inputs, the backend, whether numbers are hidden, and what the plan returns of settings and reference."""
    video, text = _features(op, "video", video), _features(op, "text", text)
    if text.dtype != video.dtype:
        raise TypeError(f"text: expected video's dtype {video.dtype}, got {text.dtype}")
    check_device("text", text.device, video.device, "video's")
    if text.shape != video.shape:
        raise ValueError(f"text: expected video's shape {list(video.shape)}, got {list(text.shape)}")
    options.check()
    if ranks is not None and any(keeps_numbers_elsewhere(type(x)) for x in (video, text)):
        raise NotImplementedError(f"group: {op} runs over a group on plain tensors alone, got {type(video).__name__}")
    n, device = video.shape[0], video.device
    N = n if ranks is None else n * ranks.W
    needs: tuple[str, ...] = () if ranks is None else (dispatch.GROUP,)
    if device.type == "cuda":
        if 128 < video.shape[1] <= 256 and dispatch.has_little_shared(device):
            needs += (dispatch.LITTLE_SHARED,)
        any_will_do = options.backend == "auto" or (options.backend is None and op not in dispatch.DEFAULT)
        if N < _OVERTAKES and any_will_do and dispatch.has_triton():
            needs += (dispatch.FEW_PAIRS,)
    backend, hidden = dispatch.pick(op, device, video.dtype, options.backend, needs), traced(type(video), type(text))
    call = Call(N, device, ranks, wide(video.dtype), backend, hidden)
    settings_of, reference, *scale = plan(call)
    return (video, text, *scale), backend, hidden, settings_of, reference


def _needs(inputs):
    learns = torch.is_grad_enabled()
    return [learns and x.requires_grad for x in inputs]


def _served(step, options, planned, ranks):
    (video, text, *scale), backend, hidden, settings_of, reference = planned
    each, how = options.reduction == "none", (backend, options.panel_rows)
    if ranks is not None:
        ranks.in_order = backend == "reference"
        everyones = settings_of(Work(each, False, False, False, *how)).across(ranks)
        body = functools.partial(reference_step, reference) if backend == "reference" else step.body
        step, settings_of = Across(body, ranks, options.grad_mode == "ddp"), lambda work: replace(everyones, work=work)
    elif backend == "reference":
        given = [video, text, *scale]
        with no_autocast(video.device.type):
            if video.shape[0] == 1:  # there is no pair, so a NaN in the features must not reach loss or gradient
                given = [x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0) for x in given]
            return reference(*given)
    inputs = (video, text.view_as(text) if text is video else text, *scale)  # torch.compile takes no tensor twice
    needs = _needs(inputs)
    if not any(needs):
        return step.at(hidden)(*inputs, None, settings_of(Work(each, False, False, False, *how)))[0]
    asked = settings_of(Work(False, needs[0], needs[1], needs[-1] and bool(scale), *how))
    if each:
        return Each.apply(step, settings_of(Work(True, False, False, False, *how)), asked, *inputs)
    return Mean.apply(step, hidden, asked, *inputs)


def _features(op, name, x):
    x = dense(op, name, x, FLOATS, "a float32, bfloat16, float16 or float64 tensor [N, E]")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected the shape [N, E] with E > 0, got {list(x.shape)}")
    return x
