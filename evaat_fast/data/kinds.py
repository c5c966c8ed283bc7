"""Kinds of clips, which have the same verb class and the same noun classes, and the graded relevancy between them.

    kinds, clip_kind = kinds_of(table)
    kinds_relevancy(kinds)[clip_kind][:, clip_kind[captions]]     # what EK-100's metrics take

Source: Damen et al., "Rescaling Egocentric Vision", IJCV 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaat_fast.data.table import ClipTable

Kind = tuple[int, frozenset[int]]  # verb class, -1 for none; noun classes

__all__ = ["Kind", "kinds_of", "kinds_relevancy", "sets_relevancy"]


def kinds_relevancy(kinds: Sequence[Kind], dtype: torch.dtype = torch.float32) -> Tensor:
    """[K, K]: relevancy between K kinds, pairs (verb class, set of noun classes); exactly 1 where equal. Metrics take it in
    float64, as the published matrices are: a sixth that float32 rounds moves their eighth digit."""
    if any(n < 0 for _, nouns in kinds for n in nouns):
        raise ValueError("kinds: expected noun classes from 0")
    verbs = torch.tensor([verb for verb, _ in kinds])
    column = {n: i for i, n in enumerate(sorted({n for _, nouns in kinds for n in nouns}))}  # numbers may be of any size
    hot = torch.zeros(len(kinds), len(column), dtype=dtype)
    for row, (_, nouns) in zip(hot, kinds, strict=True):
        row[[column[n] for n in nouns]] = 1
    common, size = hot @ hot.T, hot.sum(1)
    union = size[:, None] + size - common
    # Two clips without nouns name the same (empty) set.
    iou = torch.where(union == 0, 1.0, common / union.clamp(min=1))
    return iou.add_(verbs[:, None] == verbs).mul_(0.5)


def sets_relevancy(kinds: Sequence[Sequence[frozenset[int]]], dtype: torch.dtype = torch.float32) -> Tensor:
    """[K, K]: the same between kinds of any number of label columns, each a set of classes: the mean over the columns of the
    intersection over union. With a single verb and a set of nouns that is `kinds_relevancy`. Exactly 1 where all agree; two
    empty sets do. A kind without any class is relevant to itself alone."""
    total = torch.zeros(len(kinds), len(kinds), dtype=dtype)
    columns = len(kinds[0]) if kinds else 0
    for sets in zip(*kinds, strict=True):
        column = {n: i for i, n in enumerate(sorted(frozenset().union(*sets)))}
        hot = torch.zeros(len(kinds), len(column), dtype=dtype)
        for row, classes in zip(hot, sets, strict=True):
            row[[column[n] for n in classes]] = 1
        common, size = hot @ hot.T, hot.sum(1)
        union = size[:, None] + size - common
        total += torch.where(union == 0, 1.0, common / union.clamp(min=1))
    total /= max(columns, 1)
    bare = torch.tensor([not any(kind) for kind in kinds], dtype=torch.bool)
    total[bare], total[:, bare] = 0, 0
    total[bare, bare] = 1
    return total


def kinds_of(table: ClipTable) -> tuple[list[Kind], Tensor]:
    """(the kinds of a table in order of appearance, int64 [clips]: the number of each clip's own)."""
    kinds: dict[Kind, int] = {}
    numbers = [
        kinds.setdefault((int(verbs[0]) if len(verbs) else -1, frozenset(map(int, nouns))), len(kinds))
        for verbs, nouns in zip(table.column("verbs"), table.column("nouns"), strict=True)
    ]
    return list(kinds), torch.tensor(numbers, dtype=torch.int64)
