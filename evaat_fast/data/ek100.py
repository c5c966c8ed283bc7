"""EPIC-Kitchens-100 multi-instance retrieval: clips, captions and their graded relevancy, from the official CSV files.

    train = EK100("annotations", "videos", "train", num_frames=4, transform=train_transform(224))
    train[0]       # dict(video, text, kind, text_kind, index, replaced)

Relevancy is 0.5 [same verb class] + 0.5 IoU(noun classes) (Damen et al., IJCV 2022), so it is computed from the classes
and no relevancy file is needed. Clips with one verb class and one set of noun classes are of one *kind*;
`relevancy_table` is over kinds.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evaat_fast.data.choices import POSITIVES, SPLITS, Decoder, Frames, Positive, Sampler, Split, check_choice
from evaat_fast.data.labels import LabelledClips
from evaat_fast.data.readers import ek100 as reader
from evaat_fast.data.table import ClipTable


class EK100(LabelledClips):
    """A split of EPIC-Kitchens-100, or of any corpus in its annotations.

    Args:
        annotations: folder with EPIC_100_retrieval_{split}.csv and EPIC_100_retrieval_{split}_sentence.csv.
        video_root: folder with P01/P01_01.MP4, whole files, or folders of chunks {0,15,30,...}.MP4; see `data.layout`.
        split: "train" or "test".
        training: as in `ClipDataset`; None: for the train split.
        positive: the text of a clip: "own", its narration, or "relevant", a caption drawn from those with a relevancy
            above `threshold` to the clip, each as likely, as the SMS loss's authors do.
        num_frames, transform, jitter, sampler, frames, cache, decoder, sums, retries, on_error, max_broken, missing, seed: as
            in `ClipDataset`.

    Attributes:
        clips: a ClipTable. captions: list of str, what is retrieved. clip_kind, caption_kind: int64 [clips], [captions],
        rows of `relevancy_table`. kinds: list of (verb class, frozenset of noun classes).

    Raises:
        FileNotFoundError: a folder, an annotation file or a video is not there (the message counts and names).
        ValueError: a split, option or column that is not known, a row that cannot be read, an empty split.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        video_root: str | os.PathLike[str],
        split: Split,
        *,
        num_frames: int,
        transform: Callable[..., Tensor] | None = None,
        training: bool | None = None,
        jitter: bool | None = None,
        sampler: Sampler = "avion",
        positive: Positive = "own",
        threshold: float = 0.1,
        frames: Frames = "ordered",
        cache: Literal["memory"] | None = None,
        decoder: Decoder = "auto",
        sums: str | os.PathLike[str] | None = None,
        retries: int = 2,
        on_error: Literal["replace", "raise"] | None = None,
        max_broken: float = 0.01,
        missing: Literal["raise", "broken"] = "raise",
        seed: int = 0,
    ):
        check_choice("split", split, SPLITS)
        check_choice("positive", positive, POSITIVES)
        self.annotations, self.split = Path(annotations), split
        self.positive, self.threshold = positive, threshold
        super().__init__(
            reader.read(self.annotations, split),
            video_root,
            num_frames=num_frames,
            transform=transform,
            training=split == "train" if training is None else training,
            jitter=jitter,
            sampler=sampler,
            frames=frames,
            cache=cache,
            decoder=decoder,
            sums=sums,
            retries=retries,
            on_error=on_error,
            max_broken=max_broken,
            missing=missing,
            seed=seed,
        )
        rows = reader.captions(self.annotations, split, self.table)
        self.captions = [self.table.texts(i)[0] for i in rows]
        if split == "test" and not all(text.strip() for text in self.captions):
            empty = [self.table.id(row) for row, text in zip(rows, self.captions, strict=True) if not text.strip()]
            raise ValueError(f"{self.annotations}: {len(empty)} captions to be retrieved are empty, first of {empty[0]}")
        self.caption_kind = self.clip_kind[rows]

    @property
    def clips(self) -> ClipTable:
        """The table of the split's clips."""
        return self.table

    @property
    def relevancy(self) -> Tensor:
        """float32 [clips, captions]: what the official metrics take."""
        return self.relevancy_table[self.clip_kind][:, self.caption_kind]

    @property
    def clip_verbs(self) -> Tensor:
        """int64 [clips]: verb class of each clip."""
        return torch.tensor([verb for verb, _ in self.kinds])[self.clip_kind]

    @property
    def caption_verbs(self) -> Tensor:
        """int64 [captions]: verb class of each caption."""
        return torch.tensor([verb for verb, _ in self.kinds])[self.caption_kind]

    def caption(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """dict(text, kind, text_kind): the caption shown with a clip, and rows of `relevancy_table`."""
        own = super().caption(index, generator)
        if self.positive == "own":
            return own
        relevant = (self.relevancy_table[own["kind"]][self.caption_kind] > self.threshold).nonzero()[:, 0]
        if len(relevant) == 0:
            return own
        chosen = int(relevant[torch.randint(len(relevant), (), generator=generator)])
        return {"text": self.captions[chosen], "kind": own["kind"], "text_kind": int(self.caption_kind[chosen])}
