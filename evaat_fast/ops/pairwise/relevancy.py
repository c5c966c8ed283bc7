"""Where the labels of a pairwise loss come from: a dense matrix, quantised codes, or rows and columns of a larger table.

A loss takes any of them as `relevancy` and reads the same number for the same pair, whatever the source. Labels are converted
to float32 (float64 for float64 features) before anything is computed with them, so equal values give equal bits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from evaat_fast.ops._core.register import traced
from evaat_fast.ops._core.tensor import check_device, dense, kind, memory_of, number
from evaat_fast.ops.pairwise.check import FLOATS, no_gradient
from evaat_fast.ops.pairwise.ranks import Batch, Ranks


class DenseRelevancy:
    """Quantised labels of a batch: relevancy[j, i] = codes[j, i] * scale, rounded once from float64.

    Args:
        codes: uint8 [N, N], rows = videos, columns = captions.
        scale: a finite float, the value of one step (1 / 240 for codes that are 240 times the relevancy), or a float tensor
            [256], the value of each code, as `quantize_relevancy` gives it.

    Raises:
        TypeError: codes is no dense uint8 tensor, scale no number. ValueError: codes has not two dimensions; scale is not
        finite, of another shape or dtype, or requires a gradient.

    Source: the authors' SMS-Loss code, which keeps relevancies as uint8.
    """

    def __init__(self, codes: Tensor, scale: float | Tensor):
        self.codes = dense("DenseRelevancy", "codes", codes, (torch.uint8,), "a uint8 tensor")
        if codes.ndim != 2:
            raise ValueError(f"codes: expected the shape [N, N], got {list(codes.shape)}")
        self.values = _values(scale, codes.device)

    def labels(self, call: Batch, check: bool, own: torch.dtype | None) -> tuple["Labels", Tensor | None]:
        """Those of a batch, and in the dtype `own` each pair's own; check: wait for the device to see whether all indices
        lie in the table."""
        return _fitting(Labels(self.codes, values=self.values), call, check, own, "codes", "codes")


class IndexedRelevancy:
    """Rows and columns of a larger table: relevancy[j, i] = table[video_index[j], caption_index[i]], never built as [N, N].

    Args:
        table: [V, C] float32, float64, bfloat16, float16, or uint8 codes with a scale; any strides.
        video_index, caption_index: int64 or int32 [N], the table's row of each video and column of each caption.
        scale: of codes, as for `DenseRelevancy`; None for a table of floats.

    Raises:
        TypeError: table is not a tensor of floats, or of uint8 beside a scale; an index not of int64 or int32. ValueError: a
        shape, a device, indices of different lengths, or scale as for `DenseRelevancy`. An index outside the table is found by
        the loss: IndexError on the CPU; on CUDA the loss is NaN, unless `validate=True` asks for the error.

    Source: the authors' SMS-Loss code, whose matrix of all training clips and captions is read by their places in it.
    """

    def __init__(self, table: Tensor, video_index: Tensor, caption_index: Tensor, scale: float | Tensor | None = None):
        if scale is None:
            table = _table("table", table, "[V, C], or uint8 codes with a scale")
        elif not isinstance(table, Tensor) or table.dtype != torch.uint8 or table.ndim != 2:
            got = f"{kind(table)} {list(table.shape)}" if isinstance(table, Tensor) else kind(table)
            raise TypeError(f"table: expected uint8 codes [V, C] beside a scale, got {got}")
        else:
            table = memory_of("IndexedRelevancy", "table", table)
        _check_ids("IndexedRelevancy", table.device, video_index=video_index, caption_index=caption_index)
        if caption_index is video_index:
            caption_index = caption_index.view(-1)  # torch.compile takes no tensor twice
        self.table, self.video_index, self.caption_index = table, video_index, caption_index
        self.values = None if scale is None else _values(scale, table.device)

    def labels(self, call: Batch, check: bool, own: torch.dtype | None) -> tuple["Labels", Tensor | None]:
        """As `DenseRelevancy.labels`."""
        labels = Labels(self.table, self.video_index, self.caption_index, None, self.values)
        return _fitting(labels, call, check, own, "table", "video_index")


class VerbNounRelevancy:
    """EPIC-Kitchens' relevancy, 0.5 [same verb class] + 0.5 IoU(noun classes), from class ids: no matrix over clips at all.

    Args:
        verb: int64 or int32 [N], each pair's verb class.
        noun_set: int64 or int32 [N], each pair's set of noun classes, as a row of noun_iou.
        noun_iou: float [S, S], the intersection over union of each two sets; constant over the batches of a training run, so
            that what is made of it is made once.

    A label is 0.5 * noun_iou, plus 0.5 for the same verb, in float64, rounded once: the same number that a matrix computed in
    float64 holds.

    Raises:
        TypeError: noun_iou is no float tensor, or class ids are not int64 or int32. ValueError: a shape, a device, ids of
        different lengths, or noun_iou requires a gradient. A noun_set outside noun_iou is found by the loss, as for
        `IndexedRelevancy`.

    Source: Damen et al., "Rescaling Egocentric Vision", IJCV 2022, the relevancy of its multi-instance retrieval.
    """

    def __init__(self, verb: Tensor, noun_set: Tensor, noun_iou: Tensor):
        noun_iou = _table("noun_iou", noun_iou, "[S, S]")
        if noun_iou.shape[0] != noun_iou.shape[1]:
            raise ValueError(f"noun_iou: expected the shape [S, S], got {list(noun_iou.shape)}")
        no_gradient("noun_iou", noun_iou.requires_grad)
        _check_ids("VerbNounRelevancy", noun_iou.device, verb=verb, noun_set=noun_set)
        self.verb, self.noun_set = verb.view(-1) if verb is noun_set else verb, noun_set  # torch.compile takes no tensor twice
        self.table, self.values = _verb_noun_table(noun_iou)

    def labels(self, call: Batch, check: bool, own: torch.dtype | None) -> tuple["Labels", Tensor | None]:
        """As `DenseRelevancy.labels`."""
        labels = Labels(self.table, self.noun_set, self.noun_set.view(-1), self.verb, self.values)
        return _fitting(labels, call, check, own, "noun_iou", "noun_set")


_VERB_NOUN = WeakIdKeyDictionary()


def _verb_noun_table(noun_iou):
    """([2, S, S], values): labels of pairs of another verb and of the same, as codes where 256 values suffice."""
    if torch.compiler.is_compiling() or traced(type(noun_iou)):  # how many values there are is then not known
        return _both_verbs(noun_iou), None
    version = None if noun_iou.is_inference() else noun_iou._version
    known, *made = _VERB_NOUN.get(noun_iou, (None,))
    if version is None or known != version:
        with torch.inference_mode(False):  # what a validation makes, training reads
            made = _coded(_both_verbs(noun_iou.clone() if version is None else noun_iou))
        if version is not None:
            _VERB_NOUN[noun_iou] = (version, *made)
    return made


def _coded(table):
    """(codes, values) of a table of at most 256 values, else (table, None)."""
    distinct = torch.unique(table)
    if not 0 < distinct.numel() <= 256 or not bool(distinct.isfinite().all()):  # a NaN has no code, and must reach the loss
        return table, None
    return torch.searchsorted(distinct, table).to(torch.uint8), torch.nn.functional.pad(distinct, (0, 256 - distinct.numel()))


def _both_verbs(noun_iou):
    half = 0.5 * noun_iou.double()
    return torch.stack((half, half + 0.5))


def quantize_relevancy(relevancy: Tensor, steps: int = 240) -> tuple[Tensor, Tensor]:
    """Labels as uint8 codes: (codes, values) with codes = trunc(steps * relevancy) and values[c] = c / steps.

    With 240 steps these are the codes of the authors' SMS-Loss, computed in the dtype of `relevancy` as theirs are: in float64,
    5/6 becomes 199. `DenseRelevancy(codes, values)` and `IndexedRelevancy(codes, rows, columns, values)` take them.

    Args:
        relevancy: float tensor of any shape, 0 <= relevancy <= 255 / steps.
        steps: a positive integer.

    Returns:
        uint8, the shape of relevancy; float64 [256].

    Raises:
        TypeError: relevancy is no float tensor. ValueError: steps is no positive integer, or a label lies outside what the
        codes hold, NaN included.

    Source: the authors' SMS-Loss code (matrix * 240 as uint8).
    """
    if not isinstance(relevancy, Tensor) or relevancy.dtype not in FLOATS:
        raise TypeError(f"relevancy: expected a float tensor, got {kind(relevancy)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a positive integer, got {steps!r}")
    scaled = relevancy.detach() * steps
    if scaled.numel() and not bool(((scaled >= 0) & (scaled < 256)).all()):
        raise ValueError(f"relevancy: expected values from 0 to 255 / {steps}, got {relevancy.min()} to {relevancy.max()}")
    return scaled.to(torch.uint8), torch.arange(256, dtype=torch.float64, device=relevancy.device) / steps


@dataclass(frozen=True)
class Labels:
    """What the kernels are given for any source: the stored tensor [V, C], or [2, V, C] with the verbs that choose between the
    two; the indices into it or None; the value of each code, float [256], where it holds codes."""

    table: Tensor
    video_index: Tensor | None = None
    caption_index: Tensor | None = None
    verb: Tensor | None = None
    values: Tensor | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Contiguous [N, N] in `dtype` (torch's sums depend on the layout), rows = videos. An index out of range reads NaN."""
        if self.video_index is None or self.caption_index is None:
            return self._decode(self.table, dtype).contiguous()
        same = None if self.verb is None else self.verb[:, None] == self.verb
        return self._pick(self.video_index[:, None], self.caption_index[None, :], same, dtype).contiguous()

    def diagonal(self, dtype: torch.dtype, first: int = 0) -> Tensor:
        """In `dtype`: each pair's own label, where the first row's own is in column `first`."""
        if self.video_index is None:
            return self._decode(self.table.diagonal(first), dtype)
        same = None if self.verb is None else torch.ones_like(self.verb, dtype=torch.bool)
        return self._pick(self.video_index, self.caption_index, same, dtype)

    def across(self, ranks: Ranks, dtype: torch.dtype) -> "Labels":
        """These, of a rank's rows, with what kernels read of its rows and the columns of all; in_order: with all rows too."""
        if self.video_index is not None:
            names = [name for name in ("video_index", "caption_index", "verb") if getattr(self, name) is not None]
            indices = ranks.vectors(torch.stack([getattr(self, name).long() for name in names]))
            return replace(self, **dict(zip(names, indices, strict=True)))
        if ranks.in_order:
            return Labels(ranks.gather(self.matrix(dtype)))
        if self.table.stride(1) == 0:  # the same in every column
            return self
        columns = torch.arange(self.table.shape[1], device=self.table.device)
        return replace(self, caption_index=ranks.columns(columns))

    def taken(self, order: Tensor) -> "Labels":
        """Those of an IndexedRelevancy or VerbNounRelevancy, of the pairs in another order."""
        names = ("video_index", "caption_index", "verb")
        return replace(self, **{name: x[order] for name in names if (x := getattr(self, name)) is not None})

    def check_indices(self) -> None:
        """IndexError naming the index that does not fit the table. Waits for the device."""
        names = ("noun_set", "noun_set") if self.verb is not None else ("video_index", "caption_index")
        V, C = self.table.shape[-2:]
        for name, index, size in ((names[0], self.video_index, V), (names[1], self.caption_index, C)):
            if index is not None and index.numel():
                low, high = (int(x) for x in torch.aminmax(index))
                if low < 0 or high >= size:
                    raise IndexError(
                        f"{name}: expected 0 <= index < {size}, as the table is {[V, C]}, got {low if low < 0 else high}"
                    )

    def _pick(self, rows, columns, same, dtype):
        V, C = self.table.shape[-2:]
        if V == 0 or C == 0:
            shape = torch.broadcast_shapes(rows.shape, columns.shape)
            return torch.full(shape, float("nan"), dtype=dtype, device=self.table.device)
        inside = (rows >= 0) & (rows < V) & (columns >= 0) & (columns < C)
        at = (rows.long().clamp(0, V - 1), columns.long().clamp(0, C - 1))
        picked = self.table[at if same is None else (same.long(), *at)]
        return self._decode(picked, dtype).masked_fill(~inside, float("nan"))

    def _decode(self, x, dtype):
        return x.to(dtype) if self.values is None else self.values.to(dtype)[x.long()]


def _values(scale, device):
    """float [256]: the label that each code stands for."""
    if not isinstance(scale, Tensor):
        return torch.arange(256, dtype=torch.float64, device=device) * number("scale", scale)
    if scale.dtype not in FLOATS or scale.shape != (256,):
        raise ValueError(f"scale: expected a float, or a float tensor [256], got {scale.dtype} {list(scale.shape)}")
    no_gradient("scale", scale.requires_grad)
    return memory_of("the labels", "scale", scale).to(device)


def _fitting(labels, call, check, own, table, index):
    """labels, checked against the batch; table, index: what the source calls them."""
    # Once more: the parts of a source are public, and may have been exchanged or resized since it was made.
    second = "caption_index" if labels.verb is None else index
    for name, x in ((index, labels.video_index), (second, labels.caption_index), ("verb", labels.verb)):
        if x is not None and x.shape != (call.n,):
            raise ValueError(
                f"relevancy.{name}: expected {call.n} entries, one for each pair, "
                f"got {len(x) if x.ndim == 1 else list(x.shape)}"
            )
        if x is not None and (x.dtype not in (torch.int64, torch.int32) or x.device != labels.table.device):
            raise TypeError(f"relevancy.{name}: expected int64 or int32 on {labels.table.device}, got {x.dtype} on {x.device}")
    if labels.values is not None and labels.table.dtype != torch.uint8:
        raise TypeError(f"relevancy.{table}: expected uint8 codes beside their values, got {labels.table.dtype}")
    if labels.video_index is None and labels.table.shape != (call.n, call.N):
        raise ValueError(f"relevancy.{table}: expected the shape [{call.n}, {call.N}], got {list(labels.table.shape)}")
    check_device(f"relevancy.{table}", labels.table.device, call.device, "the features'")
    no_gradient(f"relevancy.{table}", labels.table.requires_grad)
    if check:
        labels.check_indices()
    return labels, None if own is None else labels.diagonal(own, call.first)


def _check_ids(op, device, **ids):
    """Two tensors of indices or class ids, one for each pair."""
    (first, a), (second, b) = ids.items()
    for name, x in ids.items():
        dense(op, name, x, (torch.int64, torch.int32), "a tensor of int64 or int32")
        if x.ndim != 1:
            raise ValueError(f"{name}: expected the shape [N], got {list(x.shape)}")
        check_device(name, x.device, device, "the table's")
    if a.shape != b.shape:
        raise ValueError(f"{second}: expected {a.shape[0]} entries as {first}, got {b.shape[0]}")


def _table(name, x, shape):
    """x, a float tensor of two dimensions."""
    x = dense("the loss", name, x, FLOATS, f"a float tensor {shape}")
    if x.ndim != 2:
        raise ValueError(f"{name}: expected the shape {shape}, got {list(x.shape)}")
    return x
