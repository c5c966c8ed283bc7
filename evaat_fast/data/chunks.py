"""Re-encodes videos to short chunks that decode fast: {video}.mp4/{0,15,30,...}.mp4, named by their first second.

The short side is scaled down, groups of pictures are short, and there are no B-frames: a clip then decodes several times as
fast (`python bench/decode.py`). Pictures are stored upright, at an even rate, those that are on screen then.

    videos = chunks.discover("EK100")
    cost = chunks.estimate(videos, "EK100-chunks")
    failed = chunks.write(videos, "EK100-chunks", workers=8, progress=print)

Work can be stopped at any moment and begun again, or be done by several processes at once: a chunk appears under its name when
it is complete, a video when all of its chunks are.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.decode import Header, VideoError, probe, why_not
from evaat_fast.data.decode.errors import reason
from evaat_fast.data.decode.mp4 import UPRIGHT, turned
from evaat_fast.data.layout import SUFFIXES, Source

_SAMPLES, _SAMPLE_SECONDS = 4, 8.0
_BEFORE = 2.0  # seconds
_SETTINGS = "chunks.json"
_UNFINISHED = ".part"
_HALF = Fraction(1, 2)

__all__ = ["Estimate", "Settings", "discover", "estimate", "write"]


@dataclass(frozen=True)
class Settings:
    """How chunks are encoded.

    seconds: of a chunk. short_side: pixels, never more than the video has. crf: x264's quality, lower is better and larger.
    gop: frames from one key frame to the next. preset: x264's. fps: the most frames per second; None keeps the video's.
    """

    seconds: int = 15
    short_side: int = 288
    crf: int = 23
    gop: int = 15
    preset: str = "veryfast"
    fps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("seconds", 1), ("short_side", 16), ("crf", 0), ("gop", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an int from {least}, got {value!r}")


@dataclass(frozen=True)
class Estimate:
    """What chunking will cost, by samples. videos, hours: to do. seconds: of time. bytes: of disk; free: what is there."""

    videos: int
    hours: float
    seconds: float
    bytes: int
    free: int

    def __str__(self) -> str:
        hours = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.1f} minutes"
        cost = f"about {_duration(self.seconds)} and {self.bytes / 1e9:.2g} GB ({self.free / 1e9:.3g} GB are free)"
        return f"{self.videos} videos, {hours}: {cost}"


def discover(root: str | os.PathLike[str]) -> dict[str, Source]:
    """{name: Source} of all video files below a folder, "P01/P01_01" for P01/P01_01.MP4 and P01/videos/P01_01.MP4.

    Raises:
        FileNotFoundError: no such folder, or no video in it. ValueError: two files of one name.
    """
    root = Path(root)
    found: dict[str, Source] = {}
    if not root.is_dir():
        raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            parts = [p for p in path.relative_to(root).with_suffix("").parts if p != "videos"]
            name = "/".join(parts)
            if name in found:
                raise ValueError(f"videos: two files of {name!r}: {found[name].files[0]} and {path}")
            found[name] = Source((path,), (0.0,), "whole")
    if not found:
        raise FileNotFoundError(f"videos: no video in {str(root)!r}")
    return found


def estimate(
    videos: Mapping[str, Source], out: str | os.PathLike[str], settings: Settings | None = None, workers: int | None = None
) -> Estimate:
    """What `write` with the same arguments will cost; encodes some seconds of a few videos.

    Raises:
        VideoError: none of the videos can be read. ValueError: fewer than one worker. ImportError: PyAV is missing.
    """
    _need_av()
    settings, out, workers = settings or Settings(), Path(out), _checked(workers)
    waiting = {n: s for n, s in videos.items() if not _finished(out, n).is_dir()}
    durations = {}
    for name, source in waiting.items():
        try:
            durations[name] = probe(source.files[0]).duration or 0.0
        except VideoError:  # `write` reports it
            continue
    if waiting and not durations:
        raise VideoError(f"none of {len(waiting)} videos can be read, the first is {next(iter(waiting.values())).files[0]}")
    by_length = sorted(durations, key=lambda n: durations[n])
    picked = {by_length[int((i + 0.5) / _SAMPLES * len(by_length))] for i in range(_SAMPLES)} if by_length else set()
    spent = encoded = size = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(picked):
            begin = max(0.0, durations[name] / 2 - _SAMPLE_SECONDS)
            started = time.perf_counter()
            try:
                encoded += _encode(videos[name].files[0], Path(folder) / "v", settings, begin, _SAMPLE_SECONDS)
            except VideoError:
                continue
            spent += time.perf_counter() - started
            size += sum(p.stat().st_size for p in Path(folder).rglob("*.mp4"))
            shutil.rmtree(Path(folder) / "v")
    total = sum(durations.values())
    share = total / encoded if encoded else 0.0
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    processes = min(workers, max(1, len(waiting)))
    return Estimate(len(waiting), total / 3600, spent * share / processes, round(size * share), shutil.disk_usage(there).free)


def write(
    videos: Mapping[str, Source],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, str]:
    """Writes out/{name}.mp4/{second}.mp4 for every video that is not there yet.

    Args:
        videos: names and whole files, as from `discover` or `layout.find`. out: a folder. settings: None for `Settings()`.
        workers: processes, None for one a processor. progress: called as progress(name, done, of) after each video.

    Returns:
        {name: why} of the videos that could not be read; nothing is left of them.

    Raises:
        ValueError: a video that is not one whole file, chunks of other settings in `out`, or fewer than one worker.
        ImportError: PyAV is missing.
        RuntimeError: a process was killed.
    """
    _need_av()
    settings, out, workers = settings or Settings(), Path(out), _checked(workers)
    for name, source in videos.items():
        if source.layout != "whole":
            raise ValueError(f"videos: {name!r} is not one whole file but of the layout {source.layout!r}")
    _same_settings(out, settings)
    waiting = [name for name in videos if not _finished(out, name).is_dir()]
    done, failed = len(videos) - len(waiting), {}
    with ProcessPoolExecutor(min(workers, max(1, len(waiting))), initializer=_follow, initargs=(os.getpid(),)) as pool:
        running = {pool.submit(_write_video, videos[n].files[0], _finished(out, n), settings): n for n in waiting}
        for future in as_completed(running):
            name = running[future]
            try:
                why = future.result()
            except BrokenProcessPool:
                raise RuntimeError(f"a process was killed, out of memory or by {videos[name].files[0]}; run it again") from None
            if why is not None:
                failed[name] = why
            done += 1
            if progress is not None:
                progress(name, done, len(videos))
    return failed


def _follow(parent):
    """In a worker: ends it with the process that started it. One that is killed cannot, and its workers would wait forever."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_video(path, folder, settings):
    """In a worker: None, or why not."""
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    with _alone(unfinished):
        if folder.is_dir():  # another run was faster
            unfinished.rmdir()
            return None
        there = {int(p.stem) for p in unfinished.glob("*.mp4") if p.stem.isdigit()}
        begin = next(n for n in range(len(there) + 1) if n * settings.seconds not in there) * settings.seconds
        try:
            _encode(path, unfinished, settings, float(begin))
        except VideoError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            return str(error)
        os.replace(unfinished, folder)
    return None


@contextlib.contextmanager
def _alone(folder):
    """Makes a folder and holds it. Two runs into one place take turns, and so do a run and workers of one that was killed."""
    handle = None
    while handle is None:
        with contextlib.suppress(FileExistsError):  # it was there, and by now another run has given it its final name
            folder.mkdir(parents=True, exist_ok=True)
        handle = _held(folder)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _held(folder):
    """A handle that locks a folder, -1 where there are no locks; None if it was renamed or removed in the meantime."""
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    os.close(handle)
    return None


def _encode(path, folder, settings, begin, length=math.inf):
    """Writes the chunks of a video from a second on, which begins one; returns how many seconds it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    head = Header(path)
    chunk = None
    try:
        head.stream.codec_context.options = {"err_detect": "explode"}
        head.stream.codec_context.thread_count = 1
        rate = head.rate.limit_denominator(1001)
        rate = min(rate, Fraction(settings.fps)) if settings.fps else rate
        shape = head.info()
        last = first = _first_of(begin, rate)
        for number, frame in _on_grid(head, rate, first):
            second = settings.seconds * int((number + _HALF) / rate / settings.seconds)
            if length < math.inf and number - first >= length * rate:
                break
            if chunk is None or chunk.second != second:
                if chunk is not None:
                    chunk.finish()
                chunk = _Chunk(folder, second, rate, shape, settings)
            chunk.add(frame, number)
            last = number + 1
        if chunk is not None:
            chunk.finish()
            chunk = None
        if last == first and begin == 0:
            raise VideoError(f"{path}: no frames")
        return float((last - first) / rate)
    except VideoError:
        raise
    except Exception as error:  # of a damaged picture, for one
        raise VideoError(f"{path}: {reason(path, error)}") from error
    finally:
        if chunk is not None:
            chunk.drop()
        head.close()


def _on_grid(head, rate, first):
    """(n, the frame on screen at (n + 0.5) / rate) for every n from the first."""
    if first and head.ordered:  # to well before it, as containers seek by decoding time
        start = head.stream.start_time or 0
        head.container.seek(max(start, head.ticks(float(first / rate) - _BEFORE)), stream=head.stream)
    number, before, stored, ends = first, None, 0, 0.0
    for frame in _frames(head, float(first / rate)):
        # In AVI the order is right and the time stamps are not.
        at = head.seconds(frame.pts) if head.ordered else stored / head.fps
        stored += 1
        while before is not None and (number + 0.5) / rate < at:
            yield number, before
            number += 1
        before, ends = frame, at + (float(frame.duration * head.base) if frame.duration and head.ordered else 1 / head.fps)
    while before is not None and (number + 0.5) / rate < ends:
        yield number, before
        number += 1
    if before is not None:
        head.checked_end(ends)


def _frames(head, needed):
    """Decoded frames. What is broken before the needed second is let pass: an open group may lack what it refers to."""
    from av.error import FFmpegError

    at = -math.inf
    for packet in head.packets():
        if packet.pts is not None:
            at = max(at, head.seconds(packet.pts))
        try:
            frames = head.stream.codec_context.decode(packet if packet.size else None)
        except FFmpegError:
            if at >= needed:
                raise
            continue
        yield from frames


def _first_of(second, rate):
    """The first frame whose middle lies in the chunk of a second: a reader looks for a frame by its middle, and takes a file's
    first picture for one that begins with the chunk."""
    return math.ceil(Fraction(second) * rate - _HALF)


class _Chunk:
    """A chunk being written; `finish` gives it its name."""

    def __init__(self, folder, second, rate, shape, settings):
        import av
        from av.video.reformatter import VideoReformatter

        self.second, self._matrix = second, shape.matrix
        self._path, self._part = folder / f"{second}.mp4", folder / f"{second}{_UNFINISHED}"
        self._first = _first_of(second, rate)
        scale = min(1.0, settings.short_side / min(shape.width, shape.height))
        width, height = (max(2, 2 * round(x * scale / 2)) for x in (shape.width, shape.height))
        self._size = (height, width) if shape.matrix[0] == 0 else (width, height)  # as stored
        self._out = av.open(str(self._part), "w", format="mp4")
        self._stream = self._out.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.time_base = self._base = 1 / rate
        self._stream.codec_context.thread_count = 1
        choice = {"crf": settings.crf, "g": settings.gop, "preset": settings.preset, "bf": 0, "tune": "fastdecode"}
        self._stream.options = {name: str(value) for name, value in {**choice, "sc_threshold": 0}.items()}
        self._reformatter = VideoReformatter()

    def add(self, frame, number):
        import av

        # To BT.601, which decoders take pictures without a tag for.
        width, height = self._size
        how: dict[str, Any] = {"dst_colorspace": "ITU601", "interpolation": "BICUBIC", "threads": 1}
        if self._matrix == UPRIGHT:
            picture = self._reformatter.reformat(frame, width, height, "yuv420p", **how)
        else:
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", **how).to_ndarray()
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(turned(rgb, self._matrix)), format="rgb24")
        if picture is frame:  # its time stamp is set, and the frame may be shown again
            picture = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")
        picture.pts, picture.time_base, picture.pict_type = number - self._first, self._base, 0
        self._out.mux(self._stream.encode(picture))

    def finish(self):
        self._out.mux(self._stream.encode(None))
        self._out.close()
        os.replace(self._part, self._path)

    def drop(self):
        self._out.close()
        self._part.unlink(missing_ok=True)


def _same_settings(out, settings):
    """One folder, one kind of chunks."""
    path, text = out / _SETTINGS, json.dumps(asdict(settings), indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{path}: chunks of other settings are there: {' '.join(path.read_text().split())}")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _finished(out, name):
    return out / f"{name}.mp4"


def _need_av():
    if problem := why_not("av"):
        raise ImportError(f"re-encoding videos needs PyAV ({problem}): pip install evaat-fast[video]")


def _checked(workers):
    """How many processes, one a processor where nobody says."""
    if workers is not None:
        if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
            raise ValueError(f"workers: expected an int from 1, got {workers!r}")
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _duration(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"
