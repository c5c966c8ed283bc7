"""Reads the annotation files of EPIC-Kitchens-100 retrieval and finds its videos."""

import ast
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "narration",
    "verb_class",
    "all_noun_classes",
)


Split = Literal["train", "test"]


class Clip(TypedDict):
    """A row of the clips' file. start, stop: seconds. verb, nouns: classes."""

    id: str
    participant: str
    video: str
    start: float
    stop: float
    text: str
    verb: int
    nouns: frozenset[int]


def read_clips(folder: Path, split: Split) -> list[Clip]:
    """The rows of EPIC_100_retrieval_{split}.csv."""
    return _read(folder / f"EPIC_100_retrieval_{split}.csv", _COLUMNS, _clip)


def read_captions(folder: Path, split: Split, clips: Sequence[Clip]) -> list[int]:
    """For each row of the sentence file the number of the clip that it is the narration of.

    narration_id decides: the published test file's text is shifted against it in six rows, so published evaluations
    take the clip's own narration.
    """
    path = folder / f"EPIC_100_retrieval_{split}_sentence.csv"
    row_of = {c["id"]: i for i, c in enumerate(clips)}
    names = _read(path, ("narration_id",), lambda row: row["narration_id"])
    unknown = [n for n in names if n not in row_of]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} narration ids are not in the clips' file, first {unknown[0]!r}")
    return [row_of[n] for n in names]


def find_videos(root: Path, clips: Sequence[Clip], split: Split) -> dict[str, Path]:
    """{video: path of its file or of its folder of chunks}."""
    if not root.is_dir():
        raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
    paths: dict[str, Path] = {}
    missing = []
    for name, participant in {c["video"]: c["participant"] for c in clips}.items():
        places = [root / participant / f"{name}{suffix}" for suffix in (".MP4", ".mp4")]
        path = next((p for p in places if p.exists()), None)
        if path is None:
            missing.append(str(places[0]))
        else:
            paths[name] = path
    if missing:
        count = f"{len(missing)} of the {len(missing) + len(paths)} videos of the {split} split"
        raise FileNotFoundError(f"videos: {count} are missing, first {missing[0]!r}")
    return paths


def _clip(row: dict[str, str]) -> Clip:
    clip: Clip = {
        "id": row["narration_id"],
        "participant": row["participant_id"],
        "video": row["video_id"],
        "start": _seconds(row["start_timestamp"]),
        "stop": _seconds(row["stop_timestamp"]),
        "text": row["narration"],
        "verb": _class("verb_class", ast.literal_eval(row["verb_class"].strip())),
        "nouns": frozenset(_class("all_noun_classes", n) for n in _list(ast.literal_eval(row["all_noun_classes"]))),
    }
    if not math.isfinite(clip["stop"]):
        raise ValueError(f"stop_timestamp {row['stop_timestamp']} is no time")
    if not 0 <= clip["start"] <= clip["stop"]:
        raise ValueError(f"stop_timestamp {row['stop_timestamp']} lies before start_timestamp {row['start_timestamp']}")
    return clip


def _list(value):
    if not isinstance(value, (list, tuple, set)):
        raise ValueError(f"all_noun_classes: expected a list of class numbers, got {value!r}")
    return value


def _class(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{name}: expected a class number from 0, got {str(value)[:40]}")
    return value


def _seconds(text):
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _read(path, columns, parse):
    """The rows of a CSV file, each through `parse`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"annotations: there is no folder {str(path.parent)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"annotations: there is no file {str(path)!r}")
    try:
        return _parsed(path, columns, parse)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from None


def _parsed(path, columns, parse):
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in columns if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(missing)}")
        rows = []
        for row in reader:
            try:
                rows.append(parse(row))
            except (ValueError, SyntaxError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: line {reader.line_num} cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows
