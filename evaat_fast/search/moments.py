"""From scores of clips to moments: hits of one event become one, and what is found is a small table."""

import datetime
import html
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from evaat_fast.search.store import Places

_KEEP = 0.75  # of the height of a hit above the mean score, which neighbours that belong to it have
_SORTED = 256  # events, from which sorting all scores costs less than looking for the highest each time
LONGEST = 30.0  # seconds: of an event, so that a picture that stands still is no moment of an hour

__all__ = ["LONGEST", "Event", "Moment", "Moments", "clock", "events", "printable"]


class Event(NamedTuple):
    """Rows first to last (inclusive) of one video, of which `best` has the highest score."""

    first: int
    last: int
    best: int


def events(
    scores: np.ndarray,
    places: Places,
    k: int,
    allowed: np.ndarray | None = None,
    merge: bool = True,
    mean: float | None = None,
) -> list[Event]:
    """The k best events, best first.

    The best clip takes its neighbours along that overlap or touch it and score at least three quarters as far above the mean of
    all as it does, up to 30 s; clips that overlap with what came of it are no events of their own.

    Args:
        scores: float32 [rows]. places: of the rows. allowed: bool [rows], of rows that may be found; None: all that count.
        merge: False: clips as they are. mean: of all scores, where these are some of them.
    """
    finite = np.isfinite(scores)  # of a damaged vector it is not
    free = finite & (places.codes >= 0) if allowed is None else allowed & finite & (places.codes >= 0)
    left = np.where(free, scores, np.float32(-np.inf))
    if not free.any():
        return []
    mean = float(scores[finite].mean()) if mean is None else mean
    found: list[Event] = []
    start, stop = places.start, places.stop
    for best in _best_first(left, k):
        first = last = best
        if merge:
            file = places.files[places.codes[best]]
            least = scores[best] - (1 - _KEEP) * max(0.0, float(scores[best]) - mean)

            def near(row, first=first, last=last, least=least):
                return left[row] >= least

            while (
                first > file.first
                and near(first - 1)
                and stop[first - 1] >= start[first]
                and _fits(start, stop, first - 1, last)
            ):
                first -= 1
            while (
                last < file.last - 1
                and near(last + 1)
                and start[last + 1] <= stop[last]
                and _fits(start, stop, first, last + 1)
            ):
                last += 1
            rows = slice(file.first, file.last)
            left[rows][(start[rows] < stop[last]) & (stop[rows] > start[first])] = -np.inf
        left[first : last + 1] = -np.inf
        found.append(Event(first, last, best))
        if len(found) == k:
            break
    return found


def _best_first(left: np.ndarray, k: int) -> Iterator[int]:
    """Rows from the highest on, without those that became -inf meanwhile."""
    if k > _SORTED:  # looking through all for each would take hours for a million
        yield from (row for row in np.argsort(-left, kind="stable").tolist() if left[row] > -np.inf)
        return
    while left[best := int(left.argmax())] > -np.inf:
        yield best


def _fits(start, stop, first, last):
    return stop[last] - start[first] <= LONGEST


class Moment(NamedTuple):
    """A row of `Moments`. score: cosine of its best clip. file: path. start, stop: seconds. peak: seconds, the middle of the
    best clip. date: of the file."""

    score: float
    file: str
    start: float
    stop: float
    peak: float
    date: datetime.datetime


@dataclass(frozen=True, repr=False)
class Moments:
    """What a search found, best first: columns of the same length, rows by number and in a loop, a table in `print`.

    query: what was asked. score: float32 [n], cosines of the best clips with the query. file: paths, absolute. start, stop,
    peak: float64 [n], seconds in the file; `peak` is the middle of the best clip. date: the files' dates, local time.
    """

    query: str
    score: np.ndarray
    file: list[str]
    start: np.ndarray
    stop: np.ndarray
    peak: np.ndarray
    date: list[datetime.datetime] = field(repr=False)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, row: int) -> Moment:
        start, stop, peak = (float(x[row]) for x in (self.start, self.stop, self.peak))
        return Moment(float(self.score[row]), self.file[row], start, stop, peak, self.date[row])

    def __iter__(self) -> Iterator[Moment]:
        return (self[row] for row in range(len(self)))

    def __str__(self) -> str:
        if not len(self):
            return "nothing found"
        times = [f"{clock(a)} - {clock(b)}" for a, b in zip(self.start, self.stop, strict=True)]
        width = max(map(len, times))
        rows = [
            f"{score:6.3f}  {time:>{width}}  {printable(_near(file))}"
            for score, time, file in zip(self.score, times, self.file, strict=True)
        ]
        return "\n".join([f" score  {'time':>{width}}  file", *rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks."""
        cells = ((f"{m.score:.3f}", f"{clock(m.start)} - {clock(m.stop)}", html.escape(printable(m.file))) for m in self)
        rows = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        return f"<table><tr><th>score</th><th>time</th><th>file</th></tr>{''.join(rows)}</table>"

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as JSON takes them: dates in ISO 8601."""
        return [{**m._asdict(), "date": m.date.isoformat(timespec="seconds")} for m in self]

    def to_json(self) -> str:
        """{"query": ..., "moments": [rows]}."""
        return json.dumps({"query": self.query, "moments": self.to_dicts()}, indent=1, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of the columns. Raises ImportError where pandas is missing."""
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame({name: getattr(self, name) for name in Moment._fields})


def clock(seconds: float) -> str:
    """12.5 as "00:12.5", an hour as "1:00:00.0"."""
    tenths = round(10 * float(seconds))
    hours, rest = divmod(tenths, 36_000)
    text = f"{rest // 600:02}:{rest % 600 / 10:04.1f}"
    return f"{hours}:{text}" if hours else text


def printable(text: str) -> str:
    """A name on one line, whose control characters mean nothing to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _near(file: str) -> str:
    """The path from the current folder, where it lies below it."""
    here = os.getcwd().rstrip(os.sep) + os.sep
    return file.removeprefix(here)
