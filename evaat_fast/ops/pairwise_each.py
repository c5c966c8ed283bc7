"""`reduction="none"`: each pair's own loss, by panels of torch's operations, and its gradients by computing the panels again.

Memory is linear in N; at N = 2048 a step takes 7 times (SMS) and 3.5 times (InfoNCE) that of the kernels of the mean alone.
"""

import functools

import torch

_PANEL = 4 << 20  # bytes of one [N, rows] tensor, of which a dozen live at once


def _panels(N, size):
    rows = max(1, min(N, _PANEL // (N * size)))
    return [(first, min(first + rows, N)) for first in range(0, N, rows)]


def _side(d, gap, own_pair, margin, relaxation, eps, rule):
    """(penalty, its slope in -gap) of pairs from one side, as the specification has them; nothing on own pairs."""
    m = margin * d - gap
    equal, more, near = (d.abs() < eps, d > eps, m) if rule == "code" else (d.abs() < eps, d >= eps, -gap)
    penalty = torch.where(equal, near.abs() - relaxation, torch.where(more, m, -m))
    idle = (penalty <= 0) | own_pair  # not NaN
    if rule == "charades":
        idle |= d <= -eps
    slope = torch.where(torch.where(equal, near, m) < 0, -1.0, 1.0).to(d.dtype)
    return penalty.masked_fill(idle, 0.0), slope.masked_fill(idle, 0.0)


def sms(video, text, labels, own, weight, settings, rule, each, need_video, need_text):
    """As `sms_step`, without a mean."""
    N, wide = video.shape[0], own.dtype
    video, text = video.to(wide), text.to(wide)
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (video, text)]
    unit_video, unit_text = (x / norm.clamp_min(1e-8) for x, norm in zip((video, text), norms, strict=True))
    diagonal = (unit_video * unit_text).sum(1)
    entries, grad_video, grad_text = torch.zeros_like(own), torch.zeros_like(video), torch.zeros_like(text)
    own_slope = torch.zeros_like(own)
    for first, last in _panels(N, wide.itemsize):
        x = unit_text @ unit_video[first:last].T  # texts in the rows
        c = labels.rows(first, last, wide).T
        own_pair = torch.arange(N, device=x.device)[:, None] == torch.arange(first, last, device=x.device)
        of_text, slope_text = _side(own[:, None] - c, diagonal[:, None] - x, own_pair, *settings, rule)
        of_video, slope_video = _side(own[first:last] - c, diagonal[first:last] - x, own_pair, *settings, rule)
        if weight is None:
            entries += of_text.sum(1)
            entries[first:last] += of_video.sum(0)
            continue
        slope_text *= weight[:, None]
        slope_video *= weight[first:last]
        own_slope -= slope_text.sum(1)
        own_slope[first:last] -= slope_video.sum(0)
        slope = slope_text + slope_video
        grad_video[first:last] = slope.T @ unit_text
        grad_text += slope @ unit_video[first:last]
    none = functools.partial(video.new_empty, (0,))
    if weight is None:
        return entries / (2 * (N - 1)), none(), none()
    grads = (
        through_unit((grad + own_slope[:, None] * other) / (2 * (N - 1)), unit, norm) if need else none()
        for grad, unit, other, norm, need in (
            (grad_video, unit_video, unit_text, norms[0], need_video),
            (grad_text, unit_text, unit_video, norms[1], need_text),
        )
    )
    return own.new_zeros(()), *grads


def through_unit(grad, unit, norm):
    """The gradient of rows from that of their unit rows; norm: [N, 1]."""
    grad = (grad - unit * (grad * unit).sum(1, keepdim=True)) / norm
    return grad.masked_fill(norm < 1e-8, 0.0)


def contrast(video, text, scale, positives, weight, normalise, each, need_video, need_text, need_scale):
    """As `contrast_step`, for any positives and reduction."""
    N, wide = video.shape[0], torch.promote_types(video.dtype, torch.float32)
    video, text = video.to(wide), text.to(wide)
    if normalise:
        norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (video, text)]
        video, text = (x / norm.clamp_min(1e-8) for x, norm in zip((video, text), norms, strict=True))
    panels, share = _panels(N, wide.itemsize), 1.0 if normalise else 0.5
    # In float64: a panel after the other, float32 would round a logarithm of 20 by 1e-6 each time.
    totals = torch.full((4, N), -torch.inf, dtype=torch.float64, device=video.device)
    row_all, row_positive, col_all, col_positive = totals

    def logits(first, last):
        """(products, logits, whether positive)"""
        x = video[first:last] @ text.T
        own = torch.arange(first, last, device=x.device)[:, None] == torch.arange(N, device=x.device)
        return x, scale * x, own | positives.rows(first, last) if normalise else own

    for first, last in panels:
        _, s, positive = logits(first, last)
        only = s.masked_fill(~positive, -torch.inf)
        row_all[first:last], row_positive[first:last] = s.logsumexp(1), only.logsumexp(1)
        torch.logaddexp(col_all, s.logsumexp(0).double(), out=col_all)
        torch.logaddexp(col_positive, only.logsumexp(0).double(), out=col_positive)
    entries, none = share * ((row_all - row_positive) + (col_all - col_positive)), functools.partial(video.new_empty, (0,))
    loss = (entries if each else entries.sum() / N).to(wide)
    row_all, row_positive, col_all, col_positive = totals.to(wide)
    grad_scale = video.new_zeros(())
    if not (need_video or need_text or need_scale):
        return loss, none(), none(), grad_scale
    grad_video, grad_text = torch.zeros_like(video), torch.zeros_like(text)
    weight = torch.full_like(row_all, 1 / N) if weight is None else weight
    for first, last in panels:
        x, s, positive = logits(first, last)
        slope = torch.zeros_like(s)
        for everything, only, counts in (
            (row_all[first:last, None], row_positive[first:last, None], weight[first:last, None]),
            (col_all, col_positive, weight),
        ):
            slope += ((s - everything).exp() - (s - only).exp().masked_fill(~positive, 0.0)) * counts
        slope *= share
        grad_scale += (slope * x).sum()
        slope *= scale
        grad_video[first:last] = slope @ text
        grad_text += slope.T @ video[first:last]
    grads = [grad_video, grad_text]
    if normalise:
        grads = [through_unit(*three) for three in zip(grads, (video, text), norms, strict=True)]
    return loss, *(g if need else none() for g, need in zip(grads, (need_video, need_text), strict=True)), grad_scale
