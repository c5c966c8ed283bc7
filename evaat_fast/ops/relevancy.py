"""Where the labels of a pairwise loss come from: a dense matrix, quantised codes, or rows and columns of a larger table.

A loss takes any of them as `relevancy` and reads the same number for the same pair, whatever the source. Labels are converted
to float32 (float64 for float64 features) before anything is computed with them, so equal values give equal bits.
"""

import torch

from evaat_fast import _dispatch
from evaat_fast._check import memory_of, number

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INDICES = (torch.int64, torch.int32)


class DenseRelevancy:
    """Quantised labels of a batch: relevancy[j, i] = codes[j, i] * scale, rounded once from float64.

    Args:
        codes: uint8 [N, N], rows = videos, columns = captions.
        scale: a finite float, the value of one step (1 / 240 for codes that are 240 times the relevancy).
    """

    def __init__(self, codes, scale):
        if not isinstance(codes, torch.Tensor) or codes.dtype != torch.uint8:
            raise TypeError(f"codes: expected a uint8 tensor, got {_kind(codes)}")
        memory_of("DenseRelevancy", "codes", codes)
        if codes.ndim != 2:
            raise ValueError(f"codes: expected the shape [N, N], got {list(codes.shape)}")
        self.codes = codes
        self.scale = number("scale", scale)


class IndexedRelevancy:
    """Rows and columns of a larger table: relevancy[j, i] = table[video_index[j], caption_index[i]], never built as [N, N].

    Args:
        table: [V, C] float32, float64, bfloat16 or float16, any strides.
        video_index, caption_index: int64 or int32 [N], the table's row of each video and column of each caption.
    """

    def __init__(self, table, video_index, caption_index):
        _check_table("table", table, "[V, C]")
        for name, index in (("video_index", video_index), ("caption_index", caption_index)):
            if not isinstance(index, torch.Tensor) or index.dtype not in _INDICES:
                raise TypeError(f"{name}: expected a tensor of int64 or int32, got {_kind(index)}")
            memory_of("IndexedRelevancy", name, index)
            if index.ndim != 1:
                raise ValueError(f"{name}: expected the shape [N], got {list(index.shape)}")
            if index.device != table.device:
                raise ValueError(f"{name}: expected the table's device {table.device}, got {index.device}")
        if video_index.shape != caption_index.shape:
            raise ValueError(
                f"caption_index: expected {video_index.shape[0]} entries as video_index, got {caption_index.shape[0]}"
            )
        if caption_index is video_index:
            caption_index = caption_index.view(-1)  # torch.compile takes no tensor twice
        table = memory_of("IndexedRelevancy", "table", table)
        self.table, self.video_index, self.caption_index = table, video_index, caption_index


class VerbNounRelevancy:
    """0.5 [same verb] + 0.5 IoU(noun sets), from class ids: part of the contract, not built yet."""

    def __init__(self, verb, noun_set, noun_iou):
        raise _dispatch.not_built("VerbNounRelevancy", "pass the [N, N] matrix, or IndexedRelevancy")


class VerbNounPositives:
    """Pairs that share a verb and a noun, from class ids: part of the contract, not built yet."""

    def __init__(self, *args, **kwargs):
        raise _dispatch.not_built("VerbNounPositives", "it comes with ego_nce_loss")


class Labels:
    """What the kernels are given for any source: the stored tensor, the indices into it or None, and the scale of codes."""

    def __init__(self, table, video_index=None, caption_index=None, scale=0.0):
        self.table, self.video_index, self.caption_index, self.scale = table, video_index, caption_index, scale

    def matrix(self, dtype):
        """Contiguous [N, N] in `dtype` (torch's sums depend on the layout), rows = videos. An index out of range reads NaN."""
        if self.video_index is None:
            return _decode(self.table, self.scale, dtype).contiguous()
        return self._pick(self.video_index[:, None], self.caption_index[None, :], dtype)

    def diagonal(self, dtype):
        """[N] in `dtype`: each pair's own label."""
        if self.video_index is None:
            return _decode(self.table.diagonal(), self.scale, dtype)
        return self._pick(self.video_index, self.caption_index, dtype)

    def check_indices(self):
        """IndexError naming the index that does not fit the table. Waits for the device."""
        for name, index, size in (
            ("video_index", self.video_index, self.table.shape[0]),
            ("caption_index", self.caption_index, self.table.shape[1]),
        ):
            if index is not None and index.numel():
                low, high = (int(x) for x in torch.aminmax(index))
                if low < 0 or high >= size:
                    raise IndexError(
                        f"{name}: expected 0 <= index < {size}, as the table is {list(self.table.shape)}, got "
                        f"{low if low < 0 else high}"
                    )

    def _pick(self, rows, columns, dtype):
        V, C = self.table.shape
        if V == 0 or C == 0:
            shape = torch.broadcast_shapes(rows.shape, columns.shape)
            return torch.full(shape, float("nan"), dtype=dtype, device=self.table.device)
        inside = (rows >= 0) & (rows < V) & (columns >= 0) & (columns < C)
        picked = self.table[rows.long().clamp(0, V - 1), columns.long().clamp(0, C - 1)].to(dtype)
        return picked.masked_fill(~inside, float("nan"))


def _decode(x, scale, dtype):
    if x.dtype == torch.uint8:
        return code_values(scale, dtype).to(x.device)[x.long()]
    return x.to(dtype)


def code_values(scale, dtype):
    """[256]: the label that each code stands for."""
    return (torch.arange(256, dtype=torch.float64) * scale).to(dtype)


def as_labels(relevancy, N, device):
    """Checks a loss's `relevancy` argument against the batch and returns its Labels."""
    if isinstance(relevancy, IndexedRelevancy):
        name, table, size = "relevancy.table", relevancy.table, relevancy.video_index.shape[0]
        if size != N:
            raise ValueError(f"relevancy.video_index: expected {N} entries, one for each pair, got {size}")
        labels = Labels(table, relevancy.video_index, relevancy.caption_index)
    elif isinstance(relevancy, DenseRelevancy):
        name, table = "relevancy.codes", relevancy.codes
        labels = Labels(table, scale=relevancy.scale)
    else:
        name, table = "relevancy", relevancy
        _check_table("relevancy", table, f"[{N}, {N}], IndexedRelevancy or DenseRelevancy")
        table = memory_of("the loss", "relevancy", table)
        labels = Labels(table)
    if labels.video_index is None and table.shape != (N, N):
        raise ValueError(f"{name}: expected the shape [{N}, {N}], got {list(table.shape)}")
    if table.device != device:
        raise ValueError(f"{name}: expected the features' device {device}, got {table.device}")
    no_gradient(name, table)
    return labels


def no_gradient(name, x):
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and the losses compute none for labels; pass it detached")


def _check_table(name, x, shape):
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float tensor {shape}, got {_kind(x)}")
    if x.ndim != 2:
        raise ValueError(f"{name}: expected the shape {shape}, got {list(x.shape)}")


def _kind(x):
    return x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
