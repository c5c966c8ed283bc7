"""A table of clips: what every reader makes, what data sets read, kept in Arrow so that workers share one memory map.

    table = ClipTable.of({"id": [...], "video": [...], "start": [...], "stop": [...], "texts": [...]}, dataset="ek100-mir")
    table.save("clips.arrow")                 # or .parquet, which other tools read
    table = ClipTable.open("clips.arrow")     # mapped, not read: a tenth of a second for two million clips
    table[0]                                  # Clip(id="P01_01_0", video="P01/P01_01", start=0.14, stop=3.37, ...)

| column | type | what |
|---|---|---|
| id | string | unique in the table |
| video | string | the video's key in its folder: "P01/P01_01" for EPIC-Kitchens, a uid for Ego4D |
| start, stop | float64 | seconds in the video; both NaN: all of it |
| texts | list of strings | captions of the clip, of which training draws one where there are several |
| verbs, nouns | list of int32 | class numbers; empty where the corpus has none |
| labels | list of int32 | classes of actions, as Charades-Ego has them |
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evaat_fast._files import write_atomically

if TYPE_CHECKING:
    import pyarrow

__all__ = ["COLUMNS", "Clip", "ClipTable"]

COLUMNS = ("id", "video", "start", "stop", "texts", "verbs", "nouns", "labels")
_NEEDED = ("id", "video", "texts")
_KEY = b"evaat_fast"  # of the Arrow schema's metadata
_VERSION = 1


class Clip(NamedTuple):
    """A row. start, stop: seconds. verbs, nouns, labels: class numbers."""

    id: str
    video: str
    start: float
    stop: float
    texts: tuple[str, ...]
    verbs: tuple[int, ...]
    nouns: tuple[int, ...]
    labels: tuple[int, ...]


class ClipTable:
    """Clips as Arrow columns, in memory or mapped from a file.

    Made by `ClipTable.of`, `ClipTable.open` or a reader of `evaat_fast.data.readers`. A table that was opened pickles as its
    path, so that spawned workers map the same pages.

    Attributes:
        dataset, split: names, "" where there is none. metadata: dict of whatever else its maker wrote.
        path: the file it is mapped from, or None. arrow: the pyarrow.Table.
    """

    def __init__(self, arrow: "pyarrow.Table", path: Path | None = None):
        self.arrow, self.path = arrow, path
        self.metadata: dict[str, Any] = json.loads((arrow.schema.metadata or {}).get(_KEY, b"{}"))
        if not isinstance(self.metadata, dict):
            raise ValueError(f"metadata: expected an object, got {self.metadata!r}")
        self.dataset: str = self.metadata.get("dataset", "")
        self.split: str = self.metadata.get("split", "")
        # One chunk a column, whatever was read: an element is then found without a search, and numbers without a copy.
        self._columns = {name: _whole(arrow.column(name)) for name in COLUMNS}
        self._start = self._columns["start"].to_numpy()
        self._stop = self._columns["stop"].to_numpy()

    @classmethod
    def of(
        cls, columns: Mapping[str, Sequence[Any] | np.ndarray], *, dataset: str = "", split: str = "", **metadata: Any
    ) -> "ClipTable":
        """A table in memory.

        Args:
            columns: "id", "video" and "texts", and any others of COLUMNS, of one length. A missing start or stop is NaN, a
                missing list is empty.
            dataset, split, metadata: kept with the table; what JSON can hold.

        Raises:
            ValueError: an unknown or missing column, lengths that differ, an id that occurs twice, values that do not fit.
            ImportError: pyarrow is missing.
        """
        pa = _pyarrow()
        unknown, missing = set(columns) - set(COLUMNS), set(_NEEDED) - set(columns)
        if unknown or missing:
            said = f"unknown: {', '.join(sorted(unknown))}" if unknown else f"missing: {', '.join(sorted(missing))}"
            raise ValueError(f"columns: expected {', '.join(COLUMNS)}; {said}")
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns: expected one length, got {lengths}")
        arrays = []
        for field in _schema(pa):
            values = columns.get(field.name)
            if pa.types.is_list(field.type) and values is not None and any(isinstance(v, str) for v in values):
                raise ValueError(f"columns: {field.name}: expected a list a clip, got a string")  # Arrow would take its letters
            try:
                arrays.append(_absent(pa, field, lengths["id"]) if values is None else pa.array(values, field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                raise ValueError(f"columns: {field.name}: expected {field.type}: {error}") from None
            _complete(field.name, arrays[-1])
        known = {**metadata, "dataset": dataset, "split": split, "version": _VERSION}
        table = cls(pa.table(arrays, schema=_schema(pa).with_metadata({_KEY: json.dumps(known).encode()})))
        table._check_ids()
        return table

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ClipTable":
        """The table of a file written by `save`, or by another program with at least the columns id, video and texts: an .arrow
        file is mapped into memory, a .parquet file is read. Either is validated, which takes 0.1 s for two million clips.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a table of clips.
            ImportError: pyarrow is missing.
        """
        pa = _pyarrow()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"clips: there is no file {str(path)!r}")
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                arrow = pyarrow.parquet.read_table(path)
            else:
                arrow = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            absent = [name for name in _NEEDED if name not in arrow.column_names]
            if absent:
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}; missing: {', '.join(absent)}")
            # Damaged offsets would lead anywhere.
            arrow.validate(full=True)
            for field in _schema(pa):
                if field.name not in arrow.column_names:
                    arrow = arrow.append_column(field, _absent(pa, field, len(arrow)))
            arrow = arrow.select(COLUMNS)
            if not arrow.schema.equals(_schema(pa)):
                arrow = arrow.cast(_schema(pa).with_metadata(arrow.schema.metadata))
            for name in COLUMNS:
                for chunk in arrow.column(name).chunks:
                    _complete(name, chunk)
            # Absolute, as a worker may start in another folder.
            table = cls(arrow, path.absolute() if path.suffix != ".parquet" else None)
            if table.path is None or "version" not in table.metadata:  # another program may have written it
                table._check_ids()
            return table
        except (pa.ArrowException, ValueError, OSError) as error:
            raise ValueError(f"{path}: not a table of clips: {str(error).splitlines()[0]}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .arrow (uncompressed, to be mapped) or .parquet, in place of what was there, all at once.

        Raises:
            ValueError: another suffix. OSError: the file cannot be written.
        """
        pa = _pyarrow()
        path = Path(path)
        if path.suffix not in (".arrow", ".parquet"):
            raise ValueError(f"path: expected a name in .arrow or .parquet, got {str(path)!r}")

        def write(file: IO[bytes]) -> None:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                pyarrow.parquet.write_table(self.arrow, file, compression="zstd")
            else:
                with pa.ipc.new_file(file, self.arrow.schema) as writer:
                    writer.write_table(self.arrow.combine_chunks())

        write_atomically(path, write)

    def select(self, rows: Sequence[int] | np.ndarray) -> "ClipTable":
        """A table in memory of some rows, in the order given."""
        return ClipTable(self.arrow.take(_pyarrow().array(np.asarray(rows, np.int64))))

    def column(self, name: str) -> np.ndarray:
        """start or stop: float64, a view; of another column an array of objects, made for the call."""
        if name in ("start", "stop"):
            return self._start if name == "start" else self._stop
        return self._columns[name].to_numpy(zero_copy_only=False)

    def row(self, id: str) -> int:
        """The number of a clip.

        Raises:
            KeyError: no clip has this id.
        """
        pa = _pyarrow()
        found = pa.compute.index(self._columns["id"], pa.scalar(id, pa.string())).as_py()
        if found < 0:
            raise KeyError(f"id: the table of {self.dataset or 'clips'} has no clip {id!r}")
        return found

    def id(self, row: int) -> str:
        return self._columns["id"][row].as_py()

    def video(self, row: int) -> str:
        return self._columns["video"][row].as_py()

    def start(self, row: int) -> float:
        return float(self._start[row])

    def stop(self, row: int) -> float:
        return float(self._stop[row])

    def texts(self, row: int) -> tuple[str, ...]:
        return tuple(self._columns["texts"][row].as_py())

    def verbs(self, row: int) -> tuple[int, ...]:
        return tuple(self._columns["verbs"][row].as_py())

    def nouns(self, row: int) -> tuple[int, ...]:
        return tuple(self._columns["nouns"][row].as_py())

    def labels(self, row: int) -> tuple[int, ...]:
        return tuple(self._columns["labels"][row].as_py())

    def videos(self) -> list[str]:
        """The keys of its videos, each once, in order of appearance."""
        return self._columns["video"].unique().to_pylist()

    def __len__(self) -> int:
        return self.arrow.num_rows

    def __getitem__(self, row: int) -> Clip:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row: expected one of {len(self)} clips, got {row}")
        row = int(row) % len(self)
        return Clip(
            self.id(row),
            self.video(row),
            self.start(row),
            self.stop(row),
            self.texts(row),
            self.verbs(row),
            self.nouns(row),
            self.labels(row),
        )

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        name = " ".join(filter(None, (self.dataset, self.split)))
        return f"ClipTable({len(self)} clips{f' of {name}' if name else ''}{f', {self.path}' if self.path else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (ClipTable.open, (self.path,)) if self.path else (ClipTable, (self.arrow,))

    def _check_ids(self):
        ids = self._columns["id"]
        if len(ids.unique()) < len(ids):
            counts = ids.value_counts()
            twice = next(c["values"].as_py() for c in counts if c["counts"].as_py() > 1)
            rows = [i for i, name in enumerate(ids.to_pylist()) if name == twice]
            raise ValueError(f"columns: id: {twice!r} occurs {len(rows)} times, in rows {rows[0]} and {rows[1]}")


def _complete(name: str, array: Any) -> None:
    """Refuses values that are missing, in the lists too. Arrow has counted them."""
    inner = array.flatten().null_count if array.type.num_fields else 0
    if missing := array.null_count + inner:
        raise ValueError(f"columns: {name}: {missing} values are missing")


def _pyarrow() -> Any:
    try:
        import pyarrow.compute
        import pyarrow.ipc
    except (ImportError, OSError) as error:
        raise ImportError(f"tables of clips need pyarrow ({error}): pip install 'evaat-fast[video]'") from error
    return pyarrow


def _schema(pa: Any) -> Any:
    # Ten captions for each of four million clips are more bytes than 32-bit offsets reach.
    classes = pa.list_(pa.int32())
    types = (pa.string(), pa.string(), pa.float64(), pa.float64(), pa.list_(pa.large_string()), classes, classes, classes)
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def _absent(pa: Any, field: Any, count: int) -> Any:
    """The column of a field that a table has nothing of: NaN, or empty lists."""
    if not pa.types.is_list(field.type):
        return pa.array(np.full(count, np.nan))
    return pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], field.type.value_type))


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
