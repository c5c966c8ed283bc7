"""What the readers of millions of rows share: rows that are left out are counted, never silent, and columns stay in Arrow."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.table import COLUMNS, ClipTable

__all__ = ["Skipped", "check_units", "joined", "table_of"]

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


def joined(parts: list[Any]) -> Any:
    """One Arrow array of several, which are taken out of their list one by one as they are copied: no two copies of all.

    Args:
        parts: float64 NumPy arrays, Arrow strings or lists of them, of one type, without nulls. Emptied.
    """
    import pyarrow as pa

    if isinstance(parts[0], np.ndarray):
        return pa.array(_drained(parts, sum(map(len, parts)), parts[0].dtype))
    kind, count = parts[0].type, sum(map(len, parts))
    wide = pa.types.is_large_string(kind)
    places = np.empty(count + 1, np.int64 if wide else np.int32)
    row = total = 0
    values: list[Any] = []
    for index, part in enumerate(parts):
        offsets = np.frombuffer(part.buffers()[1], places.dtype)[part.offset : part.offset + len(part) + 1]
        places[row : row + len(part)] = offsets[:-1] - offsets[0] + total
        row, total = row + len(part), total + int(offsets[-1] - offsets[0])
        if pa.types.is_list(kind):
            values.append(part.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])))
        else:
            bytes_ = part.buffers()[2]
            flat = np.frombuffer(bytes_, np.uint8) if bytes_ is not None else np.empty(0, np.uint8)
            values.append(flat[int(offsets[0]) : int(offsets[-1])])
        parts[index] = None
    if total >= 2**31 and not wide:
        raise ValueError(f"expected fewer than 2,147,483,648 bytes of names, or values of lists, got {total:,}")
    places[row] = total
    parts.clear()
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(pa.array(places), pa.concat_arrays(values))
    data = _drained(values, total, np.dtype(np.uint8))
    return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(places), pa.py_buffer(data)])


def _drained(parts, length, dtype):
    import pyarrow as pa

    whole, at = np.empty(length, dtype), 0
    for index, part in enumerate(parts):
        whole[at : at + len(part)] = part
        at, parts[index] = at + len(part), None
        del part
        if index % 16 == 15:
            pa.default_memory_pool().release_unused()
    parts.clear()
    return whole


def table_of(arrays: dict[str, Any], *, dataset: str, split: str, **metadata: Any) -> ClipTable:
    """The table of Arrow arrays, which are not copied. Ids must have been made unique. Absent lists are empty."""
    import pyarrow as pa

    frame = ClipTable.of({name: [] for name in COLUMNS}, dataset=dataset, split=split, **metadata).arrow.schema
    count = len(arrays["id"])
    nothing = pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.int32()))
    return ClipTable(pa.table([arrays.get(name, nothing) for name in COLUMNS], schema=frame))
