"""A training run: one process, or several that share each batch, a device each.

    result = train(load("run.toml"))

A run's folder holds `log.jsonl`, `config.json` and `last.pt`, or `last.parts` where `train.save_as` says so. Everything random
is drawn from (seed, epoch, number), so a run that is interrupted and resumed, in the midst of an epoch too, ends where an
uninterrupted one ends.
"""

import contextlib
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import torch

import evaat_fast
from evaat_fast._files import write_atomically
from evaat_fast.train import boards, checkpoint, evaluation, inputs, packages, shards, similarity
from evaat_fast.train.averaging import Average
from evaat_fast.train.checkpoint import Position
from evaat_fast.train.config import Config, ConfigError, absolute
from evaat_fast.train.log import Log, Progress, duration
from evaat_fast.train.loop import STOP, Inputs, Loop, Told
from evaat_fast.train.loop import Diverged as Diverged
from evaat_fast.train.masters import Masters
from evaat_fast.train.meter import Meter, matmul_peak
from evaat_fast.train.ranks import Ranks, ending_together, started
from evaat_fast.train.setup import build_model as build_model
from evaat_fast.train.setup import check_folder as check_folder
from evaat_fast.train.setup import check_same_run as check_same_run
from evaat_fast.train.setup import choose_device as choose_device
from evaat_fast.train.steps import Steps, build_optimizer, fit_optimizer
from evaat_fast.train.stop import Signals
from evaat_fast.train.stop import Stopped as Stopped


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    datasets: inputs.Splits | None = None,
) -> dict[str, Any]:
    """Runs the training that `config` describes, from start or from the last checkpoint.

    Ctrl-C and SIGTERM end the step that runs, save, and raise Stopped; a second Ctrl-C stops at once. A process that torchrun
    starts again goes on from the job's last checkpoint by itself.

    Args:
        config: a Config. resume: continue from the checkpoint in config.train.out where there is one. overwrite: start anew
            where the folder already holds a run. quiet: print nothing. datasets: of `inputs.splits`, made for
        `config`, whose caches may be full already; None makes them.

    Returns:
        dict(model, metrics, log, checkpoint): the trained model, the last evaluation ({} for a corpus without), and the
        paths of both files. With "bfloat16-params" the model's matrices are bfloat16, but where processes share them out
        ("fsdp"); the checkpoint's are float32. With config.train.ema the metrics are of the averaged weights, which the
        checkpoint holds, too.

    Raises:
        ConfigError: what the configuration asks for cannot be had here. FileNotFoundError, ValueError: data or a
            checkpoint that is missing or does not fit. ImportError: packages that are missing, all of them named. Diverged:
            a step was bad; what was trained before it is saved. Stopped: a KeyboardInterrupt, see above. OSError: the last
            checkpoint could not be written. OtherFailed: another process of the run raised, as the message says.
    """
    device = choose_device(config)
    packages.require("training", *packages.of_data(config), *packages.of_progress(quiet))
    packages.require_boards(config)
    with started(config, device) as ranks, ending_together(ranks):
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
    last = out / (checkpoint.PARTS if config.train.save_as == "parts" else checkpoint.LAST)
    stands = checkpoint.find(out)
    described = out / "config.json"
    resume = any(ranks.gather(resume or _restarted(out, overwrite)))  # of several machines some do not know of a restart
    if stands and not (resume or overwrite):
        raise ConfigError(f"train.out: {str(out)!r} already holds a run: --resume continues it, --overwrite replaces it")
    stored = checkpoint.read(stands, tensors=False) if resume and stands else None
    replaced = stored is not None and not checkpoint.is_of(stored, described)
    if replaced:  # by a run that was killed before it saved anything: that is the one to go on with
        stored = None
    at = Position()
    if stored is not None:
        assert stands is not None
        check_same_run(stored["config"], config, stands)
        at = checkpoint.position(stored, stands)
        if at.epoch + bool(at.step) > config.train.epochs:
            raise ConfigError(f"train.epochs: {config.train.epochs}, and {stands} is of {at}")
    found = ranks.gather(str(at) if stored else "")
    if other := next((rank for rank, text in enumerate(found) if text != found[0]), 0):
        states = [text or "none" for text in (found[0], found[other])]
        raise ConfigError(
            f"train.out: all processes need the same folder {str(out)!r}; process 0 finds a checkpoint there of {states[0]}, "
            f"process {other} of {states[1]}"
        )

    splits = datasets or inputs.splits(config)
    data, test = splits.train, splits.test
    usable = inputs.inspect(config, splits, lambda text: None if quiet else print(text, file=sys.stderr)).usable
    drawn = checkpoint.fingerprint(usable)
    if stored and stored.get("clips") and stored["clips"] != drawn:
        raise ConfigError(
            f"{stands} was trained on {stored['clips']['count']} clips of this corpus that could be used, and now others can, "
            f"{drawn['count']}: the rest of the run would be of another order. Restore the files, or start another run from "
            "its weights with train.init"
        )
    given = Inputs(data, inputs.sampler(config, data, usable), inputs.tokenizer(config))
    length = len(given.sampler)
    model = build_model(config, stored)
    model.to(device)
    table = _labels(config, data, out, device, ranks, model if stored is None else None)
    shared = ranks.several and config.train.parallel == "fsdp"
    if shared:
        shards.shard(model, config, ranks, device)
    masters = Masters(model, torch.bfloat16 if config.train.precision == "bfloat16-params" and not shared else None)
    optimizer = build_optimizer(model, config, masters)
    average = Average(masters, config.train.ema) if config.train.ema else None
    if stored:
        assert stands is not None
        restored = checkpoint.restore(stored, masters, optimizer, stands, average)
        stored = {"config": stored["config"], "run": stored.get("run", ""), "rng": restored}  # and no more of it in memory
    fit_optimizer(optimizer, config, device)
    steps = Steps(masters, optimizer, table, config, device, ranks, average)
    if config.train.compile:
        model.compile_blocks()

    run = stored["run"] if stored else ranks.gather(f"{_job()}{uuid.uuid4().hex}")[0]
    # An old last.pt stands until the new run's first one takes its place.
    out.mkdir(parents=True, exist_ok=True)
    if ranks.main:
        for left in out.glob(f".{checkpoint.LAST}.*.tmp"):  # by a run that was killed while it wrote
            left.unlink()
        # Its name for the run is what tells whether an old checkpoint in the folder is of this one.
        content = json.dumps({**config.to_dict(), "run": run} if run else config.to_dict(), indent=1).encode()
        write_atomically(described, lambda f: f.write(content))
    done = at.epoch * length + at.step
    shown, path = (boards.boards(config, done), out / "log.jsonl") if ranks.main else ([], None)
    log = Log(path, at.epoch, done, shown, lambda text: progress.warn(text))
    if config.data.cache and not datasets and not config.data.workers:
        with Progress(len(usable), "decoding", quiet) as reading:
            inputs.decode(data, reading, usable)
    count = config.train.epochs * length
    progress = Progress(count - done, out.name, quiet)
    peak = matmul_peak(device) if ranks.main and not quiet else None
    told = Told(log, progress, Meter(config.train.batch_size, device, peak and peak * ranks.world))

    def write(at: Position, ranks: Ranks = ranks) -> None:
        # A checkpoint should not know more than the log.
        checkpoint.save(last, masters, optimizer, at, config, drawn, average, ranks, run, log.sync)
        if ranks.main:
            checkpoint.remove_other(last)

    together = ranks.several and config.train.save_as == "parts"
    save = checkpoint.Saver(write, config, ranks.main, progress.warn, together, shared)
    save.at, begun = at if stored else None, at
    signals = Signals(quiet=not ranks.main)
    loop = Loop(steps, given, config, told, save, signals)

    def evaluated() -> dict[str, float]:
        assert test is not None
        with average.shown() if average else contextlib.nullcontext():
            of = shards.copy_of(model) if shared else model
            return evaluation.evaluate(of, test, config, device, ranks=ranks)

    def due(epoch: int) -> bool:
        every, final = config.eval.every, epoch == config.train.epochs
        return test is not None and epoch > 0 and (final or bool(every and epoch % every == 0))

    metrics: dict[str, float] | None = None if test is not None else {}
    try:
        with signals:
            if replaced:
                progress.say(f"{out.name}: {stands} is of the run that this one replaced before it was killed, and not read")
            _begin(told, config, at, stored, model, given, device, ranks, resume)
            if stored and not at.step and due(at.epoch):  # it ended while it was evaluated, or after all of it
                missing = ranks.gather(at.epoch not in log.evaluated)[0]
                if missing or at.epoch == config.train.epochs:
                    with signals.at_once():
                        metrics = evaluated()
                if missing and metrics is not None:
                    log.write("eval", at.epoch, **metrics)
            rng = stored["rng"] if stored and at.step else None
            while at.epoch < config.train.epochs:
                at, rng = loop.epoch(at, rng), None
                loss, seconds, epoch = at.loss / length, at.seconds, at.epoch + 1
                log.write(
                    "epoch",
                    epoch,
                    loss=loss,
                    seconds=seconds,
                    clips_per_second=length * config.train.batch_size / seconds,
                    seconds_waited=at.waited,
                    replaced=at.replaced,
                )
                line = f"{out.name}: epoch {epoch}/{config.train.epochs}  loss {loss:.4f}  {seconds:.1f} s"
                line += f"  {at.replaced} clips replaced" if at.replaced else ""
                at = Position(epoch, recent=at.recent)
                # Before the evaluation, which a test clip that cannot be decoded ends.
                final = epoch == config.train.epochs
                if loop.heard or due(epoch) or final or epoch % config.train.save_every == 0:
                    save(at, must=final or loop.heard == STOP)
                if loop.heard == STOP:
                    progress.say(line)
                    loop.stop(at)
                if due(epoch):
                    # A signal may have come while it was saved; whether it was, the process that writes knows.
                    heard, saved = zip(*ranks.gather((signals.heard, save.at == at)), strict=True)
                    if saved[0] and any(heard):
                        progress.say(line)
                        loop.stop(at)
                    with signals.at_once() if saved[0] else contextlib.nullcontext():
                        metrics = evaluated()
                    log.write("eval", epoch, **metrics)
                    line += f"  {evaluation.summary(metrics)}"
                told.meter.pause()
                if not final:
                    line += f"  {duration((config.train.epochs - epoch) * seconds)} left"
                progress.say(line)
    finally:
        progress.close()
        log.close()
    return {
        "model": shards.copy_of(model) if shared else model,
        "metrics": metrics,
        "log": out / "log.jsonl",
        # What was complete when it was resumed may be saved the other way.
        "checkpoint": stands if stored and at == begun else last,
    }


def _labels(config, data, out, device, ranks, model):
    """float32 [K, K], the relevancy between kinds, where the loss reads one."""
    if config.loss.name != "sms":
        return torch.zeros(0, 0)
    if config.data.similarity == "text-tower":
        return similarity.labels(config, data, out, device, ranks, model)
    return data.relevancy_table


def _begin(told, config, at, stored, model, given, device, ranks, resume):
    """Says what begins, or where it goes on."""
    out, length, epochs = Path(config.train.out), len(given.sampler), config.train.epochs
    on = f"on {device}" + f" and {ranks.world - 1} more" * (ranks.world > 1)
    if stored is None:
        parameters, clips = sum(p.numel() for p in model.parameters()), len(given.sampler.rows)
        told.log.write(
            "start",
            0,
            parameters=parameters,
            clips=clips,
            steps=epochs * length,
            device=str(device),
            version=evaat_fast.__version__,
        )
        anew = "no checkpoint to resume yet; " if resume else ""
        told.progress.say(
            f"{out.name}: {anew}{parameters / 1e6:.2f} M parameters, {clips} clips, {epochs} epochs of {length} steps {on}"
        )
        return
    where = f"in epoch {at.epoch + 1}, after step {at.step} of {length}" if at.step else f"after epoch {at.epoch}"
    before = stored["config"]["train"]["epochs"]
    first, asked = stored["config"]["train"].get("init", ""), absolute(config).train.init
    if first != asked and not told.progress.quiet:
        told.progress.warn(f"{out.name}: train.init = {asked!r} is not read, as the run goes on; it began from {first!r}")
    told.progress.say(f"{out.name}: goes on {where}, of {epochs} epochs, {on}, from {checkpoint.find(out)}")
    if before != epochs:
        told.log.write("extended", at.epoch, epochs=epochs, before=before)
        told.progress.say(
            f"{out.name}: {epochs} epochs instead of {before}: the learning rate is that of {epochs} from here on"
        )


def _restarted(out: Path, overwrite: bool) -> bool:
    """Whether torchrun started this process again, and the folder's run is of the same job. A job that overwrites another run
    has given its own a name first."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    return not overwrite or (checkpoint.named(out / "config.json") or "?").startswith(_job())


def _job() -> str:
    """What torchrun calls the job."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "job") + " "
