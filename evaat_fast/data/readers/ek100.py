"""EPIC-Kitchens-100 multi-instance retrieval: the official CSV files, and the relevancy pickles where there are any.

    table = ek100.read("epic-kitchens-100-annotations/retrieval_annotations", "test")     # 9,668 clips
    rows = ek100.captions("epic-kitchens-100-annotations/retrieval_annotations", "test", table)   # 3,842 of them, by number
    ek100.check_relevancy("...", "test", table, rows)            # None, or how a pickle compares with the closed form

| file | rows train, test | what is read |
|---|---|---|
| EPIC_100_retrieval_{split}.csv | 67,217, 9,668 | COLUMNS, below |
| EPIC_100_retrieval_{split}_sentence.csv | 15,989, 3,842 | narration_id |
| relevancy/caption_relevancy_EPIC_100_retrieval_{split}.pkl | | float64 [clips, captions]: JPoSE's, or LaViLa's copy |

start_frame and stop_frame count frames of the original videos, not of a re-encoded copy, and are not read. In the published
test sentences six of the last seven rows have the narration of another row: narration_id decides, as in every published
evaluation. The pickle of a split is not needed: relevancy is 0.5 [same verb class] + 0.5 IoU(noun classes).

Source: Damen et al., "Rescaling Egocentric Vision", IJCV 2022; github.com/epic-kitchens/epic-kitchens-100-annotations (CC
BY-NC 4.0).
"""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from evaat_fast.data.choices import Split
from evaat_fast.data.kinds import kinds_of, kinds_relevancy
from evaat_fast.data.readers import pickles, text
from evaat_fast.data.table import ClipTable

__all__ = ["Annotation", "Relevancy", "captions", "check_relevancy", "clips", "read", "sentences"]

COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "narration",
    "verb_class",
    "all_noun_classes",
)


class Annotation(TypedDict):
    """A row of the clips' file. start, stop: seconds. verb, nouns: classes."""

    id: str
    participant: str
    video: str
    start: float
    stop: float
    text: str
    verb: int
    nouns: frozenset[int]


def clips(path: str | os.PathLike[str]) -> list[Annotation]:
    """The rows of a file with the columns of EPIC_100_train.csv, EPIC_100_validation.csv or their retrieval versions.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that cannot be read, an id that occurs twice; names the lines.
    """
    unique, found = text.Unique("narration_id"), []
    for row in text.rows(path, COLUMNS):
        clip: Annotation = {
            "id": row.text("narration_id"),
            "participant": row.text("participant_id"),
            "video": row.text("video_id"),
            "start": row.clock("start_timestamp"),
            "stop": row.clock("stop_timestamp"),
            "text": row["narration"].strip(),
            "verb": row.class_number("verb_class"),
            "nouns": frozenset(row.class_list("all_noun_classes")),
        }
        if clip["stop"] < clip["start"]:
            raise row.error(
                f"stop_timestamp {row['stop_timestamp']} lies before start_timestamp {row['start_timestamp']}; "
                "expected it after"
            )
        unique.add(row, clip["id"])
        found.append(clip)
    return found


def read(folder: str | os.PathLike[str], split: Split) -> ClipTable:
    """The clips of EPIC_100_retrieval_{split}.csv. Videos are named as their files are: "P01/P01_01".

    Args:
        folder: retrieval_annotations, or what `evaat-fast prepare` made of it. split: "train" or "test".

    Raises:
        FileNotFoundError: the folder or the file is not there. ValueError: a row that cannot be read, by file and line.
    """
    if (prepared := Path(folder) / f"{split}.arrow").is_file():
        return ClipTable.open(prepared)
    path = Path(folder) / f"EPIC_100_retrieval_{split}.csv"
    return table(clips(path), dataset="ek100-mir", split=split, source=[path.name])


def table(rows: Sequence[Annotation], *, cut: bool = False, **metadata: Any) -> ClipTable:
    """The table of such rows. cut: each clip is a video of its own, all of it: "P01/P01_102_0"."""
    columns: dict[str, Any] = {
        "id": [c["id"] for c in rows],
        "video": [f"{c['participant']}/{c['id' if cut else 'video']}" for c in rows],
        "start": np.array([np.nan if cut else c["start"] for c in rows]),
        "stop": np.array([np.nan if cut else c["stop"] for c in rows]),
        "texts": [[c["text"]] for c in rows],
        "verbs": [[c["verb"]] for c in rows],
        "nouns": [sorted(c["nouns"]) for c in rows],
    }
    return ClipTable.of(columns, **metadata)


def sentences(folder: str | os.PathLike[str], split: Split) -> list[str]:
    """The narration ids of EPIC_100_retrieval_{split}_sentence.csv: the captions to be retrieved, in order.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that cannot be read, an id that occurs twice.
    """
    unique, found = text.Unique("narration_id"), []
    for row in text.rows(Path(folder) / f"EPIC_100_retrieval_{split}_sentence.csv", ("narration_id",)):
        found.append(row.text("narration_id"))
        unique.add(row, found[-1])
    return found


def captions(folder: str | os.PathLike[str], split: Split, table: ClipTable) -> np.ndarray:
    """int64 [captions]: for each row of the sentence file the number of the clip that it is the narration of.

    Args:
        folder, split: as of `read`. table: its table.

    Raises:
        FileNotFoundError: no such file. ValueError: as `sentences`, an id that no clip has, or a prepared file that is damaged
        or of another table.
    """
    if (prepared := Path(folder) / f"{split}-relevancy.npz").is_file():
        return _prepared_captions(prepared, table)
    row_of = {name: row for row, name in enumerate(table.column("id"))}
    found = sentences(folder, split)
    unknown = [name for name in found if name not in row_of]
    if unknown:
        path = Path(folder) / f"EPIC_100_retrieval_{split}_sentence.csv"
        clips_file = f"is EPIC_100_retrieval_{split}.csv whole?"
        raise ValueError(f"{path}: {len(unknown)} narration ids are not in the clips' file, first {unknown[0]!r}; {clips_file}")
    return np.array([row_of[name] for name in found], np.int64)


def _prepared_captions(path, table):
    again = "evaat-fast prepare --force makes it anew"
    try:
        with np.load(path) as found:
            rows, kinds = found["caption_clip"], found["clip_kind"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}); {again}") from None
    # Of a run that was killed between the two, or of files that were copied one by one.
    other = len(kinds) != len(table) or (isinstance(table, ClipTable) and (kinds != kinds_of(table)[1].numpy()).any())
    if other or rows.min(initial=0) < 0 or rows.max(initial=0) >= len(table):
        raise ValueError(f"{path}: of another table than the one beside it; {again}")
    return rows


@dataclass(frozen=True)
class Relevancy:
    """How a pickled matrix compares with the closed form: it differs in `differing` of `cells`, by `worst` at most, first at
    clip `first[0]`, caption `first[1]`, or nowhere. `matrix`: float64 [clips, captions], mapped from the file."""

    path: Path
    matrix: np.ndarray
    cells: int
    differing: int
    worst: float
    first: tuple[int, int] | None

    def __str__(self) -> str:
        if self.first is None:
            return f"{self.path.name} agrees with the closed form in all of {self.cells:,} cells"
        at = f"first at clip {self.first[0]}, caption {self.first[1]}, by {self.worst:.3g} at most"
        return f"{self.path.name} differs from the closed form in {self.differing:,} of {self.cells:,} cells, {at}"


def check_relevancy(folder: str | os.PathLike[str], split: Split, table: ClipTable, rows: np.ndarray) -> Relevancy | None:
    """Compares the split's relevancy pickle with the closed form; None where there is no pickle.

    Args:
        folder, split: as of `read`; the pickle lies in the folder or in its subfolder relevancy. table: of `read`.
        rows: of `captions`.

    Returns:
        A Relevancy. Values that are equal in float32 agree.

    Raises:
        ValueError: the file is no pickle of a matrix of numbers from 0 to 1 of that shape.
    """
    name = f"caption_relevancy_EPIC_100_retrieval_{split}.pkl"
    path = next((p for p in (Path(folder) / "relevancy" / name, Path(folder) / name) if p.is_file()), None)
    if path is None:
        return None
    matrix, shape = pickles.load(path), (len(table), len(rows))
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind != "f" or matrix.shape != shape:
        got = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise ValueError(f"{path}: expected floats {list(shape)}, a row a clip and a column a caption, got {got}")
    kinds, numbers = kinds_of(table)
    of_clip = numbers.numpy()
    form = kinds_relevancy(kinds).numpy()[:, of_clip[rows]]
    differing, worst, first = 0, 0.0, None
    step = max(1, (1 << 22) // max(1, len(rows)))
    for begin in range(0, len(matrix), step):
        tile = np.asarray(matrix[begin : begin + step], np.float64)
        if not ((tile >= 0) & (tile <= 1)).all():
            row, column = np.argwhere(~((tile >= 0) & (tile <= 1)))[0]
            raise ValueError(
                f"{path}: clip {begin + row}, caption {column}: expected a number from 0 to 1, got {tile[row, column]}"
            )
        gap = np.abs(tile - form[of_clip[begin : begin + step]])
        wrong = gap > 1e-6
        if first is None and wrong.any():
            row, column = np.argwhere(wrong)[0]
            first = (begin + int(row), int(column))
        differing, worst = differing + int(wrong.sum()), max(worst, float(gap.max(initial=0)))
    return Relevancy(path, matrix, matrix.size, differing, worst if differing else 0.0, first)
