"""From a folder of videos to a run: what `evaat-fast init` writes.

    print(begin.write("Videos", "work"))      # work/captions.csv to fill in, and work/config.toml

The configuration is sized by what is there: the median length of the clips decides how many frames are shown, the number of
captions the batch, the machine the model. A few training steps are timed, and as many epochs set as fit into `minutes`.
"""

import csv
import io
import math
import os
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evaat_fast._files import write_atomically
from evaat_fast.data import ClipTable
from evaat_fast.data.choices import SPLITS
from evaat_fast.data.folder import Caption, Folder, look, tables
from evaat_fast.data.readers import plain
from evaat_fast.train import pace, sections
from evaat_fast.train.config import ConfigError, load, toml_value
from evaat_fast.train.log import duration
from evaat_fast.train.setup import check_folder

CAPTIONS, CONFIG = "captions.csv", "config.toml"
# A training step of the base model took 20,860 MiB for 64 clips of 4 frames, by docs/benchmarks.md.
_MIB_PER_FRAME = 20_860 / (64 * 4)
_MINUTES = 10.0  # of training
_CACHE = 2 << 30  # bytes of decoded clips that may be kept
_CPU_MODEL, _GPU_MODEL = "eva02_at_tiny_patch16_64", "eva02_at_base_patch16_224"
_COARSE = {"patch_size": 32, "rope_grid": 2}
_WEIGHTS = "merged2b_s8b_b131k"
_EPOCHS = (5, 200)  # at least and at most, however long they take
_STEPS = 600  # while nobody has written any caption, and nothing is timed
_KINDS = 16  # with fewer classes than captions, at least so many for batches without two of one
_SHARE = 0.1  # of the videos is tested
_SHOWN = 5

__all__ = ["CAPTIONS", "CONFIG", "write"]


@dataclass(frozen=True)
class _Clips:
    """What a run would be of: how many clips to train on, of how many captions (0 while nobody has written any, and then the
    clips are the videos) and kinds, which are their classes or else their captions, the median length in seconds, and whether
    some can be tested, as there are two videos or more."""

    train: int
    captions: int
    kinds: int
    seconds: float
    testable: bool


@dataclass(frozen=True)
class _Machine:
    """gpu: MiB of its memory, 0 without one. cores. memory: bytes."""

    gpu: int
    cores: int
    memory: int


@dataclass(frozen=True)
class _Plan:
    """frames: of a clip. batch: clips; micro: of them at a time, 0 for all. distinct: no caption twice in a batch. steps: in
    all; step: seconds of one, 0 where it was not timed."""

    frames: int
    batch: int
    micro: int
    distinct: bool
    epochs: int
    steps: int
    step: float

    @property
    def said(self) -> str:
        """What was timed, in words."""
        return f"{self.epochs} epochs, {self.steps} steps, about {duration(self.steps * self.step)} on this machine"


def write(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] = ".",
    *,
    overwrite: bool = False,
    minutes: float = _MINUTES,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """Writes a file of captions, where there is none yet, and a configuration that trains on them.

    Args:
        folder: of videos, at any depth. out: where the files go; made where it is not there. progress: as for `folder.look`.
        overwrite: replace a configuration that is there, and a file of captions in which nobody has written any.
        minutes: how long training may take here, roughly, as steps are timed on clips of noise; within 5 to 200 epochs.

    Returns:
        What was found and written, and which commands come next, in words.

    Raises:
        FileNotFoundError: no such folder, or no video in it. ConfigError: files that are there already, or a folder that cannot
            be written to, or a GPU without room for a step. ValueError: a file of captions that cannot be read, or minutes of 0
            or less. ImportError: PyAV or pyarrow is missing.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes: expected a number above 0, got {minutes!r}")
    found, out = look(folder, progress), Path(out)
    if not found.videos:
        why = f"; {len(found.broken)} cannot be read, first {_first(found.broken)}" if found.broken else ""
        raise FileNotFoundError(f"FOLDER: no video in {str(folder)!r}{why}")
    check_folder(out, "--out")
    said = [_of_videos(found)]
    known = next(
        (path for place in (out, found.root) for path in tables(place) if _rowed(path, found) & set(found.videos)), None
    )
    new = None if known else out / CAPTIONS
    for path in filter(None, (new, out / CONFIG)):
        if path == new and path.exists() and (path not in tables(out) or _rowed(path, found)):
            raise ConfigError(f"{str(path)!r} is there already, and of something else: --out DIR writes elsewhere")
        if path.exists() and not overwrite:
            raise ConfigError(f"{str(path)!r} is there already: --overwrite replaces it, --out DIR writes elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    if known:
        said.append(_of_table(known, found))
    else:
        assert new is not None
        said.append(_write_captions(new, found))
    annotations = known or new
    assert annotations is not None
    unfilled = not known and len({caption.video for caption in found.captions}) < len(found.videos)
    clips = _clips(annotations, found)
    plan = _plan(clips, _machine(), 60 * minutes)
    text = _config(clips, plan, _largest(found), _machine(), _path(annotations, out), _path(found.root, out))
    write_atomically(out / CONFIG, lambda file: file.write(text.encode()))
    load(out / CONFIG)
    said += [
        f"wrote {out / CONFIG}{f': {plan.said}' if plan.step else ''}",
        "",
        *_next(annotations, out / CONFIG, unfilled, found.root, "" if minutes == _MINUTES else f" --minutes {minutes:g}"),
    ]
    return "\n".join(said)


def _of_videos(found: Folder) -> str:
    seconds = sum(info.duration or 0.0 for info in found.videos.values())
    lines = [f"{len(found.videos)} videos in {found.root}, {seconds / 60:.1f} minutes"]
    for what, names in (("cannot be read", found.broken), ("no captions taken from", found.unread)):
        lines += [f"  {what}: {name!r}: {why}" for name, why in list(names.items())[:_SHOWN]]
        lines += [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    if found.hidden:
        lines.append(f"  passed over: {len(found.hidden)} hidden names, first {found.hidden[0]!r}")
    return "\n".join(lines)


def _first(broken: dict[str, str]) -> str:
    name, why = next(iter(broken.items()))
    return f"{name!r}: {why}"


def _parts(path: Path, found: Folder) -> list[ClipTable]:
    """All clips of a file: those to train on, and those that its column split has tested."""
    return [plain.read(path, found.root, split, test_share=0.0) for split in SPLITS]


def _rowed(path: Path, found: Folder) -> set[str]:
    """The videos that a file has captions of."""
    try:
        return {video for part in _parts(path, found) for video in part.videos()}
    except plain.NoCaptions:
        return set()


def _of_table(path: Path, found: Folder) -> str:
    rowed = _rowed(path, found)
    lines = [f"captions: {path}, {sum(map(len, _parts(path, found)))} clips of {len(rowed)} videos"]
    without = [name for name in found.videos if name not in rowed]
    if without:
        listed = ", ".join(map(repr, without[:3])) + (", ..." if len(without) > 3 else "")
        lines.append(f"  {len(without)} videos have no caption there: {listed}")
    gone = [name for name in rowed if name not in found.videos]
    if gone:
        lines.append(f"  {len(gone)} of its videos are not there or cannot be read, first {min(gone)!r}")
    return "\n".join(lines)


def _write_captions(path: Path, found: Folder) -> str:
    """A row for each caption that lies beside a video, and for each other video one to fill in."""
    told: dict[str, list[Caption]] = {}
    for caption in found.captions:
        told.setdefault(caption.video, []).append(caption)
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "caption", "start", "stop"))
    for name, info in found.videos.items():
        if name not in told:
            end = "" if info.duration is None else f"{math.floor(100 * info.duration) / 100:g}"
            writer.writerow((name, "", "0" if end not in ("", "0") else "", "" if end == "0" else end))
        for c in told.get(name, ()):
            times = ("", "") if c.start is None or c.stop is None else (f"{c.start:.3f}", f"{c.stop:.3f}")
            writer.writerow((name, c.text, *times))
    content = file.getvalue()
    # By the mark Excel knows UTF-8, which it would otherwise take for the local encoding, and save names that are nobody's.
    encoded = content.encode("utf-8" if content.isascii() else "utf-8-sig")
    write_atomically(path, lambda f: f.write(encoded))
    line = f"wrote {path}: "
    if told:
        line += f"{len(found.captions)} captions of {len(found.sidecars)} files beside {len(told)} videos"
    rest = len(found.videos) - len(told)
    return line + (", and " if told and rest else "") + (f"{rest} videos to caption" if rest else "")


def _clips(path: Path, found: Folder) -> _Clips:
    durations = {name: info.duration for name, info in found.videos.items() if info.duration is not None}
    try:
        every = _parts(path, found)
    except plain.NoCaptions:
        count = len(found.videos)
        return _Clips(max(1, round((1 - _SHARE) * count)), 0, 0, statistics.median(durations.values() or [1.0]), count > 1)
    testable = len(_rowed(path, found)) > 1 or len(every[1]) > 0
    train = plain.read(path, found.root, "train", test_share=_SHARE if testable else 0.0)
    lengths = [_length(train, row, durations) for row in range(len(train))]
    captions = {plain.normal(text) for row in range(len(train)) for text in train.texts(row)[:1]}
    kinds = {clip.labels or plain.normal(clip.texts[0]) for clip in train}
    return _Clips(len(train), len(captions), len(kinds), statistics.median(lengths or [1.0]), testable)


def _length(table: ClipTable, row: int, durations: dict[str, float]) -> float:
    length = table.stop(row) - table.start(row)
    return durations.get(table.video(row), 1.0) if math.isnan(length) else length


def _largest(found: Folder) -> int:
    return max(info.width * info.height for info in found.videos.values())


def _machine() -> _Machine:
    gpu = torch.cuda.get_device_properties(0).total_memory >> 20 if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        memory = 0
    return _Machine(gpu, cores, memory)


def _path(path: Path, out: Path) -> str:
    """Relative to the configuration where it lies below it, so that both can be moved together."""
    whole = path.resolve()
    try:
        return whole.relative_to(out.resolve()).as_posix()
    except ValueError:
        return str(whole)


def _power(limit: float) -> int:
    """The largest power of two up to a limit, at least 2."""
    return 1 << max(1, int(limit).bit_length() - 1)


def _plan(clips: _Clips, machine: _Machine, budget: float) -> _Plan:
    frames = (4 if clips.seconds <= 2 and machine.gpu else 8) if clips.seconds <= 10 else 16
    # Few classes would leave few clips to a batch.
    distinct = 0 < clips.captions < clips.train and clips.kinds >= min(clips.captions, _KINDS)
    batch = min(64, _power(clips.kinds if distinct else clips.train / 2))
    fitting = _power(0.8 * machine.gpu / (_MIB_PER_FRAME * frames)) if machine.gpu else batch
    steps, step = max(1, clips.train // batch), 0.0
    micro = fitting if fitting < batch else 0
    if clips.captions:
        model = sections.Model(_GPU_MODEL, frames) if machine.gpu else sections.Model(_CPU_MODEL, frames, "", _COARSE)
        config = sections.Config(model, train=sections.Train(batch_size=batch, micro_batch=micro))
        try:
            step = pace.step_seconds(config, torch.device("cuda" if machine.gpu else "cpu"))
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"the GPU has no room for a training step of {batch} clips: end what else is there, or train on the CPU, with "
                "CUDA_VISIBLE_DEVICES= before the command"
            ) from None
    least, most = _EPOCHS
    epochs = min(most, max(least, round(budget / (steps * step)) if step else math.ceil(_STEPS / steps)))
    return _Plan(frames, batch, micro, distinct, epochs, steps * epochs, step)


def _config(clips: _Clips, plan: _Plan, pixels: int, machine: _Machine, annotations: str, videos: str) -> str:
    cache = clips.train * 2 * plan.frames * pixels * 3 <= min(_CACHE, machine.memory // 4)
    counted = f"{clips.train} clips to train on, {clips.captions} captions" if clips.captions else "no captions yet"
    if machine.gpu:
        model = f"""name = "{_GPU_MODEL}"
pretrained = "{_WEIGHTS}"    # EVA02-CLIP, from the Hugging Face hub; or the path of a file of weights"""
        optim, finer = "lr = 3e-5", ""
    else:
        model = f"""# Small enough for a CPU, from random weights. On a machine with a GPU init takes {_GPU_MODEL},
# from weights that know images and words already.
name = "{_CPU_MODEL}"
overrides = {toml_value(_COARSE)}    # four patches a frame: twice as many epochs in the same time as with 16"""
        finer = ", lr = 1e-4"
        optim = "lr = 5e-4\nweight_decay = 0.05\nbeta2 = 0.98"
    micro = f"micro_batch = {plan.micro}    # clips that this GPU's memory holds at a time\n" if plan.micro else ""
    share = "test_share = 0.1    # of the videos, drawn by their paths; a column split outranks it; 0 to train on all"
    if not clips.testable:
        share = "test_share = 0.0    # there is one video only: name its test clips in a column split"
    taken = plan.said.removeprefix(f"{plan.epochs} epochs, ") if plan.step else f"{plan.steps} steps"
    return f"""# Written by evaat-fast init: {counted}. Every key: evaat-fast train --keys

[model]
{model}
num_frames = {plan.frames}    # of each clip; half of the clips are shorter than {clips.seconds:.3g} seconds

[data]
kind = "csv"
# Columns: path, caption, start, stop (seconds or mm:ss; empty for the whole video), and if you like split (train, test) and
# labels: verb*, noun*, label*, class*, with several classes in a cell separated by ;
annotations = {toml_value(annotations)}
videos = {toml_value(videos)}
{share}
cache = {toml_value(cache)}    # keep decoded clips in memory
workers = {0 if cache else min(machine.cores, 8)}

[loss]
name = "clip"    # or then "sms", which learns from label columns how alike clips are: train.init = "run", out = "run2"{finer}

[optim]
{optim}

[schedule]
warmup_epochs = 1

[train]
out = "run"
epochs = {plan.epochs}    # {taken}
batch_size = {plan.batch}
{micro}distinct = {toml_value(plan.distinct)}    # true: no caption twice in a batch, where it would be wrong for the other clip

[eval]
every = {max(1, plan.epochs // 5)}
"""


def _next(annotations: Path, config: Path, unfilled: bool, videos: Path, minutes: str) -> list[str]:
    path, folder, run = (shlex.quote(str(x)) for x in (config, videos, config.parent / "run"))
    lines = ["next, to train on captions:"]
    if unfilled:
        note = "a row a clip: a video may have many rows, with start and stop"
        lines.append(f"  fill in the column caption of {annotations} ({note})")
        out = "" if config.parent == Path() else f" --out {shlex.quote(str(config.parent))}"
        lines.append(f"  evaat-fast init {folder}{out}{minutes} --overwrite    # sizes {config.name} by them")
    lines += [f"  evaat-fast check {path}", f"  evaat-fast train {path}"]
    lines += [f"  evaat-fast index {folder} --checkpoint {run}"]
    lines += ["or, to search at once, with weights that know pictures and words (600 MB are downloaded once):"]
    lines += [f"  evaat-fast index {folder} --checkpoint eva02_clip_b16"]
    whole, here = videos.resolve(), Path.cwd()
    near = whole.parent == here or whole in (here, *here.parents)  # where `search` looks for an index
    where = "" if near else f" --index {folder}"
    return [*lines, "then:", f"  evaat-fast search TEXT{where}", f"  evaat-fast serve --open{where}"]
