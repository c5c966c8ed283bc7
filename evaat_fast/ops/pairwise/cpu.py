"""The pairwise losses on CPU: torch multiplies panels of similarities, the C++ kernels read and overwrite them.

Memory is linear in N: one panel, the two gradients, and unit rows. The max-margin losses multiply a panel once, as their slopes
need nothing but the diagonal of the similarities; the contrastive ones twice, unless a single panel holds them all.
"""

import torch

from evaat_fast import _cpu as _module
from evaat_fast.ops._core.native import dtype_codes

DTYPE_CODE = dtype_codes(_module)

_RULES = {"code": 0, "paper": 1, "charades": 2}  # of csrc/pairwise/pairwise.h: Rule, SmsMode, kCodes, kMaskBlock
_LOSS, _SLOPES, _EACH, _WEIGHTED = range(4)
_CODES = 4
_MASK_BLOCK = 32
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


def _features(x, other):
    return x.data_ptr(), x.stride(0), other.data_ptr(), other.stride(0)


def sms(video, text, labels, self_relevancy, weight, settings, rule, each, need_video, need_text):
    """As `sms_step`."""
    from evaat_fast import _cpu

    N, E = video.shape
    wide, need = self_relevancy.dtype, need_video or need_text
    video, text = _rows(video), _rows(text)
    # Slopes are integers, which bfloat16 holds, unless each pair counts differently.
    low = video.dtype == torch.bfloat16 and weight is None and N >= _BF16_ROWS and _native_bf16()
    panel_dtype = torch.bfloat16 if low else wide
    code, wide_code, threads = DTYPE_CODE[video.dtype], DTYPE_CODE[wide], torch.get_num_threads()

    # In bfloat16 the raw rows are multiplied and the products scaled: rounding the unit rows costs five times the error.
    norm_video, norm_text, diagonal = torch.empty((3, N), dtype=wide)
    unit_video = torch.empty((N, E), dtype=panel_dtype) if need_text or not low else None
    unit_text = torch.empty((N, E), dtype=panel_dtype) if need_video or not low else None
    where = (norm_video.data_ptr(), norm_text.data_ptr(), diagonal.data_ptr(), _pointer(unit_video), _pointer(unit_text))
    _cpu.pair_prepare(code, wide_code, _features(video, text), N, E, *where, low, threads)
    left, right = (video, text) if low else (unit_video, unit_text)
    scales = [x.clamp_min(1e-8).reciprocal() for x in (norm_video, norm_text)] if low else [None, None]

    rows = _panel_rows(N, panel_dtype.itemsize)
    panel = torch.empty((rows, N), dtype=panel_dtype)
    mode = _EACH if each else _WEIGHTED if weight is not None else _SLOPES if need else _LOSS
    weight = None if weight is None else weight.to(wide)
    row_loss, col_loss = torch.empty(N, dtype=torch.float64), torch.zeros((threads, N) if each else 0, dtype=torch.float64)
    row_sum, col_sum = torch.empty(N, dtype=torch.int32), torch.zeros((threads, N), dtype=torch.int32)
    sums = [x.data_ptr() for x in (row_loss, col_loss, row_sum, col_sum)]
    grad_video, grad_text = (torch.empty((N, E) if x else (0,), dtype=wide) for x in (need_video, need_text))
    part_video = torch.empty((rows, E), dtype=panel_dtype) if low and need_video else None
    part_text = torch.empty((N, E), dtype=panel_dtype) if low and need_text else None
    source, kept = _label_source(labels, wide)  # `kept` lives as long as its pointers
    vectors = [_pointer(x) for x in (*scales, diagonal, self_relevancy)]
    for first in range(0, N, rows):
        last = min(first + rows, N)
        s = torch.mm(left[first:last], right.T, out=panel[: last - first])
        place = (wide_code, DTYPE_CODE[panel_dtype], s.data_ptr(), last - first, N, first)
        _cpu.sms_panel(*place, *vectors, source, *settings, _RULES[rule], mode, _pointer(weight), sums, threads)
        if need_video and low:
            grad_video[first:last] = torch.mm(s, unit_text, out=part_video[: last - first])
        elif need_video:
            torch.mm(s, unit_text, out=grad_video[first:last])
        if need_text:
            _add_product(grad_text, s.T, unit_video[first:last], part_text, first == 0)
    if need:
        slope = -(row_sum + col_sum.sum(0, dtype=torch.int32)).to(wide)
        slope = slope if weight is None else slope * weight
        wanted = [grad_video if need_video else None, grad_text if need_text else None]
        factor = 1 / (2 * (N - 1) * (N if weight is None else 1))
        _through_norms(video, text, (norm_video, norm_text), slope, wanted, factor)
    if each:
        return ((row_loss + col_loss.sum(0)) / (2 * (N - 1))).to(wide), grad_video, grad_text
    return (row_loss.sum() / (2 * N * (N - 1))).to(wide), grad_video, grad_text


def _through_norms(video, text, norms, slope, grads, factor):
    """In place: factor * (gradients of the unit rows + slope * the pair's other one), taken through the normalisation."""
    from evaat_fast import _cpu

    code, wide_code, threads = DTYPE_CODE[video.dtype], DTYPE_CODE[slope.dtype], torch.get_num_threads()
    for i, (x, other) in enumerate(((video, text), (text, video))):
        if grads[i] is not None:
            where = (norms[i].data_ptr(), norms[1 - i].data_ptr(), slope.data_ptr(), grads[i].data_ptr())
            _cpu.pair_finish(code, wide_code, _features(x, other), *where, factor, *x.shape, threads)


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


def contrast(video, text, scale, positives, weight, normalise, each, need_video, need_text, need_scale):
    """As `contrast_step`."""
    from evaat_fast import _cpu

    N, E = video.shape
    wide = torch.promote_types(video.dtype, torch.float32)
    threads, wide_code = torch.get_num_threads(), DTYPE_CODE[wide]
    # Narrow features are widened: rounding logits of 100 to bfloat16 would be an error of 0.25 in the exponent.
    if normalise:
        raw, norms, diagonal = (_rows(video), _rows(text)), torch.empty((2, N), dtype=wide), torch.empty(N, dtype=wide)
        video, text = torch.empty((2, N, E), dtype=wide)
        where = [x.data_ptr() for x in (*norms, diagonal, video, text)]
        _cpu.pair_prepare(DTYPE_CODE[raw[0].dtype], wide_code, _features(*raw), N, E, *where, False, threads)
    else:
        video, text = video.to(wide), text.to(wide)
    rows = _panel_rows(N, wide.itemsize)
    panel = torch.empty((rows, N), dtype=wide)
    source, kept = _positive_source(positives, rows, N)
    totals, row_slope = torch.zeros((4, 2, N), dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    totals[:, 0].fill_(-torch.inf)
    weight = None if weight is None else weight.double()
    vectors = [_pointer(weight), *(x.data_ptr() for x in totals.view(8, N)), row_slope.data_ptr()]
    panels = [(first, min(first + rows, N)) for first in range(0, N, rows)]
    for first, last in panels:
        s = torch.mm(video[first:last], text.T, out=panel[: last - first])
        place = (wide_code, s.data_ptr(), last - first, N, first, float(scale))
        _cpu.contrast_panel(False, *place, source, vectors, threads)
    row, column, positive_row, positive_column = totals[:, 0] + totals[:, 1].log()
    share = 1.0 if normalise else 0.5
    entries = share * ((row - positive_row) + (column - positive_column))
    loss = (entries if each else entries.sum() / N).to(wide)
    grad_video, grad_text = (torch.empty((N, E) if need else (0,), dtype=wide) for need in (need_video, need_text))
    share = share if weight is not None else share / N
    if need_video or need_text or need_scale:
        for first, last in panels:
            s = panel[: last - first]
            if rows < N:  # a single panel still holds its products
                torch.mm(video[first:last], text.T, out=s)
            place = (wide_code, s.data_ptr(), last - first, N, first, float(scale))
            _cpu.contrast_panel(True, *place, source, vectors, threads)
            if need_video:
                torch.mm(s, text, out=grad_video[first:last])
            if need_text:
                _add_product(grad_text, s.T, video[first:last], None, first == 0)
        factor = float(scale) * share
        if normalise:
            wanted = [grad_video if need_video else None, grad_text if need_text else None]
            _through_norms(*raw, norms, torch.zeros(N, dtype=wide), wanted, factor)
        else:
            grad_video.mul_(factor)
            grad_text.mul_(factor)
    return loss, grad_video, grad_text, (row_slope.sum() * share).to(wide)


def _positive_source(positives, rows, N):
    """The positives as the kernel takes them, with room for a panel's mask, and the tensors that must live as long."""
    dense, verbs, nouns = positives.tensors()
    if dense is None and verbs is None:
        return (0,) * 8, None
    mask = torch.empty((rows, -(-N // _MASK_BLOCK) * _MASK_BLOCK), dtype=torch.uint8)
    kept = (dense, *(None if x is None else x.T.contiguous() for x in (verbs, nouns)), mask)
    strides, words = (0, 0) if dense is None else dense.stride(), (0, 0) if verbs is None else (verbs.shape[1], nouns.shape[1])
    return (_pointer(dense), *strides, _pointer(kept[1]), _pointer(kept[2]), *words, _pointer(mask)), kept
