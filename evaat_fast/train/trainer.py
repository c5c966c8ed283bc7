"""The training loop: one process, or several that share each batch, a device each.

    result = train(load("run.toml"))

A run's folder holds `log.jsonl`, `last.pt` and `config.json`. Everything random is drawn from (seed, epoch), so a run
that is interrupted and resumed ends where an uninterrupted one ends.
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import evaat_fast
from evaat_fast._files import write_atomically
from evaat_fast.data.dataset import ClipDataset
from evaat_fast.model import EVA02AT, CLIPTokenizer
from evaat_fast.train import checkpoint, evaluation, inputs, packages
from evaat_fast.train.config import KEYS, Config, ConfigError
from evaat_fast.train.log import Log, Progress
from evaat_fast.train.masters import Masters
from evaat_fast.train.ranks import Ranks, started
from evaat_fast.train.sampler import EpochSampler
from evaat_fast.train.schedules import warmup
from evaat_fast.train.steps import Steps, build_optimizer, fit_optimizer, later


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    datasets: inputs.Splits | None = None,
) -> dict[str, Any]:
    """Runs the training that `config` describes, from start or from the last checkpoint.

    Args:
        config: a Config. resume: continue from `last.pt` in config.train.out where there is one. overwrite: start anew
            where the folder already holds a run. quiet: print nothing. datasets: of `inputs.splits`, made for
        `config`, whose caches may be full already; None makes them.

    Returns:
        dict(model, metrics, log, checkpoint): the trained model, the last evaluation ({} for a corpus without), and the
        paths of both files. With "bfloat16-params" the model's matrices are bfloat16, the checkpoint's float32.

    Raises:
        ConfigError: what the configuration asks for cannot be had here. FileNotFoundError, ValueError: data or a
            checkpoint that is missing or does not fit. ImportError: packages that are missing, all of them named. Diverged:
            the loss became NaN or infinite; the checkpoint of the last whole epoch stands.
    """
    device = choose_device(config)
    packages.require("training", *packages.of_data(config), *packages.of_progress(quiet))
    with started(config, device) as ranks:
        return _train(config, device, ranks, resume, overwrite, quiet or not ranks.main, datasets)


def _train(
    config: Config,
    device: torch.device,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    datasets: inputs.Splits | None,
) -> dict[str, Any]:
    out = check_folder(config.train.out)
    last = out / checkpoint.LAST
    if last.exists() and not (resume or overwrite):
        raise ConfigError(f"train.out: {str(out)!r} already holds a run: --resume continues it, --overwrite replaces it")
    stored = checkpoint.read(last) if resume and last.exists() else None
    if stored is not None:
        check_same_run(stored["config"], config, last)
    done = stored["epoch"] if stored else 0

    splits = datasets or inputs.splits(config)
    data, test = splits.train, splits.test
    usable = inputs.inspect(config, splits, lambda text: None if quiet else print(text, file=sys.stderr)).usable
    drawn = checkpoint.fingerprint(usable)
    if stored and stored.get("clips") and stored["clips"] != drawn:
        raise ConfigError(
            f"{last} was trained on {stored['clips']['count']} clips of this corpus that could be used, and now others can, "
            f"{drawn['count']}: the rest of the run would be of another order. Restore the files, or start another run from "
            "its weights with train.init"
        )
    sampler, tokenize = inputs.sampler(config, data, usable), inputs.tokenizer(config)
    model = build_model(config, weights=not stored)
    model.to(device)
    masters = Masters(model, torch.bfloat16 if config.train.precision == "bfloat16-params" else None)
    optimizer = build_optimizer(model, config, masters)
    if stored:
        checkpoint.restore(stored, masters, optimizer, last)
    fit_optimizer(optimizer, config, device)
    table = torch.zeros(0, 0) if data.relevancy_table is None else data.relevancy_table
    steps = Steps(masters, optimizer, table, config, device, ranks)
    if config.train.compile:
        model.compile_blocks()

    # An old last.pt stands until the new run's first one takes its place.
    out.mkdir(parents=True, exist_ok=True)
    if ranks.main:
        write_atomically(out / "config.json", lambda f: f.write(json.dumps(config.to_dict(), indent=1).encode()))
    log = Log(out / "log.jsonl" if ranks.main else None, keep=done)
    if config.data.cache and not datasets and not config.data.workers:
        with Progress(len(usable), "decoding", quiet) as reading:
            inputs.decode(data, reading, usable)
    count = config.train.epochs * len(sampler)
    progress = Progress(count - done * len(sampler), out.name, quiet)
    metrics: dict[str, float] | None = None if test is not None else {}
    replaced = sum(ranks.gather(data.replaced))
    try:
        if not stored:
            parameters = sum(p.numel() for p in model.parameters())
            log.write(
                "start",
                0,
                parameters=parameters,
                clips=len(usable),
                steps=count,
                device=str(device),
                version=evaat_fast.__version__,
            )
            progress.say(
                f"{out.name}: {parameters / 1e6:.2f} M parameters, {len(usable)} clips, {config.train.epochs} epochs of "
                f"{len(sampler)} steps on {device}" + f" and {ranks.world - 1} more" * (ranks.world > 1)
            )
        for epoch in range(done, config.train.epochs):
            loss, seconds = run_epoch(steps, data, sampler, tokenize, epoch, config, device, log, progress)
            replaced, before = sum(ranks.gather(data.replaced)), replaced
            finished = epoch + 1 == config.train.epochs
            log.write(
                "epoch",
                epoch + 1,
                loss=loss,
                seconds=seconds,
                clips_per_second=len(sampler) * config.train.batch_size / seconds,
                replaced=replaced - before,
            )
            line = f"{out.name}: epoch {epoch + 1}/{config.train.epochs}  loss {loss:.4f}  {seconds:.1f} s"
            line += f"  {replaced - before} clips replaced" if replaced > before else ""
            # Before the evaluation, which a test clip that cannot be decoded ends.
            if ranks.main and (finished or (epoch + 1) % config.train.save_every == 0):
                checkpoint.save(last, masters, optimizer, epoch + 1, config, drawn)
            if test is not None and (finished or (config.eval.every and (epoch + 1) % config.eval.every == 0)):
                metrics = evaluation.evaluate(model, test, config, device, ranks=ranks)
                log.write("eval", epoch + 1, **metrics)
                line += f"  {evaluation.summary(metrics)}"
            progress.say(line)
        if metrics is None and test is not None:  # resumed after the last epoch
            metrics = evaluation.evaluate(model, test, config, device, ranks=ranks)
    finally:
        progress.close()
        log.close()
    return {"model": model, "metrics": metrics, "log": out / "log.jsonl", "checkpoint": last}


def run_epoch(
    steps: Steps,
    data: ClipDataset,
    sampler: EpochSampler,
    tokenize: CLIPTokenizer,
    epoch: int,
    config: Config,
    device: torch.device,
    log: Log,
    progress: Progress,
) -> tuple[float, float]:
    """One epoch. Returns its mean loss and its seconds."""
    steps.model.train()
    # Crops, frames, texts and the order of the clips are functions of (seed, epoch).
    data.set_epoch(epoch)
    sampler.epoch = epoch
    total = config.train.epochs * len(sampler)
    scheduled: dict[str, Any] = dict(
        lr=config.optim.lr,
        steps=total,
        warmup_steps=round(config.schedule.warmup_epochs * len(sampler)),
        start_lr=config.schedule.start_lr,
        end_lr=config.schedule.end_lr,
        name=config.schedule.name,
    )
    started, losses = time.perf_counter(), []
    pending: tuple[int, float, Callable[[], float]] | None = None

    def settle(step: int, lr: float, loss: Callable[[], float]) -> None:
        """Reads a step's loss when the next one is launched, so that the GPU never waits for the log."""
        value = loss()
        if not math.isfinite(value):
            raise Diverged(
                f"train: the loss is {value} at step {step + 1} of {total}, epoch {epoch + 1}, lr {lr:.2e}. "
                "Lower optim.lr, lengthen schedule.warmup_epochs or set optim.clip_norm"
            )
        losses.append(value)
        log.write("step", epoch + 1, step=step + 1, loss=value, lr=lr)
        progress.step(epoch=epoch + 1, loss=value)

    for i, batch in enumerate(inputs.loader(config, data, sampler, tokenize, device, steps.ranks)):
        step = epoch * len(sampler) + i
        lr = warmup(step, **scheduled)
        steps.set_lr(lr)
        loss = later(steps(batch))
        if pending:
            settle(*pending)
        pending = (step, lr, loss)
    assert pending is not None  # a sampler has at least one batch
    settle(*pending)
    return sum(losses) / len(losses), time.perf_counter() - started


def choose_device(config: Config) -> torch.device:
    """The torch.device that config.train.device names.

    Raises:
        ConfigError: an unknown device, or one that is not here.
    """
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes each has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device: expected auto, cpu, cuda or cuda:0, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device: expected auto, cpu, cuda or cuda:0, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device: {name!r} was asked for, but torch sees no CUDA device")
    if device.type != "cuda" and config.train.cuda_graph:
        raise ConfigError(f"train.cuda_graph: needs a CUDA device, got train.device = {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device: {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def check_folder(path: str | os.PathLike[str], name: str = "train.out") -> Path:
    """Proves that `path` is a folder that can be written to, or could be made; it makes nothing.

    Raises:
        ConfigError: neither.
    """
    path = Path(path)
    try:
        if any(len(os.fsencode(part)) > 200 for part in path.parts):  # names may have 255 bytes, and ours are longer
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists() or p.is_symlink())
        probe = nearest / f".write-test.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{name}: the folder {str(path)!r} cannot be written to: {error.strerror}") from None
    return path


def check_same_run(stored: Mapping[str, Any], config: Config, source: str | os.PathLike[str]) -> None:
    """Raises ConfigError where a checkpoint was made by another run than `config` describes."""
    ours = config.to_dict()
    names = [f"{section}.{name}" for section in ("model", "loss", "optim", "schedule") for name in ours[section]]
    names += [f"train.{name}" for name in ("epochs", "batch_size", "seed", "distinct", "precision")]
    for key in names:
        section, name = key.split(".")
        theirs = stored.get(section, {}).get(name, KEYS[key].default)  # keys are younger than some runs
        if theirs != ours[section][name]:
            raise ConfigError(
                f"{source} was made with {key} = {theirs!r}, this run has {ours[section][name]!r}; to start another run from "
                "its weights, give that a folder of its own and set train.init"
            )


def build_model(config: Config, weights: bool = True) -> EVA02AT:
    """The model of `config`, on the CPU, drawn from train.seed; with `weights`, from train.init or model.pretrained.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or do not fit.
    """
    torch.manual_seed(config.train.seed)
    pretrained = (config.train.init or config.model.pretrained or None) if weights else None
    try:
        model = evaat_fast.create_model(
            config.model.name,
            config.model.num_frames or None,
            pretrained,
            temperature=config.loss.temperature,
            **config.model.overrides,
        )
    except (FileNotFoundError, ValueError) as error:
        if config.train.init and str(error).startswith("pretrained: "):
            raise type(error)(f"train.init: {str(error).removeprefix('pretrained: ')}") from None
        raise
    except (RuntimeError, MemoryError) as error:  # sizes that no memory holds
        raise ConfigError(f"model: cannot be built: {str(error).splitlines()[0] if str(error) else 'out of memory'}") from None
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / config.loss.temperature))
    model.logit_scale.requires_grad_(config.loss.learnable_temperature)
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    return model
