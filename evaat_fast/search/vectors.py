"""All vectors of an index against one query: half precision on the disk, single precision in the product."""

import functools
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from evaat_fast.search.store import BadIndex

_TILE = 8192  # rows: 8 MB of 256 float32 numbers; of 512 to 16,384 the fastest on two cores
_SAMPLE = 4096  # rows
_KEPT = (
    1 << 25
)  # bytes that stay mapped behind the product: what was read stays in the system's cache, and is no memory of ours

__all__ = ["Vectors"]


class Vectors:
    """float16 [rows, width] of a file, mapped.

    Args:
        path: of vectors of length 1. rows, width: how many there are, of how many numbers; the file may go on behind them.

    Raises:
        BadIndex: the file is not there, or shorter.
    """

    def __init__(self, path: str | os.PathLike[str], rows: int, width: int):
        self.rows, self.width = rows, width
        self._mapped: mmap.mmap | None = None
        if not rows:
            return
        try:
            with open(path, "rb") as file:
                # A private copy, of which nothing is written: torch warns of memory that it may not write to.
                self._mapped = mmap.mmap(file.fileno(), 2 * rows * width, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):
            raise BadIndex(f"{path} lacks vectors; remove the folder and index again") from None
        self._all = torch.frombuffer(self._mapped, dtype=torch.float16).view(rows, width)

    def __len__(self) -> int:
        return self.rows

    def row(self, number: int) -> Tensor:
        """float32 [width]."""
        return self._all[number].float()

    def rows_of(self, first: int, last: int) -> np.ndarray:
        """float16 [last - first, width]: a copy of rows [first, last)."""
        return self._all[first:last].numpy().copy()

    def some(self, rows: np.ndarray, query: Tensor) -> np.ndarray:
        """float32 [n]: the products of a few rows, int64 [n], with a query, float32 [width]."""
        return (self._all[torch.from_numpy(rows)].float() @ query).numpy() if len(rows) else np.zeros(0, np.float32)

    def mean(self) -> Tensor:
        """float32 [width], of a few thousand rows."""
        return self._all[:: max(1, self.rows // _SAMPLE)].float().mean(0)

    def scores(self, query: Tensor, first: int = 0) -> np.ndarray:
        """float32 [rows - first]: the products of all vectors, or those from a row on, with one query, float32 [width]. May run
        in several threads at once."""
        rows = self.rows - first
        # numpy's, which is not aligned, see below. The part before `first` is never touched, and so takes no memory.
        found = torch.from_numpy(np.empty(self.rows, np.float32))
        count = max(1, min(torch.get_num_threads(), rows // (4 * _TILE)))
        bounds = [first + part * rows // count // _TILE * _TILE for part in range(count)] + [self.rows]
        if not rows:
            pass
        elif count == 1:
            self._part(query, found, first, self.rows, torch.empty)
        else:  # threads of their own: torch's wait for each other after each tile
            pool = _pool(torch.get_num_threads())
            for done in [pool.submit(self._part, query, found, *pair) for pair in itertools.pairwise(bounds)]:
                done.result()
        return found[first:].numpy()

    def _part(self, query: Tensor, found: Tensor, begin: int, end: int, empty: Callable[[int], Tensor] | None = None) -> None:
        wide = (empty or _scratch)(min(_TILE, end - begin) * self.width).view(-1, self.width)
        dropped = -(-2 * begin * self.width // mmap.PAGESIZE) * mmap.PAGESIZE
        for first in range(begin, end, _TILE):
            some = self._all[first : min(first + _TILE, end)]
            torch.mv(wide[: len(some)].copy_(some), query, out=found[first : first + len(some)])
            behind = 2 * (first + len(some)) * self.width // mmap.PAGESIZE * mmap.PAGESIZE
            if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED") and behind - dropped >= _KEPT:
                self._mapped.madvise(mmap.MADV_DONTNEED, dropped, behind - dropped)
                dropped = behind


_own = threading.local()


def _scratch(size: int) -> Tensor:
    """float32 [size], a thread's own from search to search: where it is made each time, glibc uses little of what was aligned
    and freed again, and memory grows by 200 MB in ten searches among a million clips."""
    if getattr(_own, "wide", None) is None or len(_own.wide) < size:
        _own.wide = torch.empty(size)
    return _own.wide[:size]


_making = threading.Lock()


def _pool(count: int) -> ThreadPoolExecutor:
    with _making:
        return _made(count, os.getpid())  # in a process that was forked off they do not run


@functools.lru_cache(maxsize=4)
def _made(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of one thread of torch each. That is also what threads that begin later would have of torch, so all begin here,
    and what this one has is said again."""
    before, begun = torch.get_num_threads(), threading.Barrier(count)
    pool = ThreadPoolExecutor(count, "scores", initializer=torch.set_num_threads, initargs=(1,))
    for done in [pool.submit(begun.wait) for _ in range(count)]:
        done.result()
    torch.set_num_threads(before)
    return pool
