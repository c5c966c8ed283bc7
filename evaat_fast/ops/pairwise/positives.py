"""Which pairs of a batch count as positive for EgoNCE: a matrix, or what the captions speak of."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evaat_fast.ops._core.tensor import check_device, kind, memory_of
from evaat_fast.ops.pairwise.ranks import Batch, Ranks


class VerbNounPositives:
    """Pairs that share a verb and a noun, never built as [N, N].

    Args:
        verbs, nouns: what each pair's caption has: int64 or int32 [N], one class id each (a negative one shares nothing), or
            bool or 0/1 numbers [N, K], as many of K classes as it has.

    Raises:
        TypeError: not tensors, or class ids that are not int64 or int32. ValueError: a shape, or two that differ in their
        length or device.

    Source: EgoVLP (arXiv 2206.01670), section 3.2, its action-aware positives.
    """

    def __init__(self, verbs: Tensor, nouns: Tensor):
        self.verbs, self.nouns = (_bits(name, x) for name, x in (("verbs", verbs), ("nouns", nouns)))
        if self.verbs.shape[0] != self.nouns.shape[0]:
            raise ValueError(f"nouns: expected {self.verbs.shape[0]} entries as verbs, got {self.nouns.shape[0]}")
        check_device("nouns", self.nouns.device, self.verbs.device, "verbs'")
        # What a group of ranks is told: ids, whose bits depend on the batch, or as many bits as there are classes.
        self.given = tuple(x if x.ndim == 1 else bits for x, bits in ((verbs, self.verbs), (nouns, self.nouns)))
        self.classes = ["ids" if x.ndim == 1 else f"{x.shape[1]} classes" for x in (verbs, nouns)]


def _bits(name, x):
    """int32 [N, words]: bit c of a row's 32-bit words is class c."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"{name}: expected a tensor of class ids [N] or of 0 and 1 [N, K], got {kind(x)}")
    memory_of("VerbNounPositives", name, x)
    if x.ndim == 1:
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected class ids [N] as int64 or int32, got {x.dtype}")
        # Ids are numbered anew, so that the bits are as few as the batch has classes.
        classes, x = torch.unique(x, return_inverse=True)
        x = torch.nn.functional.one_hot(x, len(classes)).bool() & (classes >= 0) if len(classes) else x.new_zeros(0, 1).bool()
    if x.ndim != 2:
        raise ValueError(f"{name}: expected the shape [N] or [N, K], got {list(x.shape)}")
    present = torch.nn.functional.pad(x != 0, (0, -x.shape[1] % 32 if x.shape[1] else 32))
    # In int64, where bit 31 is no sign; the cast to int32 keeps the bits.
    words = (present.unflatten(1, (-1, 32)).long() << torch.arange(32, device=x.device)).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


@dataclass(frozen=True)
class Positives:
    """What the kernels are given: bool [N, N], or the verb and the noun bits int32 [N, words]; none: each pair alone.
    Of a rank, until they are known `across` all, its rows of these, or class ids [n]."""

    dense: Tensor | None = None
    verbs: Tensor | None = None
    nouns: Tensor | None = None

    def matrix(self) -> Tensor:
        """bool [N, N]: the captions (columns) that are positive for each video, beside their own."""
        if self.dense is not None:
            return self.dense
        assert self.verbs is not None and self.nouns is not None
        shares = (torch.stack([(w[:, None] & w) != 0 for w in bits.unbind(1)]).any(0) for bits in (self.verbs, self.nouns))
        return torch.logical_and(*shares)

    def across(self, ranks: Ranks) -> "Positives":
        """These with the columns of all ranks; in_order: with all rows too."""
        if self.dense is not None:
            return replace(self, dense=ranks.gather(self.dense) if ranks.in_order else ranks.columns(self.dense))
        if self.verbs is None or self.nouns is None:
            return self
        every = ((bits, ranks.gather(bits.long() if bits.ndim == 1 else bits)) for bits in (self.verbs, self.nouns))
        return Positives(None, *(_bits("positives", x) if bits.ndim == 1 else x for bits, x in every))


def as_positives(positives: Tensor | VerbNounPositives | None, call: Batch) -> Positives:
    """Checks the `positives` argument of a loss."""
    if isinstance(positives, VerbNounPositives):
        result = Positives(None, *((positives.verbs, positives.nouns) if call.ranks is None else positives.given))
        of = positives.verbs
        if len(of) != call.n:
            raise ValueError(f"positives.verbs: expected {call.n} entries, one for each pair, got {len(of)}")
    elif isinstance(positives, Tensor) and positives.dtype == torch.bool:
        if positives.shape != (call.n, call.N):
            raise ValueError(f"positives: expected the shape [{call.n}, {call.N}], got {list(positives.shape)}")
        of = memory_of("ego_nce_loss", "positives", positives)
        result = Positives(of)
    else:
        raise TypeError(f"positives: expected a bool tensor [{call.n}, {call.N}] or a VerbNounPositives, got {kind(positives)}")
    check_device("positives", of.device, call.device, "the features'")
    return result
