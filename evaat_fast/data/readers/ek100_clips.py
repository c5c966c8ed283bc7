"""EPIC-Kitchens-100 cut into clips, one mp4 file each: lightly-ai/epic-kitchens-100-clips on the Hugging Face hub, 24 GB.

    table = ek100_clips.read("epic-kitchens-100-clips", "train")

    epic-kitchens-100-clips/
      clips/P01/P01_102_0.mp4                     participant, then narration_id; 37,455 files of 854 x 480
      epic-kitchens-100-annotations/EPIC_100_train.csv, EPIC_100_validation.csv

The clips are those of the extension of 2020, whose videos have numbers of three digits (P01_102), without those of the first
55 hours (P01_11). **No clip of the retrieval test set is among them**: all of its 9,668 are of the first 55 hours. So the set
trains, and it cannot give the benchmark's test numbers. What it has of the validation file is counted by `read`.

Source: huggingface.co/datasets/lightly-ai/epic-kitchens-100-clips (CC BY-NC 4.0); the annotations are the official ones.
"""

import logging
import os
import re
from pathlib import Path

from evaat_fast.data.choices import Split
from evaat_fast.data.readers import ek100
from evaat_fast.data.table import ClipTable

__all__ = ["files", "read"]

_log = logging.getLogger("evaat_fast")
_FILES = {"train": "EPIC_100_train.csv", "test": "EPIC_100_validation.csv"}
_EXTENSION = re.compile(r"P\d{2}_\d{3}", re.ASCII)


def files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """{narration_id: its file} of folder/clips.

    Raises:
        FileNotFoundError: no folder clips. ValueError: a clip that lies in two places.
    """
    root = Path(folder) / "clips"
    if not root.is_dir():
        raise FileNotFoundError(f"clips: there is no folder {str(root)!r}")
    found: dict[str, Path] = {}
    for participant in sorted(p for p in root.iterdir() if p.is_dir()):
        for entry in os.scandir(participant):
            name, suffix = os.path.splitext(entry.name)
            if suffix.lower() == ".mp4":
                other = found.setdefault(name, Path(entry.path))
                if other != Path(entry.path):
                    raise ValueError(f"{root}: the clip {name} lies in {other.parent.name} and in {participant.name}")
    return found


def read(folder: str | os.PathLike[str], split: Split, *, annotations: str | os.PathLike[str] | None = None) -> ClipTable:
    """The clips whose files are there, whole, as "P01/P01_102_0" in folder/clips.

    Args:
        folder: of the set. split: "train", or "test" for the validation file. annotations: the file with the clips'
            narrations; None: the set's own of the split. EPIC_100_retrieval_train.csv will do as well.

    Returns:
        A ClipTable of dataset "ek100-clips". metadata: "outside", rows of videos that are not of the extension, and
        "missing", rows of its videos without a file, which a warning counts and names.

    Raises:
        FileNotFoundError: no such file or folder. ValueError: a row that cannot be read, no clip for any row.
    """
    path = Path(annotations) if annotations else Path(folder) / "epic-kitchens-100-annotations" / _FILES[split]
    rows, there = ek100.clips(path), files(folder)
    kept = [row for row in rows if row["id"] in there and there[row["id"]].parent.name == row["participant"]]
    known = {row["id"] for row in kept}
    missing = [row for row in rows if row["id"] not in known and _EXTENSION.fullmatch(row["video"])]
    if missing:
        first = f"clips/{missing[0]['participant']}/{missing[0]['id']}.mp4"
        _log.warning(
            "%s: %s of %s clips of the extension have no file, first %s", path, len(missing), len(missing) + len(kept), first
        )
    if not kept:
        first = f"clips/{rows[0]['participant']}/{rows[0]['id']}.mp4"
        raise ValueError(f"{path}: none of its {len(rows)} clips has a file in {Path(folder) / 'clips'}, such as {first}")
    outside = len(rows) - len(kept) - len(missing)
    # A file is its clip: from its first frame to its last.
    facts = {"source": [path.name], "outside": outside, "missing": len(missing)}
    return ek100.table(kept, cut=True, dataset="ek100-clips", split=split, **facts)
