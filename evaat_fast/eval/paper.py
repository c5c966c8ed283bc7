"""The published numbers of EVA02-AT and of what it is compared with, as data, and ours beside them.

    paper.rows("ek100-mir", "zero-shot")
    print(paper.table("ek100-mir", "zero-shot", [("ours", metrics)]))
    paper.differences("ek100-mir", protocol)

All rows are as EVA02-AT's authors print them (arXiv 2506.14356v1): Table I, EK-100 retrieval after fine-tuning; Table II,
EgoMCQ and Charades-Ego; Table III, EK-100 retrieval zero-shot. A star is the authors' own run of another's model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Task = Literal["ek100-mir", "egomcq", "charades-ego"]
Stage = Literal["zero-shot", "fine-tuned"]
TASKS: tuple[Task, ...] = get_args(Task)
STAGES: tuple[Stage, ...] = get_args(Stage)
PAPER = "arXiv 2506.14356v1"

# Metric and heading, in the order of a table's columns.
COLUMNS: dict[str, dict[str, str]] = {
    "ek100-mir": {
        "mAP_v2t": "mAP V>T",
        "mAP_t2v": "mAP T>V",
        "mAP": "mAP avg",
        "nDCG_v2t": "nDCG V>T",
        "nDCG_t2v": "nDCG T>V",
        "nDCG": "nDCG avg",
    },
    "egomcq": {"inter": "inter", "intra": "intra"},
    "charades-ego": {"mAP": "mAP"},
}

# How many there are in the published test set; a corpus of other counts is another one. EgoMCQ's are not known to us.
COUNTS: dict[str, dict[str, int]] = {
    "ek100-mir": {"clips": 9668, "captions": 3842},
    "egomcq": {},
    "charades-ego": {"classes": 157},
}

__all__ = ["COLUMNS", "COUNTS", "PAPER", "STAGES", "TASKS", "Row", "Stage", "Task", "differences", "rows", "table"]


@dataclass(frozen=True)
class Row:
    """One model's numbers on one task, in per cent.

    Args:
        task, stage: of TASKS, STAGES. model: its name as printed. pretraining: the corpus of videos. metrics: by the names
            of COLUMNS. source: where it is printed.
    """

    task: Task
    stage: Stage
    model: str
    pretraining: str
    metrics: Mapping[str, float]
    source: str


def _retrieval(stage: Stage, where: str, lines: str) -> list[Row]:
    """Rows of "model | pretraining | mAP V>T / T>V / average | nDCG likewise"."""
    found = []
    for line in lines.strip().splitlines():
        model, pretraining, *numbers = (part.strip() for part in line.split("|"))
        values = [float(x) for part in numbers for x in part.split("/")]
        named = dict(zip(COLUMNS["ek100-mir"], values, strict=True))
        found.append(Row("ek100-mir", stage, model, pretraining, named, f"{PAPER}, {where}"))
    return found


_TABLE_III = """
    Random           | -        |  5.7/ 5.6/ 5.7 | 10.8/10.9/10.9
    AVION-B          | EgoClip  | 31.7/25.1/28.4 | 31.0/28.1/29.5
    EVA02-AT-B       | EgoClip  | 33.5/26.8/30.2 | 32.8/29.4/31.1
    AVION-L*         | EgoClip  | 33.6/27.1/30.4 | 31.8/29.0/30.4
    EVA02-AT-L       | EgoClip  | 42.1/35.0/38.5 | 37.2/33.9/35.5
    LaViLa-B         | EgoClip+ | 35.1/26.6/30.9 | 33.7/30.4/32.0
    AVION-B          | EgoClip+ | 37.1/28.7/32.9 | 34.4/31.0/32.7
    EVA02-AT-B       | EgoClip+ | 38.3/30.3/34.3 | 36.0/32.2/34.1
    LaViLa-L         | EgoClip+ | 40.0/32.2/36.1 | 36.1/33.2/34.6
    AVION-L          | EgoClip+ | 41.7/33.5/37.6 | 36.8/33.9/35.3
    EVA02-AT-L       | EgoClip+ | 43.2/34.5/38.9 | 38.4/33.9/36.2
"""
_TABLE_I = """
    AVION-B*         | images   | 46.8/39.9/43.4 | 60.0/58.0/59.0
    AVION-B + SMS    | images   | 53.8/41.4/47.6 | 63.2/59.2/61.2
    EVA02-AT-B + SMS | images   | 57.6/45.0/51.3 | 67.1/63.0/65.0
    AVION-L*         | images   | 51.0/44.9/47.9 | 64.7/62.5/63.6
    AVION-L + SMS    | images   | 60.0/47.8/53.9 | 68.7/64.5/66.6
    EVA02-AT-L + SMS | images   | 63.8/52.4/58.1 | 71.9/67.9/69.9
    AVION-B*         | EgoClip  | 53.3/46.6/50.0 | 66.3/64.0/65.1
    AVION-B + SMS    | EgoClip  | 60.9/48.8/54.9 | 69.2/65.5/67.3
    EVA02-AT-B + SMS | EgoClip  | 63.2/51.3/57.3 | 71.0/67.0/69.0
    AVION-B          | EgoClip+ | 55.9/47.8/51.8 | 68.2/65.4/66.8
    AVION-B + SMS    | EgoClip+ | 62.9/51.1/57.0 | 71.2/67.3/69.2
    EVA02-AT-B + SMS | EgoClip+ | 64.6/53.4/59.0 | 72.6/69.0/70.8
    AVION-L          | EgoClip+ | 57.9/51.1/54.5 | 70.4/67.6/69.0
    AVION-L + SMS    | EgoClip+ | 67.3/56.9/62.1 | 74.7/71.2/73.0
    EVA02-AT-L + SMS | EgoClip+ | 68.7/58.3/63.5 | 76.1/72.3/74.2
"""
# model | pretraining | EgoMCQ inter/intra | Charades-Ego zero-shot/fine-tuned, and fine-tuned with SMS
_TABLE_II = """
    EVA02-AT-B | EgoClip  | 94.8/62.0 |           |
    EVA02-AT-L | EgoClip  | 96.2/66.0 |           |
    AVION-B*   | EgoClip+ | 94.5/61.4 | 27.4/34.8 |
    AVION-L*   | EgoClip+ | 95.4/64.5 | 29.9/39.7 |
    EVA02-AT-B | EgoClip+ | 95.0/63.2 | 27.8/36.1 | 38.0
    EVA02-AT-L | EgoClip+ | 95.9/66.5 | 30.9/42.2 | 42.5
"""


def _table_ii() -> list[Row]:
    found, source = [], f"{PAPER}, Table II"
    for line in _TABLE_II.strip().splitlines():
        model, pretraining, mcq, charades, sms = (part.strip() for part in line.split("|"))
        inter, intra = map(float, mcq.split("/"))
        found.append(Row("egomcq", "zero-shot", model, pretraining, {"inter": inter, "intra": intra}, source))
        if charades:
            for stage, value in zip(STAGES, map(float, charades.split("/")), strict=True):
                found.append(Row("charades-ego", stage, model, pretraining, {"mAP": value}, source))
        if sms:
            found.append(Row("charades-ego", "fine-tuned", f"{model} + SMS", pretraining, {"mAP": float(sms)}, source))
    return found


_ROWS = (*_retrieval("zero-shot", "Table III", _TABLE_III), *_retrieval("fine-tuned", "Table I", _TABLE_I), *_table_ii())

# What the paper says of how it was measured; None: it does not say.
_EVERYWHERE: dict[str, Any] = {"image_size": 224, "crop": None, "normalisation": None, "sampler": None, "tricks": []}
_PROTOCOL: dict[str, dict[str, Any]] = {
    "ek100-mir": {**_EVERYWHERE, "num_frames": 16, "captions": "own narration by narration_id"},
    "egomcq": {**_EVERYWHERE, "num_frames": None, "scores": "cosine"},
    "charades-ego": {**_EVERYWHERE, "num_frames": 16, "scores": None, "prompt": None},
}
_WORDS = {
    "num_frames": "frames",
    "image_size": "image size",
    "crop": "crop",
    "normalisation": "normalisation",
    "sampler": "choice of frames",
    "captions": "captions",
    "scores": "scores",
    "prompt": "prompt",
    "tricks": "tricks",
    "frames": "order of frames",
}


def rows(task: str, stage: str | None = None) -> list[Row]:
    """The published rows of a task, in the order of the tables.

    Raises:
        ValueError: an unknown task or stage.
    """
    _known("task", task, TASKS)
    if stage is not None:
        _known("stage", stage, STAGES)
    return [row for row in _ROWS if row.task == task and stage in (None, row.stage)]


def differences(task: str, protocol: Mapping[str, Any]) -> list[str]:
    """Where `protocol`, how something was measured, departs from the paper's, a sentence each; and what the paper leaves open.

    Args:
        task: of TASKS. protocol: by the names "num_frames", "image_size", "crop", "normalisation", "sampler", "captions",
            "scores", "prompt", "tricks", "frames"; those that are there are compared.
    """
    _known("task", task, TASKS)
    theirs, found, open_ = {"frames": "ordered", **_PROTOCOL[task]}, [], []
    for name, words in _WORDS.items():
        if name not in protocol or name not in theirs:
            continue
        mine, other = _text(protocol[name]), theirs[name]
        if other is None:
            open_.append(f"{words} (ours: {mine})")
        elif protocol[name] != other:
            found.append(f"{words}: ours {mine}, the paper's {_text(other)}")
    if open_:
        found.append(f"the paper does not say: {', '.join(open_)}")
    return found


def table(task: str, stage: str, ours: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """The published rows of a task and stage and, below a line, `ours`: (name, metrics); a number that is not finite is "-"."""
    columns = COLUMNS[task]
    shown = [(row.model, row.pretraining, row.metrics) for row in rows(task, stage)]
    wide = max(len(name) for name, *_ in (*shown, *ours, ("model",)))
    lines = [f"{'':<{wide}}  {'videos':<9}" + "".join(f"{heading:>10}" for heading in columns.values())]
    for name, pretraining, metrics in shown:
        lines.append(f"{name:<{wide}}  {pretraining:<9}" + _cells(metrics, columns, 1))
    if ours:
        lines.append("-" * len(lines[0]))
    lines += [f"{name:<{wide}}  {'':<9}" + _cells(metrics, columns, 2) for name, metrics in ours]
    return "\n".join(lines)


def _cells(metrics, columns, digits):
    values = [metrics.get(name, math.nan) for name in columns]
    return "".join(f"{value:>10.{digits}f}" if math.isfinite(value) else f"{'-':>10}" for value in values)


def _text(value):
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def _known(name, value, known):
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
