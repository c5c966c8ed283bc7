"""The pairwise losses on CPU: torch multiplies panels of similarities, the C++ kernels read and overwrite them.

Memory is linear in N: one panel, the two gradients, and unit rows. Gradients come out of the forward pass, as their slopes need
nothing but the diagonal of the similarities.
"""

import torch

from evaat_fast._dispatch import DTYPE_CODE

_RULES = {"code": 0, "paper": 1, "charades": 2}  # Rule of csrc/pairwise.h
_CODES = 4  # kCodes
# Bytes of a panel, and its least rows. With one thread 4 to 16 MB are alike (1.05 x the bare products); with two, every product
# waits for the slower thread, so fewer and larger ones win wherever something else runs.
_PANEL = 16 << 20
_LEAST_ROWS = 256
# From here on bfloat16 rows are multiplied as such, where the CPU can; below, the time is not in the products.
_BF16_ROWS = 1024


def _native_bf16():
    """Whether bfloat16 products are faster than float32 ones here."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _panel_rows(N, size):
    return min(N, max(_LEAST_ROWS, _PANEL // (N * size) // 64 * 64))


def _rows(x):
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _pointer(x):
    return 0 if x is None else x.data_ptr()


def sms(video, text, labels, self_relevancy, weight, settings, rule, each, need_video, need_text):
    """As `sms_step`, the mean."""
    from evaat_fast import _cpu

    N, E = video.shape
    wide = self_relevancy.dtype
    video, text = _rows(video), _rows(text)
    low = video.dtype == torch.bfloat16 and N >= _BF16_ROWS and _native_bf16()
    panel_dtype = torch.bfloat16 if low else wide
    code, wide_code, threads = DTYPE_CODE[video.dtype], DTYPE_CODE[wide], torch.get_num_threads()

    # In bfloat16 the raw rows are multiplied and the products scaled: rounding the unit rows costs five times the error.
    vectors = torch.empty((3, N), dtype=wide)
    norm_video, norm_text, diagonal = vectors
    unit_video = torch.empty((N, E), dtype=panel_dtype) if need_text or not low else None
    unit_text = torch.empty((N, E), dtype=panel_dtype) if need_video or not low else None
    features = (video.data_ptr(), video.stride(0), text.data_ptr(), text.stride(0))
    where = (norm_video.data_ptr(), norm_text.data_ptr(), diagonal.data_ptr(), _pointer(unit_video), _pointer(unit_text))
    _cpu.sms_prepare(code, wide_code, features, N, E, *where, low, threads)
    left, right = (video, text) if low else (unit_video, unit_text)
    scales = [x.clamp_min(1e-8).reciprocal() for x in (norm_video, norm_text)] if low else [None, None]

    rows = _panel_rows(N, panel_dtype.itemsize)
    panel = torch.empty((rows, N), dtype=panel_dtype)
    row_loss = torch.empty(N, dtype=torch.float64)
    row_sum, col_sum = torch.empty(N, dtype=torch.int32), torch.zeros((threads, N), dtype=torch.int32)
    grad_video, grad_text = (torch.empty((N, E) if need else (0,), dtype=wide) for need in (need_video, need_text))
    part_video = torch.empty((rows, E), dtype=panel_dtype) if low and need_video else None
    part_text = torch.empty((N, E), dtype=panel_dtype) if low and need_text else None
    source = _label_source(labels, wide)
    for first in range(0, N, rows):
        last = min(first + rows, N)
        s = panel[: last - first]
        torch.mm(left[first:last], right.T, out=s)
        _cpu.sms_panel(
            wide_code,
            DTYPE_CODE[panel_dtype],
            s.data_ptr(),
            last - first,
            N,
            first,
            *(_pointer(x) for x in scales),
            diagonal.data_ptr(),
            self_relevancy.data_ptr(),
            source[0],
            *settings,
            _RULES[rule],
            need_video or need_text,
            row_loss.data_ptr(),
            row_sum.data_ptr(),
            col_sum.data_ptr(),
            threads,
        )
        if need_video and low:
            grad_video[first:last] = torch.mm(s, unit_text, out=part_video[: last - first])
        elif need_video:
            torch.mm(s, unit_text, out=grad_video[first:last])
        if need_text:
            _add_product(grad_text, s.T, unit_video[first:last], part_text, first == 0)
    pairs = 2.0 * N * (N - 1)
    slope = -(row_sum + col_sum.sum(0, dtype=torch.int32))
    for x, norm, other, norm_other, gradient, need in (
        (video, norm_video, text, norm_text, grad_video, need_video),
        (text, norm_text, video, norm_video, grad_text, need_text),
    ):
        if need:
            features = (x.data_ptr(), x.stride(0), other.data_ptr(), other.stride(0))
            where = (norm.data_ptr(), norm_other.data_ptr(), slope.data_ptr(), gradient.data_ptr())
            _cpu.sms_finish(code, wide_code, features, *where, 1.0 / pairs, N, E, threads)
    return (row_loss.sum() / pairs).to(wide), grad_video, grad_text


def _add_product(total, a, b, part, begin):
    """total (+)= a @ b; the products of bfloat16 panels are rounded once each and added up in float32."""
    if part is not None:
        torch.mm(a, b, out=part)
        total.copy_(part) if begin else total.add_(part)
    else:
        torch.mm(a, b, out=total) if begin else total.addmm_(a, b)


def _label_source(labels, wide):
    """The labels as the kernel takes them, and the tensors that must live as long."""
    table = labels.table
    kept = [None if x is None else x.long().contiguous() for x in (labels.video_index, labels.caption_index, labels.verb)]
    kept.append(None if labels.values is None else labels.values.to(wide).contiguous())
    code = DTYPE_CODE[table.dtype] if labels.values is None else _CODES
    half = table.stride(0) if table.ndim == 3 else 0
    return (table.data_ptr(), code, half, *table.stride()[-2:], *(_pointer(x) for x in kept)), kept


def clip(video, text, logit_scale, need_video, need_text, need_scale):
    """As `contrast_step`, the mean of InfoNCE."""
    from evaat_fast import _cpu

    N, E = video.shape
    wide = torch.promote_types(video.dtype, torch.float32)
    # Narrow features are widened: rounding logits of 100 to bfloat16 would be an error of 0.25 in the exponent.
    video, text = video.to(wide), text.to(wide)
    scale, threads, wide_code = float(logit_scale), torch.get_num_threads(), DTYPE_CODE[wide]
    rows = _panel_rows(N, wide.itemsize)
    panel = torch.empty((rows, N), dtype=wide)
    vectors = torch.zeros((6, N), dtype=torch.float64)
    row_max, row_sum, col_max, col_sum, target, row_slope = vectors
    col_max.fill_(-torch.inf)
    where = [x.data_ptr() for x in vectors]
    for first in range(0, N, rows):
        last = min(first + rows, N)
        s = torch.mm(video[first:last], text.T, out=panel[: last - first])
        _cpu.clip_panel(False, wide_code, s.data_ptr(), last - first, N, first, scale, where, threads)
    loss = ((row_max + row_sum.log() - target).sum() + (col_max + col_sum.log() - target).sum()) / (2 * N)
    grad_video, grad_text = (torch.empty((N, E) if need else (0,), dtype=wide) for need in (need_video, need_text))
    if need_video or need_text or need_scale:
        for first in range(0, N, rows):
            last = min(first + rows, N)
            s = panel[: last - first]
            if rows < N:  # a single panel still holds its products
                torch.mm(video[first:last], text.T, out=s)
            _cpu.clip_panel(True, wide_code, s.data_ptr(), last - first, N, first, scale, where, threads)
            if need_video:
                torch.mm(s, text, out=grad_video[first:last])
            if need_text:
                _add_product(grad_text, s.T, video[first:last], None, first == 0)
        for gradient in (grad_video, grad_text):
            gradient.mul_(scale / (2 * N))
    return loss.to(wide), grad_video, grad_text, (row_slope.sum() / (2 * N)).to(wide)
