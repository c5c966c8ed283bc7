"""Videos in tar files, as WebDataset's shards hold them: "shards/00001.tar/clip.mp4" is a path to one.

A member of a tar file is a range of its bytes, which FFmpeg reads where it lies: nothing is unpacked. Compressed files are not
read.
"""

import functools
import os
import posixpath
import re
import tarfile
from pathlib import Path

from evaat_fast.data.decode.errors import VideoError

_TAR = re.compile(r"\.tar(?=/)", re.IGNORECASE)

__all__ = ["SUFFIX", "names", "place", "read"]
SUFFIX = ".tar"


def names(tar: Path) -> list[str]:
    """The names of a tar file's members that are files and whole, in order.

    Raises:
        VideoError: it cannot be read.
    """
    return list(_members(tar))


def place(path: Path) -> tuple[Path, int, int] | None:
    """(file, first byte, bytes): a file is all of itself, a member of a tar file a part of that. None where there is neither.

    Raises:
        VideoError: the tar file cannot be read.
    """
    if os.path.isfile(path):  # of a name that is too long, too, it says no
        return path, 0, path.stat().st_size
    said = path.as_posix()
    for end in (match.end() for match in _TAR.finditer(said)):
        tar = Path(said[:end])
        if os.path.isfile(tar):
            found = _members(tar).get(said[end + 1 :])
            return None if found is None else (tar, *found)
    return None


def read(path: Path) -> bytes:
    """The bytes of a file or member.

    Raises:
        FileNotFoundError: there is none. VideoError: as `place`.
    """
    found = place(path)
    if found is None:
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with open(found[0], "rb") as file:
        file.seek(found[1])
        return file.read(found[2])


def _members(tar):
    stat = tar.stat()
    return _index(str(tar), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=256)
def _index(tar: str, changed: int, size: int) -> dict[str, tuple[int, int]]:
    """{name: (first byte, bytes)}, of one state of the file."""
    found = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse() and member.offset_data + member.size <= size:
                    found[posixpath.normpath(member.name)] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError, UnicodeError) as error:
        raise VideoError(f"{tar}: not a tar file that can be read: {str(error).splitlines()[0]}") from None
    return found
