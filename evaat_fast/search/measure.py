"""How well a search finds what a table says is there: each caption of a test split is searched in an index of its videos.

found = measure.answers(Index.open("demo"), test)
measure.hits(found)                      # (captions whose event is among the first five, captions asked)
measure.pairs(found, test, [(4, 5)])     # of verb classes as "inflate" and "squeeze": (captions whose own came first, all)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaat_fast.data.ek100 import EK100
from evaat_fast.search import scan
from evaat_fast.search.index import Index
from evaat_fast.search.moments import Moments

_SHOWN = 0.5  # of a clip of the index: what a narrated clip must fill of it to be what it shows

__all__ = ["Answer", "answers", "hits", "pairs"]


@dataclass(frozen=True)
class Answer:
    """What a caption found.

    caption: its number in the test split. kind: its kind there. moments: all there are, best first. clips, kinds: for each
    moment the test clip that fills half of its best clip or more, and the kind of that; -1 where none does.
    """

    caption: int
    kind: int
    moments: Moments
    clips: tuple[int, ...]
    kinds: tuple[int, ...]


def answers(index: Index, test: EK100) -> list[Answer]:
    """Searches every caption of a test split.

    Args:
        index: of videos of the split, and of no others. test: the split.

    Raises:
        ValueError: a video that is not of the split.
    """
    truth = _Truth(test, index)
    found = []
    for caption, text in enumerate(test.captions):
        moments = index.search(text, k=max(1, len(index)))
        clips = tuple(truth.shown(moment.file, moment.peak) for moment in moments)
        kinds = tuple(int(test.clip_kind[clip]) if clip >= 0 else -1 for clip in clips)
        found.append(Answer(caption, int(test.caption_kind[caption]), moments, clips, kinds))
    return found


def hits(found: Sequence[Answer], k: int = 5, queries: int = 40, seed: int = 0) -> tuple[int, int]:
    """(captions whose kind of event is among the first k moments, captions asked): `queries` of them, drawn from `seed`."""
    asked = random.Random(seed).sample(found, min(queries, len(found)))
    return sum(one.kind in one.kinds[:k] for one in asked), len(asked)


def pairs(found: Sequence[Answer], test: EK100, verbs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """For each pair of verb classes (captions whose own event comes before any of the same nouns with the other verb, all such
    captions), where the split has clips of both. Guessing gets half of them right; finding neither is not right."""
    number = {kind: i for i, kind in enumerate(test.kinds)}
    counts = {pair: [0, 0] for pair in verbs}
    for one in found:
        verb, nouns = test.kinds[one.kind]
        for pair in verbs:
            if verb not in pair:
                continue
            other = number.get((pair[0] + pair[1] - verb, nouns))
            if other is not None:
                first = next((kind for kind in one.kinds if kind in (one.kind, other)), -1)
                counts[pair][0] += first == one.kind
                counts[pair][1] += 1
    return {pair: (right, asked) for pair, (right, asked) in counts.items()}


class _Truth:
    """Which test clip a moment shows."""

    def __init__(self, test: EK100, index: Index):
        self._seconds = index.settings.seconds
        rows: dict[str, list[tuple[int, float, float]]] = {index.path(file.name): [] for file in index.files}
        for row, clip in enumerate(test.table):
            source = test.source(row)
            for path, first in zip(source.files, source.starts, strict=True) if source else ():
                if clip.stop > first and (file := scan.real(path)) in rows:
                    rows[file].append((row, clip.start - first, clip.stop - first))
        if empty := [file for file, clips in rows.items() if not clips]:
            raise ValueError(f"index: expected videos of the test split, got {empty[0]!r}, of which it tells nothing")
        self._files = {file: np.array(clips) for file, clips in rows.items()}

    def shown(self, file: str, peak: float) -> int:
        half = self._seconds / 2
        rows, start, stop = self._files[file].T
        common = np.minimum(stop, peak + half) - np.maximum(start, peak - half)
        best = int(common.argmax())
        return int(rows[best]) if common[best] >= _SHOWN * self._seconds else -1
