"""Beyond some ten million clips: a graph of neighbours (usearch's HNSW) that leads to the likely best ones without reading all.

The file graph-0000.usearch beside vectors-0000.f16 has the first rows of it, with their numbers; rows that were added later are
read as ever, and rows that no longer count are left out of what it finds. It is no part of the index: without it every search
is exact, and where the vectors are copied to a new file it is left behind.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaat_fast._files import write_atomically
from evaat_fast.search.moments import LONGEST, Event, events
from evaat_fast.search.store import BadIndex, Places, graph_of
from evaat_fast.search.vectors import Vectors

_ADDED = 1 << 14  # rows at once
_SAVED = 1 << 20  # rows after which an unfinished graph is written, or as many as it has on the disk
_LEAST, _EACH = 256, 32  # clips that are asked for, at least and for each moment, which may be of 30 s
_TRIED = (1, 4)  # times as many, before all are read
_BREADTH = 8  # of the search in the graph, for each of them; with 2 one query in thirty found nothing of what it should
_LINKS = 256  # bytes of a row in memory beside its numbers, while the graph is made

__all__ = ["Graph", "build", "stamp"]


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise ImportError(f"approximate search needs usearch ({error}): pip install 'evaat-fast[usearch]'") from None
    return usearch.index.Index


class Graph:
    """A graph of the first rows of vectors, mapped.

    Args:
        path: of the vectors. vectors, places: of all rows.

    Raises:
        BadIndex: there is no graph, or it is damaged. ImportError: usearch is missing.
    """

    def __init__(self, path: str | os.PathLike[str], vectors: Vectors, places: Places):
        self._graph = _opened(graph_of(path), vectors, view=True)
        self._vectors, self._places, self.rows = vectors, places, len(self._graph)
        self._lock = threading.Lock()
        self._mean = vectors.mean()

    def events(
        self, query: Tensor, some: np.ndarray, but: Sequence[slice], k: int, merge: bool = True
    ) -> tuple[list[Event], np.ndarray] | None:
        """The k best events, as far as the graph leads to them, with the scores of their best clips, float32 [n].

        Args:
            query: float32 [width]. some: bool [files], that may be found. but: rows that may not.

        Returns:
            None where it led to fewer than k: then all are to be read.
        """
        count = max(_LEAST, _EACH * k)
        for more in _TRIED:
            found = self._events(query, some, but, k, merge, more * count)
            if found is not None:
                break
        return found

    def _events(self, query, some, but, k, merge, count):
        places = self._places
        near, horizon = self._rows(query, count)
        near = near[np.append(some, False)[places.codes[near]]]  # of rows that do not count the code is -1
        rows = _with_neighbours(near, places) if merge else near
        if not len(rows):
            return None
        allowed = np.ones(len(rows), bool)
        for one in but:
            allowed &= (rows < one.start) | (rows >= one.stop)
        scores = self._vectors.some(rows, query)
        found = events(scores, _part(places, rows), k, allowed, merge, float(self._mean @ query))
        if len(found) < k or scores[found[-1].best] < horizon:
            return None
        return [Event(*(int(rows[i]) for i in event)) for event in found], scores[[event.best for event in found]]

    def _rows(self, query, count):
        """(int64 [n], in order: those that the graph leads to, and the best of those behind it; the score below which there are
        others)."""
        with self._lock:  # its breadth is a setting of the graph
            self._graph.expansion_search = _BREADTH * count
            found = self._graph.search(query.numpy().astype(np.float16), count, threads=1).keys.astype(np.int64)
        behind = self._vectors.scores(query, self.rows)
        best = np.argpartition(-behind, count)[:count] if len(behind) > count else np.arange(len(behind))
        least = [self._vectors.some(found, query).min()] if len(found) < self.rows else []
        least += [behind[best].min()] if len(behind) > count else []
        return np.union1d(found, best + self.rows), max(least, default=-np.inf)


def _with_neighbours(rows: np.ndarray, places: Places) -> np.ndarray:
    """int64 [n]: rows, and those that may be of the same events."""
    found = []
    for row in rows.tolist():
        file = places.files[places.codes[row]]
        start, stop = places.start[file.first : file.last], places.stop[file.first : file.last]
        first = np.searchsorted(start, places.stop[row] - LONGEST)
        last = np.searchsorted(stop, places.start[row] + LONGEST, "right")
        found.append(np.arange(file.first + min(first, row - file.first), max(file.first + last, row + 1)))
    return np.unique(np.concatenate(found)) if found else rows


def _part(places: Places, rows: np.ndarray) -> Places:
    """The places of some rows, in order, as if they were all."""
    numbers, codes = np.unique(places.codes[rows], return_inverse=True)
    bounds = np.searchsorted(codes, np.arange(len(numbers) + 1)).tolist()
    files = [
        places.files[number]._replace(first=first, last=last)
        for number, (first, last) in zip(numbers.tolist(), itertools.pairwise(bounds), strict=True)
    ]
    return Places(tuple(files), codes.astype(np.int32), places.start[rows], places.stop[rows])


def stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """By which the graph of a file of vectors is known again; None where there is none."""
    try:
        found = graph_of(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _opened(path: Path, vectors: Vectors, view: bool) -> Any:
    again = "evaat-fast index VIDEOS --approximate makes one"
    make = _usearch()
    if not path.is_file():
        raise BadIndex(f"there is no graph {str(path)!r} for approximate search: {again}")
    try:
        graph = make.restore(path, view=view, enable_key_lookups=False)
    except (ValueError, RuntimeError) as error:
        raise BadIndex(f"{path} is damaged ({error}): remove it, and {again}") from None
    if graph is None or graph.ndim != vectors.width or not 0 < len(graph) <= vectors.rows:
        raise BadIndex(f"{path} is not of the vectors beside it: remove it, and {again}")
    return graph


def build(
    path: str | os.PathLike[str], vectors: Vectors, threads: int, progress: Callable[[int, int], object] | None = None
) -> int:
    """Brings the graph of a file of vectors up to date; a killed one goes on where it was last written.

    Args:
        path: of the vectors. vectors: those that count. threads: to compute with. progress: called as progress(rows, of).

    Returns:
        How many rows were added.

    Raises:
        ImportError: usearch is missing. OSError: the file cannot be written. RuntimeError: there is too little memory for it.
    """
    target, make = graph_of(path), _usearch()
    need, free = vectors.rows * (2 * vectors.width + _LINKS), _free()
    if free is not None and need > free:
        raise RuntimeError(
            f"approximate: a graph of {vectors.rows:,} clips takes {need / 1e9:.1f} GB of memory while it is made, and "
            f"{free / 1e9:.1f} GB are free; the clips are indexed, and searched exactly without it"
        )
    try:
        graph = _opened(target, vectors, view=False)
    except BadIndex:
        graph = make(ndim=vectors.width, metric="ip", dtype="f16", enable_key_lookups=False)
    begun = saved = len(graph)
    for first in range(begun, vectors.rows, _ADDED):
        last = min(first + _ADDED, vectors.rows)
        graph.add(np.arange(first, last), vectors.rows_of(first, last), threads=threads)
        if last == vectors.rows or last - saved >= max(_SAVED, saved):
            _save(graph, target)
            saved = last
        if progress is not None:
            progress(last, vectors.rows)
    return vectors.rows - begun


def _free() -> int | None:
    """Bytes of memory that may still be taken, here and in the container around; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        found.append(1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        taken, files = int((group / "memory.current").read_text()), (group / "memory.stat").read_text()
        given_back = sum(int(files.partition(f"\n{name} ")[2].split()[0]) for name in ("inactive_file", "active_file"))
        found.append(int((group / "memory.max").read_text()) - taken + given_back)  # "max" where there is no limit
    return min(found, default=None)


def _save(graph, target):
    # usearch writes by name; of what is written atomically the name is known.
    write_atomically(target, lambda file: graph.save(file.name))
