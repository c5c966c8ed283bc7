"""Turns a download into what training and evaluation open: checks it, converts its metadata, builds its relevancy.

    report = prepare("ek100-mir", "epic-kitchens-100-annotations/retrieval_annotations", "prepared", videos="EK100_256p")
    print(report)

    prepared/ek100-mir/
      train.arrow, train.parquet, test.arrow, test.parquet       ClipTables
      train-relevancy.npz, test-relevancy.npz                    table [K, K], clip_kind, caption_kind, caption_clip
      prepared.json                                              what each was made of: size, time and hash of its sources

It may be run again at any time: what is up to date stays, an interrupted run goes on where it was, and no file is ever seen
half written.

| data set | source | tables, and what is written beside them |
|---|---|---|
| ek100-mir | the folder retrieval_annotations, or the one it is in | train, test; relevancy |
| ek100-clips | the folder of the hub | train, test |
| egoclip | egoclip.csv or its folder | train |
| egoclip-plus | the folder with LaViLa's pickles | train (rephraser and narrator), human, uncovered, val |
| egomcq | egomcq.json or its folder | test; test-questions.npz: texts, choices [Q, 5], answers, types |
| charades-ego | the folder CharadesEgo | test (whole videos), train, val (clips); test-classes.json |
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast._files import sha256, write_atomically, write_json
from evaat_fast.data import prepare_videos
from evaat_fast.data.kinds import kinds_of, kinds_relevancy
from evaat_fast.data.readers import charades, egoclip, egoclip_plus, egomcq, ek100, ek100_clips
from evaat_fast.data.table import ClipTable

__all__ = ["DATASETS", "Report", "prepare"]

_VERSION = 1  # of what is written
_RECORD = "prepared.json"
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class _Table:
    """A table to be made: `read` makes it of `files`; `extra` writes what belongs to it, and returns what to say of it."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Any]
    extra: Callable[[Any, Path], str | None] | None = None
    published: int | None = None  # rows of the published file


@dataclass
class Report:
    """What was done. str() is a table of it. tables: {name: path of the .arrow}. complete: nothing is missing or damaged."""

    dataset: str
    out: Path
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, Path] = field(default_factory=dict)
    complete: bool = True
    videos: Path | None = None

    @property
    def next(self) -> str:
        """What to run then."""
        if not self.complete:
            return "get what is missing and run this again"
        place = f"--annotations {self.out} --videos {self.videos or 'DIR'}"
        if self.dataset in ("egomcq", "charades-ego"):
            return f"evaat-fast eval --task {self.dataset} --checkpoint RUN/last.pt {place}"
        keys = f'data.kind = "{self.dataset}", data.annotations = "{self.out}", data.videos = "{self.videos or "DIR"}"'
        return f"evaat-fast train --keys > run.toml; there {keys}; then evaat-fast train run.toml"

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows) if self.rows else 0
        lines = [f"{self.dataset} in {self.out}"]
        lines += [f"  {name:<{width}}  {count:>18}  {said}" for name, count, said in self.rows]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def prepare(
    dataset: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    videos: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prepares a data set.

    Args:
        dataset: one of DATASETS. source: its file or folder of metadata. out: a folder; `out`/dataset is made in it.
        videos: the folder of its videos, to be checked too; for ek100-clips None is `source`/clips.
        force: make everything anew. progress: called as progress(what, done, of), bytes or files.

    Returns:
        A Report.

    Raises:
        FileNotFoundError: none of its files is there; the message names them. ValueError: another data set, a file that
        cannot be read. OSError: `out` cannot be written. ImportError: pyarrow is missing.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}")
    source, folder = Path(source), Path(out) / dataset
    tasks = DATASETS[dataset](source)
    ready = [task for task in tasks if all(path.exists() for path in task.files)]
    if not ready:
        absent = [str(path) for task in tasks for path in task.files if not path.exists()]
        raise FileNotFoundError(f"{dataset}: expected {' or '.join(dict.fromkeys(absent))}; there is none of them")
    folder.mkdir(parents=True, exist_ok=True)
    record, report = _Record(folder / _RECORD), Report(dataset, folder)
    for task in tasks:
        if task in ready:
            _convert(task, folder, record, report, force, progress)
        else:
            absent = [path.name for path in task.files if not path.exists()]
            report.rows.append((task.name, "not there", ", ".join(absent)))
    if videos is None and dataset == "ek100-clips":
        videos = source / "clips"
    if videos is not None:
        report.videos = Path(videos)
        _look(Path(videos), record, report, progress)
    return report


def _convert(task, folder, record, report, force, progress):
    arrow = folder / f"{task.name}.arrow"
    stamps = {str(path): _stamp(path) for path in task.files}
    made = record.data["tables"].get(task.name)
    fresh = not force and made is not None and all((folder / name).is_file() for name in made["outputs"])
    if fresh and _same(made["sources"], stamps, progress):
        made["sources"] = {path: [*stamp, made["sources"][path][2]] for path, stamp in stamps.items()}
        record.save()
        said = "up to date"
    else:
        sources = {path: [*stamp, _digest(Path(path), progress)] for path, stamp in stamps.items()}
        if progress is not None:
            progress(f"reading {task.files[0].name}", 0, 1)
        result = task.read()
        table = result if isinstance(result, ClipTable) else result.clips
        note = task.extra(result, folder) if task.extra else None
        table.save(folder / f"{task.name}.parquet")
        table.save(arrow)
        outputs = {f"{task.name}.parquet", arrow.name, *(path.name for path in folder.glob(f"{task.name}-*"))}
        facts = {"clips": len(table), "videos": len(table.videos()), "note": note, "skipped": _counted(table.metadata)}
        made = record.data["tables"][task.name] = {"sources": sources, "outputs": sorted(outputs), **facts}
        record.save()
        said = f"{arrow.name}, {arrow.stat().st_size / 1e6:,.1f} MB"
    published = f" (published: {task.published:,})" if task.published and task.published != made["clips"] else ""
    said = f"{made['videos']:,} videos; {said}{published}"
    if made["skipped"]:
        said += f"; {made['skipped']:,} rows left out"
    report.rows.append((task.name, f"{made['clips']:,} clips", said))
    report.tables[task.name] = arrow
    if made["note"]:
        report.notes.append(f"{task.name}: {made['note']}")


def _counted(metadata):
    """How many rows a reader says it left out, by reason, or by file and reason."""
    skipped = metadata.get("skipped", {})
    return sum(sum(n.values()) if isinstance(n, dict) else n for n in skipped.values())


def _look(videos, record, report, progress):
    for name, path in report.tables.items():

        def show(done, of, name=name):
            if progress is not None:
                progress(f"videos of {name}", done, of)

        def keep(facts):
            record.data["videos"] |= facts
            record.save()

        found = prepare_videos.check(ClipTable.open(path), videos, known=record.data["videos"], progress=show, keep=keep)
        keep(found.known)
        report.rows.append((f"{name} videos", "complete" if found.complete else "INCOMPLETE", str(found)))
        report.complete &= found.complete


class _Record:
    """prepared.json, written all at once. One that cannot be read is made anew, with everything it speaks of."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.data = json.loads(path.read_text())
            if self.data["version"] != _VERSION or not {"tables", "videos"} <= set(self.data):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            self.data = {"version": _VERSION, "tables": {}, "videos": {}}

    def save(self) -> None:
        write_atomically(self.path, lambda file: file.write(json.dumps(self.data, indent=1).encode()))


def _stamp(path):
    if path.is_dir():
        return [sum(1 for _ in path.rglob("*")), 0]
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _same(sources: Mapping[str, list[Any]], stamps: Mapping[str, list[int]], progress: Progress | None) -> bool:
    """Whether the sources are what they were: by size and time, or, where only the time is another, by their hash."""
    if set(sources) != set(stamps) or any(sources[path][0] != stamp[0] for path, stamp in stamps.items()):
        return False
    changed = [path for path, stamp in stamps.items() if Path(path).is_dir() or sources[path][:2] != stamp]
    return all(_digest(Path(path), progress) == sources[path][2] for path in changed)


def _digest(path, progress):
    """SHA-256 of a file, or of the names in a folder."""
    if path.is_dir():
        return hashlib.sha256("\n".join(sorted(str(p.relative_to(path)) for p in path.rglob("*"))).encode()).hexdigest()
    size = path.stat().st_size
    if progress is None or size <= 1 << 26:
        return sha256(path)
    return sha256(path, lambda done: progress(f"checking {path.name}", done, size))


def _ek100(source):
    folder = source if (source / "EPIC_100_retrieval_test.csv").exists() else source / "retrieval_annotations"
    folder = folder if folder.is_dir() else source
    tasks = []
    for split, count in (("train", 67217), ("test", 9668)):
        files = [folder / f"EPIC_100_retrieval_{split}{end}.csv" for end in ("", "_sentence")]
        name = f"caption_relevancy_EPIC_100_retrieval_{split}.pkl"
        files += [path for path in (folder / "relevancy" / name, folder / name) if path.is_file()][:1]
        tasks.append(_ek100_task(folder, split, tuple(files), count))
    return tasks


def _ek100_task(folder, split, files, count):
    def extra(table, out):
        rows = ek100.captions(folder, split, table)
        kinds, numbers = kinds_of(table)
        kind = numbers.numpy()
        arrays = {"table": kinds_relevancy(kinds).numpy(), "clip_kind": kind, "caption_kind": kind[rows]}
        write_atomically(out / f"{split}-relevancy.npz", lambda file: np.savez(file, **arrays, caption_clip=rows))
        found = ek100.check_relevancy(folder, split, table, rows)
        return f"{len(rows):,} captions; {found or 'relevancy from the classes'}"

    return _Table(split, files, lambda: ek100.read(folder, split), extra, count)


def _ek100_clips(source):
    annotations, tasks = source / "epic-kitchens-100-annotations", []
    for split, name in (("train", "EPIC_100_train.csv"), ("test", "EPIC_100_validation.csv")):
        read = _bound(ek100_clips.read, source, split)
        tasks.append(_Table(split, (annotations / name, source / "clips"), read, lambda table, _: _outside(table)))
    return tasks


def _outside(table):
    said = f"{table.metadata['outside']:,} annotated clips are of videos that the set leaves out"
    return said + (f", {table.metadata['missing']:,} of its own are missing" if table.metadata["missing"] else "")


def _egoclip(source):
    path = source / "egoclip.csv" if source.is_dir() else source
    return [_Table("train", (path,), lambda: egoclip.read(path), None, 3847723)]


def _egoclip_plus(source):
    names = egoclip_plus.FILES
    both = tuple(source / names[kind] for kind in egoclip_plus.PRETRAINING)
    tasks = [_Table("train", both, lambda: egoclip_plus.read(source, "train"))]
    for kind, split in (("train", "train"), ("uncovered", "train"), ("val", "val")):
        task = "human" if kind == "train" else kind
        tasks.append(_Table(task, (source / names[kind],), _bound(egoclip_plus.read, source / names[kind], split)))
    return tasks


def _egomcq(source):
    path = source / "egomcq.json" if source.is_dir() else source

    def extra(found, out):
        arrays = {"texts": np.array(found.texts), "choices": found.choices, "answers": found.answers, "types": found.types}
        write_atomically(out / "test-questions.npz", lambda file: np.savez(file, **arrays))
        inter = int((found.types == egomcq.INTER).sum())
        return f"{len(found):,} questions, {inter:,} inter-video (type 1) and {len(found) - inter:,} intra-video (type 2)"

    return [_Table("test", (path,), lambda: egomcq.read(path), extra)]


def _charades(source):
    names = source / "Charades_v1_classes.txt"

    def extra(table, out):
        write_json(out / "test-classes.json", charades.classes(source))
        bare = sum(len(labels) == 0 for labels in table.column("labels"))
        return f"157 classes; {bare:,} videos have none" if bare else "157 classes"

    tasks = [_Table("test", (source / "CharadesEgo_v1_test_only1st.csv", names), _bound(charades.read, source, "test"), extra)]
    for split, csv in (("train", "train"), ("val", "test")):
        files = [source / f"metadata_filtered_{split}.pkl"]
        if not files[0].is_file():
            files = [source / "metadata_train.csv"] if split == "train" else []
        if not files or not files[0].is_file():
            files = [source / f"CharadesEgo_v1_{csv}_only1st.csv"]
        tasks.append(_Table(split, (*files, names), _bound(charades.read, source, split)))
    return tasks


def _bound(read, *arguments):
    return lambda: read(*arguments)


DATASETS: dict[str, Callable[[Path], list[_Table]]] = {
    "ek100-mir": _ek100,
    "ek100-clips": _ek100_clips,
    "egoclip": _egoclip,
    "egoclip-plus": _egoclip_plus,
    "egomcq": _egomcq,
    "charades-ego": _charades,
}
