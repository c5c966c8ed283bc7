"""Which videos lie below folders: one pass over directories, and no file is opened."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from evaat_fast.data.below import entries, is_text
from evaat_fast.data.layout import VIDEOS

_INT64 = 1 << 63

__all__ = ["Found", "name_of", "path_of", "real", "scan", "stamp"]


class Found(NamedTuple):
    """A video by name. size: bytes. mtime: nanoseconds. why: why it cannot be read, where that is plain to see."""

    size: int
    mtime: int
    why: str | None = None


def stamp(status: os.stat_result) -> tuple[int, int]:
    """(size, mtime) by which a file is known again. Nanoseconds of 64 bits end in 2262, and there are files of later dates."""
    return status.st_size, max(-_INT64, min(status.st_mtime_ns, _INT64 - 1))


def name_of(path: str | os.PathLike[str], base: str) -> str:
    """What a file is called in an index: its path from the folder `base`, where it lies below it, so that both can be moved."""
    path = os.path.abspath(os.fspath(path))
    if path == base:
        return "."
    inside = base if base.endswith(os.sep) else base + os.sep
    return path[len(inside) :].replace(os.sep, "/") if path.startswith(inside) else path


def real(path: str | os.PathLike[str]) -> str:
    """An absolute path by which a folder has one name, whichever links lead to it; a link to a file keeps its own."""
    path = os.path.abspath(os.fspath(path))
    return (
        os.path.realpath(path)
        if os.path.isdir(path)
        else os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    )


def path_of(name: str, base: str) -> str:
    """The absolute path of a name."""
    return os.path.normpath(os.path.join(base, name))


def scan(paths: Iterable[str | os.PathLike[str]], base: str, links: dict[str, str] | None = None) -> dict[str, Found]:
    """All videos below folders, and files that are named themselves, by name and in its order.

    Hidden files and folders are left out, links are followed, no folder is entered twice.

    Args:
        paths: files or folders. base: absolute, see `name_of`. links: {name of a link on the way: name of where it leads} is
            added to it.

    Raises:
        FileNotFoundError: a path that is not there.
    """
    found: dict[str, Found] = {}
    entered: set[tuple[int, int]] = set()
    links = {} if links is None else links
    for path in paths:
        full = real(path)
        if os.path.isdir(full):
            _walk(full, base, found, entered, links)
        elif os.path.lexists(full):
            if os.path.islink(full):
                _follow(full, base, links)
            _look(full, base, found)
        else:
            raise FileNotFoundError(f"videos: there is no file or folder {full!r}")
    return {name: found[name] for name in sorted(found)}


def _walk(root, base, found, entered, links):
    def failed(folder, error):
        found[name_of(folder, base)] = Found(0, 0, f"a folder that cannot be read: {error.strerror}")

    def linked(folder):
        _follow(folder, base, links)

    for entry in entries(root, lambda entry: entry.name.startswith("."), entered=entered, linked=linked, failed=failed):
        if os.path.splitext(entry.name)[1].lower() in VIDEOS:
            if entry.is_symlink():
                _follow(entry.path, base, links)
            _look(entry.path, base, found, entry)


def _follow(path, base, links):
    name, leads = name_of(path, base), name_of(os.path.realpath(path), base)
    if is_text(name + leads):  # what lies below another is refused by its own name
        links[name] = leads


def _look(path, base, found, entry=None):
    name = name_of(path, base)
    if not is_text(name):  # Parquet's strings are UTF-8
        found[name] = Found(0, 0, "its name is not UTF-8; rename it")
        return
    try:
        status = entry.stat() if entry is not None else Path(path).stat()
    except OSError as error:
        dangling = os.path.islink(path) and not os.path.exists(path)
        found[name] = Found(0, 0, "a link to nothing" if dangling else str(error.strerror))
        return
    why = None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        why = "not a file"
    elif not status.st_size:
        why = "the file is empty"
    found[name] = Found(*stamp(status), why)
