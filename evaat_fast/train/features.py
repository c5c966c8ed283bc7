"""Embeddings of clips and of captions in files for other programs: Parquet, or NumPy's npz.

    DIR/features.json                       the model, how clips were shown to it, and the hash of its weights
    DIR/clips-00000-of-00003.parquet        id, video, start, stop, embedding (float32, of length 1)
    DIR/texts-00000-of-00001.parquet        text, embedding

A file is written as soon as it is full, so memory stays flat, and what is there already stays: an interrupted run goes on.
Only a file that lacks clips, left out by an earlier run, is made anew by one that leaves none out.
Texts are the captions of the clips, or those to be retrieved, each once, in order of appearance. An npz has the same columns
as arrays, strings as Unicode ones.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaat_fast import _parts
from evaat_fast._files import sha256, write_atomically, write_json
from evaat_fast.data.dataset import ClipDataset, captions
from evaat_fast.train import embedding, inputs, outcome, trainer
from evaat_fast.train.config import Config, ConfigError
from evaat_fast.train.log import Progress

FORMATS = ("parquet", "npz")
_RECORD = "features.json"

__all__ = ["FORMATS", "write"]


def write(
    config: Config,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    device: torch.device,
    *,
    split: str = "test",
    form: str = "parquet",
    rows: int = 8192,
    partial: bool = False,
    say: Callable[[str], object] = print,
) -> str:
    """Embeds a split of config.data.

    Args:
        config: its model, data, batch size and precision. checkpoint: a file of weights, or a folder of parts. out: the folder.
        device: where to compute. split: of the corpus. form: of FORMATS. rows: how many a file has.
        partial: leave clips out that cannot be read. say: is told which.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: an unknown split or form, or a folder that holds the features of something else. outcome.Incomplete: clips
            that cannot be read. FileNotFoundError, ValueError: data or weights that are missing or do not fit.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"--split: expected train or test, got {split!r}")
    if form not in FORMATS:
        raise ConfigError(f"--format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if rows < 1:
        raise ConfigError(f"--rows: expected a number from 1, got {rows}")
    out, wanted = Path(out), inputs.model_config(config)
    config.train.init = os.fspath(checkpoint)
    data = inputs.open_split(config, split, **inputs.of_evaluation(config, "broken" if partial else "raise"))  # type: ignore[arg-type]
    model = trainer.build_model(config).to(device).eval()
    texts = _texts(data)
    record = {
        "clips": len(data),
        "texts": len(texts),
        "embedding": wanted.embed_dim,
        "rows": rows,
        "dataset": config.data.kind,
        "split": split,
        "table_sha256": _identity(data, texts),
        "checkpoint_sha256": sha256(_parts.standing(checkpoint) or checkpoint),
        "model": model.config.__dict__,
        "preprocessing": {
            "frames": wanted.num_frames,
            "sampler": config.data.sampler,
            "crop": f"centre, {wanted.image_size}",
            "normalisation": model.config.norm,
        },
        "precision": outcome.precision(config, device, model),
    }
    _claim(out, record, config)
    kept: dict[str, int] = {}
    left, said = 0, []  # type: int, list[str]
    for name, count in (("clips", len(data)), ("texts", len(texts))):
        parts = range(0, count, rows)
        paths = [out / f"{name}-{i:05}-of-{len(parts):05}.{form}" for i in range(len(parts))]
        with Progress(count, name) as progress:
            for first, path in zip(parts, paths, strict=True):
                some = range(first, min(first + rows, count))
                there = _rows(path, name)
                if there == len(some) or (there is not None and partial):
                    kept[name] = kept.get(name, 0) + 1
                    left += len(some) - there
                elif name == "clips":
                    columns, broken = _clips(model, data, some, config, device, partial)
                    left += len(broken)
                    for line in broken[:3]:
                        say(f"left out: {line}")
                    _save(path, columns, record)
                else:
                    found = torch.cat(list(embedding.of_texts(model, texts[first : some.stop], config, device)))
                    _save(path, {"text": texts[first : some.stop], "embedding": found.numpy()}, record)
                for _ in some:
                    progress.step()
        already = f", {kept[name]} of them there already" if name in kept else ""
        said.append(f"{count:,} {name} in {len(paths)} {form} files{already}")
    if left:
        said.append(f"{left:,} clips left out, as they cannot be read")
    return f"{out}: " + "; ".join(said)


def _texts(data: ClipDataset) -> list[str]:
    """Its captions, each once: those to be retrieved, where there are such."""
    given = getattr(data, "captions", None) if not data.training else None
    found = given if given is not None else (text for row in range(len(data)) for text in captions(data.table, row))
    return list(dict.fromkeys(found))


def _identity(data: ClipDataset, texts: list[str]) -> str:
    """A hash of what is embedded: files of other clips may be as many."""
    digest = hashlib.sha256()
    for values in (data.table.column("id"), data.table.column("video"), texts):
        digest.update("\0".join(values).encode() + b"\0\0")
    for name in ("start", "stop"):
        digest.update(np.ascontiguousarray(data.table.column(name)).tobytes())
    return digest.hexdigest()


def _rows(path: Path, name: str) -> int | None:
    """How many rows a file of clips or texts has; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        if path.suffix == ".npz":
            with np.load(path) as found:
                return len(found["id" if name == "clips" else "text"])
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _clips(model, data, some, config, device, partial):
    rows, found, broken = [], [], []
    for batch in embedding.of_clips(model, data, config, device, rows=some):
        if batch.unreadable and not partial:
            raise outcome.Incomplete(f"{next(iter(batch.unreadable.values()))}; --allow-partial goes on without such clips")
        broken += [f"{data.table.id(row)}: {why}" for row, why in batch.unreadable.items()]
        rows += batch.rows.tolist()
        found.append(batch.embeddings)
    table = data.table
    columns = {
        "id": [table.id(row) for row in rows],
        "video": [table.video(row) for row in rows],
        "start": table.column("start")[rows],
        "stop": table.column("stop")[rows],
        "embedding": torch.cat(found).numpy(),
    }
    return columns, broken


def _save(path: Path, columns: dict[str, Any], record: dict[str, Any]) -> None:
    if path.suffix == ".npz":
        text = json.dumps(record)
        named: dict[str, Any] = {**{name: np.asarray(values) for name, values in columns.items()}, "metadata": np.array(text)}
        write_atomically(path, lambda file: np.savez(file, **named))
        return
    import pyarrow as pa
    import pyarrow.parquet

    kinds = {"start": pa.float64(), "stop": pa.float64()}  # said, as a file in which all clips are left out has no values
    arrays = {name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items() if name != "embedding"}
    numbers = np.ascontiguousarray(columns["embedding"], np.float32)
    arrays["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])
    table = pa.table(arrays).replace_schema_metadata({"evaat_fast": json.dumps(record)})
    write_atomically(path, lambda file: pyarrow.parquet.write_table(table, file))


def _claim(out: Path, record: dict[str, Any], config: Config) -> None:
    """Writes what the folder is of, or compares with what is there."""
    path = out / _RECORD
    if path.is_file():
        try:
            there = json.loads(path.read_text())
        except ValueError:
            raise ConfigError(f"--out: {str(path)!r} is not JSON; give another folder") from None
        for name, value in json.loads(json.dumps(record)).items():
            if there.get(name) != value:
                raise ConfigError(
                    f"--out: {str(out)!r} holds features of another {name} ({there.get(name)!r:.60}, here {value!r:.60}); give "
                    "another folder"
                )
        return
    out.mkdir(parents=True, exist_ok=True)
    more = {
        "checkpoint": config.train.init,
        "config": config.to_dict(),
        "versions": outcome.versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(path, {**record, **more})
