"""Whether clips can be what their table says, from metadata and the headers of the files alone: nothing is decoded.

report = check(data)          # data: a ClipDataset
print(report)                 # what is wrong, how many clips it touches, the first of them
report.usable                 # rows of the clips that nothing speaks against
"""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaat_fast.data import video as videos
from evaat_fast.data.dataset import ClipDataset, impossible
from evaat_fast.data.decode import Sums
from evaat_fast.data.layout import Source
from evaat_fast.data.table import ClipTable

__all__ = ["Finding", "Report", "check"]

_SHOWN = 3  # examples of a finding
# A clip's last frame may be that of the next second, and a chunk a frame short: less than this is no gap.
_SLACK = 0.5
# Clips and seconds of a video from which it would be strange that nothing happens after its first sixtieth.
_MANY, _LONG = 10, 300.0


@dataclass(frozen=True)
class Finding:
    """Something wrong. what: a short name. rows: int64, the clips it touches. examples: of them, in words.
    usable: whether they can be shown all the same."""

    what: str
    rows: np.ndarray
    examples: tuple[str, ...]
    usable: bool = False


@dataclass(frozen=True)
class Report:
    """What `check` found. clips: how many there are. files: how many headers were read."""

    clips: int
    files: int
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> np.ndarray:
        """int64: rows of the clips that cannot be shown, in order."""
        rows = [f.rows for f in self.findings if not f.usable]
        return np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64)

    @property
    def usable(self) -> np.ndarray:
        """int64: the rows of all others."""
        return np.setdiff1d(np.arange(self.clips), self.broken)

    @property
    def share(self) -> float:
        """Which share of the clips is broken."""
        return len(self.broken) / self.clips

    @property
    def worst(self) -> str:
        """What is wrong with the most of the broken clips, and with the first of those."""
        worst = max((f for f in self.findings if not f.usable), key=lambda f: len(f.rows))
        return f"most are {worst.what}, first {worst.examples[0]}"

    def __str__(self) -> str:
        lines = [f"{self.clips} clips, headers of {self.files} files read: " + ("" if self.findings else "nothing wrong found")]
        for finding in self.findings:
            share = f"{len(finding.rows)} clips ({100 * len(finding.rows) / self.clips:.3g} %)"
            lines.append(f"  {finding.what}: {share}" + (", used all the same" if finding.usable else ""))
            lines += [f"    {example}" for example in finding.examples]
        return "\n".join(lines)

    def to_dict(self, table: ClipTable) -> dict[str, Any]:
        """The report as JSON takes it, with the ids of all clips that a finding touches."""
        ids = table.column("id")
        findings = [
            {"what": f.what, "usable": f.usable, "examples": list(f.examples), "clips": ids[f.rows].tolist()}
            for f in self.findings
        ]
        return {"clips": self.clips, "files": self.files, "broken": len(self.broken), "findings": findings}


def check(
    data: ClipDataset, *, files: Literal["ends", "all"] = "ends", progress: Callable[[int, int], object] | None = None
) -> Report:
    """Compares a data set's table with its files.

    Args:
        data: a ClipDataset, made with missing="broken" where missing videos should be counted and not raised.
        files: read the headers of "all" files, or of each video's first and last ("ends"), which tells its length; that a
            chunk between them is there, and not empty, is seen in the folder.
        progress: called as progress(files read, files).

    Returns:
        A Report.
    """
    table = data.table
    # Of each clip, the number of what its files are found by.
    names, video = _coded(table.arrow.column("id" if data.cut else "video"))
    findings: list[Finding] = []

    def found(what: str, rows: np.ndarray, example: Callable[[int], str], usable: bool = False) -> None:
        if len(rows):
            # One file may have all the first ones.
            _, first = np.unique(video[rows], return_index=True)
            shown = rows[np.sort(first)[:_SHOWN]]
            findings.append(Finding(what, rows, tuple(example(int(row)) for row in shown), usable))

    def clip(row: int) -> str:
        return f"clip {table.id(row)}, {table.start(row):.2f} to {table.stop(row):.2f} s of {table.video(row)}"

    there = np.array([name in data.sources for name in names])
    found("videos that are missing", np.flatnonzero(~there[video]), lambda row: f"{table.video(row)} in {data.video_root}")

    spans, unreadable, read = _spans(data.sources, files, data.sums, progress)
    bad = np.array([name in unreadable for name in names])
    found("files that cannot be read", np.flatnonzero(bad[video]), lambda row: unreadable[names[video[row]]])

    if data.sums is not None:
        bare = np.array([n in spans and not all(map(data.sums.has, data.sources[n].files)) for n in names])
        found("files without checksums, read as they are", np.flatnonzero(bare[video]), clip, usable=True)

    start, stop = table.column("start"), table.column("stop")
    wrong = impossible(start, stop)
    found("clips whose times are of no part of a video", np.flatnonzero(wrong), clip)
    known = (there & ~bad)[video] & ~np.isnan(start) & ~wrong
    ends = np.array([spans[name][-1][1] if name in spans else np.inf for name in names])[video]
    beyond = known & (start >= ends)
    found(
        "clips that begin after their video ends",
        np.flatnonzero(beyond),
        lambda row: f"{clip(row)}, which ends at {ends[row]:.2f} s",
    )
    if known.any() and beyond.sum() > known.sum() / 2:
        ratio = np.median(start[beyond] / ends[beyond])
        hint = f"half of the starts lie beyond {ratio:.3g} times the length of their video: are start and stop in seconds?"
        findings[-1] = Finding(findings[-1].what, findings[-1].rows, (*findings[-1].examples, hint))
    inside = known & ~beyond
    gaps = _in_gaps(names, video, start, stop, spans, inside)
    found("clips in a part of their video that has no file", np.flatnonzero(gaps), clip)
    late = inside & ~gaps & (stop > ends + _SLACK)
    found(
        "clips that end after their video, whose last frame is repeated",
        np.flatnonzero(late),
        lambda row: f"{clip(row)}, which ends at {ends[row]:.2f} s",
        usable=True,
    )
    found(
        "clips that all lie in the first sixtieth of their videos, as times in minutes would",
        _early(video, stop, ends, inside & np.isfinite(ends)),
        lambda row: f"{clip(row)}, which ends at {ends[row]:.2f} s",
        usable=True,
    )
    if data.training:
        found("clips without a caption", _without_caption(table), clip)
    findings += _alike(data)
    return Report(len(table), read, tuple(findings))


def _coded(column: Any) -> tuple[list[str], np.ndarray]:
    """(distinct values, for each row the number of its own)."""
    coded = column.combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy()


def _spans(
    sources: dict[str, Source], files: str, sums: Sums | None, progress: Callable[[int, int], object] | None
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, str], int]:
    """({video: [(first second, last second) of what its files cover]}, {video: why not}, how many headers were read)."""
    jobs: list[tuple[str, int, Path]] = []
    unreadable: dict[str, str] = {}
    for name, source in sources.items():
        for i, path in enumerate(source.files):
            if files == "all" or i in (0, len(source.files) - 1):
                jobs.append((name, i, path))
            elif not path.is_file():
                unreadable.setdefault(name, f"{path}: no such video")
            elif path.stat().st_size == 0:
                unreadable.setdefault(name, f"{path}: the file is empty")
            elif why := _another(path, sums):
                unreadable.setdefault(name, why)
    lengths: dict[tuple[str, int], float] = {}
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        found = pool.map(lambda job: _length(job[2], sums), jobs)
        for done, (job, length) in enumerate(zip(jobs, found, strict=True), 1):
            name, i, _ = job
            if isinstance(length, str):
                unreadable.setdefault(name, length)
            else:
                lengths[name, i] = length
            if progress is not None:
                progress(done, len(jobs))
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, source in sources.items():
        if name in unreadable:
            continue
        # A chunk whose header was not read is as long as its neighbours lie apart, at most as the first one is.
        first = lengths[name, 0]
        spans[name] = [(s, s + lengths.get((name, i), first)) for i, s in enumerate(source.starts)]
    return spans, unreadable, len(jobs)


def _another(path: Path, sums: Sums | None) -> str | None:
    """What its size says against a file that has checksums."""
    try:
        if sums is not None:
            sums.of(path)
    except videos.VideoError as error:
        return str(error)
    return None


def _length(path: Path, sums: Sums | None) -> float | str:
    try:
        info = videos.probe(path, sums)
    except videos.VideoError as error:
        return str(error)
    if info.missing_bytes:  # an index before the pictures survives a copy that was cut short
        return f"{path}: cut short: {info.missing_bytes:,} bytes are missing"
    return math.inf if info.duration is None else info.duration  # some containers do not say


def _in_gaps(names, video, start, stop, spans, inside):
    """bool [clips]: those that need frames of a chunk that is not there."""
    hit = np.zeros(len(start), bool)
    order = np.argsort(video, kind="stable")
    first = np.searchsorted(video[order], np.arange(len(names) + 1))
    for number, name in enumerate(names):
        edges = [(0.0, 0.0), *spans.get(name, ())]
        holes = [(end, begin) for (_, end), (begin, _) in zip(edges[:-1], edges[1:], strict=True) if begin > end + _SLACK]
        rows = order[first[number] : first[number + 1]]
        for end, begin in holes:
            hit[rows] |= (start[rows] < begin - 1e-6) & (stop[rows] > end + _SLACK)
    return hit & inside


def _early(video: np.ndarray, stop: np.ndarray, ends: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The clips of long videos that have many, where all of those videos are silent after a sixtieth of their length."""
    number = video[inside]
    last, count = np.zeros(video.max(initial=0) + 1), np.bincount(number, minlength=video.max(initial=0) + 1)
    length = np.zeros_like(last)
    np.maximum.at(last, number, stop[inside])
    np.maximum.at(length, number, ends[inside])
    many = (count >= _MANY) & (length >= _LONG)
    if not many.any() or (last[many] > length[many] / 60 + 1).any():
        return np.zeros(0, np.int64)
    return np.flatnonzero(inside & many[video])


def _without_caption(table: ClipTable) -> np.ndarray:
    import pyarrow.compute as pc

    texts = table.arrow.column("texts").combine_chunks()
    said = pc.greater(pc.binary_length(pc.utf8_trim_whitespace(pc.list_flatten(texts))), 0)
    has = np.zeros(len(table), bool)
    has[pc.list_parent_indices(texts).to_numpy()[said.to_numpy(zero_copy_only=False)]] = True
    return np.flatnonzero(~has)


def _alike(data: ClipDataset) -> Iterable[Finding]:
    """Labels from which nothing can be learnt, and captions likewise."""
    rows = np.arange(len(data))
    if len(rows) < 2:
        return
    kinds = data.clip_kind
    if kinds is not None and len(kinds.unique()) == 1:
        yield Finding("labels that are all alike", rows, ("every clip has the same classes",), usable=True)
    texts = {data.table.texts(row) for row in np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)}
    if len(texts) == 1 and texts != {()}:
        text = next(iter(texts))
        yield Finding("captions that are all alike", rows, (f"of {min(len(rows), 1000)} looked at: {text[0]!r}",), usable=True)
