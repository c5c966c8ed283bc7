"""The toy kitchen: a small corpus for which one frame is not enough, in the layout of EPIC-Kitchens-100 retrieval.

    corpus = generate("toy-kitchen")          # about 10 MB, made in a minute on two cores, found again the next time
    corpus.annotations, corpus.videos         # what evaat_fast.data.EK100 takes

8 verbs, which only time tells apart, times 12 nouns (4 colours, 3 shapes). A narration's noun set is {colour, shape},
so that relevancy takes the values 0, 1/6, 1/2, 2/3 and 1. kitchen_render says how the middle frame is kept from
telling the verb.
"""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaat_fast.data.kitchen_render import COLOURS, SHAPES, VERBS, Segment, encode_video

__all__ = ["COLOURS", "PAIRS", "SHAPES", "VERBS", "Kitchen", "generate"]

# Verb classes that are alike but for time: three times a movement and its reverse; and two that move on the spot.
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))

_VERSION = 3  # of the pictures: a corpus of another version is made anew
_STAMP = "kitchen.json"
_CLIPS_PER_VIDEO = 48
_MARGIN = 2  # frames between a segment's border and the narrated clip, so that no rounding shows the neighbour
_COLUMNS = (
    "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame stop_frame "
    "narration verb verb_class noun noun_class all_nouns all_noun_classes"
).split()
_TRAIN_SENTENCE_COLUMNS = ("narration_id", "narration", "verb", "verb_classes", "nouns", "noun_classes")


class Kitchen(NamedTuple):
    """Where a corpus lies."""

    root: Path
    annotations: Path
    videos: Path


def generate(
    root: str | os.PathLike[str],
    *,
    train_clips: int = 1536,
    test_clips: int = 192,
    seed: int = 0,
    size: int = 100,
    fps: int = 30,
    chunk_seconds: int = 15,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Kitchen:
    """Makes the corpus under `root`, or finds it there.

    `root`/annotations gets EPIC_100_retrieval_{train,test}.csv and their _sentence.csv; `root`/videos gets
    P01/P01_00.MP4/{0,15,30,...}.MP4, H.264. Clips last about a second; some cross a chunk's border, and the first chunk
    of the first video lacks its last frame, as in re-encoded data sets. Equal settings give equal files.

    Args:
        root: folder; made if missing. Everything appears in it at once, when it is complete.
        train_clips, test_clips: number of clips; multiples of 96 are balanced over all verbs and nouns.
        seed: draws everything.
        size: side of the square frames in pixels, even, at least 98: decord2 cannot read narrower ones on every CPU.
        fps: frames per second.
        chunk_seconds: length of the chunk files; 0 writes every video as one file.
        workers: threads; None takes one per core, at most 8.
        progress: called as progress(videos_done, videos) after every video.

    Returns:
        Kitchen(root, annotations, videos), all pathlib.Path.

    Raises:
        ValueError: a setting out of range.
        FileExistsError: `root` holds other things, or a corpus of other settings; nothing is overwritten.
        OSError: `root` cannot be written.
        ImportError: PyAV is missing.
    """
    for name, value, least in (
        ("train_clips", train_clips, 1),
        ("test_clips", test_clips, 1),
        ("seed", seed, 0),
        ("size", size, 98),
        ("fps", fps, 8),
        ("chunk_seconds", chunk_seconds, 0),
        ("workers", 1 if workers is None else workers, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    if size % 2:
        raise ValueError(f"size: expected an even number of pixels, as H.264's colours need, got {size}")
    settings = {"version": _VERSION, "train_clips": train_clips, "test_clips": test_clips, "seed": seed}
    settings |= {"size": size, "fps": fps, "chunk_seconds": chunk_seconds}
    root = Path(root)
    corpus = Kitchen(root, root / "annotations", root / "videos")
    if _found(root, settings):
        return corpus
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError(f"making videos needs PyAV ({error}): pip install evaat-fast[video]") from error
    root.parent.mkdir(parents=True, exist_ok=True)
    made_root = not root.exists()
    # Beside its final place, so that the renaming at the end is atomic; inside it where an empty folder is there already,
    # which may be a mount point or somebody's current folder, and whose stamp is moved last.
    place = root.parent if made_root else root
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name[:100]}-", dir=place))
    try:
        _make(staging, settings, workers, progress)
        (staging / _STAMP).write_text(json.dumps(settings, indent=1) + "\n")
        staging.chmod(0o777 & ~_umask())
        if not made_root:
            for path in sorted(staging.iterdir(), key=lambda p: p.name == _STAMP):
                path.rename(root / path.name)
            return corpus
        try:
            staging.rename(root)
        except OSError:
            # Another process finished the same corpus first.
            if not _found(root, settings):
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return corpus


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _found(root, settings):
    """Whether the finished corpus is there; raises if something else is."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise FileExistsError(f"root: {root} exists and is not a folder")
    stamp = root / _STAMP
    if stamp.is_file():
        try:
            there = json.loads(stamp.read_text())
        except ValueError:
            there = {}
        if there == settings:
            return True
        differing = [k for k in settings if not isinstance(there, dict) or there.get(k) != settings[k]]
        raise FileExistsError(f"root: {root} holds a toy kitchen of another {', '.join(differing)}; remove it or name another")
    if any(root.iterdir()):
        raise FileExistsError(f"root: {root} is not empty and holds no toy kitchen; name a new or an empty folder")
    return False


def _make(folder, settings, workers, progress):
    videos, jobs = [], []
    for split, count, first in (("train", settings["train_clips"], 1), ("test", settings["test_clips"], 0)):
        rng = np.random.default_rng((settings["seed"], first))
        videos += [(split, *video) for video in _plan(rng, count, settings["fps"])]
    # Numbered over both splits, four videos to a participant, so that no participant is in both.
    train = sum(v[0] == "train" for v in videos)
    offset = -(-train // 4) * 4
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, (split, seed, segments) in enumerate(videos):
        place = number if split == "train" else offset + number - train
        name = f"P{place // 4 + 1:02d}_{place % 4:02d}"
        target = folder / "videos" / name.split("_")[0] / f"{name}.MP4"
        shape = (settings["size"], settings["fps"], seed, settings["chunk_seconds"])
        jobs.append((target, segments, *shape, number == 0 and settings["chunk_seconds"] > 0))
        rows[split] += [_row(name, i, s, settings["fps"]) for i, s in enumerate(segments)]
    _annotate(folder / "annotations", rows)
    (folder / "videos").mkdir()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(encode_video, *job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _plan(rng, count, fps):
    """Splits `count` clips over videos: a list of (seed, [Segment])."""
    kinds = len(VERBS) * len(COLOURS) * len(SHAPES)
    deck = np.concatenate([rng.permutation(kinds) for _ in range(-(-count // kinds))])[:count]
    rng.shuffle(deck)
    videos = []
    for first in range(0, count, _CLIPS_PER_VIDEO):
        segments, at = [], 0
        for kind in deck[first : first + _CLIPS_PER_VIDEO]:
            verb, noun = divmod(int(kind), len(COLOURS) * len(SHAPES))
            length = int(rng.integers(round(0.9 * fps), round(1.2 * fps) + 1)) + 2 * _MARGIN
            segments.append(Segment(verb, *divmod(noun, len(SHAPES)), at, length, int(rng.integers(2**62))))
            at += length
        videos.append((int(rng.integers(2**62)), segments))
    return videos


def _row(video, number, segment, fps):
    colour, shape = list(COLOURS)[segment.colour], SHAPES[segment.shape]
    nouns, classes = [shape, colour], [len(COLOURS) + segment.shape, segment.colour]
    verb = VERBS[segment.verb]
    # The direction follows the object, as narrators say it: "push red box left".
    words = verb.split() if verb.startswith("push") else [verb]
    narration = " ".join([words[0], colour, shape, *words[1:]])
    start, stop = segment.start + _MARGIN, segment.start + segment.length - _MARGIN
    return {
        "narration_id": f"{video}_{number}",
        "participant_id": video.split("_")[0],
        "video_id": video,
        "narration_timestamp": _clock((start + stop) / 2 / fps, 3),
        "start_timestamp": _clock(start / fps, 2),
        "stop_timestamp": _clock(stop / fps, 2),
        "start_frame": start,
        "stop_frame": stop,
        "narration": narration,
        "verb": verb.replace(" ", "-"),
        "verb_class": segment.verb,
        "noun": nouns[0],
        "noun_class": classes[0],
        "all_nouns": str(nouns),
        "all_noun_classes": str(classes),
    }


def _clock(seconds, digits):
    seconds = round(seconds, digits)
    return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:0{digits + 3}.{digits}f}"


def _annotate(folder, rows):
    folder.mkdir(parents=True)
    for split, table in rows.items():
        first: dict[str, dict[str, Any]] = {}
        for row in table:
            first.setdefault(row["narration"], row)
        sentences = [
            row | {"verb_classes": row["verb_class"], "nouns": row["all_nouns"], "noun_classes": row["all_noun_classes"]}
            for row in first.values()
        ]
        columns = _TRAIN_SENTENCE_COLUMNS if split == "train" else _TRAIN_SENTENCE_COLUMNS[:2]
        _write(folder / f"EPIC_100_retrieval_{split}.csv", _COLUMNS, table)
        _write(folder / f"EPIC_100_retrieval_{split}_sentence.csv", columns, sentences)


def _write(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
