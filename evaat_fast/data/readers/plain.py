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
import functools
import hashlib
import io
import logging
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evaat_fast.data.choices import LABEL_COLUMNS, SPLITS, Split, check_choice
from evaat_fast.data.decode import VideoError, members
from evaat_fast.data.readers import text
from evaat_fast.data.readers.large import LONGEST
from evaat_fast.data.table import ClipTable

__all__ = ["COLUMNS", "SUFFIXES", "NoCaptions", "columns_of", "is_text", "normal", "read", "seconds", "walk"]

_log = logging.getLogger("evaat_fast")
COLUMNS = ("path", "caption", "start", "stop", "split")
SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")
_NEEDED = ("path", "caption")
_CLOCK = re.compile(r"(?:(\d{1,3}):)?(\d{1,3}):(\d{1,2}(?:[.,]\d+)?)", re.ASCII)
_TIME = "seconds or a time as 1:02:03.5"


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
    path, places = Path(path), _Places(Path(videos))
    header, rows = _open(path)
    classes = _label_columns(path, header, labels)
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


def seconds(said: str) -> float | None:
    """Seconds of "12.5", "1:02.5" or "01:02:03,5"; None of anything else."""
    found = _CLOCK.fullmatch(said.strip())
    if found is None:
        return text.number(said)
    hours, minutes, rest = int(found[1] or 0), int(found[2]), float(found[3].replace(",", "."))
    # 60.00 is what rounding makes of 59.998; minutes count on where there are no hours.
    return None if rest > 60 or (found[1] and minutes > 59) else 3600 * hours + 60 * minutes + rest


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


class _Places:
    """Finds what the column path says below a folder."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
        self.root, self._known = root, {}  # type: Path, dict[str, str]

    def find(self, row: _Row) -> str:
        """The path below the folder as the disk has it; of what is not there, as the row has it."""
        said = row.text("path")
        if row["path"] != said and os.path.exists(self.root / row["path"]):
            said = row["path"]  # whose name ends in a space
        if said not in self._known:
            self._known[said] = self._find(row, said)
        return self._known[said]

    def _find(self, row, said):
        if os.path.isabs(said):
            said = self._below(row, said)
        # Windows writes backslashes, and macOS may write e and its accent as two letters.
        spelt = dict.fromkeys(
            posixpath.normpath(form)
            for slashes in (said, said.replace("\\", "/"))
            for form in (slashes, *(unicodedata.normalize(kind, slashes) for kind in ("NFC", "NFD")))
        )
        if any(name == ".." or name.startswith("../") for name in spelt):
            row.fail("path", f"a video below {str(self.root)!r}")
        for name in spelt:
            if os.path.exists(self.root / name) or _in_tar(self.root / name):
                return name
        wanted = unicodedata.normalize("NFC", list(spelt)[-1])
        by_path, by_name = self._listed
        found = by_path.get(wanted.casefold(), [])
        if not found and "/" not in wanted:
            found = by_name.get(wanted.casefold(), [])
        # A camera's .MP4 may be written .mp4; but where there are both, they are two.
        found = [name for name in found if unicodedata.normalize("NFC", name).endswith(wanted)] or found
        if len(found) > 1:
            row.fail(
                "path", f"the name of one video; {len(found)} have it: {', '.join(found[:3])}; give the path below the folder"
            )
        return found[0] if found else wanted

    def _below(self, row, said):
        for one, root in ((os.path.normpath(said), self.root.absolute()), (os.path.realpath(said), self.root.resolve())):
            try:
                return Path(one).relative_to(root).as_posix()
            except ValueError:
                continue
        return row.fail("path", f"a video below {str(self.root)!r}")

    @functools.cached_property
    def _listed(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """({path in one spelling: as the disk has it}, {name: such paths}), without case, of all files but hidden ones."""
        by_path: dict[str, list[str]] = {}
        by_name: dict[str, list[str]] = {}
        for name in walk(self.root):
            spelt = unicodedata.normalize("NFC", name).casefold()
            by_path.setdefault(spelt, []).append(name)
            by_name.setdefault(posixpath.basename(spelt), []).append(name)
        return by_path, by_name


def walk(root: Path, skipped: list[str] | None = None) -> Iterator[str]:
    """The paths of all files below a folder, in order, through links but into no folder twice; `skipped`: what is hidden or has
    a name that is no text is added to it."""
    seen: set[tuple[int, int]] = set()
    skipped = [] if skipped is None else skipped
    for folder, folders, files in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        below = Path(folder).relative_to(root)
        for names in (folders, files):
            for name in sorted(names):
                if name.startswith(".") or not is_text(name):
                    skipped.append((below / name).as_posix())
        folders[:] = sorted(name for name in folders if not name.startswith(".") and is_text(name))
        yield from ((below / name).as_posix() for name in sorted(files) if not name.startswith(".") and is_text(name))


def _in_tar(path):
    try:
        return members.place(path) is not None
    except VideoError:  # said by the check
        return False


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8; other bytes are surrogates in it."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


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
            twice = [name for name in names if name and names.count(name) > 1]
            if twice:
                raise ValueError(f"{path}: line 1 names the column {twice[0]} {names.count(twice[0])} times")
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
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: names the column {twice[0]} {names.count(twice[0])} times")
    for name in _NEEDED:
        kind = table.schema.field(name).type
        inner = kind.value_type if name == "caption" and pa.types.is_list(kind) else kind
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
            raise ValueError(f"{path}: {name}: expected a column of text, got {kind}")
    return names, _arrow_rows(path, table)


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
        found = seconds(value) if value else None
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
        _once(f"{path}: columns that are not read: {', '.join(unused)}; data.labels names those that hold classes")


def _mention_mixed(path, clips, of_video):
    sides: dict[str, set[str]] = {}
    for c in clips:
        sides.setdefault(c.video, set()).add(c.split or of_video[c.video])
    mixed = [video for video, of in sides.items() if len(of) > 1]
    if mixed:
        _once(f"{path}: {len(mixed)} videos are in both train and test, by the column split; first {mixed[0]!r}")
