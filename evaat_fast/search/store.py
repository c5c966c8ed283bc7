"""An index on the disk: one folder, whose manifest says what of it counts.

    index.json                        settings, how many rows count, which files hold them, videos that cannot be read
    vectors-0000.f16                  float16 [rows, E], one row a clip, each of length 1
    places-0000.parquet               file, start, stop, size, mtime of each row, in the same order

A commit appends vectors, writes places beside the former, and renames a new manifest into its place. What a killed process
leaves behind the last manifest does not count, and the next one overwrites or removes it. Rows of videos that changed or are
gone are listed as dead; where they are many `finish` copies the others to a new file. Nothing that is written depends on the
time or the process.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaat_fast._files import write_atomically

MANIFEST = "index.json"
FORMAT = 1
_LOCK = ".lock"
_DEAD = 0.25  # the share of dead rows from which the others are copied
_TILE = 1 << 16  # rows that are copied at once
_END = 1 << 16  # bytes of vectors at either end that are hashed
COLUMNS = ("file", "start", "stop", "size", "mtime")

__all__ = ["COLUMNS", "BadIndex", "File", "Manifest", "Partial", "Places", "Problem", "Store", "alone", "graph_of"]


class BadIndex(ValueError):
    """An index that is not there, is damaged, or is of something else; the message says what to do."""


class Problem(NamedTuple):
    """Why a video is not in the index. size: bytes. mtime: nanoseconds."""

    size: int
    mtime: int
    why: str


class Partial(NamedTuple):
    """The video whose first clips alone are in the index, its last rows. size: bytes. mtime: nanoseconds."""

    name: str
    clips: int
    size: int
    mtime: int


class File(NamedTuple):
    """A video in the index. first, last: its rows, [first, last). size: bytes. mtime: nanoseconds."""

    name: str
    first: int
    last: int
    size: int
    mtime: int


@dataclass(frozen=True)
class Manifest:
    """What of an index counts.

    settings: what its vectors are of, see `evaat_fast.search.embedder.Settings`. width: numbers of a vector. rows: how many
    there are. vectors, places: names of files. dead: [first, last) of rows that no longer count. roots: folders that are
    indexed. unreadable: {video: its Problem}. partial: a long video that a killed process had begun. links: {name of a link
    below the folders: name of where it led}. ends: a hash of the first and last rows, by which a file of other vectors is
    known; "" where there are none, or a former version wrote it.
    """

    settings: dict[str, Any]
    width: int
    rows: int = 0
    vectors: str = "vectors-0000.f16"
    places: tuple[str, ...] = ()
    dead: tuple[tuple[int, int], ...] = ()
    roots: tuple[str, ...] = ()
    unreadable: dict[str, Problem] = field(default_factory=dict)
    partial: Partial | None = None
    links: dict[str, str] = field(default_factory=dict)
    ends: str = ""

    def __post_init__(self) -> None:
        counts = (self.rows, self.width, *(n for pair in self.dead for n in pair))
        names = (self.vectors, self.ends, *self.places, *self.roots, *self.links, *self.links.values())
        if not all(type(n) is int for n in counts) or not all(isinstance(name, str) for name in names):
            raise TypeError("a number or a name is none")
        if self.rows < 0 or self.width < 1 or not all(0 <= first <= last <= self.rows for first, last in self.dead):
            raise ValueError("rows out of range")
        if any(os.path.basename(name) != name for name in (self.vectors, *self.places)):
            raise ValueError("a file of another folder")

    def dumps(self) -> bytes:
        values = asdict(self) | {"unreadable": {name: list(self.unreadable[name]) for name in sorted(self.unreadable)}}
        values["links"] = dict(sorted(self.links.items()))
        return (json.dumps({"format": FORMAT, **values}, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Places:
    """What is known of each row. files: those that count. codes: int32 [rows], each row's number in `files`, -1 of a dead one.
    start, stop: float64 [rows], seconds."""

    files: tuple[File, ...]
    codes: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class Store:
    """The files of an index. Its manifest is that of the moment at which it was opened, or last changed through it.

    Args:
        folder: of the index.

    Raises:
        BadIndex: there is none, or it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.manifest = self._manifest()

    @classmethod
    def create(cls, folder: str | os.PathLike[str], settings: Mapping[str, Any], width: int) -> "Store":
        """An empty index. Who still reads one that it replaces has its vectors: they get a file of another name."""
        path = Path(folder) / MANIFEST
        manifest = Manifest(dict(settings), width)
        if path.exists():
            numbers = [int(old.stem[8:]) for old in path.parent.glob("vectors-[0-9][0-9][0-9][0-9].f16")]
            manifest = replace(manifest, vectors=f"vectors-{max(numbers, default=-1) + 1:04}.f16")
        content = manifest.dumps()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
        return cls(folder)

    def _manifest(self) -> Manifest:
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            number = found.pop("format")
            if number == FORMAT:
                found["places"], found["roots"] = tuple(found["places"]), tuple(found["roots"])
                found["dead"] = tuple((first, last) for first, last in found["dead"])
                found["partial"] = Partial(*found["partial"]) if found["partial"] else None
                found["unreadable"] = {name: Problem(*values) for name, values in found["unreadable"].items()}
                return Manifest(**found)
        except FileNotFoundError:
            raise BadIndex(f"there is no index in {str(self.folder)!r}; evaat-fast index VIDEOS makes one") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadIndex(f"{path} is damaged ({error}); remove the folder and index again") from None
        raise BadIndex(f"{path} is of format {number!r}, this version reads {FORMAT}; remove the folder and index again")

    def places(self) -> Places:
        """Of all rows."""
        import pyarrow as pa
        import pyarrow.parquet

        rows = self.manifest.rows
        codes, start, stop = np.full(rows, -1, np.int32), np.zeros(rows), np.zeros(rows)
        alive = np.ones(rows, bool)
        for first, last in self.manifest.dead:
            alive[first:last] = False
        files: list[File] = []
        at = 0
        for part in self.manifest.places:
            try:
                table = pyarrow.parquet.read_table(self.folder / part, columns=list(COLUMNS))
                n = len(table)
                if not n:
                    continue
                column = table.column("file").combine_chunks()
                column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
                numbers, names = column.indices.to_numpy(), column.dictionary.cast(pa.string()).to_pylist()
                start[at : at + n], stop[at : at + n] = table.column("start").to_numpy(), table.column("stop").to_numpy()
                # Of a video that changed the dead rows of its former version may lie right before its own.
                begins = np.diff(numbers, prepend=-1) != 0
                begins[1:] |= np.diff(alive[at : at + n])
                firsts = np.flatnonzero(begins)
                sizes, times = (table.column(x).to_numpy()[firsts].tolist() for x in ("size", "mtime"))
            except (OSError, ValueError, KeyError, AttributeError, pa.ArrowException) as error:
                raise BadIndex(f"{self.folder / part} is damaged ({error}); remove the folder and index again") from None
            bounds = [*firsts.tolist(), n]
            for i, first in enumerate(bounds[:-1]):
                name, begin, end = names[numbers[first]], at + first, at + bounds[i + 1]
                if not alive[begin]:
                    continue
                if files and files[-1].name == name and files[-1].last == begin:  # a long video, of several commits
                    begin = files.pop().first
                codes[begin:end] = len(files)
                files.append(File(name, begin, end, sizes[i], times[i]))
            at += n
        if at != rows:
            raise BadIndex(f"{self.folder}: {at} places for {rows} vectors; remove the folder and index again")
        return Places(tuple(files), codes, start, stop)

    def check_vectors(self) -> None:
        """Raises BadIndex where the file of vectors is not the one that was written, by its ends."""
        manifest = self.manifest
        path = self.folder / manifest.vectors
        try:
            same = manifest.ends in ("", _ends(path, 2 * manifest.rows * manifest.width))
        except OSError as error:
            raise BadIndex(f"{path} lacks vectors ({error.strerror}); remove the folder and index again") from None
        if not same:
            raise BadIndex(f"{path} has other vectors than were written; remove the folder and index again")

    # Below: only while `alone` holds the folder.

    def tidy(self) -> None:
        """Removes what a killed process left behind."""
        vectors = self.manifest.vectors
        kept = {MANIFEST, vectors, graph_of(vectors).name, *self.manifest.places}
        for path in self.folder.iterdir():
            ours = path.name.startswith(("vectors-", "places-", "graph-")) or (
                path.name.startswith(".") and path.suffix == ".tmp"
            )
            if ours and path.name not in kept:
                path.unlink(missing_ok=True)

    def append(
        self,
        vectors: np.ndarray,
        places: Mapping[str, Sequence[Any]],
        unreadable: Mapping[str, Problem],
        dead: Sequence[tuple[int, int]] = (),
        partial: Partial | None = None,
    ) -> None:
        """Commits rows, and what could not be read.

        Args:
            vectors: float16 [n, width]. places: a list of n for each column. unreadable: {video: its Problem}. dead: earlier
                rows that no longer count. partial: the last video, if more of it is to come.
        """
        old = self.manifest
        manifest = replace(
            old, unreadable={**old.unreadable, **unreadable}, dead=tuple(sorted({*old.dead, *dead})), partial=partial
        )
        if len(vectors):
            path = self.folder / manifest.vectors
            if not manifest.rows:  # a new file: somebody may have mapped what an index that is gone left in its place
                path.unlink(missing_ok=True)
                graph_of(path).unlink(missing_ok=True)
            with open(path, "r+b" if manifest.rows else "wb") as file:
                file.truncate(2 * manifest.rows * manifest.width)
                file.seek(0, os.SEEK_END)
                file.write(np.ascontiguousarray(vectors, "<f2").tobytes())
                file.flush()
                os.fsync(file.fileno())
            name = f"places-{_number(manifest):04}-{manifest.rows:012}.parquet"
            _write(self.folder / name, _table(places))
            rows = manifest.rows + len(vectors)
            ends = _ends(path, 2 * rows * manifest.width)
            manifest = replace(manifest, rows=rows, places=(*manifest.places, name), ends=ends)
        self._commit(manifest)

    def change(self, **changes: Any) -> None:
        """Commits other values of fields of the manifest, where they are others."""
        manifest = replace(self.manifest, **changes)
        if manifest != self.manifest:
            self._commit(manifest)

    def finish(self) -> None:
        """One file of places; and without dead rows, where these are many."""
        manifest = self.manifest
        dead = sum(last - first for first, last in manifest.dead)
        if dead > _DEAD * manifest.rows:
            self._compact()
        elif len(manifest.places) > 1:
            name = f"places-{_number(manifest) + 1:04}.parquet"
            _write(self.folder / name, self._table())
            self._commit(replace(manifest, places=(name,)))
        self.tidy()

    def _compact(self) -> None:
        manifest = self.manifest
        vectors = np.memmap(self.folder / manifest.vectors, np.float16, "r", shape=(manifest.rows, manifest.width))
        keep = np.ones(manifest.rows, bool)
        for first, last in manifest.dead:
            keep[first:last] = False
        name = f"vectors-{int(manifest.vectors[8:12]) + 1:04}.f16"
        places = f"places-{_number(manifest) + 1:04}.parquet"

        def copy(file):
            for first in range(0, manifest.rows, _TILE):
                some = slice(first, first + _TILE)
                file.write(np.ascontiguousarray(vectors[some][keep[some]]).tobytes())

        write_atomically(self.folder / name, copy)
        import pyarrow as pa

        _write(self.folder / places, self._table().filter(pa.array(keep)))
        rows = int(keep.sum())
        ends = _ends(self.folder / name, 2 * rows * manifest.width)
        self._commit(replace(manifest, vectors=name, places=(places,) if rows else (), rows=rows, dead=(), ends=ends))

    def _table(self) -> Any:
        """The places of all rows, as one table."""
        import pyarrow as pa
        import pyarrow.parquet

        return pa.concat_tables(pyarrow.parquet.read_table(self.folder / name) for name in self.manifest.places)

    def _commit(self, manifest: Manifest) -> None:
        content = manifest.dumps()
        write_atomically(self.folder / MANIFEST, lambda file: file.write(content))
        self.manifest = manifest


def graph_of(vectors: str | os.PathLike[str]) -> Path:
    """The file of the graph that leads to vectors, by theirs."""
    path = Path(vectors)
    return path.with_name(path.name.replace("vectors-", "graph-", 1)).with_suffix(".usearch")


def _ends(path: Path, size: int) -> str:
    """A hash of the ends of a file's first `size` bytes."""
    if not size:
        return ""
    with open(path, "rb") as file:
        first = file.read(min(size, _END))
        file.seek(max(0, size - _END))
        return hashlib.sha256(first + file.read(min(size, _END))).hexdigest()[:16]


def _number(manifest: Manifest) -> int:
    """Of the files of places."""
    return int(manifest.places[-1][7:11]) if manifest.places else 0


def _table(columns: Mapping[str, Sequence[Any]]) -> Any:
    import pyarrow as pa

    kinds = dict(zip(COLUMNS, (pa.string(), pa.float64(), pa.float64(), pa.int64(), pa.int64()), strict=True))
    return pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})


def _write(path: Path, table: Any) -> None:
    """Names once each, in order of appearance, however the table was put together."""
    import pyarrow as pa
    import pyarrow.parquet

    names = table.column("file").cast(pa.string()).combine_chunks()
    table = table.combine_chunks().set_column(0, "file", pa.chunked_array([names.dictionary_encode()]))
    write_atomically(path, lambda file: pyarrow.parquet.write_table(table, file))


@contextlib.contextmanager
def alone(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the folder against a second writer; the operating system lets go of it with the process.

    Raises:
        BadIndex: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(Path(folder) / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadIndex(f"another process is indexing into {str(folder)!r}; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
