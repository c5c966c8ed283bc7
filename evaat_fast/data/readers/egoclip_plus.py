"""EgoClip+, LaViLa's pretraining set: pickled lists of clips of Ego4D, with one text or several each.

    table = egoclip_plus.read("datasets/Ego4D")       # rephraser, then narrator, as LaViLa and AVION concatenate them
    table = egoclip_plus.read("ego4d_val.pkl")        # one file

| file | a row |
|---|---|
| ego4d_train.pkl, ego4d_val.pkl | (uid, start, end, text) |
| ego4d_train.rephraser.no_punkt_top3.pkl | (uid, start, end, [text]) |
| ego4d_train.narrator_63690737.return_10.pkl | (uid, start, end, [ten texts], [ten negative log likelihoods]) |
| ego4d_train.uncovered_all.narrator_63690737.return_5.pkl | the same with five, of stretches nobody narrated |

start and end are seconds. The likelihoods are not kept: LaViLa draws one of the texts, each as likely. The rows have no id:
theirs here is the kind of file and the number, "narrator/12". The files are pickles, which could run anything: they are read
by `evaat_fast.data.readers.pickles`, which cannot.

Source: Zhao et al., "Learning Video Representations from Large Language Models", CVPR 2023 (arXiv 2212.04501), docs/PRETRAIN.md
of its code.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.readers import pickles, text
from evaat_fast.data.readers.large import Skipped, check_units, joined, table_of
from evaat_fast.data.table import ClipTable

__all__ = ["FILES", "read"]

FILES = {
    "rephraser": "ego4d_train.rephraser.no_punkt_top3.pkl",
    "narrator": "ego4d_train.narrator_63690737.return_10.pkl",
    "uncovered": "ego4d_train.uncovered_all.narrator_63690737.return_5.pkl",
    "train": "ego4d_train.pkl",
    "val": "ego4d_val.pkl",
}
PRETRAINING = ("rephraser", "narrator")


def read(
    path: str | os.PathLike[str], split: str = "train", *, kinds: Sequence[str] | None = None, skip: float = 0.001
) -> ClipTable:
    """The clips of one file, or of a folder's.

    Args:
        path: a pickle, or a folder with FILES. split: "train" or "val", of which a folder's files are.
        kinds: of FILES, which of a folder's are read, in that order; None: the rephraser's and the narrator's, or
            ego4d_val.pkl for split "val".
        skip: the share of a file's rows that may be left out because they cannot be read; counted as `egoclip.read` does.
            A text that is empty beside others is left out by itself, and counted.

    Returns:
        A ClipTable of dataset "egoclip-plus". metadata: "rows" and "skipped", by file, and "empty", texts left out.

    Raises:
        FileNotFoundError: no such file. ValueError: a pickle that is damaged or of something else, more unreadable rows
        than `skip`, times that are no seconds. ImportError: pyarrow is missing.
    """
    path = Path(path)
    if path.is_dir():
        unknown = [kind for kind in kinds or () if kind not in FILES]
        if unknown:
            raise ValueError(f"kinds: expected some of {', '.join(FILES)}, got {unknown[0]!r}")
        files = {kind: path / FILES[kind] for kind in kinds or (PRETRAINING if split == "train" else ("val",))}
    else:
        files = {next((kind for kind, name in FILES.items() if name == path.name), path.stem): path}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"annotations: there is no file {str(file)!r}")
    columns = _Columns()
    rows: dict[str, int] = {}
    skipped: dict[str, dict[str, int]] = {}
    for kind, file in files.items():
        before = columns.count
        reasons = Skipped(file, skip)
        with _no_collection():
            for first, batch in _numbered(file):
                columns.add(batch, kind, first, reasons)
        rows[file.name] = columns.count - before
        skipped[file.name] = reasons.finish(rows[file.name])
        check_units(file, columns.times("start", before), columns.times("stop", before))
    facts = {"source": [f.name for f in files.values()], "rows": rows, "skipped": skipped, "empty": columns.empty}
    return table_of(columns.arrays(), dataset="egoclip-plus", split=split, **facts)


@contextmanager
def _no_collection():
    """Without the cyclic garbage collector, which looks for cycles in millions of rows that have none."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _numbered(file: Path) -> Iterator[tuple[int, list[Any]]]:
    """Batches of rows and the number of the first, from 1; some ten thousand at a time."""
    first, held = 1, []  # type: int, list[Any]
    for batch in pickles.batches(file):
        held += batch
        if len(held) >= 1 << 14:
            yield first, held
            first, held = first + len(held), []
    if held:
        yield first, held


class _Columns:
    """The columns so far, as lists of arrays, one of each a batch."""

    def __init__(self):
        self.parts: dict[str, list[Any]] = {name: [] for name in ("id", "video", "start", "stop", "texts", "counts")}
        self.count = self.empty = 0

    def add(self, rows: list[Any], kind: str, first: int, skipped: Skipped) -> None:
        import pyarrow as pa
        from pyarrow import compute as pc

        numbers = np.arange(first, first + len(rows))
        columns = _uniform(rows)
        if columns is None:  # a row is not as it should be: one by one
            faults = [_fault(row) for row in rows]
            for number, fault in enumerate(faults, first):
                if fault:
                    skipped.add(fault[0], 1, f"row {number}: got {fault[1]}".__str__)
            good = [fault is None for fault in faults]
            rows, numbers = [row for row, keep in zip(rows, good, strict=True) if keep], numbers[good]
            if not rows:
                return None
            columns = _columns(rows)
        names, begins, ends, words = columns
        starts, stops = np.array(begins, np.float64), np.array(ends, np.float64)
        counts = np.fromiter(map(len, words), np.int64, len(words))
        flat = list(chain.from_iterable(words))
        # The large type, as ten texts for each of four million clips are more bytes than 32 bits count.
        uids, texts = _decoded(names, pa.string()), _decoded(flat, pa.large_string())
        if uids is None or texts is None:
            return self._halved(rows, kind, numbers, skipped)
        texts = pc.utf8_trim_whitespace(texts)
        owner = np.repeat(np.arange(len(rows)), counts)
        said = pc.not_equal(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
        filled = np.bincount(owner[said], minlength=len(rows))

        fine = np.ones(len(rows), bool)
        for reason, wrong, shown in (
            ("times that are not finite", ~(np.isfinite(starts) & np.isfinite(stops)), (starts, stops)),
            ("clips that end before they start", stops < np.maximum(starts, 0), (starts, stops)),
            ("clips without a text", filled == 0, None),
        ):
            wrong &= fine
            fine &= ~wrong
            place = int(wrong.argmax()) if wrong.any() else 0

            def where(place=place, shown=shown):
                return f"row {numbers[place]}" + (f": got {shown[0][place]:g} to {shown[1][place]:g}" if shown else "")

            skipped.add(reason, int(wrong.sum()), where)
        self.empty += int((counts - filled)[fine].sum())
        kept, said = pa.array(fine), said & fine[owner]
        self.parts["id"].append(pc.binary_join_element_wise(kind, pa.array(numbers[fine]).cast(pa.string()), "/"))
        self.parts["video"].append(uids.filter(kept))
        self.parts["start"].append(np.maximum(starts[fine], 0))
        self.parts["stop"].append(stops[fine])
        self.parts["texts"].append(texts if said.all() else texts.filter(pa.array(said)))
        self.parts["counts"].append(filled[fine])
        self.count += int(fine.sum())

    def _halved(self, rows, kind, numbers, skipped):
        """The rows of a batch in which one is not UTF-8, found by halving."""
        if len(rows) == 1:
            return skipped.add("texts that are not UTF-8", 1, lambda: f"row {numbers[0]}")
        middle = len(rows) // 2
        for some, those in ((rows[:middle], numbers[:middle]), (rows[middle:], numbers[middle:])):
            # Rows that were left out are counted already, so each run of neighbours is a batch of its own.
            edges = [0, *(np.flatnonzero(np.diff(those) != 1) + 1).tolist(), len(those)]
            for begin, end in pairwise(edges):
                self.add(some[begin:end], kind, int(those[begin]), skipped)
        return None

    def times(self, name: str, begin: int) -> np.ndarray:
        return np.concatenate(self.parts[name])[begin:] if self.parts[name] else np.empty(0)

    def arrays(self) -> dict[str, Any]:
        import pyarrow as pa

        counts = np.concatenate(self.parts.pop("counts"))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        if offsets[-1] >= 2**31:
            raise ValueError(f"expected fewer than 2,147,483,648 texts, got {offsets[-1]:,}")
        columns: dict[str, Any] = {name: joined(self.parts.pop(name)) for name in list(self.parts)}
        columns["texts"] = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), columns["texts"])
        return columns


def _decoded(strings, kind):
    """An Arrow array of strings, or None where one of them is not UTF-8."""
    import pyarrow as pa

    try:
        return pa.array(strings, pa.large_binary()).cast(kind)
    except pa.ArrowInvalid:
        return None


def _uniform(rows):
    """The columns of rows all of which are tuples as they should be, or None. In C, as there are millions."""
    if not set(map(type, rows)) <= {tuple} or not set(map(len, rows)) <= {4, 5}:
        return None
    names, begins, ends, words = _columns(rows)
    numbers = set(map(type, begins)) | set(map(type, ends))
    if set(map(type, names)) != {bytes} or not all(names) or not numbers <= {int, float}:
        return None
    if set(map(type, words)) != {list} or not all(words) or set(map(type, chain.from_iterable(words))) != {bytes}:
        return None
    return names, begins, ends, words


def _columns(rows):
    names, begins, ends, words = map(list, zip(*(row[:4] for row in rows), strict=True))
    if bytes in set(map(type, words)):
        words = [[text] if type(text) is bytes else text for text in words]
    return names, begins, ends, words


def _fault(row):
    """(what is wrong with a row, what it is), or None."""
    if not isinstance(row, (tuple, list)) or not 4 <= len(row) <= 5:
        got = f"{len(row)} values" if isinstance(row, (tuple, list)) else type(row).__name__
        return "rows that are not (uid, start, end, texts)", got
    texts = [row[3]] if type(row[3]) is bytes else row[3]
    for value, good, what in (
        (row[0], type(row[0]) is bytes and row[0], "rows whose uid is no string"),
        (row[1], type(row[1]) in (int, float), "rows whose start is no number"),
        (row[2], type(row[2]) in (int, float), "rows whose end is no number"),
        (row[3], type(texts) is list and texts and {*map(type, texts)} == {bytes}, "rows whose texts are no list of strings"),
    ):
        if not good:
            return what, text.short(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
    return None
