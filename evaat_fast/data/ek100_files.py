"""Reads the annotation files of EPIC-Kitchens-100 retrieval and finds its videos."""

import ast
import csv

_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "narration",
    "verb_class",
    "all_noun_classes",
)


def read_clips(folder, split):
    """The rows of EPIC_100_retrieval_{split}.csv as dict(id, participant, video, start, stop, text, verb, nouns)."""
    return _read(folder / f"EPIC_100_retrieval_{split}.csv", _COLUMNS, _clip)


def read_captions(folder, split, clips):
    """For each row of the sentence file the number of the clip that it is the narration of.

    narration_id decides: the published test file's text is shifted against it in six rows, so published evaluations
    take the clip's own narration.
    """
    path = folder / f"EPIC_100_retrieval_{split}_sentence.csv"
    row_of = {c["id"]: i for i, c in enumerate(clips)}
    names = _read(path, ("narration_id",), lambda row: row["narration_id"])
    unknown = [n for n in names if n not in row_of]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} narration ids are not in the clips' file, first {unknown[0]!r}")
    return [row_of[n] for n in names]


def find_videos(root, clips, split):
    """{video: path of its file or of its folder of chunks}."""
    if not root.is_dir():
        raise FileNotFoundError(f"video_root: there is no folder {str(root)!r}")
    paths, missing = {}, []
    for name, participant in {c["video"]: c["participant"] for c in clips}.items():
        places = [root / participant / f"{name}{suffix}" for suffix in (".MP4", ".mp4")]
        path = next((p for p in places if p.exists()), None)
        if path is None:
            missing.append(str(places[0]))
        paths[name] = path
    if missing:
        count = f"{len(missing)} of the {len(paths)} videos of the {split} split"
        raise FileNotFoundError(f"video_root: {count} are missing, first {missing[0]!r}")
    return paths


def _clip(row):
    clip = {
        "id": row["narration_id"],
        "participant": row["participant_id"],
        "video": row["video_id"],
        "start": _seconds(row["start_timestamp"]),
        "stop": _seconds(row["stop_timestamp"]),
        "text": row["narration"],
        "verb": int(row["verb_class"]),
        "nouns": frozenset(int(n) for n in ast.literal_eval(row["all_noun_classes"])),
    }
    if not 0 <= clip["start"] <= clip["stop"]:
        raise ValueError(f"stop_timestamp {row['stop_timestamp']} lies before start_timestamp {row['start_timestamp']}")
    return clip


def _seconds(text):
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _read(path, columns, parse):
    """The rows of a CSV file, each through `parse`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"annotations: there is no folder {str(path.parent)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"annotations: there is no file {str(path)!r}")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in columns if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(missing)}")
        rows = []
        for row in reader:
            try:
                rows.append(parse(row))
            except (ValueError, SyntaxError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: line {reader.line_num} cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows
