"""Clips of a folder of videos and one file of captions: what is alike among them, to train and to evaluate on.

    table = readers.plain.read("captions.csv", "videos", "train")
    data = PlainClips(table, "videos", num_frames=4)
    data[0]       # dict(video, text, kind, text_kind, index, replaced)

Relevancy comes from what there is. With label columns it is the mean over them of the intersection over union of classes, as
EPIC-Kitchens-100 has it for verbs and nouns (Damen et al., IJCV 2022). Without, equal captions count as equal, whatever their
case and spaces, and all others as unrelated.
"""

import os
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evaat_fast.data import layout
from evaat_fast.data.choices import SIMILARITIES, Similarity, check_choice
from evaat_fast.data.dataset import ClipDataset
from evaat_fast.data.decode import VideoError
from evaat_fast.data.kinds import sets_relevancy
from evaat_fast.data.readers.plain import normal
from evaat_fast.data.table import ClipTable

LARGEST = 20_000  # kinds or captions that a table [K, K] is made of: 1.6 GB

__all__ = ["LARGEST", "PlainClips"]


class PlainClips(ClipDataset):
    """Clips of `readers.plain`.

    Args:
        table: of `readers.plain.read`. video_root: the folder of its videos.
        similarity: what clips are alike by: "labels", their label columns, or equal captions where there are none or a clip has
            no class; "text-tower": captions alone, for a table that somebody else makes of them.
        options: of `ClipDataset`.

    Attributes:
        captions: list of str, each once, in order of appearance; those that differ in case and spaces alone are one.
        labelled: whether label columns say what is alike. clip_kind: int64 [clips], rows of `relevancy_table`.
        own: for each kind of clip the numbers of its captions, where captions say what is alike.

    Raises:
        FileNotFoundError, ValueError: as `ClipDataset`.
    """

    clip_kind: Tensor

    def __init__(
        self, table: ClipTable, video_root: str | os.PathLike[str], *, similarity: Similarity = "labels", **options: Any
    ):
        check_choice("similarity", similarity, SIMILARITIES)
        super().__init__(table, video_root, **options)
        self._number: dict[str, int] = {}
        self.captions: list[str] = []
        said: list[tuple[int, ...]] = []
        for texts in table.arrow.column("texts").to_pylist():
            said.append(tuple(dict.fromkeys(self._numbered(text) for text in texts if text.strip())))
        columns = self._columns()
        found = [
            tuple(frozenset(c for c in row if c in column) for column in columns)
            for row in table.arrow.column("labels").to_pylist()
        ]
        self.labelled = similarity == "labels" and any(map(any, found))
        if self.labelled:
            # A clip without a class is like those of its captions.
            keys: list[Any] = [sets if any(sets) else frozenset(own) for sets, own in zip(found, said, strict=True)]
        else:
            keys = list(map(frozenset, said))
        kinds: dict[Any, int] = {}
        self.clip_kind = torch.tensor([kinds.setdefault(key, len(kinds)) for key in keys], dtype=torch.int64)
        none: tuple[frozenset[int], ...] = (frozenset(),) * len(columns)
        self._sets = [key if isinstance(key, tuple) else none for key in kinds] if self.labelled else []
        self.own = [] if self.labelled else [tuple(sorted(key)) for key in kinds]
        pairs = {
            (number, kind): None for numbers, kind in zip(said, self.clip_kind.tolist(), strict=True) for number in numbers
        }
        self._kinds_of_caption = torch.tensor(list(pairs), dtype=torch.int64).view(-1, 2)

    @cached_property
    def relevancy_table(self) -> Tensor:
        """float32 [K, K] between kinds; of captions [V, C], of the kinds of clips and the captions.

        A batch's labels are ops.IndexedRelevancy(data.relevancy_table, batch["kind"], batch["text_kind"]).

        Raises:
            ValueError: there are more than LARGEST of them.
        """
        return self._table(torch.float32)

    @property
    def relevancy(self) -> Tensor:
        """float64 [clips, captions], exactly 1 for a clip's own ones: what metrics take. A caption of several clips is as
        relevant as the most relevant of them."""
        table = self._table(torch.float64)
        if self.labelled:
            numbers, kinds = self._kinds_of_caption.T
            best = torch.zeros(len(table), len(self.captions), dtype=table.dtype)
            table = best.scatter_reduce_(1, numbers.expand(len(table), -1), table[:, kinds], "amax")
        return table[self.clip_kind]

    def caption(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """dict(text, kind, text_kind): a caption of the clip, and its row and column of `relevancy_table`."""
        own = super().caption(index, generator)
        own["kind"] = int(self.clip_kind[index])
        own["text_kind"] = own["kind"] if self.labelled else self._number.get(normal(own["text"]), 0)
        return own

    def _numbered(self, text):
        number = self._number.setdefault(normal(text), len(self.captions))
        if number == len(self.captions):
            self.captions.append(text)
        return number

    def _columns(self) -> list[range]:
        """The class numbers of each label column."""
        found, first = [], 0
        for names in self.table.metadata.get("classes", {}).values():
            found.append(range(first, first + len(names)))
            first += len(names)
        return found

    def check_size(self) -> None:
        """Raises ValueError where a table of the relevancy would be larger than LARGEST."""
        count = len(self._sets) if self.labelled else max(len(self.own), len(self.captions))
        if count > LARGEST:
            what = "kinds of clips, by their label columns" if self.labelled else "captions"
            raise ValueError(
                f"data: {count:,} {what}: a table of the relevancy between them would be too large, above {LARGEST:,}; train "
                "with loss.name = 'clip', which needs none"
            )

    def _table(self, dtype: torch.dtype) -> Tensor:
        self.check_size()
        if self.labelled:
            return sets_relevancy(self._sets, dtype)
        table = torch.zeros(len(self.own), len(self.captions), dtype=dtype)
        for row, numbers in zip(table, self.own, strict=True):
            row[list(numbers)] = 1
        return table

    def _found(self, missing):
        """The table's paths are those of files, with their endings; or of folders of chunks."""
        if not self.video_root.is_dir():
            raise FileNotFoundError(f"videos: there is no folder {str(self.video_root)!r}")
        found, names = {}, self.table.videos()
        for name in names:
            try:
                found[name] = layout.of_path(self.video_root / name)
            except VideoError:
                continue
        absent = [name for name in names if name not in found]
        if absent and missing == "raise":
            raise FileNotFoundError(layout.missing_files(self.video_root, absent, len(names), "videos"))
        return False, found
