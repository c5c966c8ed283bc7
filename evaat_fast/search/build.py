"""From videos to rows of an index: decoding in threads, a batch at a time through the model, a commit every few hundred clips.

Threads decode ahead; on a CPU the same threads embed, one batch each, so that no core waits for another. The order is that of
names whatever is ready first, and batches never reach beyond a commit, so a run that is killed and begun again writes what an
undisturbed one does, to the last bit.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from evaat_fast.data.decode import VideoError, why_not
from evaat_fast.search import by_shot, scan, windows
from evaat_fast.search.embedder import Embedder, Settings
from evaat_fast.search.store import COLUMNS, Partial, Problem, Store
from evaat_fast.search.windows import Span

_COMMIT = 256  # clips, or the video more that reaches them
_BATCH = 64  # clips, at most
_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 18}  # of a batch
_SPAN = 64 << 20  # bytes of frames that a thread decodes at once
_SPANS = (16, 256)  # clips, at least and at most

__all__ = ["Progress", "Report", "build", "plan_of", "threads"]


@dataclass(frozen=True)
class Progress:
    """How far indexing is. videos, of: done, and in all. bytes, all_bytes: of their files. clips: embedded. seconds: since it
    began. name: of the video that is being read."""

    videos: int
    of: int
    bytes: int
    all_bytes: int
    clips: int
    seconds: float
    name: str

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def remaining(self) -> float:
        """Seconds, by the bytes of the files."""
        return self.seconds * (self.all_bytes - self.bytes) / self.bytes if self.bytes else float("nan")


@dataclass(frozen=True)
class Report:
    """What `Index.add` did. videos: indexed now. clips: of these. unchanged: videos left as they are. removed: videos that are
    gone. changed: of `videos`, those that were indexed before. unreadable: {video: why}, of all that were looked at. seconds:
    how long it took."""

    videos: int
    clips: int
    unchanged: int
    removed: int
    changed: int
    unreadable: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        said = [f"{self.videos:,} videos indexed, {self.clips:,} clips"]
        said += [f"{n:,} {what}" for n, what in ((self.unchanged, "unchanged"), (self.changed, "changed")) if n]
        said += [f"{self.removed:,} gone"] if self.removed else []
        said += [f"{len(self.unreadable):,} cannot be read"] if self.unreadable else []
        rate = f", {self.clips / self.seconds:.1f} clips/s" if self.clips and self.seconds else ""
        return "; ".join(said) + f" ({self.seconds:.1f} s{rate})"


@dataclass(frozen=True)
class Plan:
    """What there is to do. todo: videos to read, in order. known: unreadable ones to write down as they are. gone: of the
    index. stale: those of todo that it has in another version. unchanged: how many. refused: {video: why} of those looked at
    and left."""

    todo: dict[str, scan.Found]
    known: dict[str, Problem]
    gone: list[str]
    stale: list[str]
    unchanged: int
    refused: dict[str, str] = field(default_factory=dict)


def plan_of(
    found: Mapping[str, scan.Found],
    there: Mapping[str, tuple[int, int]],
    unreadable: Mapping[str, Problem],
    below: Callable[[str], bool],
    retry: bool = False,
) -> Plan:
    """Compares what lies in folders with what an index has.

    Args:
        found: of `scan.scan`. there: (size, mtime) by name, of the index. unreadable: of its manifest. below: whether a name is
            of the folders that were looked through. retry: try again what could not be read.
    """
    todo, known, refused, unchanged = {}, {}, {}, 0
    for name, one in found.items():
        stamp = one.size, one.mtime
        before = unreadable.get(name)
        if there.get(name) == stamp:
            unchanged += 1
        elif before and before[:2] == stamp and not (retry and one.why is None):
            refused[name] = before.why
        elif one.why is not None:
            known[name] = Problem(*stamp, one.why)
        else:
            todo[name] = one
    gone = [name for name in (*there, *unreadable) if name not in found and below(name) and not _unseen(name, found)]
    stale = [name for name in there if name in todo or name in known]
    return Plan(todo, known, gone, stale, unchanged, refused)


def _unseen(name: str, found: Mapping[str, scan.Found]) -> bool:
    """Whether it may well lie in a folder that cannot be read now, which is then among what was found."""
    return any(str(folder) in found for folder in PurePosixPath(name).parents)


def threads(workers: int | None) -> int:
    """How many, one a processor where nobody says.

    Raises:
        ValueError: fewer than one.
    """
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers: expected an int from 1, got {workers!r}")
    return workers


_Clips = tuple[np.ndarray, np.ndarray]  # uint8 [U, S, S, 3], and which of these frames each clip has, int64 [n, T]


@dataclass
class _Group:
    """What the next commit will have. first: its row at which the current video begins."""

    vectors: list[Any] = field(default_factory=list)  # arrays, or futures of them
    waiting: list[_Clips] = field(default_factory=list)  # that are not a batch yet
    clips: int = 0
    first: int = 0
    places: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    dropped: list[tuple[int, int]] = field(default_factory=list)  # rows of videos that broke off
    dead: list[tuple[int, int]] = field(default_factory=list)  # and those of them that were committed before
    unreadable: dict[str, Problem] = field(default_factory=dict)

    def add(self, name: str, span: Span, found: scan.Found) -> None:
        n = len(span.where)
        if n:
            self.waiting.append((span.frames, span.where))
        self.clips += n
        columns = ([name] * n, span.start.tolist(), span.stop.tolist(), [found.size] * n, [found.mtime] * n)
        for column, values in zip(COLUMNS, columns, strict=True):
            self.places[column] += values

    def batch(self, size: int) -> list[_Clips]:
        """The first clips that wait, at most so many, which wait no more."""
        taken: list[_Clips] = []
        while self.waiting and size:
            frames, where = self.waiting.pop(0)
            if len(where) > size:
                self.waiting.insert(0, (frames, where[size:]))
            taken.append((frames, where[:size]))
            size -= len(taken[-1][1])
        return taken


def build(
    store: Store,
    embedder: Embedder,
    settings: Settings,
    todo: Mapping[str, scan.Found],
    base: str,
    workers: int,
    progress: Callable[[Progress], object] | None = None,
) -> tuple[int, dict[str, str]]:
    """Indexes videos; the one that the manifest calls partial, from where it stands.

    Args:
        store: held by this process. todo: videos by name, in order. base: of names, see `scan.name_of`. workers: threads.
        progress: is told after each video and each span of one.

    Returns:
        (clips, {video: why it could not be read}).
    """
    if problem := why_not("av"):
        raise ImportError(f"reading videos needs PyAV ({problem}): pip install 'evaat-fast[video]'")
    device, began = embedder.device.type, time.monotonic()
    group, clips, done, read, failed = _Group(), 0, 0, 0, {}
    size = max(4, min(_BATCH, _TOKENS[device] // math.prod(embedder.config.grid)))
    total = sum(one.size for one in todo.values())

    def tell(name: str, share: float = 0.0) -> None:
        if progress is not None:
            so_far = read + int(share * todo[name].size)
            progress(Progress(done, len(todo), so_far, total, clips, time.monotonic() - began, name))

    def embedded(batch: list[_Clips]) -> np.ndarray:
        clips = [np.take(frames, where, axis=0) for frames, where in batch]
        return embedder.clips(torch.from_numpy(clips[0] if len(clips) == 1 else np.concatenate(clips)))

    def embed(batch: list[_Clips]) -> None:
        if device != "cpu":
            group.vectors.append(embedded(batch))
            return
        running = [x for x in group.vectors[-2 * workers :] if isinstance(x, Future) and not x.done()]
        if len(running) > workers:
            running[0].result()
        group.vectors.append(pool.submit(embedded, batch))

    def flush(everything: bool = False) -> None:
        while (n := sum(len(where) for _, where in group.waiting)) >= size or (everything and n):
            embed(group.batch(size))

    def commit(partial: Partial | None = None) -> None:
        nonlocal group
        flush(everything=True)
        made = [x.result() if isinstance(x, Future) else x for x in group.vectors]
        vectors = np.concatenate(made) if made else np.zeros((0, store.manifest.width), np.float16)
        keep = np.ones(len(vectors), bool)
        for first, last in group.dropped:
            keep[first:last] = False
        if not np.isfinite(vectors[keep].astype(np.float32)).all():
            raise ValueError(f"checkpoint: {settings.checkpoint}: its vectors are not finite; they cannot be searched")
        places = {name: [x for x, kept in zip(column, keep, strict=True) if kept] for name, column in group.places.items()}
        store.append(vectors[keep], places, group.unreadable, group.dead, partial)
        group = _Group()

    begun = store.manifest.partial
    with ThreadPoolExecutor(workers, "index", initializer=_one_thread) as pool:
        here = 0  # clips of the video
        try:
            for name, event in _events(pool, todo, base, settings, embedder, workers, begun):
                found = todo[name]
                if isinstance(event, Span):
                    here = here or (begun.clips if begun and begun.name == name else 0)
                    group.add(name, event, found)
                    here, clips = here + len(event.where), clips + len(event.where)
                    flush()
                    tell(name, event.share)
                    if group.clips >= _COMMIT and event.share < 1:
                        commit(Partial(name, here, found.size, found.mtime))
                    continue
                if event:
                    group.unreadable[name], failed[name] = Problem(found.size, found.mtime, event), event
                    group.dropped.append((group.first, group.clips))
                    here = here or (begun.clips if begun and begun.name == name else 0)
                    committed = here - (group.clips - group.first)
                    if committed:
                        group.dead.append((store.manifest.rows - committed, store.manifest.rows))
                    clips -= min(clips, here)
                here, group.first, done, read = 0, group.clips, done + 1, read + found.size
                tell(name)
                if group.clips >= _COMMIT:
                    commit()
            commit()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return clips, failed


def _events(
    pool: ThreadPoolExecutor,
    todo: Mapping[str, scan.Found],
    base: str,
    settings: Settings,
    embedder: Embedder,
    workers: int,
    begun: Partial | None,
) -> Iterator[tuple[str, Span | str]]:
    """What becomes of each video, in order, by name: spans, and at last why none of its clips count, "" where they do. Threads
    are ahead."""
    config = embedder.config
    height, width = config.size
    most = _SPAN // (config.num_frames * height * width * 3)
    clips = (settings.seconds, settings.stride, config.num_frames)
    size = max(_SPANS[0], min(_SPANS[1], most))
    paths = {name: scan.path_of(name, base) for name in todo}
    spans = (_by_shot if settings.shots else _in_parallel)(pool, paths, clips, embedder.crop, size, workers, begun)
    for name, found in spans:
        if not isinstance(found, Exception):
            yield name, found
            if found.share < 1:
                continue
            try:
                if scan.stamp(os.stat(paths[name])) == todo[name][:2]:
                    yield name, ""
                    continue
                raise VideoError("it changed while it was read; index again")
            except (VideoError, OSError) as error:
                found = error
        yield name, _why(found, paths[name])


def _in_parallel(pool, paths, clips, crop, size, workers, begun):
    """(name, a Span or why there are no more), each of them a thread's work."""

    def jobs():
        """(name, its windows or why there are none, the first clip, a decoded span)."""
        for name, planned in _ahead(
            ((name, pool.submit(windows.windows, path, *clips)) for name, path in paths.items()), 2 * workers
        ):
            try:
                some = planned.result()
            except (VideoError, OSError) as error:
                yield name, error, 0, None
                continue
            first = begun.clips if begun and begun.name == name else 0
            for at in range(first, len(some), size):
                yield name, some, at, pool.submit(windows.decode, paths[name], some.times[at : at + size], crop)

    broken = None
    for name, some, at, future in _ahead(jobs(), workers + 1):
        if future is None:
            yield name, some
        elif name == broken:
            future.cancel()
        else:
            try:
                frames, where = future.result()
                end = at + len(where)
                yield name, Span(frames, where, some.start[at:end], some.stop[at:end], end / len(some))
            except (VideoError, OSError) as error:
                broken = name
                yield name, error


def _by_shot(pool, paths, clips, crop, size, workers, begun):
    """(name, a Span or why there are no more), of which those of one video are made one after another."""
    seconds, stride, frames = clips

    def opened():
        for name, path in paths.items():
            skip = begun.clips if begun and begun.name == name else 0
            spans = by_shot.spans(path, seconds, stride, frames, crop, size, skip)
            yield name, spans, pool.submit(next, spans)

    for name, spans, future in _ahead(opened(), workers + 1):
        share = 0.0
        while share < 1:
            try:
                span = future.result()
            except (VideoError, OSError) as error:
                yield name, error
                break
            if (share := span.share) < 1:
                future = pool.submit(next, spans)
            yield name, span


def _ahead(things: Iterable[Any], count: int) -> Iterator[Any]:
    """The things, of which so many are made before they are asked for."""
    waiting: deque[Any] = deque()
    for thing in things:
        waiting.append(thing)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _why(error: Exception, path: str) -> str:
    """In a line, without the path, which is beside it."""
    text = str(error).removeprefix(f"{path}: ").partition(": 'file:")[0].strip()
    return (text or type(error).__name__).splitlines()[0]


def _one_thread() -> None:
    """Threads that each have their own work would spin at one another's cost."""
    torch.set_num_threads(1)
