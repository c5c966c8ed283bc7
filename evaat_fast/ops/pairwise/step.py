"""One step of a pairwise loss as a torch operator, loss and gradients together, and what autograd keeps of it."""

import torch

from evaat_fast.ops._core.register import register, traced
from evaat_fast.ops.pairwise.check import no_autocast
from evaat_fast.ops.pairwise.positives import Positives
from evaat_fast.ops.pairwise.relevancy import Labels


def _fake_sms(video, text, *arguments):
    *_, each, need_video, need_text, _ = arguments
    wide = torch.promote_types(video.dtype, torch.float32)
    gradients = [video.new_empty(video.shape if need else (0,), dtype=wide) for need in (need_video, need_text)]
    return video.new_empty(video.shape[:1] if each else (), dtype=wide), *gradients


@register(
    "sms_step(Tensor video, Tensor text, Tensor table, Tensor? video_index, Tensor? caption_index, Tensor? verb, "
    "Tensor? values, Tensor? self_relevancy, Tensor? weight, float margin, float relaxation, float eps, str rule, bool each, "
    "bool need_video, bool need_text, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_sms,
)
@torch.no_grad()
def sms_step(
    video,
    text,
    table,
    video_index,
    caption_index,
    verb,
    values,
    self_relevancy,
    weight,
    margin,
    relaxation,
    eps,
    rule,
    each,
    need_video,
    need_text,
    backend,
):
    """(loss, gradients asked for, empty otherwise), in float32, or float64 for float64 features.

    each: the loss is [N], as `reduction="none"`. weight [N]: the gradients are those of the sum of weight * entries, else of
    the mean.
    """
    wide = torch.promote_types(video.dtype, torch.float32)
    labels = Labels(table, video_index, caption_index, verb, values)
    if video.is_cpu:
        labels.check_indices()
    if video.shape[0] < 2:
        return tuple(x.zero_() for x in _fake_sms(video, text, each, need_video, need_text, backend))
    own = labels.diagonal(wide) if self_relevancy is None else self_relevancy.to(wide)
    arguments = (video, text, labels, own.contiguous(), weight, (margin, relaxation, eps), rule, each, need_video, need_text)
    if backend == "triton":
        from evaat_fast.ops.pairwise.triton import sms
    else:
        from evaat_fast.ops.pairwise.cpu import sms
    with no_autocast(video):
        return sms(*arguments)


def _refuse_double_backward():
    # Grad mode is on in a backward pass only under create_graph=True. torch's once_differentiable would let it pass where the
    # incoming gradient is a constant, and a gradient penalty would silently be none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError('the losses have no double backward (create_graph=True) in a kernel; use backend="reference"')


class Sms(torch.autograd.Function):
    """The mean saves the two gradients and nothing else. They stay in float32 until the factor of the backward pass is known,
    so that a loss scale reaches them before float16 rounds them."""

    @staticmethod
    def forward(ctx, video, text, *arguments):
        loss, *gradients = sms_step.at(traced(type(video), type(text)))(video, text, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.needs = video.dtype, arguments[-3:-1]
        return loss

    @staticmethod
    def backward(ctx, factor):
        _refuse_double_backward()
        gradients = (
            (gradient * factor).to(ctx.dtype) if need else None
            for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        )
        return *gradients, *[None] * 15


class SmsEach(torch.autograd.Function):
    """Each pair's own loss: the backward pass computes the similarities again, now that it knows what each counts."""

    @staticmethod
    def forward(ctx, video, text, *arguments):
        *settings, need_video, need_text, backend = arguments
        ctx.save_for_backward(video, text, *settings[:6])
        ctx.settings, ctx.needs, ctx.backend = settings[7:-1], (need_video, need_text), backend
        return sms_step.at(traced(type(video), type(text)))(video, text, *settings, False, False, backend)[0]

    @staticmethod
    def backward(ctx, weight):
        _refuse_double_backward()
        video, text, *labels = ctx.saved_tensors
        _, *gradients = sms_step.at(traced(type(video), type(text)))(video, text, *labels, weight.contiguous(), *ctx.settings, False, *ctx.needs, ctx.backend)
        gradients = (g.to(video.dtype) if need else None for g, need in zip(gradients, ctx.needs, strict=True))
        return *gradients, *[None] * 15


def sms_loss_step(video, text, labels, self_relevancy, settings, rule, reduction, backend):
    """The loss of a checked call on a backend that is not the reference."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (video, text)]
    text = text.view_as(text) if text is video else text  # torch.compile takes no tensor twice
    each = reduction == "none"
    arguments = (*labels.tensors(), self_relevancy, None, *settings, rule, each, *needs, backend)
    if not any(needs):
        return sms_step.at(traced(type(video), type(text)))(video, text, *arguments)[0]
    return (SmsEach if each else Sms).apply(video, text, *arguments)


def _fake_contrast(video, text, scale, dense, verbs, nouns, weight, normalise, each, need_video, need_text, *others):
    wide = torch.promote_types(video.dtype, torch.float32)
    gradients = [video.new_empty(video.shape if need else (0,), dtype=wide) for need in (need_video, need_text)]
    return video.new_empty(video.shape[:1] if each else (), dtype=wide), *gradients, video.new_empty((), dtype=wide)


@register(
    "contrast_step(Tensor video, Tensor text, Tensor scale, Tensor? dense, Tensor? verbs, Tensor? nouns, Tensor? weight, "
    "bool normalise, bool each, bool need_video, bool need_text, bool need_scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_contrast,
)
@torch.no_grad()
def contrast_step(video, text, scale, dense, verbs, nouns, weight, normalise, each, need_video, need_text, need_scale, backend):
    """(loss, gradients asked for, empty otherwise), in float32, or float64 for float64 features. scale: [] of that dtype.

    normalise: EgoNCE, of cosines and with both directions added; else InfoNCE, of products and their mean. each, weight: as
    `sms_step`.
    """
    needs = (need_video, need_text, need_scale)
    if video.shape[0] < 2:  # the softmax of one is one, whatever the logit
        fakes = _fake_contrast(video, text, scale, dense, verbs, nouns, weight, normalise, each, *needs, backend)
        return tuple(x.zero_() for x in fakes)
    positives = Positives(dense, verbs, nouns)
    if backend == "triton":
        from evaat_fast.ops.pairwise.triton import contrast
    else:
        from evaat_fast.ops.pairwise.cpu import contrast
    with no_autocast(video):
        return contrast(video, text, scale, positives, weight, normalise, each, *needs)


class Contrast(torch.autograd.Function):
    """Saves the gradients of both features and of the scale."""

    @staticmethod
    def forward(ctx, video, text, scale, *arguments):
        loss, *gradients = contrast_step.at(traced(type(video), type(text)))(video, text, scale, *arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.needs = (video.dtype, text.dtype, scale.dtype), arguments[-4:-1]
        return loss

    @staticmethod
    def backward(ctx, factor):
        _refuse_double_backward()
        gradients = (
            (gradient * factor).to(dtype) if need else None
            for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
        )
        return *gradients, *[None] * 10


class ContrastEach(torch.autograd.Function):
    """As `SmsEach`."""

    @staticmethod
    def forward(ctx, video, text, scale, *arguments):
        *settings, _, _, _, ctx.backend = arguments
        ctx.save_for_backward(video, text, scale, *settings[:3])
        ctx.normalise, ctx.needs = settings[4], arguments[-4:-1]
        return contrast_step.at(traced(type(video), type(text)))(video, text, scale, *settings, False, False, False, ctx.backend)[0]

    @staticmethod
    def backward(ctx, weight):
        _refuse_double_backward()
        tensors = ctx.saved_tensors
        _, *gradients = contrast_step.at(traced(type(tensors[0]), type(tensors[1])))(*tensors, weight.contiguous(), ctx.normalise, False, *ctx.needs, ctx.backend)
        gradients = (g.to(x.dtype) if need else None for g, x, need in zip(gradients, tensors[:3], ctx.needs, strict=True))
        return *gradients, *[None] * 10


def contrast_loss_step(video, text, scale, positives, reduction, backend):
    """As `sms_loss_step`; positives None: InfoNCE."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (video, text, scale)]
    text = text.view_as(text) if text is video else text
    each, normalise = reduction == "none", positives is not None
    pairs = positives.tensors() if normalise else (None, None, None)
    arguments = (video, text, scale, *pairs, None, normalise, each, *needs, backend)
    if not any(needs):
        return contrast_step.at(traced(type(video), type(text)))(*arguments)[0]
    return (ContrastEach if each else Contrast).apply(*arguments)
