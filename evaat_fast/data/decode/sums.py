"""Checksums of videos, from a time when they were whole, by which damage since then is an error and never a picture.

H.264 has no checksum of its own: where bytes changed, a decoder makes what it can of them, and most of it looks like a video.

    write("sums", "videos", files)                       # once, reading every byte
    sums = Sums("sums", "videos")
    with open_video(path, sums=sums) as reader: ...      # a block that is another raises VideoError

A file is held to them block by block, as its blocks are read: of an hour's recording a clip of two seconds touches a few.
Decoders that are not PyAV read with code of their own, and the whole file is looked at before.
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from evaat_fast._files import write_atomically
from evaat_fast.data.decode import members
from evaat_fast.data.decode.errors import VideoError

__all__ = ["BLOCK", "CheckedFile", "FileSums", "Sums", "Written", "write"]

BLOCK = 1 << 16  # bytes under one CRC-32: four bytes of it for 64 KiB, 45 MB for the 740 GB of EPIC-Kitchens-100
_FILES, _BLOCKS = "files.npy", "blocks.bin"
# key: of a path below the root. size: bytes. begin: where its first block's sum lies among all of them.
_ENTRY = np.dtype([("key", "<u8"), ("size", "<u8"), ("begin", "<u8")])
_KEEP = 1 << 34  # bytes that are read between two saves of what is known


@dataclass(frozen=True)
class FileSums:
    """Of one file. size: bytes. blocks: uint32, a CRC-32 for each 64 KiB."""

    size: int
    blocks: np.ndarray


@dataclass(frozen=True)
class Written:
    """What `write` did. new: files that were read; changed: of these, known with another size; kept: known, and not read."""

    new: int
    kept: int
    changed: int

    def __str__(self) -> str:
        changed = f", {self.changed:,} of them of another size than before" if self.changed else ""
        return f"checksums: {self.new:,} files read{changed}; {self.kept:,} were known"


class Sums:
    """The checksums of a folder of videos.

    Args:
        folder: what `write` made. root: the folder of the videos, wherever that lies now.

    Raises:
        FileNotFoundError: there are none in the folder. ValueError: they cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], root: str | os.PathLike[str]):
        self.folder, self.root = Path(folder), Path(root)
        if not (self.folder / _FILES).is_file():
            raise FileNotFoundError(
                f"sums: there are no checksums in {str(folder)!r}; evaat-fast check --write-sums makes them"
            )
        self._files = _entries(self.folder)
        size = int((-(-self._files["size"].astype(np.int64) // BLOCK)).sum())
        if (have := (self.folder / _BLOCKS).stat().st_size if size else 0) < 4 * size:
            raise ValueError(f"sums: {self.folder / _BLOCKS} was cut short: {have:,} bytes for {4 * size:,}")

    def __reduce__(self) -> tuple[type["Sums"], tuple[Path, Path]]:  # workers map the files anew
        return Sums, (self.folder, self.root)

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def _blocks(self) -> np.ndarray:
        path = self.folder / _BLOCKS
        return np.memmap(path, "<u4", "r") if path.stat().st_size >= 4 else np.zeros(0, np.uint32)

    def of(self, path: Path) -> FileSums | None:
        """Those of a file or of a member of a tar file; None where it has none.

        Raises:
            VideoError: it is not there, or of another size.
        """
        row, files = self._row(path), self._files
        if row is None:
            return None
        size, begin = int(files["size"][row]), int(files["begin"][row])
        place = members.place(path)
        if place is None:
            raise VideoError(f"{path}: no such video")
        if place[2] != size:
            raise VideoError(
                f"{path}: {place[2]:,} bytes where its checksums are of {size:,}: it was damaged, or replaced by another; "
                "evaat-fast check --write-sums takes it as it is now"
            )
        return FileSums(size, self._blocks[begin : begin + -(-size // BLOCK)])

    def has(self, path: Path) -> bool:
        """Whether a file has checksums, without a look at it."""
        return self._row(path) is not None

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.ascontiguousarray(self._files["key"])  # a search in them as they lie takes ten times as long

    def _row(self, path):
        key, keys = _key(path, self.root), self._keys
        row = int(np.searchsorted(keys, np.uint64(key)))
        return row if row < len(keys) and keys[row] == key else None

    def open(self, path: Path) -> "CheckedFile | None":
        """A file that is held to its sums; None where it has none."""
        found = self.of(path)
        return None if found is None else CheckedFile(path, found)

    def hold(self, path: Path) -> None:
        """VideoError where any byte of a file is another."""
        if (file := self.open(path)) is not None:
            with contextlib.closing(file):
                while file.read(BLOCK):
                    pass


class CheckedFile:
    """A video, or one within a tar file, whose blocks are held to their checksums as they are read: what PyAV opens.

    failed: what was said of the first block that was another, since a demuxer may go on behind an error; None.

    Raises:
        VideoError: it cannot be opened; of `read`: a block is another, or cannot be read.
    """

    def __init__(self, path: Path, sums: FileSums):
        self.name = str(path)
        self.failed: str | None = None
        self._sums = sums
        place = members.place(path)
        if place is None:
            raise VideoError(f"{path}: no such video")
        self._first = place[1]
        try:
            self._file: BinaryIO = open(place[0], "rb", buffering=0)
        except OSError as error:
            raise VideoError(f"{path}: {error.strerror}") from error
        self._at, self._held, self._block = 0, -1, b""

    def read(self, size: int) -> bytes:
        """At most so many bytes, not beyond a block; b"" at the end."""
        number, within = divmod(self._at, BLOCK)
        if self._at >= self._sums.size or self.failed:  # PyAV keeps one error for where it is back in Python
            return b""
        if number != self._held:
            self._block, self._held = self._checked(number), number
        found = self._block[within : within + size]
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._sums.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._file.close()

    def _checked(self, number):
        begin = number * BLOCK
        size = min(BLOCK, self._sums.size - begin)
        block = b""
        try:
            self._file.seek(self._first + begin)
            while len(block) < size and (more := self._file.read(size - len(block))):
                block += more
        except OSError as error:
            self.failed = f"{self.name}: {error.strerror}, in bytes {begin:,} to {begin + size:,}"
            raise VideoError(self.failed) from error
        if len(block) != size or zlib.crc32(block) != self._sums.blocks[number]:
            self.failed = f"{self.name}: damaged since its checksums were made, in bytes {begin:,} to {begin + size:,}"
            raise VideoError(self.failed)
        return block


def write(
    folder: str | os.PathLike[str],
    root: str | os.PathLike[str],
    files: Iterable[Path],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Written:
    """Makes the checksums of videos, reading every byte; adds to those that are there.

    What is known stays, and is not read again, unless its size is another. It may be interrupted and run again.

    Args:
        folder: for the checksums, 1 MB for 16 GB of video. files: videos below root, the folder of all; their paths below it
            are what they are known by. progress: called as progress(bytes read, bytes).

    Raises:
        ValueError: a file that is not below root, or checksums that cannot be read. OSError: a file cannot be read.
    """
    folder, root = Path(folder), Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    known = {int(e["key"]): e for e in (_entries(folder) if (folder / _FILES).is_file() else ())}
    todo: list[tuple[int, Path, int]] = []
    kept = changed = 0
    for path in dict.fromkeys(files):
        place = members.place(path)
        if place is None:
            raise FileNotFoundError(f"{path}: no such video")
        key = _key(path, root)
        if key in known and int(known[key]["size"]) == place[2]:
            kept += 1
            continue
        changed += key in known
        todo.append((key, path, place[2]))
    done, total, unsaved = 0, sum(size for *_, size in todo), 0
    with open(folder / _BLOCKS, "ab") as blocks, ThreadPoolExecutor(8) as pool:
        blocks.truncate(blocks.tell() // 4 * 4)
        at = blocks.seek(0, os.SEEK_END) // 4
        try:
            for begin in range(0, len(todo), 64):  # not all at once: results wait in memory
                batch = todo[begin : begin + 64]
                for (key, _, size), made in zip(batch, pool.map(_sums_of, (path for _, path, _ in batch)), strict=True):
                    blocks.write(made.tobytes())
                    known[key] = np.array((key, size, at), _ENTRY)
                    at, done, unsaved = at + len(made), done + size, unsaved + size
                    if progress is not None:
                        progress(done, total)
                if unsaved >= _KEEP:
                    _save(folder, blocks, known)
                    unsaved = 0
        finally:  # an interrupt, or a file that cannot be read, costs nothing that was read before
            _save(folder, blocks, known)
    return Written(len(todo), kept, changed)


def _sums_of(path: Path) -> np.ndarray:
    return np.fromiter((zlib.crc32(block) for block in _read(path)), np.dtype("<u4"))


def _read(path: Path) -> Iterator[bytes]:
    place = members.place(path)
    if place is None:
        raise FileNotFoundError(f"{path}: no such video")
    with open(place[0], "rb") as file:
        file.seek(place[1])
        for begin in range(0, place[2], BLOCK):
            size = min(BLOCK, place[2] - begin)
            block = file.read(size)
            if len(block) != size:
                raise OSError(f"{path}: it was cut short while it was read")
            yield block


def _save(folder, blocks, known):
    """The sums first: an entry is never ahead of what it speaks of."""
    blocks.flush()
    os.fsync(blocks.fileno())
    entries = np.sort(np.array([known[key] for key in known], _ENTRY).reshape(-1), order="key")
    write_atomically(folder / _FILES, lambda file: np.save(file, entries))


def _entries(folder):
    try:
        files = np.load(folder / _FILES, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"sums: {folder / _FILES} cannot be read: {error}") from None
    if files.dtype != _ENTRY or files.ndim != 1:
        raise ValueError(f"sums: {folder / _FILES} is of another kind: {files.dtype}")
    return files


def _key(path, root):
    """Of a million files' paths a check asks: a path's own relative_to takes longer than all else."""
    said, above = os.fspath(path), os.path.join(root, "")
    if said.startswith(above):
        below = said[len(above) :].replace(os.sep, "/")
    elif Path(path).is_relative_to(root):  # of ".", say
        below = Path(path).relative_to(root).as_posix()
    else:
        raise ValueError(f"{path}: expected a video below {root}")
    return int.from_bytes(hashlib.blake2b(os.fsencode(below), digest_size=8).digest(), "little")
