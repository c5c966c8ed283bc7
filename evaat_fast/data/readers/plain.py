"""A folder of videos and one file of captions: CSV, TSV, Parquet or Arrow.

    table = plain.read("captions.csv", "videos", "train")

    path,caption,start,stop,verb,noun
    trip/monday.mp4,opens the fridge,0:12.5,0:15,open,fridge
    trip/monday.mp4,takes the milk and the eggs,15,18,take,milk;eggs
    evening.mov,somebody sings

| column | what |
|---|---|
| path | of the video below the folder; its bare name will do where no other file has it; absolute where it lies below; a member
|      | of a tar file as shards/00001.tar/clip.mp4 |
| caption | a sentence. Rows of one path, start and stop are one clip with several captions, of which training draws one |
| start, stop | seconds, or [hh:]mm:ss[.f]; without them, or with both empty, the whole video |
| split | "train" or "test", if given; empty, or without the column: by the video's path and a seed |
| label columns | classes by any names, several in a cell separated by ; or |: the columns that `labels` names |

Which videos are tested does not depend on the others: a hash of the seed and of the path decides, so that none moves when rows
are added. Only where it leaves a side without a video does the nearest one go there.
"""

import csv
import hashlib
import io
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evaat_fast.data import below
from evaat_fast.data.choices import LABEL_COLUMNS, SPLITS, Split, check_choice
from evaat_fast.data.readers import text
from evaat_fast.data.readers.large import LONGEST
from evaat_fast.data.table import ClipTable

__all__ = ["COLUMNS", "SUFFIXES", "NoCaptions", "columns_of", "normal", "read"]

_log = logging.getLogger("evaat_fast")
COLUMNS = ("path", "caption", "start", "stop", "split")
SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
_NEEDED = ("path", "caption")
_TIME = "seconds or a time as 1:02:03.5"
_LIKE_TIME = re.compile(
    r"(start|stop|end|begin|from|to)([ _.-]*(at|in|time|timestamp|s|secs?|seconds?|ms|us|msecs?|milliseconds?|frames?))*"
)
_NAMED = 10  # columns that a message names


class NoCaptions(ValueError):
    """A file whose captions are all empty, as `evaat-fast init` writes it."""


def read(
    path: str | os.PathLike[str],
    videos: str | os.PathLike[str],
    split: Split,
    *,
    labels: Sequence[str] = LABEL_COLUMNS,
    test_share: float = 0.1,
    seed: int = 0,
) -> ClipTable:
    """The clips of a split.

    Args:
        path: a file of SUFFIXES. videos: the folder that its paths are relative to.
        split: "train" or "test".
        labels: names of label columns, or patterns with a *, which may fit none.
        test_share: which share of the videos are tested, roughly: each with this probability, at least one on either side. 0:
            only those that the column `split` names. seed: of that choice.

    Returns:
        A ClipTable of dataset "csv"; its `video` is the file's path below the folder, with its ending. metadata: "classes",
        {label column: [class names]}; the numbers of the column `labels` count through them in order. Empty where the split is.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: names the file, the line or row, the column, what was expected
            and what came. ImportError: pyarrow is missing.
    """
    check_choice("split", split, SPLITS)
    path, places = Path(path), below.Places(Path(videos))
    header, rows = _open(path)
    classes = _label_columns(path, header, labels)
    _check_times(path, [name for name in header if name not in classes])
    _mention(path, [name for name in header if name and name not in (*COLUMNS, *classes)])
    clips: dict[str, _Clip] = {}
    numbers: dict[tuple[str, str], int] = {}
    empty: list[_Row] = []
    total = 0
    for row in rows:
        total += 1
        captions = [c for c in _cells(row, "caption") if c.strip()]
        if not captions:
            empty.append(row)
            continue
        video = places.find(row)
        start, stop = _span(row)
        name = video if start is None else f"{video}@{_short(start)}-{_short(stop)}"
        clip = clips.setdefault(name, _Clip(video, start, stop, row))
        clip.captions.update(dict.fromkeys(c.strip() for c in captions))
        for column in classes:
            for value in _classes(row, column):
                clip.classes.add(numbers.setdefault((column, value), len(numbers)))
        clip.put(row)
    if not total:
        raise ValueError(f"{path}: no rows")
    if not clips:
        raise NoCaptions(f"{path}: none of its {total} rows has a caption: fill in the column caption")
    if empty:
        _once(f"{path}: {len(empty)} of {total} rows have no caption and are left out, first {empty[0].place}")
    of_video = _assign(path, clips.values(), test_share, seed)
    chosen = {name: c for name, c in clips.items() if (c.split or of_video[c.video]) == split}
    _mention_mixed(path, clips.values(), of_video)
    # Classes are numbered column by column, the same in both splits.
    order = {key: i for i, key in enumerate(sorted(numbers, key=lambda key: (list(classes).index(key[0]), numbers[key])))}
    number = {numbers[key]: i for key, i in order.items()}
    nan = float("nan")
    columns: dict[str, list[Any]] = {
        "id": list(chosen),
        "video": [c.video for c in chosen.values()],
        "start": [nan if c.start is None else c.start for c in chosen.values()],
        "stop": [nan if c.stop is None else c.stop for c in chosen.values()],
        "texts": [list(c.captions) for c in chosen.values()],
        "labels": [sorted(number[n] for n in c.classes) for c in chosen.values()],
    }
    named = {column: [value for owner, value in order if owner == column] for column in classes}
    return ClipTable.of(columns, dataset="csv", split=split, source=[path.name], classes=named)


def normal(caption: str) -> str:
    """What captions are compared by: without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())


def columns_of(path: str | os.PathLike[str]) -> list[str]:
    """The names of a file's columns, where it can be read as one of captions.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    return _open(Path(path))[0]


class _Row(text.Row):
    """A line of a text file or a row of a table. lists: cells that hold several values."""

    __slots__ = ("lists", "unit")

    def __init__(self, path: Path, line: int, values: dict[str, str], unit: str, lists: dict[str, list[str]] | None = None):
        super().__init__(path, line, values)
        self.unit, self.lists = unit, lists or {}

    @property
    def place(self) -> str:
        return f"{self.unit} {self.line}"

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {self.place} cannot be read: {message}")


class _Clip:
    """A clip as rows give it; `put` refuses a split that two of them do not share."""

    def __init__(self, video: str, start: float | None, stop: float | None, row: _Row):
        self.video, self.start, self.stop, self.first = video, start, stop, row
        self.captions: dict[str, None] = {}
        self.classes: set[int] = set()
        self.split = ""

    def put(self, row: _Row) -> None:
        said = row.values.get("split", "").strip().lower()
        if said and said not in SPLITS:
            row.fail("split", "train or test, or nothing")
        if said and self.split and said != self.split:
            raise row.error(f"split: expected {self.split}, as {self.first.place} of the same clip has it, got {said}")
        self.split = said or self.split


def _open(path: Path) -> tuple[list[str], Iterator[_Row]]:
    """(names of its columns, its rows)."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a file of {', '.join(SUFFIXES)}")
    if path.suffix.lower() in (".parquet", ".arrow"):
        return _open_arrow(path)
    _, content = text.content(path)
    delimiter, names = _header(path, content)
    rows = text.rows(path, _NEEDED, delimiter=delimiter)
    return names, (_Row(path, row.line, row.values, "line") for row in rows)


def _header(path, content):
    """(delimiter, names): that of which the first line has the needed columns; where none does, the likely one, whose error
    says what is missing."""
    first = next((line for line in content.splitlines() if line.strip()), "")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    for delimiter in dict.fromkeys((usual, ",", "\t", ";", "|")):
        try:
            names = [name.strip() for name in next(csv.reader(io.StringIO(first), delimiter=delimiter), [])]
        except csv.Error:
            continue
        if set(_NEEDED) <= set(names):
            _check_once(f"{path}: line 1", filter(None, names))
            return delimiter, names
    next(text.rows(path, _NEEDED, delimiter=usual), None)
    raise ValueError(f"{path}: expected a header with the columns {', '.join(_NEEDED)} in the first line")


def _open_arrow(path):
    if not path.is_file():
        raise FileNotFoundError(f"annotations: there is no file {str(path)!r}")
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except (ImportError, OSError) as error:
        raise ImportError(f"{path.suffix} files need pyarrow ({error}): pip install 'evaat-fast[video]'") from error
    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    names = table.column_names
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise ValueError(f"{path}: expected the columns {', '.join(_NEEDED)}; missing: {', '.join(missing)}")
    _check_once(f"{path}:", names)
    for name in _NEEDED:
        kind = table.schema.field(name).type
        inner = kind.value_type if name == "caption" and pa.types.is_list(kind) else kind
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        if str(inner) not in ("string", "large_string", "string_view", "null"):
            raise ValueError(f"{path}: {name}: expected a column of text, got {kind}")
    for i, column in enumerate(table.schema):  # without pandas Python knows no nanoseconds
        if pa.types.is_duration(column.type) and column.type.unit == "ns":
            table = table.set_column(i, column.name, table.column(i).cast(pa.duration("us"), safe=False))
    return names, _arrow_rows(path, table)


def _check_once(where, names):
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{where} names the column {name} {count} times")


def _check_times(path, header):
    """Times under other names, in who knows what unit, would be left out, and clips be whole videos."""
    other = [name for name in header if name not in COLUMNS and _LIKE_TIME.fullmatch(name.strip().lower())]
    if other and not {"start", "stop"} <= set(header):
        raise ValueError(
            f"{path}: expected times in columns start and stop, seconds or [hh:]mm:ss, got {', '.join(other[:_NAMED])}; name "
            "columns that are no times otherwise"
        )


def _arrow_rows(path, table):
    line = 0
    for batch in table.to_batches(max_chunksize=8192):
        for values in batch.to_pylist():
            line += 1
            lists = {name: [_said(v) for v in value if v is not None] for name, value in values.items() if _several(value)}
            plain = {name: _said(value) for name, value in values.items() if name not in lists}
            plain |= {name: "; ".join(value) for name, value in lists.items()}
            yield _Row(path, line, plain, "row", lists)


def _several(value):
    return isinstance(value, (list, tuple))


def _said(value: Any) -> str:
    """A value of a typed column as a text file would have it; missing ones as nothing."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if hasattr(value, "total_seconds"):
        return repr(value.total_seconds())
    return str(value)


def _cells(row: _Row, column: str) -> list[str]:
    return row.lists.get(column, [row.values[column]])


def _classes(row: _Row, column: str) -> Iterable[str]:
    values = row.lists[column] if column in row.lists else re.split(r"[;|]", row.values[column])
    return filter(None, map(normal, values))


def _span(row: _Row) -> tuple[float | None, float | None]:
    said = [row.values.get(name, "").strip() for name in ("start", "stop")]
    if not any(said):
        return None, None
    times = []
    for name, value in zip(("start", "stop"), said, strict=True):
        found = text.seconds(value) if value else None
        if found is None or found < 0 or (found > LONGEST and name == "stop"):
            other = "" if value else f", as {'stop' if name == 'start' else 'start'} is given; or neither, for the whole video"
            if name not in row.values:
                raise row.error(f"{name}: expected a column of this name beside the other one")
            row.fail(name, f"{_TIME}{other}" if found is None or found < 0 else "seconds, of no video of two days or more")
        times.append(found)
    if not times[1] > times[0]:
        row.fail("stop", f"a time after start = {row.values['start'].strip()}")
    return times[0], times[1]


def _short(time):
    return f"{time:.3f}".rstrip("0").rstrip(".")


def _label_columns(path, header, labels):
    found: dict[str, None] = {}
    for pattern in labels:
        if pattern in COLUMNS:
            raise ValueError(f"{path}: labels: {pattern!r} is no label column, as it says something else of a clip")
        if "*" not in pattern and pattern not in header:
            raise ValueError(f"{path}: labels: expected a column {pattern!r}; there are {', '.join(filter(None, header))}")
        fitting = [name for name in header if name not in COLUMNS and (name == pattern or _fits(name, pattern))]
        found.update(dict.fromkeys(fitting))
    return tuple(found)


def _fits(name, pattern):
    return "*" in pattern and fnmatchcase(name.lower(), pattern.lower())


def _assign(path: Path, clips: Iterable[_Clip], share: float, seed: int) -> dict[str, str]:
    """The split of each video of which some clip has none of its own."""
    if not 0 <= share < 1:
        raise ValueError(f"test_share: expected a share from 0 to below 1, got {share!r}")
    clips = list(clips)
    drawn = {video: _draw(seed, video) for video in dict.fromkeys(c.video for c in clips if not c.split)}
    tested = {video: share > 0 and value < share for video, value in drawn.items()}
    given = {c.split for c in clips if c.split}
    if share > 0 and drawn:
        if len(drawn) < 2 and not given:
            raise ValueError(
                f"{path}: expected two videos or more, of which one is tested; got clips of {next(iter(drawn))!r} alone: name "
                "its test clips in a column split, or train on all with test_share = 0"
            )
        if not any(tested.values()) and "test" not in given:
            tested[min(drawn, key=drawn.__getitem__)] = True
        if all(tested.values()) and "train" not in given:
            tested[max(drawn, key=drawn.__getitem__)] = False
    return {video: SPLITS[is_tested] for video, is_tested in tested.items()}


def _draw(seed: int, video: str) -> float:
    """From 0 to 1, of the seed and the path alone."""
    said = f"{seed}\0{unicodedata.normalize('NFC', video)}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big") / 2**64


_said_before: set[str] = set()


def _once(message: str) -> None:
    """A warning; both splits are of one file."""
    if message not in _said_before:
        _said_before.add(message)
        _log.warning("%s", message)


def _mention(path, unused):
    if unused:
        more = f" and {len(unused) - _NAMED:,} more" if len(unused) > _NAMED else ""
        _once(
            f"{path}: columns that are not read: {', '.join(unused[:_NAMED])}{more}; data.labels names those that hold classes"
        )


def _mention_mixed(path, clips, of_video):
    sides: dict[str, set[str]] = {}
    for c in clips:
        sides.setdefault(c.video, set()).add(c.split or of_video[c.video])
    mixed = [video for video, of in sides.items() if len(of) > 1]
    if mixed:
        _once(f"{path}: {len(mixed)} videos are in both train and test, by the column split; first {mixed[0]!r}")
