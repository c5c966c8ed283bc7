"""Which of a table's videos are there, whole, and long enough: from names and the headers of MP4 files, without decoding.

    report = check(table, "videos")     # what is missing, damaged or too short, counted, the first of each named

A header is read in 50 microseconds: the boxes of an MP4 file must add up to its size, which those of a copy that was cut
short do not, and its movie header says how long it is. Of other containers only the size is looked at.
"""

import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaat_fast.data import layout
from evaat_fast.data.decode import mp4
from evaat_fast.data.table import ClipTable

__all__ = ["Videos", "check", "header"]

_MP4 = (".mp4", ".mov", ".m4v")
_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
_BATCH, _KEEP = 512, 10.0  # files, seconds
_SLACK = 1.0  # s: annotators' last clips end a little after their video


class Fact(NamedTuple):
    """What is known of a file, as JSON keeps it: its seconds, or None where its header does not say; what is wrong, or None."""

    size: int
    mtime: int
    seconds: float | None
    why: str | None


@dataclass(frozen=True)
class Videos:
    """What was found. missing: keys of videos. damaged: {file: why}. outside: ids of clips that begin after their video ends.
    lost: clips of videos that are missing or damaged. known: {file: its Fact}."""

    count: int
    files: int
    missing: list[str]
    damaged: dict[str, str]
    outside: list[str]
    lost: int
    known: dict[str, Fact] = field(repr=False)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.damaged or self.outside)

    def __str__(self) -> str:
        said = [f"{self.count - len(self.missing):,} of {self.count:,} videos in {self.files:,} files"]
        if self.missing:
            said.append(f"{len(self.missing):,} missing, first {self.missing[0]}")
        if self.damaged:
            name, why = next(iter(self.damaged.items()))
            said.append(f"{len(self.damaged):,} files damaged, first {name}: {why}")
        if self.outside:
            said.append(f"{len(self.outside):,} clips begin after their video ends, first {self.outside[0]}")
        if self.lost:
            said.append(f"{self.lost:,} clips cannot be read")
        return "; ".join(said)


def header(path: Path) -> tuple[float | None, str | None]:
    """(seconds, or None where the header does not say; what is wrong with the file, or None)."""
    size = path.stat().st_size
    if size == 0:
        return None, "the file is empty"
    if path.suffix.lower() not in _MP4:
        return None, None
    at, seconds, movie = 0, None, False
    with open(path, "rb") as file:
        for kind, (begin, end) in mp4.boxes(file, 0, size):
            if at == 0 and kind not in _FIRST:
                break
            if end > size:
                return None, f"cut short: its part {kind.decode('latin1')!r} needs {end - size:,} bytes more"
            if kind == b"moov":
                file.seek(begin)
                seconds, movie = _duration(file.read(48)), True
            at = end
    if at == 0:
        return None, "no MP4 file, by its first bytes"
    if at < size:
        return None, f"cut short: {size - at} bytes after its last part"
    return (seconds, None) if movie else (None, "cut short: it has no index ('moov')")


def _duration(data):
    if data[4:8] != b"mvhd" or len(data) < 40:
        return None
    scale, length = struct.unpack(">IQ" if data[8] else ">II", data[28:40] if data[8] else data[20:28])
    return length / scale if scale and length and length not in (2**32 - 1, 2**64 - 1) else None


def check(
    table: ClipTable,
    root: str | os.PathLike[str],
    *,
    known: Mapping[str, Sequence[Any]] | None = None,
    progress: Callable[[int, int], object] | None = None,
    keep: Callable[[dict[str, Fact]], object] | None = None,
) -> Videos:
    """Looks for the table's videos under root and at the headers of their files.

    Args:
        known: Videos.known of an earlier check; files of the same size and time are not opened again.
        progress: called as progress(files_done, files). keep: called now and then with what will be Videos.known, so that an
            interrupted check need not begin anew.

    Raises:
        FileNotFoundError: there is no folder root. ValueError: two files of one video, or chunks whose names could mean either.
    """
    root, known, names = Path(root), known or {}, table.videos()
    found = layout.find(root, names, "skip")
    paths = [path for source in found.values() for path in source.files]
    facts: dict[str, Fact] = {}

    def look(path):
        stamp = 0, 0
        try:
            status, before = path.stat(), known.get(str(path))
            stamp = status.st_size, status.st_mtime_ns
            return str(path), Fact(*before) if before and tuple(before[:2]) == stamp else Fact(*stamp, *header(path))
        except OSError as error:
            return str(path), Fact(*stamp, None, str(error))

    kept = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        for begin in range(0, len(paths), _BATCH):
            facts.update(pool.map(look, paths[begin : begin + _BATCH]))
            if progress is not None:
                progress(len(facts), len(paths))
            if keep is not None and time.monotonic() - kept > _KEEP:
                keep(facts)
                kept = time.monotonic()
    damaged = {str(Path(name).relative_to(root)): fact.why for name, fact in facts.items() if fact.why}
    ends, lost = {}, set()
    missing = [video for video in names if video not in found]
    lost |= set(missing)
    for video, source in found.items():
        gap = _gap(source, [facts[str(path)][2] for path in source.files])
        if gap:
            damaged[str(source.files[0].parent.relative_to(root))] = f"its chunk {gap} is missing"
        if gap or any(facts[str(path)].why for path in source.files):
            lost.add(video)
        elif (seconds := facts[str(source.files[-1])].seconds) is not None:
            ends[video] = source.starts[-1] + seconds
    outside, gone = [], 0
    if lost or ends:
        starts = np.nan_to_num(table.column("start"))
        for row, video in enumerate(table.column("video")):
            if video in lost:
                gone += 1
            elif starts[row] >= ends.get(video, np.inf) + _SLACK:
                outside.append(table.id(row))
    return Videos(len(names), len(paths), missing, damaged, outside, gone, facts)


def _gap(source, seconds):
    """The name of the first chunk that is not there, before the last that is; None. seconds: of each file, or None."""
    if source.layout not in ("chunks", "indexed"):
        return None
    numbers, step = [int(path.stem) for path in source.files], 1
    if source.layout == "chunks":
        step = min(np.diff([0, *numbers]).tolist()[1 if numbers[0] == 0 else 0 :], default=1)
        longest = max((length for length in seconds[:-1] if length), default=step)
        if step > 1.5 * longest:  # every other one is gone
            step = max(1, round(longest))
    there = set(numbers)
    absent = next((n for n in range(0, numbers[-1], step) if n not in there), None)
    return None if absent is None else f"{absent}{source.files[0].suffix}"
