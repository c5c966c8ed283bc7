"""The pairwise losses on a GPU: Triton's kernels make panels of slopes, torch's products turn them into gradients.

Scratch is one panel, unit rows in the features' dtype and a few vectors; from N = 256k on the max-margin losses have a kernel
that needs neither panel nor unit rows. Nothing waits for the GPU.
"""

import functools

import torch

# Bytes of a panel, which should stay in L2 between the kernel that writes it and the two products that read it; from N = 128k
# its 128 rows, the least a product is efficient with, take more.
_PANEL = 32 << 20
_LEAST_ROWS = 128
_RECOMPUTE = 1 << 18  # pairs from which a step does without panels


def _panel_rows(N, size):
    return min(N, max(_LEAST_ROWS, _PANEL // (N * size) // _LEAST_ROWS * _LEAST_ROWS))


@functools.cache
def _has_out_dtype():
    """Whether torch multiplies 16-bit matrices into a float32 result (2.8 and later, CUDA)."""
    return hasattr(torch.ops.aten.addmm, "dtype_out")


def multiply(a, b, out, begin=True):
    """out (+)= a @ b in float32; 16-bit products are rounded once each where torch cannot keep their sums."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if begin else out.addmm_(a, b)
    elif a.is_cuda and _has_out_dtype():
        torch.mm(a, b, out_dtype=out.dtype, out=out) if begin else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        product = torch.mm(a, b)
        out.copy_(product) if begin else out.add_(product)


def _rows(x):
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _recomputes(N, E, dtype):
    """Whether a step with gradients does without panels: where their least rows leave L2, and a text gradient that every panel
    adds to costs more than computing the similarities twice. bfloat16, for whose range a row's 1 / norm is never too large;
    float32 would spill."""
    from evaat_fast.kernels.pairwise.sms_recompute import MOST_FEATURES

    return N >= _RECOMPUTE and E <= MOST_FEATURES and dtype == torch.bfloat16


def sms(video, text, labels, own, weight, settings, rule, each, need_video, need_text):
    """As `sms_step`."""
    from evaat_fast.kernels.pairwise import sms as kernels

    N, E = video.shape
    if (need_video or need_text) and _recomputes(N, E, video.dtype):
        return _sms_recompute(video, text, labels, own, weight, settings, rule, need_video, need_text)
    dtype, device = video.dtype, video.device
    video, text, need = _rows(video), _rows(text), need_video or need_text
    norms, inverses = torch.empty((2, 2, N), dtype=torch.float32, device=device)
    diagonal = torch.empty(N, dtype=torch.float32, device=device)
    unit_video, unit_text = units = torch.empty((2, N, E), dtype=dtype, device=device)
    kernels.prepare(video, text, units, norms, inverses)
    kernels.own_cosines(video, text, inverses, diagonal)

    rows = _panel_rows(N, dtype.itemsize)
    down, across = kernels.tiles(rows, N, dtype)
    panel = torch.empty((rows, N), dtype=dtype, device=device) if need else None
    sums = torch.zeros((2, N), dtype=torch.int32, device=device)
    losses = torch.zeros((2, N) if each else (), dtype=torch.float64, device=device)
    part = torch.empty((across, rows) if each else (down * across,), dtype=torch.float32, device=device)
    part_col = torch.empty((down, N), dtype=torch.float32, device=device) if each else None
    grads = [torch.empty((N, E) if x else (0,), dtype=torch.float32, device=device) for x in (need_video, need_text)]
    weight, source = None if weight is None else weight.float(), _source(labels)
    for first in range(0, N, rows):
        last = min(first + rows, N)
        slopes = panel[: last - first] if need else None
        down, across = kernels.tiles(last - first, N, dtype)
        here = part.flatten()[: across * (last - first) if each else down * across]
        parts = (here, part_col)
        kernels.sms_panel(
            (video, text, inverses), (diagonal, own), source, weight, slopes, parts, sums, first, last, settings, rule
        )
        if each:
            losses[0, first:last] = here.view(across, last - first).sum(0, dtype=torch.float64)
            losses[1] += part_col[:down].sum(0, dtype=torch.float64)
        else:
            losses += here.sum(dtype=torch.float64)
        if need_video:
            multiply(slopes, unit_text, grads[0][first:last])
        if need_text:
            multiply(slopes.T, unit_video[first:last], grads[1], first == 0)
    if need:
        factor = 1 / (2 * (N - 1)) if weight is not None else 1 / (2 * N * (N - 1))
        wanted = [g if x else None for g, x in zip(grads, (need_video, need_text), strict=True)]
        kernels.finish(video, text, norms, sums, weight, *wanted, factor)
    losses = losses.sum(0) / (2 * (N - 1)) if each else losses / (2 * N * (N - 1))
    return losses.float(), *grads


def _source(labels):
    """The labels as the kernels take them."""
    return *labels.tensors()[:4], None if labels.values is None else labels.values.float()


def _sms_recompute(video, text, labels, own, weight, settings, rule, need_video, need_text):
    """A step with gradients, without panels."""
    from evaat_fast.kernels.pairwise import sms as kernels
    from evaat_fast.kernels.pairwise.sms_recompute import sms_rows

    N, E = video.shape
    empty = functools.partial(torch.empty, dtype=torch.float32, device=video.device)
    video, text, (norms, inverses), diagonal = _rows(video), _rows(text), empty(2, 2, N), empty(N)
    kernels.prepare(video, text, None, norms, inverses)
    entries, sums = empty(2, N, dtype=torch.float64), empty(2, N, dtype=torch.int32)
    grads = [empty(N, E) if need else empty(0) for need in (need_video, need_text)]
    wanted = [g if need else None for g, need in zip(grads, (need_video, need_text), strict=True)]
    weight, source = None if weight is None else weight.float(), _source(labels)
    for i, captions in enumerate((False, True)):
        rows = (diagonal, own, source, weight, entries[i], sums[i], wanted[i])
        sms_rows((video, text, inverses), *rows, settings, rule, captions)
    share = 1 / (2 * (N - 1)) if weight is not None else 1 / (2 * N * (N - 1))
    kernels.finish(video, text, norms, sums, weight, *wanted, share)
    return (entries.sum() * share).float(), *grads


def _two_floats(x):
    """float64 [2, N] -> float32 [2, 2, N] whose second dimension adds up to it."""
    high = x.float()
    low = torch.where(high.isfinite(), x - high, 0.0)
    return torch.stack((high, low.float()), 1)


def contrast(video, text, scale, positives, weight, normalise, each, need_video, need_text, need_scale):
    """As `contrast_step`."""
    from evaat_fast.kernels.pairwise import contrast as pairwise_contrast
    from evaat_fast.kernels.pairwise import sms as kernels

    N, E = video.shape
    dtype, device, share = video.dtype, video.device, 1.0 if normalise else 0.5
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)  # noqa: E731
    video, text, inverses, unit_video, unit_text = _rows(video), _rows(text), None, video, text
    if normalise:
        norms, inverses = empty(2, 2, N)
        unit_video, unit_text = units = torch.empty((2, N, E), dtype=dtype, device=device)
        kernels.prepare(video, text, units, norms, inverses)
    source = (video, text, inverses), scale.reshape(1), positives.tensors()
    rows = _panel_rows(N, dtype.itemsize)
    panels = [(first, min(first + rows, N)) for first in range(0, N, rows)]
    row_totals, col_totals = torch.full((2, 2, N), -torch.inf, dtype=torch.float64, device=device)
    for first, last in panels:
        down, across = pairwise_contrast.tiles(last - first, video, source[2])
        of_rows, of_columns = empty(2, 2, 4 * across, last - first), empty(2, 2, down, N)
        pairwise_contrast.stats(*source, of_rows, of_columns, first, last)
        row_totals[:, first:last] = of_rows.sum(1, dtype=torch.float64).logsumexp(1)
        col_totals = torch.logaddexp(col_totals, of_columns.sum(1, dtype=torch.float64).logsumexp(1))
    if positives.tensors() == (None, None, None):  # the own logits, from the same products
        own, ones = empty(N), torch.ones((2, N), device=device)
        kernels.own_cosines(video, text, ones if inverses is None else inverses, own)
        row_totals[1] = col_totals[1] = own * scale
    entries = share * ((row_totals[0] - row_totals[1]) + (col_totals[0] - col_totals[1]))
    loss = (entries if each else entries.sum() / N).float()
    totals = [_two_floats(x) for x in (row_totals, col_totals)]
    grads = [empty(N, E) if need else empty(0) for need in (need_video, need_text)]
    grad_scale = torch.zeros((), dtype=torch.float64, device=device)
    if not (need_video or need_text or need_scale):
        return loss, *grads, grad_scale.float()
    panel = torch.empty((rows, N), dtype=dtype, device=device)
    for first, last in panels:
        down, across = pairwise_contrast.tiles(last - first, video, source[2])
        slopes, part = panel[: last - first], empty(down * across)
        pairwise_contrast.slopes(*source, totals, weight, slopes, part, first, last)
        grad_scale += part.sum(dtype=torch.float64)
        if need_video:
            multiply(slopes, unit_text, grads[0][first:last])
        if need_text:
            multiply(slopes.T, unit_video[first:last], grads[1], first == 0)
    share = share if weight is not None else share / N
    for grad in grads:
        grad.mul_(scale * share)
    if normalise:
        no_sums = torch.zeros((2, N), dtype=torch.int32, device=device)
        wanted = [g if need else None for g, need in zip(grads, (need_video, need_text), strict=True)]
        kernels.finish(video, text, norms, no_sums, None, *wanted, 1.0)
    return loss, *grads, (grad_scale * share).float()
