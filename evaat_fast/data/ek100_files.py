"""The annotation files of EPIC-Kitchens-100 retrieval, as `EK100` takes them, and where its videos lie."""

from collections.abc import Sequence
from pathlib import Path

from evaat_fast.data.readers.ek100 import Clip, Split, captions, clips

__all__ = ["Clip", "Split", "find_videos", "read_captions", "read_clips"]


def read_clips(folder: Path, split: Split) -> list[Clip]:
    """The rows of EPIC_100_retrieval_{split}.csv."""
    return clips(folder / f"EPIC_100_retrieval_{split}.csv")


def read_captions(folder: Path, split: Split, clips: Sequence[Clip]) -> list[int]:
    """For each row of the sentence file the number of the clip that it is the narration of."""
    return captions(folder, split, [c["id"] for c in clips]).tolist()


def find_videos(root: Path, clips: Sequence[Clip], split: Split) -> dict[str, Path]:
    """{video: path of its file or of its folder of chunks}."""
    if not root.is_dir():
        raise FileNotFoundError(f"videos: there is no folder {str(root)!r}")
    paths: dict[str, Path] = {}
    missing = []
    for name, participant in {c["video"]: c["participant"] for c in clips}.items():
        places = [root / participant / f"{name}{suffix}" for suffix in (".MP4", ".mp4")]
        path = next((p for p in places if p.exists()), None)
        if path is None:
            missing.append(str(places[0]))
        else:
            paths[name] = path
    if missing:
        count = f"{len(missing)} of the {len(missing) + len(paths)} videos of the {split} split"
        raise FileNotFoundError(f"videos: {count} are missing, first {missing[0]!r}")
    return paths
