"""`reduction="none"`: each pair's own loss, by panels of torch's operations, and its gradients by computing the panels again.

Memory is linear in N, time some ten times that of the kernels that know the mean alone.
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
    none, pairs = functools.partial(video.new_empty, (0,)), 2 * (N - 1)
    if weight is None:
        return entries / pairs, none(), none()
    grads = []
    for grad, unit, other, norm, need in (
        (grad_video, unit_video, unit_text, norms[0], need_video),
        (grad_text, unit_text, unit_video, norms[1], need_text),
    ):
        grad = (grad + own_slope[:, None] * other) / pairs
        grad = (grad - unit * (grad * unit).sum(1, keepdim=True)) / norm
        grads.append(grad.masked_fill(norm < 1e-8, 0.0) if need else none())
    return own.new_zeros(()), *grads


def clip(video, text, logit_scale, each, weight, need_video, need_text, need_scale):
    """As `clip_step`, without a mean."""
    N, wide = video.shape[0], torch.promote_types(video.dtype, torch.float32)
    video, text = video.to(wide), text.to(wide)
    panels = _panels(N, wide.itemsize)
    rows, columns = (torch.full((N,), -torch.inf, dtype=wide, device=video.device) for _ in range(2))
    for first, last in panels:
        s = logit_scale * (video[first:last] @ text.T)
        rows[first:last] = s.logsumexp(1)
        columns = torch.logaddexp(columns, s.logsumexp(0))
    none = functools.partial(video.new_empty, (0,))
    if weight is None:
        target = logit_scale * (video * text).sum(1)
        return (rows + columns) / 2 - target, none(), none(), video.new_zeros(())
    grad_video, grad_text, grad_scale = torch.zeros_like(video), torch.zeros_like(text), video.new_zeros(())
    for first, last in panels:
        x = video[first:last] @ text.T
        s = logit_scale * x
        slope = (s - rows[first:last, None]).exp() * weight[first:last, None] + (s - columns).exp() * weight
        own = torch.arange(first, last, device=s.device)
        slope[own - first, own] -= 2 * weight[first:last]
        grad_scale += (slope * x).sum() / 2
        slope *= logit_scale / 2
        grad_video[first:last] = slope @ text
        grad_text += slope.T @ video[first:last]
    grads = (g if need else none() for g, need in ((grad_video, need_video), (grad_text, need_text)))
    return video.new_zeros(()), *grads, grad_scale
