"""Which clips make a batch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class EpochSampler:
    """Batches of clip indices, another order each epoch, the same for the same seed and epoch.

    Args:
        kinds: for each clip the number of its kind, its (verb class, noun classes) or its caption.
        batch_size: clips in a batch, always exactly so many: an epoch leaves the rest out. seed: of the order.
        distinct: at most one clip of a kind in a batch, as InfoNCE needs it: to that loss every other caption of the
            batch is a wrong one. The kinds with the most clips left come first, which wastes the fewest clips.
        rows: the clips to draw from; None for all of them. They can be read again as an attribute.
        groups: for each clip the number of its kind's group: with `distinct`, all kinds of a group come together, those of the
            last one as far as there is room, so that a batch holds what is hard to tell apart.

    Raises:
        ValueError: fewer clips, or with `distinct` fewer kinds, than a batch holds.
    """

    def __init__(
        self,
        kinds: Tensor | Sequence[int],
        batch_size: int,
        seed: int = 0,
        distinct: bool = False,
        rows: Tensor | None = None,
        groups: Tensor | None = None,
    ):
        kinds = torch.as_tensor(kinds)
        self.rows = torch.arange(len(kinds)) if rows is None else rows
        self._kinds = kinds[self.rows]
        self._groups = None if groups is None else groups[self.rows]
        self._batch_size, self._seed, self._distinct = batch_size, seed, distinct
        if len(self._kinds) < batch_size:
            raise ValueError(f"train.batch_size: {batch_size} is more than the {len(self._kinds)} training clips")
        count = len(self._kinds.unique())
        if distinct and count < batch_size:
            raise ValueError(
                f"train.batch_size: {batch_size} is more than the {count} kinds (of classes, or of captions) of training "
                "clips, of which train.distinct = true allows one clip each in a batch"
            )
        self.epoch = 0
        # How many distinct batches there are depends on the counts alone, not on the order.
        self._length = len(self._batches()) if distinct else len(self._kinds) // batch_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows[batch].tolist() for batch in self._batches())

    def _batches(self) -> Tensor | list[Tensor]:
        """Numbers of `rows`."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self._kinds), generator=generator)
        if not self._distinct:
            whole = order[: len(order) // self._batch_size * self._batch_size]
            return whole.view(-1, self._batch_size)
        clips: dict[int, list[int]] = {}
        for index, kind in zip(order.tolist(), self._kinds[order].tolist(), strict=True):
            clips.setdefault(kind, []).append(index)
        batches, left = [], torch.tensor([len(c) for c in clips.values()], dtype=torch.float32)
        names = list(clips)
        groups = (
            None if self._groups is None else self._groups[[clips[name][0] for name in names]].unique(return_inverse=True)[1]
        )
        while int((left > 0).sum()) >= self._batch_size:
            # Ties are broken at random; a fraction below 1 cannot reorder whole numbers.
            most = left + torch.rand(len(left), generator=generator)
            chosen = (
                most.topk(self._batch_size).indices if groups is None else _together(most, left, groups)[: self._batch_size]
            )
            batches.append(torch.tensor([clips[names[i]].pop() for i in chosen.tolist()]))
            left[chosen] -= 1
        return batches


def _together(most, left, groups):
    """Kinds by their group's greatest number, then by their own; those of which no clip is left come last."""
    of_group = torch.zeros(int(groups.max()) + 1).scatter_reduce_(0, groups, most, "amax")
    order = most.argsort(descending=True)
    of_kind = torch.where(left > 0, of_group[groups], -1.0)[order]
    return order[of_kind.argsort(descending=True, stable=True)]
