"""What lies in a folder of one's own: videos, those that cannot be read, and captions beside them.

    found = look("Videos")
    found.videos["trip/monday.mp4"].duration
    found.captions           # of monday.srt, monday.vtt and monday.txt

A video is a file with an ending of `layout.VIDEOS` whose header can be read, or a member of a tar file. Files of its name hold
captions: text files of all of it, one a line; without one, JSON files, as WebDataset has them, under "caption" or "text"; and
subtitles with times.
"""

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evaat_fast.data import below, decode
from evaat_fast.data.decode import VideoError, VideoInfo, members
from evaat_fast.data.layout import VIDEOS
from evaat_fast.data.readers import plain, text

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SIDECARS = (".srt", ".vtt", ".txt", ".json")
_CUE = re.compile(r"\s*(\S+)\s+-->\s+(\S+)")
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")

__all__ = ["SIDECARS", "Caption", "Folder", "look", "tables"]


@dataclass(frozen=True)
class Caption:
    """Of a video, by its path below the folder; start, stop: seconds, None for all of it."""

    video: str
    text: str
    start: float | None = None
    stop: float | None = None


@dataclass(frozen=True)
class Folder:
    """root. videos: {path below it: what its header says}. broken: why others are none. hidden: paths that begin with a dot or
    whose names are not UTF-8. captions: of files beside videos, which are sidecars; unread: why some of those gave none."""

    root: Path
    videos: dict[str, VideoInfo]
    broken: dict[str, str]
    hidden: tuple[str, ...]
    captions: tuple[Caption, ...]
    sidecars: tuple[str, ...]
    unread: dict[str, str]


def look(root: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None) -> Folder:
    """Everything below a folder, through links; no video is decoded.

    Args:
        root: the folder. progress: called as progress(headers read, videos).

    Raises:
        FileNotFoundError: no such folder. ImportError: PyAV is not installed.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {str(root)!r}")
    if problem := decode.why_not("av"):
        raise ImportError(f"reading a video's headers needs PyAV ({problem}): pip install 'evaat-fast[video]'")
    hidden: list[str] = []
    files, broken = list(below.walk(root, hidden)), {}  # type: list[str], dict[str, str]
    for tar in [name for name in files if name.lower().endswith(members.SUFFIX)]:
        try:
            files += _inside(root / tar, tar, hidden)
        except VideoError as error:
            broken[tar] = str(error).removeprefix(f"{root / tar}: ")
    broken |= {name: "compressed: unpack it" for name in files if name.lower().endswith(_COMPRESSED)}
    names = [name for name in files if name.lower().endswith(VIDEOS)]
    videos: dict[str, VideoInfo] = {}
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        for done, (name, info) in enumerate(zip(names, pool.map(_probe, (root / name for name in names)), strict=True), 1):
            if isinstance(info, str):
                broken[name] = info
            else:
                videos[name] = info
            if progress is not None:
                progress(done, len(names))
    there, captions, used, unread = set(files), [], [], {}  # type: set[str], list[Caption], list[str], dict[str, str]
    for video in videos:
        own: list[Caption] = []
        for name in _beside(video, there):
            if own and name.endswith(".json"):  # often the same again, among other things
                continue
            try:
                found = list(_captions(root / name, video))
            except (ValueError, OSError, VideoError) as error:
                unread[name] = str(error).splitlines()[0].removeprefix(f"{root / name}: ")
                continue
            own += found
            used += [name] * bool(found)
        captions += own
    return Folder(root, videos, broken, tuple(hidden), tuple(captions), tuple(dict.fromkeys(used)), unread)


def tables(folder: str | os.PathLike[str]) -> list[Path]:
    """The files directly in a folder that `readers.plain` can read, in order, one that is called captions first."""
    found = []
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        if path.suffix.lower() in plain.SUFFIXES and path.is_file() and not path.name.startswith("."):
            try:
                plain.columns_of(path)
            except (ValueError, ImportError, OSError):
                continue
            found.append(path)
    return sorted(found, key=lambda path: path.stem.lower() != "captions")


def _probe(path):
    try:
        info = decode.probe(path)
    except VideoError as error:
        return str(error).removeprefix(f"{path}: ")
    if info.missing_bytes:
        return f"cut short: {info.missing_bytes:,} bytes are missing"
    return info


def _inside(tar: Path, name: str, hidden: list[str]) -> Iterator[str]:
    for member in members.names(tar):
        if posixpath.basename(member).startswith(".") or not below.is_text(member):
            hidden.append(f"{name}/{member}")
        else:
            yield f"{name}/{member}"


def _beside(video: str, there: set[str]) -> Iterator[str]:
    """monday.srt and monday.mp4.srt of monday.mp4."""
    stem, _ = posixpath.splitext(video)
    for ending in SIDECARS:
        for name in (stem + ending, stem + ending.upper(), video + ending):
            if name in there:
                yield name


def _captions(path: Path, video: str) -> Iterator[Caption]:
    content = text.decoded(path, members.read(path))
    if path.suffix.lower() == ".json":
        yield from (Caption(video, line) for line in dict.fromkeys(_said(content)))
        return
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in content.splitlines()]
        yield from (Caption(video, line) for line in dict.fromkeys(filter(None, lines)))
        return
    for block in re.split(r"\n\s*\n", content.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.split("\n")
        for number, line in enumerate(lines):
            if "-->" not in line:
                continue
            cue = _CUE.match(line)
            start, stop = (text.seconds(said) for said in cue.groups()) if cue else (None, None)
            if start is None or stop is None:
                raise ValueError(f"expected times as 00:01:02,500 --> 00:01:04,000, got {text.short(line.strip())}")
            words = " ".join(_MARKUP.sub("", " ".join(lines[number + 1 :])).split())
            if words and stop > start:
                yield Caption(video, words, start, stop)
            break


def _said(content: str) -> Iterator[str]:
    found = json.loads(content)
    for key in ("caption", "captions", "text", "texts"):
        value = found.get(key) if isinstance(found, dict) else None
        for line in value if isinstance(value, list) else [value]:
            if isinstance(line, str) and line.strip():
                yield " ".join(line.split())
