"""An index of videos: open it, search it, add to it."""

import copy
import datetime
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaat_fast.search import graph, scan, windows
from evaat_fast.search.build import Progress, Report, build, plan_of, threads
from evaat_fast.search.embedder import Embedder, Settings, check_same, check_settings, weights_of
from evaat_fast.search.moments import Event, Moments, events
from evaat_fast.search.query import Like, Term, parse_like, parse_query, spoken
from evaat_fast.search.store import MANIFEST, BadIndex, File, Places, Store, alone
from evaat_fast.search.vectors import Vectors

FOLDER = ".evaat-index"  # of an index, in the folder of its videos

__all__ = ["FOLDER", "Index", "find"]


def find(folder: str | os.PathLike[str] = ".") -> Path:
    """The index of a folder, of the nearest one above it that has one, or of the only one directly below it that does.

    Raises:
        BadIndex: there is none, or several below.
    """
    start = Path(folder).absolute()
    for place in (start, *start.parents):
        if (place / FOLDER / MANIFEST).is_file():
            return place / FOLDER
    below = sorted(path.parent for path in start.glob(f"*/{FOLDER}/{MANIFEST}"))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(repr(path.parent.name) for path in below[:3]) + (", ..." if len(below) > 3 else "")
        raise BadIndex(f"there are {len(below)} indexes below {str(start)!r}, of {names}: --index names one")
    raise BadIndex(
        f"there is no index in {str(start)!r}, above it or directly below: evaat-fast index VIDEOS makes one, --index names "
        "another"
    )


class Index:
    """Clips of videos as vectors, and where each of them is; `Index.open` or `Index.create` makes one.

    folder: where it lies. settings: what its vectors are of. places: of all rows. `len(index)` is how many clips count.
    Names of videos are paths from the folder in which the index lies, of others absolute ones, so that videos and index can be
    moved together. One object may serve several threads: a search sees what was there when it began.
    """

    def __init__(self, store: Store, device: str = "auto"):
        self.folder, self._device = store.folder, device
        self.base = os.path.realpath(self.folder.parent)
        self._loaded: list[Embedder] = []  # none or one, which copies share
        self._graphs: list[Any] = []  # none, or of which file, and that
        self._lock = threading.RLock()
        self.settings: Settings
        self.vectors: Vectors
        self.places: Places
        self._take(store)

    def _take(self, store: Store) -> None:
        manifest, settings, places = store.manifest, Settings.of(store.manifest.settings), store.places()
        vectors = Vectors(self.folder / manifest.vectors, manifest.rows, manifest.width)
        store.check_vectors()
        with self._lock:
            if getattr(self, "settings", settings) != settings:
                self._loaded = []  # another list: a search that has begun goes on with the former model
            self._store, self.settings, self.vectors, self.places = store, settings, vectors, places

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, device: str = "auto") -> "Index":
        """Opens an index; its model is loaded when a text is searched.

        Args:
            folder: of the index, or of videos that have one in their folder. device: where the model computes: "auto", "cpu",
                "cuda".

        Raises:
            BadIndex (a ValueError): there is none, or it is damaged; the message says what to do.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file() and (folder / FOLDER / MANIFEST).is_file():
            folder = folder / FOLDER
        for attempt in range(3):  # a writer may remove files between two of our steps
            try:
                return cls(Store(folder), device)
            except BadIndex:
                if attempt == 2:
                    raise
        raise AssertionError

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        *,
        seconds: float = 2.0,
        overlap: float = 0.5,
        frames: int | None = None,
        shots: bool = False,
        device: str = "auto",
        overwrite: bool = False,
    ) -> "Index":
        """An empty index.

        Args:
            folder: to be made. checkpoint: what `evaat_fast.load` takes: a file, a run's folder, "eva02_clip_b16".
            seconds: of a clip, 0.5 to 60. overlap: the share of a clip that the next one has, too, 0 to 0.9.
            frames: of a clip; None: as many as the weights were trained with, 4 for those of pictures.
            shots: no clip reaches beyond a hard cut; all frames are decoded to find them, see `evaat_fast.search.shots`.
            device: as for `open`. overwrite: in the place of one that is there, whatever that is of.

        Raises:
            BadIndex: there is one already, or another process is writing it. ValueError: a setting out of range.
            FileNotFoundError, RuntimeError: no weights.
        """
        if (Path(folder) / MANIFEST).exists() and not overwrite:
            raise BadIndex(f"there is an index in {str(folder)!r} already; Index.open opens it")
        name, hashed = weights_of(checkpoint)
        Settings(name, hashed, {}, seconds, overlap, shots)  # out of range is said before a model is loaded
        embedder = Embedder(name, device, **({} if frames is None else {"num_frames": frames}))
        settings = Settings(name, hashed, embedder.described(), seconds, overlap, shots)
        with alone(folder):
            if not overwrite and (Path(folder) / "index.json").exists():  # of another process, while the model was loaded
                raise BadIndex(f"there is an index in {str(folder)!r} already; Index.open opens it")
            index = cls(Store.create(folder, asdict(settings), embedder.config.embed_dim), device)
        index._loaded.append(embedder)
        return index

    def __len__(self) -> int:
        return sum(file.last - file.first for file in self.places.files)

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}: {len(self):,} clips of {len(self.places.files):,} videos)"

    @property
    def files(self) -> tuple[File, ...]:
        """The videos in it."""
        return self.places.files

    @property
    def unreadable(self) -> dict[str, str]:
        """{video: why} of those that are not in it."""
        return {name: problem.why for name, problem in self._store.manifest.unreadable.items()}

    @property
    def embedder(self) -> Embedder:
        """Its model, loaded when it is first needed.

        Raises:
            BadIndex: the weights are not there, or others now.
        """
        with self._lock:
            if not self._loaded:
                self._loaded.append(Embedder.of(self.settings, self._device))
            return self._loaded[0]

    def path(self, name: str) -> str:
        """The absolute path of a video."""
        return scan.path_of(name, self.base)

    def real_path(self, name: str) -> str:
        """The absolute path of a video by which no link leads: that to which links led when it was indexed."""
        links, head, rest = self._store.manifest.links, name, ""
        while links and head:
            if head in links:
                return self.path(links[head] + rest)
            head, slash, last = head.rpartition("/")
            rest = f"{slash}{last}{rest}"
        return self.path(name)

    def check(self, checkpoint: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        """Raises BadIndex unless the index is of these weights and settings (seconds, overlap, frames, shots); of what is None,
        nothing is asked."""
        if checkpoint is not None:
            check_same(self.settings, os.fspath(checkpoint), weights_of(checkpoint)[1])
        check_settings(self.settings, settings)

    # Searching.

    def search(
        self,
        query: str | None = None,
        *,
        like: str | Like | Sequence[str | Like] = (),
        k: int = 10,
        folder: str | os.PathLike[str] | None = None,
        after: str | datetime.date | None = None,
        before: str | datetime.date | None = None,
        merge: bool = True,
        approximate: bool = False,
    ) -> Moments:
        """The best moments.

        Args:
            query: text; " + " adds another, " - " takes one away: "push left + a red block - a hand". Each counts alike.
            like: moments as "FILE@12.5", "FILE@01:02" or `Like`, which add to the query; in the index or not. They are not
                found themselves.
            k: how many, at most.
            folder: only videos below it; its path from here, or from the index's videos. after, before: only files of this date
                or later, of earlier ones than that: a date, or text in ISO 8601.
            merge: False: single clips, not events.
            approximate: True: by the graph of `build_graph`, for more than some ten million clips; scores are exact, and what
                is missed is measured in bench/README.md. Where filters leave too little of what it finds, all are read.

        Returns:
            Moments: columns score (cosine with the query), file, start, stop, peak (seconds) and date, best first.

        Raises:
            ValueError: neither query nor like, or one of them, a folder or a date that makes no sense. BadIndex: the weights
                are not there, or others now; approximate without a graph. VideoError: a `like` that cannot be read.
                ImportError: approximate without usearch.
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k: expected an int from 1, got {k!r}")
        terms = [] if query is None else parse_query(query)
        given = [like] if isinstance(like, (str, Like)) else list(like)
        likes = [parse_like(x) if isinstance(x, str) else x for x in given]
        if not terms and not likes:
            raise ValueError("query: expected text, or like=..., got neither")
        with self._lock:
            now = copy.copy(self)  # which nobody reloads
        some = now._filtered(folder, after, before)
        vector = now.vector(terms, likes)
        but = [rows for one in likes if (rows := now._rows(one)) is not None]
        return now.moments(*now.best(vector, k, some, but, merge=merge, approximate=approximate), spoken(terms, likes))

    def best(
        self,
        vector: Tensor,
        k: int,
        some: np.ndarray | None = None,
        but: Sequence[slice] = (),
        *,
        merge: bool = True,
        approximate: bool = False,
    ) -> tuple[list[Event], np.ndarray]:
        """The k best events for a vector, float32 [E] of length 1, and the scores of their best clips, float32 [n].

        Args:
            some: bool [files], those that may be found; None: all. but: rows that may not. merge, approximate: as for `search`.
        """
        some = np.ones(len(self.places.files), bool) if some is None else some
        if approximate and (led := self.graph().events(vector, some, but, k, merge)) is not None:
            return led
        allowed = self._allowed(some)
        for rows in but:
            allowed[rows] = False
        scores = self.vectors.scores(vector)
        found = events(scores, self.places, k, allowed, merge)
        return found, scores[[event.best for event in found]]

    def moments(self, found: Sequence[Event], scores: np.ndarray, query: str) -> Moments:
        """A table of `events`. scores: float32 [n], of the best clip of each."""
        places = self.places
        files = [places.files[places.codes[event.best]] for event in found]
        best = [event.best for event in found]
        return Moments(
            query,
            scores,
            [self.path(file.name) for file in files],
            places.start[[event.first for event in found]],
            places.stop[[event.last for event in found]],
            (places.start[best] + places.stop[best]) / 2,
            [datetime.datetime.fromtimestamp(file.mtime / 1e9) for file in files],
        )

    def vector(self, terms: Sequence[Term], likes: Sequence[Like] = ()) -> Tensor:
        """float32 [E] of length 1: the sum of what the texts and moments are, each of length 1."""
        total = torch.zeros(self.vectors.width)
        if terms:
            signs = torch.tensor([float(term.sign) for term in terms])
            total += signs @ self.embedder.texts([term.text for term in terms])
        for one in likes:
            total += F.normalize(self._alike(one), dim=0)
        if total.norm() < 1e-3:
            raise ValueError(f"query: {spoken(terms, likes)!r} adds up to nothing")
        return F.normalize(total, dim=0)

    def _alike(self, like: Like) -> Tensor:
        rows = self._rows(like)
        if rows is not None:
            middle = (self.places.start[rows] + self.places.stop[rows]) / 2
            return self.vectors.row(rows.start + int(np.abs(middle - like.time).argmin()))
        path = self._located(like.file)
        if not os.path.isfile(path):
            raise ValueError(f"like: there is no file {like.file!r}")
        embedder = self.embedder
        some = windows.around(path, like.time, self.settings.seconds, embedder.config.num_frames)
        frames, where = windows.decode(path, some.times, embedder.crop)
        return torch.from_numpy(embedder.clips(torch.from_numpy(frames[where]))[0]).float()

    def _located(self, name: str | os.PathLike[str]) -> str:
        """From the current folder, else from that of the videos."""
        there = scan.real(name)
        return there if os.path.exists(there) else self.path(os.fspath(name))

    def _rows(self, like: Like) -> slice | None:
        """Those of clips that contain a moment; None where the video is not in the index, or has changed."""
        path = self._located(like.file)
        name = scan.name_of(path, self.base)
        file = next((file for file in self.places.files if file.name == name), None)
        if file is None:
            return None
        rows = slice(file.first, file.last)
        inside = np.flatnonzero((self.places.start[rows] <= like.time) & (self.places.stop[rows] >= like.time))
        if not len(inside):
            end = self.places.stop[file.last - 1]
            raise ValueError(f"like: expected a time from 0 to {end:.2f} s in {like.file!r}, got {like.time:g}")
        return slice(file.first + int(inside[0]), file.first + int(inside[-1]) + 1)

    def allowed(
        self,
        folder: str | os.PathLike[str] | None = None,
        after: str | datetime.date | None = None,
        before: str | datetime.date | None = None,
    ) -> np.ndarray:
        """bool [rows]: of which videos `search` takes notice, with the same arguments."""
        return self._allowed(self._filtered(folder, after, before))

    def _allowed(self, some):
        return (self.places.codes >= 0) & np.append(some, False)[self.places.codes]

    def _filtered(self, folder, after, before):
        """bool [files]"""
        files = self.places.files
        some = np.ones(len(files), bool)
        if folder is not None:
            below = _below([scan.name_of(self._located(folder), self.base)])
            some &= np.array([below(file.name) for file in files], bool)
            if files and not some.any():
                raise ValueError(f"folder: expected one with videos of the index below it, got {os.fspath(folder)!r}")
        times = np.array([file.mtime for file in files], np.int64)
        if after is not None:
            some &= times >= _nanoseconds("after", after)
        if before is not None:
            some &= times < _nanoseconds("before", before)
        return some

    # Adding.

    def add(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        retry: bool = False,
        workers: int | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> Report:
        """Indexes what is new or changed below folders, by size and time of files, and forgets what is gone from them.

        It may be killed at any moment: the index then has what was committed, and the same call goes on.

        Args:
            paths: folders, or files. retry: also try again what could not be read before. workers: threads; None: one a
                processor. progress: called with a Progress after each video, and within long ones.

        Returns:
            A Report; `report.unreadable` says what was left out, and why.

        Raises:
            FileNotFoundError: a path that is not there. BadIndex: another process is indexing, or the weights are not there,
                or others now. ValueError: fewer than one worker, or vectors that are not finite.
        """
        began = datetime.datetime.now()
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        workers = threads(workers)
        with alone(self.folder):
            store = Store(self.folder)
            store.tidy()
            manifest = store.manifest
            places = self.places if manifest == self._store.manifest else store.places()
            links: dict[str, str] = {}
            found = scan.scan(given, self.base, links)
            roots = [scan.name_of(scan.real(path), self.base) for path in given]
            below = _below(roots)
            there = {file.name: (file.size, file.mtime) for file in places.files}
            if partial := manifest.partial:
                there.pop(partial.name, None)
            plan = plan_of(found, there, manifest.unreadable, below, retry)
            old = {*plan.gone, *plan.stale}
            if partial and (partial.name not in plan.todo or plan.todo[partial.name][:2] != (partial.size, partial.mtime)):
                old, partial = {*old, partial.name}, None
            dead = [(file.first, file.last) for file in places.files if file.name in old]
            kept = {name: why for name, why in manifest.unreadable.items() if name not in old and name not in plan.todo}
            folders = {name for name, path in zip(roots, given, strict=True) if os.path.isdir(path)}
            store.change(
                dead=tuple(sorted({*manifest.dead, *dead})),
                roots=tuple(sorted({*manifest.roots, *folders})),
                unreadable={**kept, **plan.known},
                partial=partial,
                links={**{name: leads for name, leads in manifest.links.items() if not below(name)}, **links},
            )
            clips, failed = 0, {}  # type: int, dict[str, str]
            if plan.todo:
                todo = plan.todo  # what was begun goes on before anything else is appended
                todo = {partial.name: todo[partial.name], **todo} if partial else todo
                clips, failed = build(store, self.embedder, self.settings, todo, self.base, workers, progress)
            store.finish()
        if store.manifest != self._store.manifest:
            self._take(store)
        refused = {**plan.refused, **{name: problem.why for name, problem in plan.known.items()}, **failed}
        changed = sum(name in plan.todo and name not in failed for name in plan.stale)
        gone = sum(name in there for name in plan.gone)
        took = (datetime.datetime.now() - began).total_seconds()
        return Report(len(plan.todo) - len(failed), clips, plan.unchanged, gone, changed, dict(sorted(refused.items())), took)

    def build_graph(self, workers: int | None = None, progress: Callable[[int, int], object] | None = None) -> int:
        """Makes the graph for approximate search, or brings it up to date with what was added; one that was killed goes on.

        Args:
            workers: threads; None: one a processor. progress: called as progress(clips, of).

        Returns:
            How many clips were added to it.

        Raises:
            ImportError: usearch is missing: pip install 'evaat-fast[usearch]'. BadIndex: another process is indexing.
            RuntimeError: there is too little memory for it.
        """
        workers = threads(workers)
        with alone(self.folder):
            self.reload()
            return graph.build(self.folder / self._store.manifest.vectors, self.vectors, workers, progress)

    def graph(self) -> graph.Graph:
        """That of `build_graph`, mapped when it is first asked for.

        Raises:
            BadIndex: there is none, or it is damaged. ImportError: usearch is missing.
        """
        path, vectors = self.folder / self._store.manifest.vectors, self.vectors
        known = graph.stamp(path), vectors
        with self._lock:
            if not self._graphs or self._graphs[0] != known:
                self._graphs[:] = [known, graph.Graph(path, vectors, self.places)]
            return self._graphs[1]

    def update(self, **options: Any) -> Report:
        """`add` of all folders that were added before."""
        return self.add([self.path(name) for name in self._store.manifest.roots], **options)

    def reload(self) -> None:
        """Takes up what another process has committed since."""
        for attempt in range(3):  # it may remove files between two of our steps
            store = Store(self.folder)
            if store.manifest == self._store.manifest:
                return
            try:
                return self._take(store)
            except BadIndex:
                if attempt == 2:
                    raise


def _below(roots: Iterable[str]) -> Callable[[str], bool]:
    """Whether a name is one of these or lies below one."""
    exact = set(roots)
    starts = tuple(name.rstrip("/") + "/" for name in exact if name != ".")
    everything = "." in exact

    def below(name: str) -> bool:
        return name in exact or name.startswith(starts) or (everything and not os.path.isabs(name))

    return below


def _nanoseconds(what: str, value: str | datetime.date) -> int:
    """Of a date, its first; without a zone, local."""
    try:
        date = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(date, datetime.datetime):
            date = datetime.datetime(date.year, date.month, date.day)
        return round(date.timestamp() * 1e9)
    except (ValueError, AttributeError, OverflowError):
        raise ValueError(f"{what}: expected a date as 2026-05-31, got {value!r}") from None
