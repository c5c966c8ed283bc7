"""Runs a task: what came out, as a record that says all that repeating it needs, and as a table beside the paper's."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import evaat_fast
from evaat_fast import _parts
from evaat_fast._files import sha256
from evaat_fast.data import decode
from evaat_fast.data.check import check
from evaat_fast.data.choices import Frames
from evaat_fast.eval import paper, tricks
from evaat_fast.model import EVA02AT
from evaat_fast.train import embedding, evaluation, inputs, trainer
from evaat_fast.train.config import Config, ConfigError
from evaat_fast.train.log import Progress
from evaat_fast.train.tasks import RETRIEVAL, Options, Task, open_task

__all__ = ["Incomplete", "guess_stage", "precision", "run", "run_of", "similarities", "text", "versions"]

_DISTRIBUTIONS = ("torch", "numpy", "av", "torchcodec", "decord", "decord2", "pyarrow", "tokenizers")


class Incomplete(ValueError):
    """Some of a test set cannot be read, and nobody said that the rest will do."""


def run(
    name: str,
    config: Config,
    checkpoints: Sequence[str | os.PathLike[str]],
    device: torch.device,
    *,
    stage: str | None = None,
    frames: Frames | None = None,
    options: Options | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Evaluates checkpoints on a task; several are an ensemble, whose similarities are averaged.

    Args:
        name: of `tasks.TASKS`. config: its model, its data, which are the task's files, its batch size and precision.
        checkpoints: files of weights, or folders of parts. device: where to compute.
        stage: "zero-shot" or "fine-tuned", whose rows of the paper ours are put beside; None guesses by what the first
            checkpoint's run was trained on.
        frames: instead of config.eval.frames. options: Options. say: is told what is left out.

    Returns:
        The record: metrics and counts by name, None for what is not defined; task, stage, checkpoint(s) with hashes, frames,
        protocol, tricks, notes, differences, partial, published_test_set, config, model, device, precision, decoder,
        versions, seconds, date. JSON takes all of it. `text` prints it.

    Raises:
        Incomplete: clips that are missing or cannot be read, without options.partial. ConfigError, FileNotFoundError,
            ValueError: as `open_task`, and weights that do not fit.
    """
    options, started = options or Options(), time.perf_counter()
    if len(checkpoints) > 1 and "ensemble" not in options.tricks:
        options = replace(options, tricks=(*options.tricks, "ensemble"))
    if len(checkpoints) < 2 and "ensemble" in options.tricks:
        raise ConfigError("--trick: an ensemble is of several checkpoints: give --checkpoint more than once")
    task = open_task(name, config, options)
    task.data.frames = frames or config.eval.frames
    usable = _usable(task, options, say)
    sims, kept, model = [], torch.ones(len(task.data), dtype=torch.bool), None
    unreadable: dict[int, str] = {}
    for path in checkpoints:
        config.train.init = os.fspath(path)
        model = trainer.build_model(config).to(device).eval()
        sim, read, failed = similarities(task, model, config, device, usable, options)
        sims.append(sim)
        kept, unreadable = kept & read, unreadable | failed  # a clip that only one of them could read has no mean
    assert model is not None
    for row, why in list(unreadable.items())[:3]:
        say(f"left out: {task.data.table.id(row)}: {why}")
    if not kept.any():
        raise Incomplete(f"no clip could be read for each of the {len(checkpoints)} checkpoints")
    result = task.judge(tricks.ensemble(sims) if len(sims) > 1 else sims[0], kept)
    protocol = {
        "num_frames": model.config.num_frames,
        "image_size": model.config.image_size,
        "crop": "three along the longer side" if "three-crops" in options.tricks else "centre",
        "normalisation": model.config.norm,
        "sampler": config.data.sampler,
        "frames": task.data.frames,
        "tricks": list(options.tricks),
        **task.protocol,
    }
    left_out = int((~kept).sum())
    stored = run_of(checkpoints[0])
    return {
        "task": name,
        "stage": stage or guess_stage(name, stored),
        "partial": left_out > 0,
        "published_test_set": _published(name, len(task.data), task),
        **{key: value if math.isfinite(value) else None for key, value in result.metrics.items()},
        **result.counts,
        "left_out": left_out,
        "notes": list(result.notes),
        "protocol": protocol,
        "differences": paper.differences(name, protocol) if name in paper.TASKS else [],
        "frames": task.data.frames,
        "checkpoint": os.fspath(checkpoints[0]) if len(checkpoints) == 1 else [os.fspath(path) for path in checkpoints],
        "checkpoint_sha256": [sha256(_parts.standing(path) or path) for path in checkpoints],
        "epoch": stored.get("epoch"),
        "config": config.to_dict(),
        "model": model.config.__dict__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "precision": precision(config, device, model),
        "decoder": decode.chosen() if config.data.decoder == "auto" else config.data.decoder,
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def similarities(
    task: Task, model: EVA02AT, config: Config, device: torch.device, rows: Sequence[int], options: Options
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """The task's similarities, which clips they are of (bool [clips]), and why others could not be read.

    Raises:
        Incomplete: a clip that cannot be read, without options.partial.
    """
    texts = torch.cat(list(embedding.of_texts(model, task.texts, config, device, task.normalize)))
    clips, kept = torch.zeros(len(task.data), model.config.embed_dim), torch.zeros(len(task.data), dtype=torch.bool)
    views = [view for view in options.tricks if view in embedding.VIEWS]
    unreadable: dict[int, str] = {}
    with Progress(len(rows), task.name) as progress:
        for batch in embedding.of_clips(
            model, task.data, config, device, rows=rows, views=views, normalize=task.normalize or bool(views)
        ):
            unreadable |= batch.unreadable
            if unreadable and not options.partial:
                raise Incomplete(f"{next(iter(unreadable.values()))}; --allow-partial goes on without such clips")
            clips[batch.rows], kept[batch.rows] = batch.embeddings, True
            for _ in batch.rows:
                progress.step()
    if not kept.any():
        raise Incomplete(f"none of the {len(kept)} clips can be read, the first: {next(iter(unreadable.values()), 'missing')}")
    return task.compare(clips, texts), kept, unreadable


def _usable(task, options, say):
    """The rows that nothing speaks against, from headers alone: hours of decoding should not end at a missing file."""
    report = check(task.data)
    if report.findings:
        say(str(report))
    if len(report.broken) and not options.partial:
        found = f"{len(report.broken)} of {report.clips} clips cannot be used; {report.worst}"
        raise Incomplete(f"{found}; --allow-partial goes on without them")
    if not len(report.usable):
        raise Incomplete(f"none of the {report.clips} clips can be used")
    return report.usable


def text(record: Mapping[str, Any]) -> str:
    """The record for people: what was measured, beside the paper's numbers, and what differs."""
    name, metrics = record["task"], {k: math.nan if v is None else v for k, v in record.items()}
    label = "ours" + "".join(f" + {trick}" for trick in record["protocol"]["tricks"])
    label += ", PARTIAL" * record["partial"] + (", another test set" if record["published_test_set"] is False else "")
    if name in paper.TASKS:
        lines = [f"{name}, {record['stage']}; the paper's numbers ({paper.PAPER}) and ours, in per cent"]
        lines += [paper.table(name, record["stage"], [(label, metrics)]), ""]
    else:
        lines = [f"{label}, in per cent; MedR: the median rank, from 1"]
    if record["partial"]:
        than = "; the paper's numbers are of all of them" if name in paper.TASKS else ""
        lines.append(f"PARTIAL: {record['left_out']} clips were left out{than}")
    if name in paper.TASKS and record["published_test_set"] is None:
        lines.append("whether this is all of the published test set, its counts would tell, which are not known here")
    elif name in paper.TASKS and not record["published_test_set"]:
        counts = ", ".join(f"{number:,} {what}" for what, number in paper.COUNTS[name].items())
        lines.append(f"not the published test set{f', which has {counts}' if counts else ''}: not comparable with the paper's")
    if name in RETRIEVAL:
        lines.append(f"{record['clips']} clips, {record['captions']} captions")
        more = ("mAP", "nDCG") if name not in paper.TASKS and "mAP" in metrics else ()
        lines += evaluation.lines(metrics, (*more, "R@1", "R@5", "R@10", "MedR"))
    elif name == "egomcq":
        lines.append(f"inter: {record['inter_questions']} questions of type 1, intra: {record['intra_questions']} of type 2")
    else:
        lines.append(f"{record['videos']} videos, {record['classes'] - record['absent']} classes occur")
    lines += [f"note: {note}" for note in record["notes"]]
    lines += [f"differs: {difference}" for difference in record["differences"]]
    return "\n".join(lines)


def guess_stage(task: str, stored: Mapping[str, Any]) -> str:
    """\"fine-tuned\" where a checkpoint's run was trained on the task's own corpus, else "zero-shot"."""
    data = stored.get("config", {}).get("data", {})
    kind = data.get("kind", "ek100-mir" if data else "")
    own = {"ek100-mir": ("ek100-mir", "ek100-clips"), "charades-ego": ("charades-ego",), "retrieval": ("csv",)}
    return "fine-tuned" if kind in own.get(task, ()) else "zero-shot"


def run_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration and the epoch that a run's checkpoint holds; {} for other weights."""
    if Path(path).suffix == ".safetensors":
        return {}
    try:
        if Path(path).is_dir():
            content = _parts.read(path, tensors=False)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what cannot be read is build_model's to say
        return {}
    found = {name: content[name] for name in ("config", "epoch") if name in content} if isinstance(content, dict) else {}
    return found if isinstance(found.get("config", {}), dict) else {}


def _published(name: str, clips: int, task: Task) -> bool | None:
    """Whether the test set has the published one's counts; None where those that are known leave it open."""
    mine = {"clips": clips, "captions": len(task.texts), "classes": len(task.texts)}
    if name not in paper.TASKS:
        return None
    counts = paper.COUNTS[name]
    if any(mine[what] != number for what, number in counts.items()):
        return False
    return True if "clips" in counts else None


def precision(config: Config, device: torch.device, model: EVA02AT) -> str:
    """\"bfloat16 autocast\" or "float32", whichever `inputs.autocast` gives."""
    with inputs.autocast(config, device, model):
        return "bfloat16 autocast" if torch.is_autocast_enabled(device.type) else str(model.matrix_dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Of Python, this library and the packages that results may depend on, those that are installed."""
    found = {"python": platform.python_version(), "evaat-fast": evaat_fast.__version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
