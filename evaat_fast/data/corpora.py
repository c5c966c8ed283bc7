"""The corpora that this library knows, by the names that a configuration and the command line give them.

data = open_corpus("ek100-mir", "annotations", "videos", "train", num_frames=4)
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from evaat_fast.data.choices import CORPORA, LABELLED, Corpus, Split, check_choice
from evaat_fast.data.dataset import ClipDataset
from evaat_fast.data.ek100 import EK100
from evaat_fast.data.labels import ActionClips, LabelledClips
from evaat_fast.data.plain import PlainClips
from evaat_fast.data.readers import charades, egoclip, egoclip_plus, egomcq, ek100, ek100_clips, plain
from evaat_fast.data.table import ClipTable

_MADE: dict[Corpus, type[ClipDataset]] = dict(zip(LABELLED, (EK100, LabelledClips, ActionClips, PlainClips), strict=True))

__all__ = ["open_corpus", "read_actions", "read_questions", "read_table"]


_F = TypeVar("_F", bound=Callable[..., Any])


def _hinting(function: _F) -> _F:
    """Says what `annotations` can be where a file of theirs is missing."""

    @functools.wraps(function)
    def called(kind, annotations, *arguments, **options):
        try:
            return function(kind, annotations, *arguments, **options)
        except FileNotFoundError as error:
            if kind != "csv" and str(error).startswith(("annotations: ", "clips: ")):
                raise FileNotFoundError(f"{error}; {_wanted(kind, Path(annotations))}") from None
            raise

    return cast(_F, called)


def _wanted(kind, path):
    if (path / kind).is_dir():
        return f"did you mean {str(path / kind)!r}?"
    files = "a table that evaat-fast prepare wrote, in .arrow" if kind == "clips" else f"the published files of {kind!r}"
    return f"expected {files}, or the folder PREPARED/{'DATASET' if kind == 'clips' else kind} that evaat-fast prepare made"


@_hinting
def open_corpus(
    kind: Corpus, annotations: str | os.PathLike[str], videos: str | os.PathLike[str], split: Split, **options: Any
) -> ClipDataset:
    """A split of a corpus, to train on or, for "ek100-mir", "charades-ego" and "csv", to evaluate.

    Args:
        kind: "clips" for a table written by `ClipTable.save`, "csv" for a folder of videos and a file of their captions, else
            the name of a corpus. annotations: as for `read_table`, for "csv" the file.
        videos: the folder of its videos. split: "train" or "test". options: of `ClipDataset`, for "ek100-mir" of `EK100`, for
            "csv" of `PlainClips` and those of `readers.plain.read`: labels, test_share, split_seed.

    Raises:
        FileNotFoundError, ValueError: files that are missing or cannot be read, a corpus without such a split.
    """
    if kind == "ek100-mir":
        return EK100(annotations, videos, split, **options)
    if kind == "csv":
        how = {name: options.pop(name) for name in ("labels", "test_share") if name in options}
        seed = options.pop("split_seed", 0)
        table = plain.read(annotations, videos, split, seed=seed, **how)
        if not len(table):
            none = "; with data.test_share = 0 nothing is tested" if split == "test" else ""
            raise ValueError(
                f"{annotations}: it has no clip to {split} on: data.test_share, or a column split, says which are{none}"
            )
        return PlainClips(table, videos, **options)
    table = read_table(kind, annotations, split)
    if kind == "charades-ego" and split == "test":
        return ClipDataset(table, videos, **options)
    return _MADE.get(kind, ClipDataset)(table, videos, **options)


def read_table(kind: Corpus, annotations: str | os.PathLike[str], split: Split) -> ClipTable:
    """The clips of a split.

    Args:
        annotations: the folder or the file that the corpus's reader takes (`evaat_fast.data.readers`), or the folder that
            `evaat-fast prepare` made of it, or one of its files in .arrow or .parquet.

    Raises:
        FileNotFoundError, ValueError: as `open_corpus`.
    """
    check_choice("kind", kind, CORPORA)
    path = Path(annotations)
    if kind == "csv":
        raise ValueError("kind: the paths of 'csv' are of a folder of videos: call readers.plain.read")
    if (path / f"{split}.arrow").is_file():
        path = path / f"{split}.arrow"
    if kind == "clips" or path.suffix in (".arrow", ".parquet"):
        return ClipTable.open(path)
    if kind == "ek100-mir":
        return ek100.read(path, split)
    if kind == "ek100-clips":
        return ek100_clips.read(path, split)
    if kind == "charades-ego":
        return charades.read(path, split)
    if split != "train":
        raise ValueError(f"split: {kind} is a pretraining set and has no {split!r}")
    if kind == "egoclip":
        return egoclip.read(path / "egoclip.csv" if path.is_dir() else path)
    return egoclip_plus.read(path)


def read_questions(annotations: str | os.PathLike[str]) -> egomcq.Questions:
    """EgoMCQ, from egomcq.json, its folder, what `evaat-fast prepare` made of it or the folder of that.

    Raises:
        FileNotFoundError, ValueError: as `egomcq.read`.
    """
    path = Path(annotations)
    prepared = _prepared(path, "egomcq")
    if (prepared / "test-questions.npz").is_file():
        with np.load(prepared / "test-questions.npz", allow_pickle=False) as found:
            texts, choices, answers, types = (found[name] for name in ("texts", "choices", "answers", "types"))
        return egomcq.Questions(texts.tolist(), choices, answers, types, ClipTable.open(prepared / "test.arrow"))
    return egomcq.read(path / "egomcq.json" if path.is_dir() else path)


def read_actions(annotations: str | os.PathLike[str]) -> tuple[ClipTable, list[str]]:
    """Charades-Ego's whole test videos and the names of its classes, from its folder, what `evaat-fast prepare` made of it or
    the folder of that.

    Raises:
        FileNotFoundError, ValueError: as `charades.read`.
    """
    path = Path(annotations)
    prepared = _prepared(path, "charades-ego")
    if (prepared / "test-classes.json").is_file():
        return ClipTable.open(prepared / "test.arrow"), json.loads((prepared / "test-classes.json").read_text())
    return charades.read(path, "test"), charades.classes(path)


def _prepared(path, name):
    return path / name if (path / name).is_dir() else path
