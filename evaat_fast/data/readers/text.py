"""Comma- and tab-separated files, read strictly: columns by name, and every fault named by file, line and column.

    for row in rows("EPIC_100_retrieval_test.csv", ("narration_id", "start_timestamp")):
        row.text("narration_id"), row.clock("start_timestamp")

A byte order mark, CRLF, quoted line breaks and columns in another order are read. What is not: fields that do not fit the
header, a file that ends in the middle of a line, bytes that are not UTF-8, numbers that are not finite.
"""

import csv
import io
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["Row", "Unique", "class_list", "content", "decoded", "number", "rows", "seconds", "short"]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CLOCK = re.compile(r"(\d{1,4}):(\d{1,2}):(\d{1,2}(?:\.\d+)?)", re.ASCII)
_SPOKEN = re.compile(r"(?:(\d{1,3}):)?(\d{1,3}):(\d{1,2}(?:[.,]\d+)?)", re.ASCII)
_CLASSES = re.compile(r"\[\s*(?:\d+(?:\s*,\s*\d+)*\s*,?\s*)?\]", re.ASCII)
_DELIMITERS = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_LARGEST = 2**31 - 1  # class numbers are int32
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 5, 5, 5
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200  # `short` cuts at 60


class Row:
    """A line of a file. Its methods give a column's value or raise the ValueError that names file, line and column."""

    __slots__ = ("line", "path", "values")

    def __init__(self, path: Path, line: int, values: dict[str, str]):
        self.path, self.line, self.values = path, line, values

    def __getitem__(self, column: str) -> str:
        return self.values[column]

    def fail(self, column: str, expected: str) -> NoReturn:
        raise self.error(f"{column}: expected {expected}, got {short(self.values[column])}")

    def error(self, message: str) -> ValueError:
        """The ValueError of this line: for the caller to raise."""
        return ValueError(f"{self.path}: line {self.line} cannot be read: {message}")

    def text(self, column: str) -> str:
        """What is not empty, without space around it."""
        return self.values[column].strip() or self.fail(column, "a text")

    def number(self, column: str) -> float:
        """A finite number."""
        value = number(self.values[column])
        return self.fail(column, "a finite number") if value is None else value

    def clock(self, column: str) -> float:
        """Seconds, of HH:MM:SS.ss."""
        match = _CLOCK.fullmatch(self.values[column].strip())
        if match is None or int(match[2]) > 59 or float(match[3]) > 60:  # 60.00: rounded up from 59.998
            return self.fail(column, "a time as HH:MM:SS.ss")
        return 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])

    def class_number(self, column: str) -> int:
        """A class number from 0."""
        value = self.values[column].strip()
        if not value.isascii() or not value.isdecimal() or int(value[:12]) > _LARGEST:
            return self.fail(column, "a class number from 0")
        return int(value)

    def class_list(self, column: str) -> list[int]:
        """Class numbers, of "[192, 115, 12]"."""
        values = class_list(self.values[column])
        return self.fail(column, "a list of class numbers as [3, 14]") if values is None else values


def number(text: str) -> float | None:
    """The finite number that a text is, or None. Unlike float(), it takes no "nan", "1_000" or digits of other scripts."""
    text = text.strip()
    value = float(text) if _NUMBER.fullmatch(text) else float("inf")
    return value if abs(value) < float("inf") else None


def seconds(said: str) -> float | None:
    """Seconds of "12.5", "1:02.5" or "01:02:03,5"; None of anything else."""
    found = _SPOKEN.fullmatch(said.strip())
    if found is None:
        return number(said)
    hours, minutes, rest = int(found[1] or 0), int(found[2]), float(found[3].replace(",", "."))
    # 60.00 is what rounding makes of 59.998; minutes count on where there are no hours.
    return None if rest > 60 or (found[1] and minutes > 59) else 3600 * hours + 60 * minutes + rest


def class_list(text: str) -> list[int] | None:
    """The numbers of "[192, 115, 12]", or None where that is not what the text is."""
    text = text.strip()
    if not _CLASSES.fullmatch(text):
        return None
    values = [int(n) for n in text[1:-1].replace(",", " ").split()]
    return values if max(values, default=0) <= _LARGEST else None


class Unique:
    """Refuses what a column says twice, by both lines."""

    def __init__(self, column: str):
        self.column, self.lines = column, {}  # type: str, dict[str, int]

    def add(self, row: Row, value: str) -> None:
        first = self.lines.setdefault(value, row.line)
        if first != row.line:
            raise row.error(f"{self.column}: {short(value)} was already given in line {first}; expected each once")


def content(path: str | os.PathLike[str], what: str = "annotations") -> tuple[Path, str]:
    """The path, and the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: no such folder or file; the message begins with `what`. ValueError: not UTF-8.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {str(path.parent)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{what}: there is no file {str(path)!r}")
    return path, decoded(path, path.read_bytes())


def decoded(path: Path, raw: bytes) -> str:
    """The text of a file's bytes; ValueError where they are not UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: expected text in UTF-8, got UTF-16, by its first two bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 text: byte {raw[error.start]:#04x}") from None
    if "\0" in text:
        raise ValueError(f"{path}: line {text[: text.index(chr(0))].count(chr(10)) + 1} is not UTF-8 text: byte 0x00")
    return text


def rows(
    path: str | os.PathLike[str], columns: Sequence[str], *, delimiter: str = ",", what: str = "annotations"
) -> Iterator[Row]:
    """The rows of a file with a header that names at least `columns`, in any order; empty lines are passed over.

    Raises:
        FileNotFoundError: no such file. ValueError: what the module's docstring lists, another delimiter, no rows.
    """
    path, text = content(path, what)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line, count, header = 1, 0, None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            cut = "; the file ends within quotes: cut short?" if "unexpected end" in str(error) else ""
            raise ValueError(f"{path}: line {line} cannot be read: {error}{cut}") from None
        if not fields:
            continue
        if header is None:
            header = _header(path, line, fields, columns, delimiter)
        elif len(fields) != len(header):
            raise ValueError(_misfit(path, line, len(header), len(fields), text, reader.line_num))
        else:
            count += 1
            yield Row(path, line, dict(zip(header, fields, strict=True)))
    if header is None:
        raise ValueError(f"{path}: expected a header with the columns {', '.join(columns)}, got an empty file")
    if not count:
        raise ValueError(f"{path}: no rows")


def _header(path, line, fields, columns, delimiter):
    header = [name.strip() for name in fields]
    missing = [c for c in columns if c not in header]
    if missing:
        said = f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(missing)}"
        for other, name in _DELIMITERS.items():
            if other != delimiter and len(set(columns) & set(delimiter.join(fields).split(other))) > len(columns) - len(
                missing
            ):
                said += f"; fields seem to be separated by {name}, expected {_DELIMITERS[delimiter]}"
        raise ValueError(f"{said}; the first line has {short(header)}")
    twice = [c for c in columns if header.count(c) > 1]
    if twice:
        raise ValueError(f"{path}: line {line} names the column {twice[0]} {header.count(twice[0])} times")
    return header


def _misfit(path, line, expected, got, text, end):
    last = not text.endswith("\n") and end >= text.count("\n") + 1
    cut = "; the file ends in the middle of this line: cut short?" if last and got < expected else ""
    return f"{path}: line {line} cannot be read: expected {expected} fields, got {got}{cut}"


def short(value: object) -> str:
    """A value as a message shows it. Lists within lists are cut: what refers to itself twice at each of fifty levels has no
    end."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
