"""Charades-Ego: videos with their action classes to be recognised, and the clips of them to be trained on.

    test = charades.read("CharadesEgo", "test")        # a row a video, all of it; labels: its classes
    train = charades.read("CharadesEgo", "train")      # a row an action, with the class's name as its text
    names = charades.classes("CharadesEgo")            # 157 names, by class number

| file | what |
|---|---|
| CharadesEgo_v1_{train,test}_only1st.csv | a video: id, script, actions ("c092 11.90 21.20;c147 0.00 12.60", or none), length |
| Charades_v1_classes.txt | "c000 Holding some clothes", 157 lines |
| metadata_filtered_{train,val}.pkl | LaViLa's clips: pickled (id, start, end, text) |
| metadata_train.csv | EgoVLP's clips, separated by tabs: id, cls, t_start, t_end, narration |

Clips come from LaViLa's list where there is one, else from EgoVLP's, else from the actions of the csv, which both are made of.
Only first-person videos count ("only1st"). The annotators' times are rough: an action that ends before it starts, as some do,
still labels its video, but is no clip.

Source: Sigurdsson et al., "Actor and Observer", CVPR 2018; the lists are of the code of LaViLa and of EgoVLP.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.readers import pickles, text
from evaat_fast.data.readers.large import Skipped, check_units
from evaat_fast.data.table import ClipTable

__all__ = ["classes", "read", "videos"]

_COLUMNS = ("id", "actions", "length")
_ACTION = re.compile(r"c(\d{3}) (\S+) (\S+)", re.ASCII)
_CLASS = re.compile(r"c(\d{3}) (.*\S)", re.ASCII)
_CLASSES = 157
_SKIP = 0.02  # of a list's clips may end before they start


def classes(folder: str | os.PathLike[str]) -> list[str]:
    """The names of Charades_v1_classes.txt, class 0 first.

    Raises:
        FileNotFoundError: no such file. ValueError: a line that is not "c000 name", or not in order.
    """
    path, content = text.content(Path(folder) / "Charades_v1_classes.txt")
    names: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        match = _CLASS.fullmatch(line.strip())
        if match is None or int(match[1]) != len(names):
            raise ValueError(f"{path}: line {number}: expected 'c{len(names):03d} NAME', got {line[:40]!r}")
        names.append(match[2])
    if len(names) != _CLASSES:
        raise ValueError(f"{path}: expected {_CLASSES} classes, got {len(names)}; cut short?")
    return names


def videos(folder: str | os.PathLike[str], split: str) -> ClipTable:
    """The videos of CharadesEgo_v1_{split}_only1st.csv, whole: a row each, its script as the text, its classes as labels.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that cannot be read, an id that occurs twice.
    """
    path = Path(folder) / f"CharadesEgo_v1_{split}_only1st.csv"
    ids, scripts, labels, reversed_ = [], [], [], 0
    for row, actions, _ in _actions(path, ("script",)):
        ids.append(row.text("id"))
        scripts.append([row["script"].strip()] if row["script"].strip() else [])
        labels.append(sorted({number for number, _, _ in actions}))
        reversed_ += sum(stop < start for _, start, stop in actions)
    columns = {"id": ids, "video": ids, "texts": scripts, "labels": labels}
    return ClipTable.of(columns, dataset="charades-ego", split=split, source=[path.name], reversed=reversed_)


def read(folder: str | os.PathLike[str], split: str, *, source: str | None = None) -> ClipTable:
    """What a split is evaluated or trained on: "test" the whole videos, "train" the clips of actions.

    Args:
        folder: CharadesEgo, with the files above. split: "train", "val" (LaViLa's clips of the test videos) or "test".
        source: of the clips, "lavila", "egovlp" or "actions"; None: the first of which there is a file.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that cannot be read.
    """
    folder = Path(folder)
    if split == "test":
        return videos(folder, "test")
    if split not in ("train", "val"):
        raise ValueError(f"split: expected train, val or test, got {split!r}")
    lists = {"lavila": folder / f"metadata_filtered_{split}.pkl", "egovlp": folder / "metadata_train.csv"}
    if source is None:
        source = (
            "lavila" if lists["lavila"].is_file() else "egovlp" if split == "train" and lists["egovlp"].is_file() else "actions"
        )
    if source not in (*lists, "actions"):
        raise ValueError(f"source: expected lavila, egovlp or actions, got {source!r}")
    if source == "lavila":
        return _lavila(lists["lavila"], folder, split)
    if source == "egovlp":
        return _egovlp(lists["egovlp"], folder)
    return _of_actions(folder / f"CharadesEgo_v1_{'train' if split == 'train' else 'test'}_only1st.csv", folder, split)


def _actions(path, more=()):
    """(row, [(class, start, stop)], length) of each video."""
    unique = text.Unique("id")
    rows, late = 0, 0
    for row in text.rows(path, (*_COLUMNS, *more)):
        unique.add(row, row.text("id"))
        length, found = row.number("length"), []
        for action in filter(None, row["actions"].strip().split(";")):
            match = _ACTION.fullmatch(action.strip())
            start, stop = (text.number(match[2]), text.number(match[3])) if match else (None, None)
            if match is None or start is None or stop is None or int(match[1]) >= _CLASSES or start < 0:
                said = f"actions as 'c092 11.90 21.20;c147 0.00 12.60', of classes c000 to c{_CLASSES - 1}"
                raise row.error(f"actions: expected {said}, got {action[:40]!r}")
            found.append((int(match[1]), start, stop))
            rows, late = rows + 1, late + (start > 1.5 * length + 10)
        yield row, found, length
    if 10 * late > rows:
        raise ValueError(f"{path}: actions: expected seconds of the video; {late} of {rows} start long after its length")


def _of_actions(path, folder, split):
    names, clips = classes(folder), []  # type: list[str], list[tuple[Any, ...]]
    for row, actions, _ in _actions(path):
        clips += [(row.line, row.text("id"), start, stop, names[number], number) for number, start, stop in actions]
    return _clips(path, split, clips, "line")


def _egovlp(path, folder):
    names = classes(folder) if (folder / "Charades_v1_classes.txt").is_file() else None
    clips = []
    for row in text.rows(path, ("id", "cls", "t_start", "t_end", "narration"), delimiter="\t"):
        number, words = row.class_number("cls"), row.text("narration")
        if number >= _CLASSES:
            row.fail("cls", f"a class from 0 to {_CLASSES - 1}")
        if names is not None and words != names[number]:
            row.fail("narration", f"the name of class {number}, {names[number]!r}")
        clips.append((row.line, row.text("id"), row.number("t_start"), row.number("t_end"), words, number))
    return _clips(path, "train", clips, "line")


def _lavila(path, folder, split):
    names = classes(folder) if (folder / "Charades_v1_classes.txt").is_file() else []
    number_of = {name: number for number, name in enumerate(names)}
    clips: list[tuple[Any, ...]] = []
    for batch in pickles.batches(path):
        for row in batch:
            place = len(clips) + 1
            clips.append((place, *_lavila_row(path, place, row)))
            clips[-1] += (number_of.get(clips[-1][4]),)
    return _clips(path, split, clips, "row")


def _lavila_row(path, place, row):
    what = f"{path}: row {place}: expected (id, start, end, text)"
    if not isinstance(row, (tuple, list)) or len(row) != 4:
        raise ValueError(f"{what}, got {type(row).__name__}" + (f" of {len(row)}" if isinstance(row, (tuple, list)) else ""))
    name, start, stop, words = row
    if isinstance(words, list) and len(words) == 1:
        words = words[0]
    try:
        name, words = (value.decode().strip() if isinstance(value, bytes) else "" for value in (name, words))
    except UnicodeDecodeError:
        raise ValueError(f"{what}, got a string that is not UTF-8") from None
    times = [float(t) if type(t) in (int, float) and abs(t) < float("inf") else None for t in (start, stop)]
    if not name or not words or None in times:
        raise ValueError(f"{what} of two strings and two finite numbers, got {text.short((name, start, stop, words))}")
    return name, times[0], times[1], words


def _clips(path, split, rows, unit):
    """The table of rows (line, video, start, stop, text, class or None); ids are numbered within their video."""
    skipped, count = Skipped(path, _SKIP), {}  # type: Skipped, dict[str, int]
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "video", "start", "stop", "texts", "labels")}
    for line, video, start, stop, words, number in rows:
        place = count[video] = count.get(video, -1) + 1
        if stop < max(start, 0.0):
            skipped.add("clips that end before they start", 1, f"{unit} {line}: got {start:g} to {stop:g}".__str__)
            continue
        labels = [] if number is None else [number]
        for name, value in zip(columns, (f"{video}/{place}", video, max(start, 0.0), stop, [words], labels), strict=True):
            columns[name].append(value)
    reasons = skipped.finish(len(columns["id"]))
    check_units(path, np.array(columns["start"]), np.array(columns["stop"]))
    return ClipTable.of(columns, dataset="charades-ego", split=split, source=[path.name], skipped=reasons)
