"""EgoClip, EgoVLP's pretraining set: egoclip.csv, 3,847,723 clips of Ego4D of a second each, separated by tabs.

    table = egoclip.read("egoclip.csv")

Columns: clip_idx, video_uid, video_dur, narration_source, narration_ind, narration_time, clip_start, clip_end, clip_text
("#C C picks a bag"), tag_verb ("[93]", of 118) and tag_noun ("[192, 115, 12]", of 582). The file is no CSV of a writer's: it
is lines joined by tabs, in which quotes are letters, and EgoVLP's own reader let pandas drop lines with too many fields
(`error_bad_lines=False`) and took max(0, clip_start). Here such lines are left out too, and counted; starts before the video
are moved to 0, and counted.

Source: Lin et al., "Egocentric Video-Language Pretraining", NeurIPS 2022 (arXiv 2206.01670), and its code.
"""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.readers.large import Skipped, check_units, joined, table_of
from evaat_fast.data.table import ClipTable

__all__ = ["read"]

COLUMNS = ("clip_idx", "video_uid", "video_dur", "clip_start", "clip_end", "clip_text", "tag_verb", "tag_noun")
_BLOCK = 8 << 20  # bytes of the file that are columns at a time
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_CLASSES = r"^\s*\[\s*(\d+(\s*,\s*\d+)*\s*,?\s*)?\]\s*$"
_BEYOND = 0.01  # of all clips may begin after their video ends


def read(path: str | os.PathLike[str], *, skip: float = 0.001) -> ClipTable:
    """The clips of egoclip.csv: id clip_idx, video video_uid, one text, EgoVLP's verb and noun tags.

    Args:
        path: of the file. skip: the share of rows that may be left out because they cannot be read. They are counted by
            reason, in a warning and in the table's metadata["skipped"].

    Returns:
        A ClipTable. metadata["moved"]: how many clips began before 0; metadata["beyond"]: how many begin after their video
        ends, which are kept.

    Raises:
        FileNotFoundError: no such file. ValueError: columns that are missing, more unreadable rows than `skip`, a clip_idx
        that occurs twice, a file that ends within a line, times that are no seconds.
        ImportError: pyarrow is missing.
    """
    import pyarrow as pa

    path = Path(path)
    skipped = Skipped(path, skip)
    parts: dict[str, list[Any]] = {name: [] for name in ("id", "video", "start", "stop", "texts", "verbs", "nouns")}
    numbers, moved, beyond, first = [], 0, 0, ""
    for batch in _batches(path, skipped):
        starts = batch["start"]
        early, late = starts < 0, starts >= batch["duration"]
        moved, beyond = moved + int(early.sum()), beyond + int(late.sum())
        if late.any() and not first:
            row = int(late.argmax())
            first = f"clip {batch['id'][row]} starts at {starts[row]:g} of {batch['duration'][row]:g}"
        batch["start"] = np.maximum(starts, 0)
        numbers.append(batch["number"])
        for name, arrays in parts.items():
            arrays.append(batch[name])
    count = sum(map(len, numbers))
    reasons = skipped.finish(count)
    _unique(path, np.concatenate(numbers))
    del numbers
    if beyond > _BEYOND * count:
        said = f"{beyond:,} of {count:,} clips start after their video ends, first {first}"
        raise ValueError(f"{path}: clip_start: expected seconds of the video, whose length video_dur is; {said}")
    columns = {name: joined(parts.pop(name)) for name in list(parts)}
    columns["texts"] = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32)), columns["texts"])
    check_units(path, columns["start"].to_numpy(), columns["stop"].to_numpy())
    facts = {"source": [path.name], "skipped": reasons, "moved": moved, "beyond": beyond}
    return table_of(columns, dataset="egoclip", split="train", **facts)


def _batches(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Columns of some thousand rows that can be read."""
    import pyarrow as pa
    from pyarrow import compute as pc
    from pyarrow import csv

    header = _header(path)
    _utf8(path)
    tail = _Tail(path)

    def bad(row):
        if row.actual_columns < row.expected_columns and tail.is_last(row.text):
            tail.cut = True
            return "error"
        reason = f"lines of another number of fields than the header's {row.expected_columns}"
        skipped.add(reason, 1, lambda: f"{tail.line_with(row.text)} of {row.actual_columns}")
        return "skip"

    try:
        reader = csv.open_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=bad),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() for name in header}, include_columns=list(COLUMNS), strings_can_be_null=False
            ),
        )
        for batch in reader:
            yield from _checked(path, dict(zip(COLUMNS, batch.columns, strict=True)), skipped, pc)
    except pa.ArrowException as error:
        if tail.cut:
            raise ValueError(f"{path}: the last line has too few fields: the file is cut short") from None
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _checked(path, columns, skipped, pc):
    """The batch without the rows that cannot be read, as arrays of the table's types."""
    import pyarrow as pa

    good = np.ones(len(columns["clip_idx"]), bool)

    def refuse(name, reason, wrong):
        wrong = wrong & good
        good[wrong] = False

        def where():
            row = int(wrong.argmax())
            text = columns[name][row].as_py()
            fields = [columns[c][row].as_py() for c in ("clip_idx", "video_uid", name)]
            return f"{_line(path, fields)}, got {text[:40]!r}"

        skipped.add(f"{name}: {reason}", int(wrong.sum()), where)

    for name in ("clip_idx", "video_dur", "clip_start", "clip_end"):
        pattern = r"^\d{1,18}$" if name == "clip_idx" else _NUMBER
        what = "expected a whole number" if name == "clip_idx" else "expected a finite number"
        refuse(name, what, ~_mask(pc.match_substring_regex(columns[name], pattern)))
    for name in ("video_uid", "clip_text"):
        refuse(name, "expected a text", _mask(pc.equal(pc.binary_length(pc.utf8_trim_whitespace(columns[name])), 0)))
    for name in ("tag_verb", "tag_noun"):
        refuse(name, "expected a list of class numbers as [3, 14]", ~_mask(pc.match_substring_regex(columns[name], _CLASSES)))
    if not good.all():
        columns = {name: column.filter(pa.array(good)) for name, column in columns.items()}
        good = np.ones(int(good.sum()), bool)
    times = {}
    for name in ("video_dur", "clip_start", "clip_end"):
        times[name] = pc.cast(pc.utf8_trim_whitespace(columns[name]), pa.float64()).to_numpy(zero_copy_only=False)
        refuse(name, "expected a finite number", ~np.isfinite(times[name]))
    refuse("clip_end", "expected a time from clip_start on", times["clip_end"] < np.maximum(times["clip_start"], 0))
    lists = {}
    for name in ("tag_verb", "tag_noun"):
        lists[name], large = _lists(columns[name])
        refuse(name, "expected class numbers below 2147483648", large)
    kept = pa.array(good)
    text = pc.cast(columns["clip_text"], pa.large_string())
    yield {
        "number": pc.cast(columns["clip_idx"], pa.int64()).to_numpy()[good],
        "id": columns["clip_idx"].filter(kept),
        "video": pc.utf8_trim_whitespace(columns["video_uid"]).filter(kept),
        "start": times["clip_start"][good],
        "stop": times["clip_end"][good],
        "duration": times["video_dur"][good],
        "texts": pc.utf8_trim_whitespace(text).filter(kept),
        "verbs": lists["tag_verb"].filter(kept),
        "nouns": lists["tag_noun"].filter(kept),
    }


def _lists(column):
    """(list<int32> of strings as "[3, 14]", which rows hold a number that is too large)."""
    import pyarrow as pa
    from pyarrow import compute as pc

    plain = pc.replace_substring_regex(column, r"[\[\]\s]|,\s*\]", "")
    empty = pc.equal(plain, "")
    pieces = pc.split_pattern(pc.if_else(empty, "-1", plain), ",")
    offsets = pieces.offsets.to_numpy()
    flat = pieces.flatten()
    long = pc.greater(pc.binary_length(flat), 10)
    values = pc.cast(pc.if_else(long, "9999999999", flat), pa.int64()).to_numpy(zero_copy_only=False)
    offsets = offsets - offsets[0]
    large = np.zeros(len(column), bool)
    large[np.searchsorted(offsets, np.flatnonzero(values > 2**31 - 1), "right") - 1] = True
    keep = values >= 0
    counts = np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int32)
    numbers = np.where(values > 2**31 - 1, 0, values)[keep].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(counts), pa.array(numbers)), large


def _mask(array):
    return array.to_numpy(zero_copy_only=False)


def _unique(path, numbers):
    order = np.sort(numbers)
    twice = order[1:][order[1:] == order[:-1]]
    if len(twice):
        rows = np.flatnonzero(numbers == twice[0])
        lines = [_line(path, [str(twice[0])], skip=n) for n in range(2)]
        raise ValueError(
            f"{path}: clip_idx: {twice[0]} was given {len(rows)} times, {lines[0]} and {lines[1]}; expected each once"
        )


def _header(path):
    if not path.is_file():
        raise FileNotFoundError(f"annotations: there is no file {str(path)!r}")
    with open(path, "rb") as file:
        line = file.readline(1 << 20)
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: expected text in UTF-8, got UTF-16, by its first two bytes")
    names = line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    missing = [c for c in COLUMNS if c not in names]
    if missing:
        comma = "; fields seem to be separated by a comma, expected a tab" if line.count(b",") > line.count(b"\t") else ""
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}{comma}")
    twice = [c for c in COLUMNS if names.count(c) > 1]
    if twice:
        raise ValueError(f"{path}: line 1 names the column {twice[0]} {names.count(twice[0])} times")
    return names


class _Tail:
    """Whether a line is the file's last, without an end of line."""

    def __init__(self, path):
        self.path, self.cut = path, False
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 16)))
            end = file.read()
        self.last = None if end.endswith((b"\n", b"\r")) else end.rsplit(b"\n", 1)[-1]

    def is_last(self, text):
        return self.last is not None and text.encode("utf-8", "surrogateescape") == self.last

    def line_with(self, text):
        wanted = text.encode("utf-8", "surrogateescape")
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.rstrip(b"\r\n") == wanted:
                    return f"line {number}"
        return f"the line {text[:40]!r}"


def _line(path, fields, skip=0):
    """ "line N", of the one after `skip` others whose fields these are."""
    wanted = {field.encode() for field in fields}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if wanted <= set(line.rstrip(b"\r\n").split(b"\t")):
                if skip == 0:
                    return f"line {number}"
                skip -= 1
    return "a line"


def _utf8(path):
    """Refuses a file that is not UTF-8, or holds a zero byte, by its line: Arrow would pass over such a line in silence."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
                wrong = block.find(0)
            except UnicodeDecodeError as error:
                wrong = max(0, error.start - pending)
            if wrong >= 0:
                line += block.count(b"\n", 0, wrong)
                raise ValueError(f"{path}: line {line} is not UTF-8 text: byte {block[wrong]:#04x}")
            line += block.count(b"\n")
    if decoder.getstate()[0]:
        raise ValueError(f"{path}: line {line} is not UTF-8 text: the file ends within a letter; cut short?")
