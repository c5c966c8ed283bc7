"""Files written all at once, and their hashes."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


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


def write_json(path: str | os.PathLike[str], record: Any) -> None:
    """A record for people and programs, written atomically; its folder is made."""
    text = json.dumps(record, indent=1) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def damage(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a file of torch's that cannot be read: "is empty", "is damaged or was cut short, at 5 bytes"; None
    where it does not begin as one, or is whole."""
    with open(path, "rb") as file:
        begins = file.read(4)
    if not begins:
        return "is empty"
    if begins == b"PK\3\4" and not zipfile.is_zipfile(path):  # an archive, whose table of contents comes last
        return f"is damaged or was cut short, at {os.path.getsize(path):,} bytes"
    return None


def sha256(path: str | os.PathLike[str], progress: Callable[[int], object] | None = None) -> str:
    """The hash of a file's bytes; of a folder, of the names and hashes of its files in order, as `sha256sum` prints them.

    Args:
        path: a file or a folder without folders. progress: called as progress(bytes read so far) of a file.
    """
    digest, done = hashlib.sha256(), 0
    if Path(path).is_dir():
        for part in sorted(Path(path).iterdir()):
            digest.update(f"{sha256(part)}  {part.name}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            done += len(block)
            if progress is not None:
                progress(done)
    return digest.hexdigest()
