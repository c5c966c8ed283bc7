"""Writes the toy kitchen once more in every layout and every format of metadata that the real data sets come in.

    corpus = kitchen.generate("toy-kitchen")
    made = write_all(corpus)          # toy-kitchen/formats; made.egoclip, made.egomcq, ... are paths

    formats/
      ek100/retrieval_annotations/            EPIC_100_retrieval_{train,test}.csv, _sentence.csv, relevancy/*.pkl
      ek100/videos/P01/P01_00.MP4             whole files, as LaViLa's
      ek100-clips/                            clips/P01/P01_100_0.mp4, epic-kitchens-100-annotations/
      ego4d/                                  egoclip.csv, ego4d_{train,val}.pkl, rephraser, narrator, uncovered, egomcq.json
      ego4d/{full_scale,video_15s,video_288px,video_chunked}/   whole, AVION's 15 s, LaViLa's 300 s, EgoVLP's 600 s by number
      charades-ego/CharadesEgo/               CSVs, classes, metadata_filtered_{train,val}.pkl, metadata_train.csv
      charades-ego/CharadesEgo_v1_480/        K0000EGO.mp4, six actions each

Pictures are the corpus's own: whole files and chunks hold its packets; clips and Charades' videos are encoded again from its
frames. The readers' docstrings say where each format is from.
"""

import csv
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaat_fast.data.kitchen import COLOURS, SHAPES, VERBS, Kitchen
from evaat_fast.data.kitchen_layouts import cut, whole

__all__ = ["Formats", "write_all"]

_DONE = "formats.json"
_VERSION = 1
_ACTIONS = 6  # of a Charades-Ego video
_CLASSES = 157  # which Charades has; the kitchen fills the first 96
_REPHRASED = ("#C C {}", "#C C carefully {}", "#C the person {}")
_NARRATED = (
    "#C C {}", "#C C {} with a hand", "#C C {} again", "#C C {} on the table", "#C C slowly {}",
    "#C C then {}", "#C C {} in the kitchen", "#C C {} with both hands", "#C C quickly {}", "#C C {} once more",
)  # fmt: skip
_CHARADES = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length".split(",")
_EGOCLIP = (
    "clip_idx video_uid video_dur narration_source narration_ind narration_time clip_start clip_end clip_text tag_verb tag_noun"
).split()


class Formats(NamedTuple):
    """Where each format lies: what its reader, or `evaat-fast prepare`, takes."""

    root: Path
    ek100: Path  # retrieval_annotations
    ek100_videos: Path
    ek100_clips: Path
    egoclip: Path  # egoclip.csv
    ego4d: Path  # the folder with the pickles
    egomcq: Path  # egomcq.json
    ego4d_videos: dict[str, Path]  # by layout: full_scale, video_15s, video_288px, video_chunked
    charades: Path  # CharadesEgo
    charades_videos: Path


def write_all(corpus: Kitchen, *, workers: int | None = None, progress: Callable[[int, int], object] | None = None) -> Formats:
    """Makes `corpus.root`/formats, or finds it there; the corpus itself stays as it is.

    Args:
        corpus: of `kitchen.generate`. workers: threads; None takes one per core, at most 8.
        progress: called as progress(videos_done, videos).

    Returns:
        Formats, all paths.

    Raises:
        OSError: the folder cannot be written. ImportError: PyAV is missing.
    """
    made = _places(corpus.root / "formats")
    stamp = made.root / _DONE
    if stamp.is_file() and stamp.read_text() == _stamp():
        return made
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError(f"making videos needs PyAV ({error}): pip install evaat-fast[video]") from error
    staging = Path(tempfile.mkdtemp(prefix=".formats-", dir=corpus.root))
    try:
        _write(corpus, _places(staging), workers, progress)
        (staging / _DONE).write_text(_stamp())
        staging.chmod(corpus.annotations.stat().st_mode & 0o777)
        shutil.rmtree(made.root, ignore_errors=True)
        staging.rename(made.root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return made


def _stamp():
    return json.dumps({"version": _VERSION}) + "\n"


def _places(root):
    ego4d, charades = root / "ego4d", root / "charades-ego"
    layouts = {name: ego4d / name for name in ("full_scale", "video_15s", "video_288px", "video_chunked")}
    return Formats(
        root,
        root / "ek100" / "retrieval_annotations",
        root / "ek100" / "videos",
        root / "ek100-clips",
        ego4d / "egoclip.csv",
        ego4d,
        ego4d / "egomcq.json",
        layouts,
        charades / "CharadesEgo",
        charades / "CharadesEgo_v1_480",
    )


def _write(corpus, made, workers, progress):
    from evaat_fast.data.readers import ek100

    for folder in (made.ek100, made.ek100_clips, made.ego4d, made.charades, made.charades_videos):
        folder.mkdir(parents=True)
    shutil.copytree(corpus.annotations, made.ek100, dirs_exist_ok=True)
    rows = {split: ek100.clips(corpus.annotations / f"EPIC_100_retrieval_{split}.csv") for split in ("train", "test")}
    _relevancy(made.ek100, rows)
    _cut_clips(corpus, made.ek100_clips)
    videos = list(dict.fromkeys((c["participant"], c["video"]) for split in rows.values() for c in split))
    charades = {split: _charades_videos(clips, 0 if split == "train" else 5000) for split, clips in rows.items()}
    lengths, jobs = {}, []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for participant, video in videos:
            source = corpus.videos / participant / f"{video}.MP4"
            clips = [c for split in rows.values() for c in split if c["video"] == video]
            pieces = {}
            if _extended(video):
                for clip in clips:
                    name = _renamed(video, clip["id"])
                    pieces[made.ek100_clips / "clips" / participant / f"{name}.mp4"] = (clip["start"], clip["stop"])
            for name, some in [pair for split in charades.values() for pair in split.items()]:
                if some[0]["video"] == video:
                    pieces[made.charades_videos / f"{name}.mp4"] = (some[0]["start"], some[-1]["stop"])
            jobs.append(pool.submit(_video, source, participant, video, made, pieces))
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                video, seconds = job.result()
                lengths[video] = seconds
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _egoclip(made, rows["train"], lengths)
    _pickles(made.ego4d, rows, lengths)
    _egomcq(made.egomcq, rows)
    _charades(made.charades, charades)


def _video(source, participant, video, made, pieces):
    """All files of one video: (its name, its seconds)."""
    target, uid = made.ek100_videos / participant / f"{video}.MP4", _uid(video)
    seconds = whole(source, target)
    if seconds > 300:
        raise ValueError(f"{video}: expected a video of at most 300 s, the shorter of the chunks, got {seconds:g} s")
    copies = {
        made.ego4d_videos["full_scale"] / f"{uid}.mp4": target,
        made.ego4d_videos["video_288px"] / f"{uid}.mp4" / "0.mp4": target,
        made.ego4d_videos["video_chunked"] / uid / "0.mp4": target,
    }
    chunks = sorted(source.iterdir()) if source.is_dir() else [source]
    for chunk in chunks:
        copies[made.ego4d_videos["video_15s"] / f"{uid}.mp4" / f"{chunk.stem if source.is_dir() else 0}.mp4"] = chunk
    for copy, original in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    cut(target, pieces)
    return video, seconds


def _uid(video):
    digest = hashlib.sha1(video.encode()).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))


def _extended(video):
    """Every second video, the first among them, is of the extension, whose numbers have three digits."""
    return int(video.split("_")[1]) % 2 == 0


def _renamed(video, name):
    participant, number = video.split("_")
    return name.replace(video, f"{participant}_{100 + int(number)}", 1) if _extended(video) else name


def _relevancy(folder, rows):
    from evaat_fast.data.kinds import kinds_of, kinds_relevancy
    from evaat_fast.data.readers import ek100

    (folder / "relevancy").mkdir()
    for split, clips in rows.items():
        table = ek100.table(clips)
        kinds, kind = kinds_of(table)
        matrix = kinds_relevancy(kinds)[kind][:, kind[ek100.captions(folder, split, table)]].double().numpy()
        with open(folder / "relevancy" / f"caption_relevancy_EPIC_100_retrieval_{split}.pkl", "wb") as file:
            pickle.dump(matrix, file)


def _cut_clips(corpus, folder):
    (folder / "epic-kitchens-100-annotations").mkdir()
    for split, name in (("train", "EPIC_100_train.csv"), ("test", "EPIC_100_validation.csv")):
        with open(corpus.annotations / f"EPIC_100_retrieval_{split}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["narration_id"] = _renamed(row["video_id"], row["narration_id"])
            row["video_id"] = _renamed(row["video_id"], row["video_id"])
        _table(folder / "epic-kitchens-100-annotations" / name, list(rows[0]), rows)


def _egoclip(made, clips, lengths):
    # Written as EgoVLP does: lines joined by tabs, nothing quoted.
    lines, place = ["\t".join(_EGOCLIP)], {}  # type: list[str], dict[str, int]
    for number, clip in enumerate(clips):
        index = place[clip["video"]] = place.get(clip["video"], -1) + 1
        middle = (clip["start"] + clip["stop"]) / 2
        nouns = sorted(clip["nouns"], reverse=True)
        values = (number, _uid(clip["video"]), round(lengths[clip["video"]], 6), f"narration_pass_{1 + number % 2}", index)
        times = (round(middle, 4), round(clip["start"], 6), round(clip["stop"], 6))
        lines.append("\t".join(map(str, (*values, *times, f"#C C {clip['text']}", [clip["verb"]], nouns))))
    made.egoclip.write_text("\n".join(lines) + "\n")


def _pickles(folder, rows, lengths):
    from evaat_fast.data.readers.egoclip_plus import FILES

    rng = np.random.default_rng(0)
    plain, rephrased, narrated, uncovered = [], [], [], []
    for clip in rows["train"]:
        key, text = (_uid(clip["video"]), clip["start"], clip["stop"]), clip["text"]
        plain.append((*key, f"#C C {text}"))
        rephrased.append((*key, [form.format(text) for form in _REPHRASED]))
        narrated.append((*key, [form.format(text) for form in _NARRATED], rng.uniform(0.5, 4, 10).tolist()))
        later = min(clip["stop"] + 0.2, lengths[clip["video"]])
        texts = [form.format("looks around") for form in _NARRATED[:5]]
        uncovered.append((key[0], clip["stop"], later, texts, rng.uniform(0.5, 4, 5).tolist()))
    val = [(_uid(c["video"]), c["start"], c["stop"], f"#C C {c['text']}") for c in rows["test"]]
    lists = {"train": plain, "val": val, "rephraser": rephrased, "narrator": narrated, "uncovered": uncovered}
    for kind, clips in lists.items():
        with open(folder / FILES[kind], "wb") as file:
            pickle.dump(clips, file, protocol=3)


def _egomcq(path, rows):
    """A question of either type for each test clip: inter with candidates of other videos, intra with those of its own."""
    rng = np.random.default_rng(0)
    test: list[Any] = rows["test"]
    questions: dict[str, Any] = {}
    others = test if len({c["video"] for c in test}) > 1 else test + rows["train"]
    for kind, pool in ((1, others), (2, test)):
        for clip in test:
            wrong, seen = [], {clip["text"]}
            for index in rng.permutation(len(pool)):
                candidate = pool[index]
                if (candidate["video"] == clip["video"]) == (kind == 2) and candidate["text"] not in seen:
                    wrong.append(candidate)
                    seen.add(candidate["text"])
                if len(wrong) == 4:
                    break
            if len(wrong) == 4:
                answer = int(rng.integers(5))
                choices = [*wrong[:answer], clip, *wrong[answer:]]
                given = {str(i): _choice(c) for i, c in enumerate(choices)}
                questions[str(len(questions))] = {"answer": answer, "query": _choice(clip), "choices": given, "types": kind}
    path.write_text(json.dumps(questions))


def _choice(clip):
    return {
        "video_uid": _uid(clip["video"]),
        "clip_start": clip["start"],
        "clip_end": clip["stop"],
        "clip_text": f"#C C {clip['text']}",
        "tag_verb": str([clip["verb"]]),
        "tag_noun": str(sorted(clip["nouns"], reverse=True)),
    }


def _charades_videos(clips, first):
    """{id: its clips}: some that follow one another, of one video."""
    found: dict[str, list[Any]] = {}
    for clip in clips:
        some = next(reversed(found.values()), None)
        if some is None or len(some) == _ACTIONS or some[0]["video"] != clip["video"]:
            found[f"K{first + len(found):04d}EGO"] = some = []
        some.append(clip)
    return found


def _charades(folder, splits):
    names = [f"{verb} a {colour} {shape}" for verb in VERBS for shape in SHAPES for colour in COLOURS]
    names += [f"Doing nothing with thing {i}" for i in range(len(names), _CLASSES)]
    (folder / "Charades_v1_classes.txt").write_text("".join(f"c{i:03d} {name}\n" for i, name in enumerate(names)))
    for split, found in splits.items():
        rows, trimmed, lines = [], [], ["id\tcls\tt_start\tt_end\tnarration"]
        for name, clips in found.items():
            begin, actions = clips[0]["start"], []
            for clip in clips:
                colour, shape = sorted(clip["nouns"])
                number = (clip["verb"] * len(SHAPES) + shape - len(COLOURS)) * len(COLOURS) + colour
                start, stop = round(clip["start"] - begin, 2), round(clip["stop"] - begin, 2)
                actions.append(f"c{number:03d} {start:.2f} {stop:.2f}")
                trimmed.append((name, start, stop, names[number]))
                lines.append(f"{name}\t{number}\t{start}\t{stop}\t{names[number]}")
            script = "A person stands in a kitchen. " + " ".join(f"They {c['text']}." for c in clips)
            row = {"id": name, "subject": "KTCN", "scene": "Kitchen", "quality": 6, "relevance": 7, "verified": "Yes"}
            row |= {"script": script, "objects": "cup;block;bottle", "descriptions": script, "actions": ";".join(actions)}
            rows.append(row | {"length": f"{clips[-1]['stop'] - begin:.2f}"})
        _table(folder / f"CharadesEgo_v1_{split}_only1st.csv", _CHARADES, rows)
        with open(folder / f"metadata_filtered_{'train' if split == 'train' else 'val'}.pkl", "wb") as file:
            pickle.dump(trimmed, file)
        if split == "train":
            (folder / "metadata_train.csv").write_text("\n".join(lines) + "\n")


def _table(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
