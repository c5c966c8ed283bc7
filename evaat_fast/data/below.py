"""Files below a folder: all of them, and the one that somebody means by a path.

list(walk(Path("Videos")))
Places(Path("Videos")).find(row)     # of the column path, as the disk has it
"""

import functools
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from evaat_fast.data.decode import VideoError, members
from evaat_fast.data.readers import text

__all__ = ["Places", "entries", "is_text", "walk"]


class Places:
    """Finds what the column path says below a folder."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
        self.root, self._known = root, {}  # type: Path, dict[str, str]

    def find(self, row: text.Row) -> str:
        """The path below the folder as the disk has it; of what is not there, as the row has it."""
        said = row.text("path")
        if row["path"] != said and os.path.exists(self.root / row["path"]):
            said = row["path"]  # whose name ends in a space
        if said not in self._known:
            self._known[said] = self._find(row, said)
        return self._known[said]

    def _find(self, row, said):
        if os.path.isabs(said):
            said = self._below(row, said)
        # Windows writes backslashes, and macOS may write e and its accent as two letters.
        spelt = dict.fromkeys(
            posixpath.normpath(form)
            for slashes in (said, said.replace("\\", "/"))
            for form in (slashes, *(unicodedata.normalize(kind, slashes) for kind in ("NFC", "NFD")))
        )
        if any(name == ".." or name.startswith("../") for name in spelt):
            row.fail("path", f"a video below {str(self.root)!r}")
        for name in spelt:
            if os.path.exists(self.root / name) or _in_tar(self.root / name):
                return name
        wanted = unicodedata.normalize("NFC", list(spelt)[-1])
        by_path, by_name = self._listed
        found = by_path.get(wanted.casefold(), [])
        if not found and "/" not in wanted:
            found = by_name.get(wanted.casefold(), [])
        # A camera's .MP4 may be written .mp4; but where there are both, they are two.
        found = [name for name in found if unicodedata.normalize("NFC", name).endswith(wanted)] or found
        if len(found) > 1:
            row.fail(
                "path", f"the name of one video; {len(found)} have it: {', '.join(found[:3])}; give the path below the folder"
            )
        return found[0] if found else wanted

    def _below(self, row, said):
        for one, root in ((os.path.normpath(said), self.root.absolute()), (os.path.realpath(said), self.root.resolve())):
            try:
                return Path(one).relative_to(root).as_posix()
            except ValueError:
                continue
        return row.fail("path", f"a video below {str(self.root)!r}")

    @functools.cached_property
    def _listed(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """({path in one spelling: as the disk has it}, {name: such paths}), without case, of all files but hidden ones."""
        by_path: dict[str, list[str]] = {}
        by_name: dict[str, list[str]] = {}
        for name in walk(self.root):
            spelt = unicodedata.normalize("NFC", name).casefold()
            by_path.setdefault(spelt, []).append(name)
            by_name.setdefault(posixpath.basename(spelt), []).append(name)
        return by_path, by_name


def walk(root: Path, skipped: list[str] | None = None) -> Iterator[str]:
    """The paths of all files below a folder, in order, through links but into no folder twice; `skipped`: what is hidden or has
    a name that is no text is added to it."""
    skipped = [] if skipped is None else skipped

    def leave(entry):
        left = entry.name.startswith(".") or not is_text(entry.name)
        if left:
            skipped.append(Path(entry.path).relative_to(root).as_posix())
        return left

    for entry in entries(root, leave):
        yield Path(entry.path).relative_to(root).as_posix()


def entries(
    root: str | os.PathLike[str],
    leave: Callable[[os.DirEntry[str]], bool],
    *,
    entered: set[tuple[int, int]] | None = None,
    linked: Callable[[str], object] | None = None,
    failed: Callable[[str, OSError], object] | None = None,
) -> Iterator[os.DirEntry[str]]:
    """The files below a folder: its own, by name, then those of the folders in it, through links but into no folder twice.

    Args:
        leave: whether to leave out a file, or a folder with all in it. entered: folders that were, and that are. linked: called
            with each folder that is a link. failed: called with a folder that cannot be read, and why; None: it is left out.
    """
    entered = set() if entered is None else entered
    waiting = [(os.fspath(root), False)]
    while waiting:
        folder, link = waiting.pop()
        folders, files = [], []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            if link and linked is not None:
                linked(folder)
            with os.scandir(folder) as found:
                for entry in sorted(found, key=lambda entry: entry.name):
                    if leave(entry):
                        continue
                    if _is_folder(entry):
                        folders.append((entry.path, entry.is_symlink()))
                    else:
                        files.append(entry)
        except OSError as error:
            if failed is not None:
                failed(folder, error)
        yield from files
        waiting += reversed(folders)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that cannot be entered
        return False


def _in_tar(path):
    try:
        return members.place(path) is not None
    except (VideoError, OSError):  # said by the check; a name that is too long is of no file
        return False


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8; other bytes are surrogates in it."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
