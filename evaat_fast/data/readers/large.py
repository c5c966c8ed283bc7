"""What the readers of millions of rows share: rows that are left out are counted, never silent, and columns stay in Arrow."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.table import COLUMNS, ClipTable

__all__ = ["Skipped", "check_units", "table_of"]

_log = logging.getLogger("evaat_fast")
LONGEST = 2 * 86400.0  # no video of these corpora lasts two days
CLIP = 120.0  # half of the clips of EgoClip and EgoClip+ last a second; of none of them half last two minutes


class Skipped:
    """Counts the rows that a reader leaves out, by reason, and says where the first of each is.

    Args:
        path: of the file. share: of all rows that may be left out; more, and `finish` raises.
    """

    def __init__(self, path: Path, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"skip: expected a share from 0 to 1, got {share!r}")
        self.path, self.share = path, share
        self.reasons: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, count: int, where: Callable[[], str]) -> None:
        """`count` more rows are left out; where() names the first of them, as "line 7" or "row 7: got 'soon'"."""
        if count:
            before, first = self.reasons.get(reason, (0, ""))
            self.reasons[reason] = (before + count, first or where())

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def finish(self, kept: int) -> dict[str, int]:
        """{reason: rows}, after a warning if there are any.

        Raises:
            ValueError: more than the share were left out, or all.
        """
        said = "; ".join(f"{count:,} of {reason}, first {where}" for reason, (count, where) in self.reasons.items())
        if self.count > self.share * (self.count + kept) or (self.count and not kept):
            of = f"{self.count:,} of {self.count + kept:,} rows cannot be read"
            raise ValueError(f"{self.path}: {of} (skip = {self.share:g} of all may be left out): {said}")
        if not kept:
            raise ValueError(f"{self.path}: no rows")
        if self.reasons:
            _log.warning("%s: %s of %s rows are left out: %s", self.path, f"{self.count:,}", f"{self.count + kept:,}", said)
        return {reason: count for reason, (count, _) in self.reasons.items()}


def check_units(path: Path, starts: np.ndarray, stops: np.ndarray) -> None:
    """Refuses times that cannot be seconds in a video: beyond two days, or half of the clips longer than two minutes.

    Raises:
        ValueError: names the file, a clip and the likely unit.
    """
    if len(starts) == 0:
        return
    worst, median = int(stops.argmax()), float(np.median(stops - starts))
    if stops[worst] > LONGEST or median > CLIP:
        found = (
            f"row {worst + 1} ends at {stops[worst]:g}"
            if stops[worst] > LONGEST
            else f"half of the clips last {median:g} or more"
        )
        raise ValueError(f"{path}: expected times in seconds, got what looks like milliseconds or frame numbers: {found}")


def table_of(arrays: dict[str, Any], *, dataset: str, split: str, **metadata: Any) -> ClipTable:
    """The table of Arrow arrays, which are not copied. Ids must have been made unique. Absent lists are empty."""
    import pyarrow as pa

    frame = ClipTable.of({name: [] for name in COLUMNS}, dataset=dataset, split=split, **metadata).arrow.schema
    count = len(arrays["id"])
    nothing = pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.int32()))
    return ClipTable(pa.table([arrays.get(name, nothing) for name in COLUMNS], schema=frame))
