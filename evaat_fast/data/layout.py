"""Where the videos of a corpus lie: whole files, cut clips, or chunks named by their first second or by their number.

| layout | files of video "P01/P01_01", "uid" | who has it |
|---|---|---|
| whole | P01/P01_01.MP4, P01/videos/P01_01.MP4, P01_01.mp4 | the publishers |
| clips | P01/P01_01_0.mp4, a file for each clip, named by its id | cut sets of EPIC-Kitchens-100 |
| chunks | P01/P01_01.MP4/{0,15,30}.MP4, uid.mp4/{0,300,600}.mp4: the first second | AVION, LaViLa |
| indexed | uid/{0,1,2}.mp4: the number of a chunk | EgoVLP |

Any of SUFFIXES, in upper or lower case. A corpus is of one layout; which, its files decide.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaat_fast.data.decode import OutsideError, VideoError, members, probe

Layout = Literal["whole", "clips", "chunks", "indexed"]
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
# And what cameras and phones write, of one's own.
VIDEOS = (*SUFFIXES, ".3gp", ".flv", ".m2ts", ".mpeg", ".mpg", ".mts", ".ogv", ".wmv")
_PLACES = ("", "videos", "clips")  # folders that a download brings with it
_SAMPLED = 8  # videos whose durations decide what a chunk's name means

__all__ = ["SUFFIXES", "VIDEOS", "Layout", "Source", "find", "find_clips", "of_path"]


@dataclass(frozen=True)
class Source:
    """Where a video lies.

    files: one, or chunks in order of time. starts: the second of the video at which each begins; of a cut clip, at which the
    clip does. layout: which of those above.
    """

    files: tuple[Path, ...]
    starts: tuple[float, ...]
    layout: Layout


def find(root: str | os.PathLike[str], videos: Iterable[str], missing: Literal["raise", "skip"] = "raise") -> dict[str, Source]:
    """Where each video lies.

    Args:
        root: the folder of the corpus. videos: their names in it, without suffix ("P01/P01_01", an Ego4D uid).
        missing: what to do about videos that are not there. "skip": leave them out of what is returned.

    Returns:
        {video: its Source}. Where chunks are missing their seconds are in no file of it.

    Raises:
        FileNotFoundError: no such folder, or videos that are not in it, counted, the first ones named.
        ValueError: two files of one video, or chunks whose names could mean either.
        VideoError: a folder without chunks.
    """
    names = list(dict.fromkeys(videos))
    folders = _Folders(Path(root))
    found = {name: place for name in names if (place := folders.find(name)) is not None}
    if missing == "skip":
        found = {name: place for name, place in found.items() if place.is_file() or _any_chunk(place)}
    elif absent := [name for name in names if name not in found]:
        raise FileNotFoundError(missing_files(root, absent, len(names), "videos"))
    listed = {name: _chunk_files(place) for name, place in found.items() if place.is_dir()}
    length = _chunk_seconds(listed.values())
    return {n: _chunked(listed[n], length) if n in listed else _whole(place) for n, place in found.items()}


def find_clips(
    root: str | os.PathLike[str],
    ids: Sequence[str],
    videos: Sequence[str],
    starts: Sequence[float],
    missing: Literal["raise", "skip"] = "raise",
) -> dict[str, Source]:
    """Where the clips of a set that is cut into them lie, by their ids; {} where none does, as in all other layouts.

    Args:
        root: as in `find`. ids, videos, starts: of each clip. missing: of clips beside others that are there, as in `find`.

    Raises:
        FileNotFoundError: no such folder, or some of the clips are not in it. ValueError: two files of one clip.
    """
    folders, found = _Folders(Path(root)), {}
    for clip, video, start in zip(ids, videos, starts, strict=True):
        # A participant's folder, or that of the video's chunks, comes before the id as it does before the video's name.
        if path := folders.find(f"{video.rpartition('/')[0]}/{clip}".lstrip("/")):
            found[clip] = Source((path,), (float(start),), "clips")
    if found and missing == "raise" and (absent := [clip for clip in ids if clip not in found]):
        raise FileNotFoundError(missing_files(root, absent, len(ids), "clips"))
    return found


def of_path(path: str | os.PathLike[str]) -> Source:
    """The Source of a file, of a member of a tar file, or of a folder of chunks; VideoError where there is none."""
    path = Path(path)
    if os.path.isfile(path) or (not os.path.isdir(path) and members.place(path) is not None):
        return _whole(path)
    if not os.path.isdir(path):
        raise VideoError(f"{path}: no such video")
    return _folder(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _folder(path, changed):
    files = _chunk_files(path)
    return _chunked(files, _chunk_seconds([files]))


def home(source: Source, second: float) -> int:
    """The number of the file that a second of the video lies in; OutsideError before the first."""
    later = next((i for i, start in enumerate(source.starts) if start > second), len(source.starts))
    if later == 0:
        raise OutsideError(
            f"{source.files[0].parent}: the chunk of {second:.2f} s is missing: the first begins at {source.starts[0]:.0f} s"
        )
    return later - 1


def _whole(path):
    return Source((path,), (0.0,), "whole")


def _chunked(files, length):
    numbers = [number for number, _ in files]
    if length is None:
        return Source(tuple(p for _, p in files), tuple(map(float, numbers)), "chunks")
    return Source(tuple(p for _, p in files), tuple(length * n for n in numbers), "indexed")


def _chunk_files(folder):
    """[(number, file)] in order."""
    chunks: dict[int, Path] = {}
    for entry in filter(_is_chunk, folder.iterdir()):
        number = int(entry.stem)
        if number in chunks:
            raise ValueError(f"{folder}: two chunks of one name, {chunks[number].name} and {entry.name}")
        chunks[number] = entry
    if not chunks:
        suffix = folder.suffix or ".mp4"
        raise VideoError(f"{folder}: a folder without chunks named by their first second (0{suffix}, 15{suffix}, ...)")
    return sorted(chunks.items())


def _any_chunk(folder):
    return any(map(_is_chunk, folder.iterdir()))


def _is_chunk(path):
    return path.stem.isascii() and path.stem.isdigit() and path.suffix.lower() in SUFFIXES


def _chunk_seconds(listings):
    """None where chunks are named by their first second; the seconds of a chunk where they are numbered.

    Chunks that follow one another do not overlap: one that lasts longer than the step to the next name is a numbered one.
    """
    several = [files for files in listings if len(files) > 1]
    # Where steps are as short as any, names are most likely numbers.
    several.sort(key=lambda files: min(b[0] - a[0] for a, b in itertools.pairwise(files)))
    verdicts: dict[bool, Path] = {}
    lengths = []
    for files in several[:_SAMPLED]:
        step, seconds, path = _first_readable(files)
        if seconds is None:
            continue
        numbered = seconds > step + max(1.0, 0.2 * step)
        verdicts[numbered] = path
        lengths += [seconds] if numbered else []
    if len(verdicts) > 1:
        named, counted = verdicts[False], verdicts[True]
        raise ValueError(f"chunks named by their first second ({named}) and numbered ones ({counted}) in one corpus")
    if not lengths:
        return None
    # The last chunk may be short, the others at most a few frames.
    length = max(lengths)
    nearest = round(length)
    return float(nearest if math.isclose(length, nearest, abs_tol=0.5) else length)


def _first_readable(files):
    """(step to the next name, seconds, file) of a chunk whose header says how long it is; the last chunk comes last."""
    steps = sorted(((b[0] - a[0], a[1]) for a, b in itertools.pairwise(files)), key=lambda pair: pair[0])
    for step, path in (*steps, (steps[0][0], files[-1][1])):
        try:
            seconds = probe(path).duration
        except VideoError:  # said when a clip in it is read
            continue
        if seconds is not None:
            return step, seconds, path
    return 0, None, files[0][1]


class _Folders:
    """Looks names up by listing each folder once: on a network file system a listing costs what a look at one file does."""

    def __init__(self, root):
        if not root.is_dir():
            raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
        self._root = root
        self._listings: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name):
        """The file or folder of a video or clip, or None."""
        if name.startswith("/") or ".." in name.split("/"):
            return None  # outside the folder, where a table's names have no business
        parent, _, stem = name.rpartition("/")
        inside = [parent] if not parent else [parent, ""]
        for first in _PLACES:
            for part in inside:
                for last in ("", "videos") if part else ("",):
                    folder = self._root.joinpath(*(p for p in (first, part, last) if p))
                    found = self._listing(folder).get(stem, [])
                    if len(found) > 1:
                        raise ValueError(f"{folder}: {len(found)} videos {stem!r}: {', '.join(p.name for p in found)}")
                    if found:
                        return found[0]
        return None

    def _listing(self, folder):
        if folder not in self._listings:
            stems: dict[str, list[Path]] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        stem, suffix = os.path.splitext(entry.name)
                        name = stem if suffix.lower() in SUFFIXES else entry.name
                        # Looks at links only, and a link to what is gone is not there.
                        if entry.is_dir() or (name == stem != entry.name and entry.is_file()):
                            stems.setdefault(name, []).append(folder / entry.name)
            except (FileNotFoundError, NotADirectoryError):
                pass
            self._listings[folder] = stems
        return self._listings[folder]


def missing_files(root: str | os.PathLike[str], names: Sequence[str], total: int, what: str) -> str:
    """What to say of names that are not there."""
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"videos: {len(names)} of {total} {what} are not in {str(root)!r}: {listed}"
