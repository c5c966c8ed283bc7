"""Files written all at once, and their hashes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write(file)` on a temporary file in the same folder, flushes it to the disk and renames it to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> str:
    """The hash of a file's bytes, or of a folder's files, their names and bytes. progress: called as progress(bytes read so
    far)."""
    digest, done, path = hashlib.sha256(), 0, Path(path)
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        if part is not path:
            digest.update(part.name.encode() + b"\0")
        with open(part, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done)
    return digest.hexdigest()
