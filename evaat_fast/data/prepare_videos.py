"""Which of a table's videos are there, whole, and long enough: from names and the headers of MP4 files, without decoding.

    report = check(table, "videos")     # what is missing, damaged or too short, counted, the first of each named

A header is read in 50 microseconds: the boxes of an MP4 file must add up to its size, which those of a copy that was cut
short do not, and its movie header says how long it is. Of other containers only the size is looked at.
"""

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.table import ClipTable

__all__ = ["Videos", "check", "find", "header"]

_SUFFIXES = (".MP4", ".mp4", ".mkv", ".webm", ".avi", ".mov")
_MP4 = (".mp4", ".mov", ".m4v")
_INDEXED = 600.0  # seconds of EgoVLP's chunks, whose names are numbers
_SLACK = 1.0  # s: annotators' last clips end a little after their video


@dataclass(frozen=True)
class Videos:
    """What was found. missing: keys of videos. damaged: {file: why}. outside: ids of clips that begin after their video ends.
    lost: clips of videos that are missing or damaged. known: {file: [size, mtime, seconds or None, why or None]}."""

    count: int
    files: int
    missing: list[str]
    damaged: dict[str, str]
    outside: list[str]
    lost: int
    known: dict[str, list[Any]] = field(repr=False)

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


def find(root: Path, videos: Iterable[str]) -> dict[str, list[Path]]:
    """{video: its files}: one, or its chunks in order; none where it is missing.

    Looked for are root/P01/P01_01.MP4 (or .mp4, .mkv, ...), a file or a folder of chunks, a folder root/UID of EgoVLP's
    chunks, and root/P01/videos/P01_01.MP4, as the official download has it.
    """
    found: dict[str, list[Path]] = {}
    folders: dict[Path, set[str]] = {}
    for video in videos:
        *parents, name = video.split("/")
        found[video] = []
        for folder in (root.joinpath(*parents), root.joinpath(*parents, "videos")):
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
            hit = next((name + s for s in (*_SUFFIXES, "") if name + s in folders[folder]), None)
            if hit is not None:
                path = folder / hit
                found[video] = sorted(_chunks(path), key=_number) if path.is_dir() else [path]
                break
    return found


def _chunks(folder):
    return [folder / name for name in os.listdir(folder) if name.endswith(_SUFFIXES) and name.split(".")[0].isdecimal()]


def _number(path):
    return int(path.stem)


def header(path: Path) -> tuple[float | None, str | None]:
    """(seconds, or None where the header does not say; what is wrong with the file, or None)."""
    size = path.stat().st_size
    if size == 0:
        return None, "the file is empty"
    if path.suffix.lower() not in _MP4:
        return None, None
    at, seconds, movie = 0, None, False
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            head = file.read(16)
            if len(head) < 8:
                return None, f"cut short: {size - at} bytes after its last part"
            length, kind, begin = *struct.unpack(">I4s", head[:8]), 8
            if at == 0 and kind not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
                return None, "no MP4 file, by its first bytes"
            if length == 1 and len(head) == 16:
                length, begin = struct.unpack(">Q", head[8:])[0], 16
            elif length == 0:  # to the end of the file
                length = size - at
            if length < begin or at + length > size:
                return None, f"cut short: its part {kind.decode('latin1')!r} needs {at + length - size:,} bytes more"
            if kind == b"moov":
                movie = True
                file.seek(at + begin)
                seconds = _duration(file.read(48))
            at += length
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
    known: Mapping[str, list[Any]] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Videos:
    """Looks for the table's videos under root and at the headers of their files.

    Args:
        known: Videos.known of an earlier check; files of the same size and time are not opened again.
        progress: called as progress(files_done, files).

    Raises:
        FileNotFoundError: there is no folder root.
    """
    root, known = Path(root), known or {}
    if not root.is_dir():
        raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
    found = find(root, table.videos())
    paths = [path for files in found.values() for path in files]
    facts: dict[str, list[Any]] = {}

    def look(path):
        status = path.stat()
        stamp, before = [status.st_size, status.st_mtime_ns], known.get(str(path))
        try:
            return str(path), before if before and before[:2] == stamp else [*stamp, *header(path)]
        except OSError as error:
            return str(path), [*stamp, None, str(error)]

    with ThreadPoolExecutor(8) as pool:
        for done, (name, fact) in enumerate(pool.map(look, paths, chunksize=64), 1):
            facts[name] = fact
            if progress is not None and (done % 256 == 0 or done == len(paths)):
                progress(done, len(paths))
    damaged = {str(Path(name).relative_to(root)): fact[3] for name, fact in facts.items() if fact[3]}
    ends, lost = {}, set()
    for video, files in found.items():
        chunked = bool(files) and files[0].parent.name.split(".")[0] == video.split("/")[-1]
        gap = _gap(files) if chunked else None
        if gap:
            damaged[str(files[0].parent.relative_to(root))] = f"its chunk {gap} is missing"
        if not files or gap or any(facts[str(path)][3] for path in files):
            lost.add(video)
        elif (seconds := facts[str(files[-1])][2]) is not None:
            ends[video] = (_begins(files[-1]) if chunked else 0.0) + seconds
    missing = [video for video, files in found.items() if not files]
    outside, gone = [], 0
    if lost or ends:
        starts = np.nan_to_num(table.column("start"))
        for row, video in enumerate(table.column("video")):
            if video in lost:
                gone += 1
            elif starts[row] >= ends.get(video, np.inf) + _SLACK:
                outside.append(table.id(row))
    return Videos(len(found), len(paths), missing, damaged, outside, gone, facts)


def _gap(files):
    """The name of the first chunk that is not there, before the last that is; None."""
    numbers = list(map(_number, files))
    step = min(np.diff([0, *numbers]).tolist()[1 if numbers[0] == 0 else 0 :], default=1)
    there = set(numbers)
    absent = next((n for n in range(0, numbers[-1], step) if n not in there), None)
    return None if absent is None else f"{absent}{files[0].suffix}"


def _begins(chunk):
    """The second at which a chunk begins: EgoVLP's, in folders without a suffix, are numbered."""
    return (1.0 if chunk.parent.suffix in _SUFFIXES else _INDEXED) * int(chunk.stem)
