"""A step of a pairwise loss as a torch operator, loss and gradients together, and what autograd keeps of it."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.register import Operator, register, traced
from evaat_fast.ops._core.tensor import check_device, dense
from evaat_fast.ops.pairwise.check import FLOATS, Options, no_autocast
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.reference import Penalty, wide
from evaat_fast.ops.pairwise.relevancy import Labels


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


@dataclass(frozen=True)
class ContrastSettings:
    """A log-sum-exp loss. normalise: EgoNCE, of cosines and with both directions added; else InfoNCE, of products and their
    mean."""

    positives: Positives
    normalise: bool
    work: Work


class Step:
    """One step on one backend: what it is given, and room for the gradients.

    A backend's class adds what `_run` calls: prepare(); sweeps(), functions of (first, last) that read those rows of the
    similarities and return their slopes or None; product(a, b, out, add), out (+)= a @ b; finish(), the loss and all gradients.
    """

    panel: Any
    unit_video: Any
    unit_text: Any

    def __init__(self, video: Tensor, text: Tensor, scale: Tensor | None, weight: Tensor | None, settings: Any):
        self.N, self.E = video.shape
        self.video, self.text = (x if x.stride(1) == 1 or self.E == 1 else x.contiguous() for x in (video, text))
        self.scale: Any = scale
        self.weight, self.settings, self.work = weight, settings, settings.work
        self.dtype, self.wide, self.device = video.dtype, wide(video.dtype), video.device
        needs = self.work.needs()
        self.gradients = [torch.empty((self.N, self.E) if x else 0, dtype=self.wide, device=self.device) for x in needs[:2]]
        self.grad_video, self.grad_text = (g if x else None for g, x in zip(self.gradients, needs, strict=False))
        self.learns = any(needs)

    def panel_rows(self, size: int, most: int, least: int, multiple: int) -> int:
        """Rows of a panel of `most` bytes whose elements have `size`, a multiple and at least so many."""
        return min(self.N, self.work.panel_rows or max(least, most // (self.N * size) // multiple * multiple))


def _outputs(inputs, work):
    """Loss and gradients, not yet written: empty where they are not asked for, but for the scale's."""
    dtype = wide(inputs[0].dtype)
    loss = inputs[0].new_empty(inputs[0].shape[:1] if work.each else (), dtype=dtype)
    asked = zip(inputs, work.needs(), strict=False)
    return loss, *(x.new_empty(x.shape if need or x.ndim == 0 else (0,), dtype=dtype) for x, need in asked)


def _run(name, inputs, weight, settings):
    video, work = inputs[0], settings.work
    if video.shape[0] < 2:  # no pair: the softmax of one is one, whatever the logit
        return tuple(x.zero_() for x in _outputs(inputs, work))
    backend: Any
    if work.backend == "triton":
        from evaat_fast.ops.pairwise import triton as backend
    elif work.backend == "cuda":
        from evaat_fast.ops.pairwise import cuda as backend
    else:
        from evaat_fast.ops.pairwise import cpu as backend
    video, text, scale = inputs if len(inputs) == 3 else (*inputs, None)
    with no_autocast(video.device.type):
        step = getattr(backend, name)(video, text, scale, weight, settings)
        step.prepare()
        # Memory is linear in N: a sweep reads a panel, some videos times all captions, and may turn it into slopes. The
        # max-margin losses need one sweep, as their slopes depend on nothing but the diagonal of the similarities; the
        # contrastive ones two, for the totals come first.
        for sweep in step.sweeps():
            for first in range(0, step.N, step.rows):
                last = min(first + step.rows, step.N)
                slopes = sweep(first, last)
                if slopes is not None and step.grad_video is not None:
                    step.product(slopes, step.unit_text, step.grad_video[first:last])
                if slopes is not None and step.grad_text is not None:
                    step.product(slopes.T, step.unit_video[first:last], step.grad_text, add=first > 0)
        return step.finish()


@register(
    "sms_step(Tensor video, Tensor text, Tensor? weight, {settings}) -> (Tensor, Tensor, Tensor)",
    lambda video, text, weight, settings: _outputs((video, text), settings.work),
    SmsSettings,
)
def sms_step(video: Tensor, text: Tensor, weight: Tensor | None, settings: SmsSettings) -> tuple:
    """(loss, gradients asked for, empty otherwise), in float32, or float64 for float64 features.

    weight [N]: the gradients are those of the sum of weight * entries, else of the mean.
    """
    if video.is_cpu and not (settings.checked and weight is None):  # a backward pass: what they lie in may have changed
        settings.labels.check_indices()
    return _run("Sms", (video, text), weight, settings)


@register(
    "contrast_step(Tensor video, Tensor text, Tensor scale, Tensor? weight, {settings}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda video, text, scale, weight, settings: _outputs((video, text, scale), settings.work),
    ContrastSettings,
)
def contrast_step(video: Tensor, text: Tensor, scale: Tensor, weight: Tensor | None, settings: ContrastSettings) -> tuple:
    """As `sms_step`, with the gradient of scale, [] in the dtype of the computation."""
    return _run("Contrast", (video, text, scale), weight, settings)


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
    from evaat_fast.ops.pairwise.triton import scaled

    needs = work.needs()[: len(gradients)]
    some = [(gradient, dtype) for gradient, dtype, need in zip(gradients, dtypes, needs, strict=True) if need]
    made = iter(scaled(factor, *map(list, zip(*some, strict=True))))
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
    def forward(ctx, step, settings, *inputs):
        loss, *gradients = _call(step, inputs, None, settings)
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.work = [x.dtype for x in inputs], settings.work
        return loss

    @staticmethod
    def backward(ctx, factor):
        _refuse_double_backward()
        return None, None, *_scaled(factor, ctx.saved_tensors, ctx.dtypes, ctx.work)


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
class Call:
    """What a loss plans by: N pairs, where they are, the dtype of the computation, the backend, and whether a compiler, a mode
    or a wrapper may hide the numbers."""

    N: int
    device: torch.device
    dtype: torch.dtype
    backend: str
    hidden: bool


def loss(op: str, step: Operator, video: Tensor, text: Tensor, options: Options, plan: Callable[[Call], tuple]) -> Tensor:
    """Checks a call, plans it, and runs it.

    plan: returns the step's settings as a function of their work, the reference as one of the inputs, and what the inputs are
    beside the features.
    """
    video, text = _features(op, "video", video), _features(op, "text", text)
    if text.dtype != video.dtype:
        raise TypeError(f"text: expected video's dtype {video.dtype}, got {text.dtype}")
    check_device("text", text.device, video.device, "video's")
    if text.shape != video.shape:
        raise ValueError(f"text: expected video's shape {list(video.shape)}, got {list(text.shape)}")
    options.check(op)
    N, device = video.shape[0], video.device
    backend, hidden = dispatch.pick(op, device, video.dtype, options.backend), traced(type(video), type(text))
    settings_of, reference, *scale = plan(Call(N, device, wide(video.dtype), backend, hidden))
    if backend == "reference":
        given = [video, text, *scale]
        if N == 1:  # there is no pair, so a NaN in the features must not reach loss or gradient
            given = [x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0) for x in given]
        with no_autocast(device.type):
            return reference(*given)
    inputs = (video, text.view_as(text) if text is video else text, *scale)  # torch.compile takes no tensor twice
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    each, how = options.reduction == "none", (backend, options.panel_rows)
    if not any(needs):
        return step.at(hidden)(*inputs, None, settings_of(Work(each, False, False, False, *how)))[0]
    asked = settings_of(Work(False, needs[0], needs[1], needs[-1] and bool(scale), *how))
    if each:
        return Each.apply(step, settings_of(Work(True, False, False, False, *how)), asked, *inputs)
    return Mean.apply(step, asked, *inputs)


def _features(op, name, x):
    x = dense(op, name, x, FLOATS, "a float32, bfloat16, float16 or float64 tensor [N, E]")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected the shape [N, E] with E > 0, got {list(x.shape)}")
    return x
