"""Clips with classes: the graded relevancy between them, which a loss with soft labels learns from.

Clips with the same verb classes and the same noun classes are of one *kind*; `relevancy_table` is over kinds.
"""

import os
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evaat_fast.data.dataset import ClipDataset
from evaat_fast.data.kinds import kinds_of, kinds_relevancy
from evaat_fast.data.table import ClipTable

__all__ = ["ActionClips", "LabelledClips"]


class LabelledClips(ClipDataset):
    """Clips with verb and noun classes, each with its own caption.

    Args, Raises: as `ClipDataset`.

    Attributes:
        kinds: list of (verb class, frozenset of noun classes). clip_kind: int64 [clips], rows of `relevancy_table`.
    """

    clip_kind: Tensor

    def __init__(self, table: ClipTable, video_root: str | os.PathLike[str], **options: Any):
        super().__init__(table, video_root, **options)
        self.kinds, self.clip_kind = kinds_of(table)

    @cached_property
    def relevancy_table(self) -> Tensor:
        """float32 [K, K]: 0.5 [same verb class] + 0.5 IoU(noun classes), exactly 1 where both agree.

        A batch's labels are ops.IndexedRelevancy(data.relevancy_table, batch["kind"], batch["text_kind"]).
        """
        return kinds_relevancy(self.kinds)

    def caption(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """dict(text, kind, text_kind): the clip's caption, and rows of `relevancy_table`."""
        own = super().caption(index, generator)
        own["kind"] = own["text_kind"] = int(self.clip_kind[index])
        return own


class ActionClips(LabelledClips):
    """Clips whose caption is the name of their action, as Charades-Ego's: two of one name are of one kind, and relevancy is 1
    within a kind and 0 between two (equation 17 of arXiv 2506.14356).

    Args, Raises: as `ClipDataset`.
    """

    def __init__(self, table: ClipTable, video_root: str | os.PathLike[str], **options: Any):
        super().__init__(table, video_root, **options)
        self.clip_kind = self.caption_kinds()
        self.kinds = [(number, frozenset()) for number in range(int(self.clip_kind.max()) + 1)]

    @cached_property
    def relevancy_table(self) -> Tensor:
        """float32 [K, K]: the identity."""
        return torch.eye(len(self.kinds))
