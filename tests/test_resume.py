"""What stops a run loses nothing: killed, told to stop, out of disk, at a bad batch, it goes on as if nothing had been."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evaat_fast.cli import main
from evaat_fast.train import Diverged, Stopped, checkpoint, embedding, inputs, load, steps, stop, train
from evaat_fast.train.config import ConfigError
from evaat_fast.train.log import Log, read

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).with_name("killed.py")
# 6 steps an epoch, each with crops, frames, texts and patches of its own.
OPTIONS = ("train.batch_size=8", "model.patch_dropout=0.5", "data.positive=relevant", "eval.every=1", "train.save_minutes=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    from corpus import configuration

    return train(configuration(tmp_path_factory.mktemp("whole"), *OPTIONS), quiet=True)


def untimed(log):
    return [{k: v for k, v in r.items() if "second" not in k} for r in read(log)]


def assert_same_run(run, whole):
    ours, theirs = (checkpoint.read(r["checkpoint"]) for r in (run, whole))
    for name, x in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], x), name
    for i, moments in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][i][name], x) for name, x in moments.items())
    assert torch.equal(ours["rng"]["cpu"], theirs["rng"]["cpu"])
    assert untimed(run["log"]) == untimed(whole["log"]) and run["metrics"] == whole["metrics"]


@contextlib.contextmanager
def at_step(count, act):
    """Within it the loss of that step, counted from 1, is what `act(loss)` returns of it, or the same where it returns None."""
    original, calls = steps.batch_loss, []

    def called(*arguments):
        calls.append(1)
        loss = original(*arguments)
        changed = act(loss) if len(calls) == count else None
        return loss if changed is None else changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "batch_loss", called)
        yield


def environment():
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return {k: v for k, v in os.environ.items() if k not in names}


def test_killed_while_it_writes(configure, whole, tmp_path, capsys):
    """The file before it stands, and what was half written is cleared away."""
    configure()
    overrides = [f"--set={text}" for text in (*OPTIONS, "train.save_steps=1")]
    command = [sys.executable, str(SCRIPT), "write", "9", "train", str(tmp_path / "run.toml"), *overrides]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert run.returncode == -signal.SIGKILL, run.stderr[-2000:]
    out = tmp_path / "run"
    assert list(out.glob(".last.pt.*.tmp")) and [r["step"] for r in read(out / "log.jsonl") if r["event"] == "step"][-1] == 9
    stored = checkpoint.read(out / "last.pt")
    assert (stored["epoch"], stored["within"]["step"]) == (1, 2)  # after 5 steps, the end of the epoch, and 2 steps
    torch.manual_seed(99)
    resumed = train(configure(*OPTIONS), resume=True)
    assert "goes on in epoch 2, after step 2 of 6, of 2 epochs" in capsys.readouterr().out
    assert_same_run(resumed, whole)
    assert not list(out.glob(".last.pt.*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_told_to_stop_it_finishes_the_step_saves_and_says_so(configure, whole, tmp_path, capfd, number):
    configure()
    arguments = ["train", str(tmp_path / "run.toml"), *(f"--set={text}" for text in OPTIONS)]
    before = signal.getsignal(number)
    with at_step(8, lambda loss: os.kill(os.getpid(), number)):
        assert main(arguments) == 128 + number
    assert signal.getsignal(number) is before
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    said = capfd.readouterr().err
    assert f"{name}: finishes the step and saves; once more stops at once" in said
    assert f"stopped by {name} in epoch 2, after step 2 of 6, which is saved; --resume continues" in said
    assert_same_run(train(load(tmp_path / "run.toml", OPTIONS), resume=True, quiet=True), whole)


def test_told_to_stop_in_the_last_step_of_an_epoch_or_in_an_evaluation(configure, whole):
    config = configure(*OPTIONS)
    with (
        at_step(6, lambda loss: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(Stopped, match="in epoch 1, which is saved"),
    ):
        train(config, quiet=True)
    original, seen = embedding.of_clips, []
    config.eval.batch_size = 4

    def interrupted(*arguments, **options):
        for batch in original(*arguments, **options):
            seen.append(batch)
            if len(seen) == 1:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            yield batch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="stopped by Ctrl-C"):
        patch.setattr(embedding, "of_clips", interrupted)
        train(config, resume=True, quiet=True)  # the evaluation that is still to be made of the first epoch
    assert len(seen) == 1  # and not all of it first
    assert_same_run(train(config, resume=True, quiet=True), whole)


def test_told_to_stop_while_it_saves_it_does_not_evaluate_first(configure, whole, monkeypatch):
    config, original = configure(*OPTIONS), checkpoint.save

    def interrupted(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        with pytest.raises(Stopped, match="stopped by SIGTERM in epoch 1, which is saved"):
            train(config, quiet=True)
    assert not [r for r in read(Path(config.train.out) / "log.jsonl") if r["event"] == "eval"]
    assert_same_run(train(config, resume=True, quiet=True), whole)


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with stop.Signals(quiet=True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.heard == signal.SIGINT and signals.name == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)


def test_of_torchrun_a_ctrl_c_comes_twice(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop.Signals(quiet=True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's, of the same one
        assert signals.heard == signal.SIGINT
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(configure, whole, capsys):
    def limit(size):
        def act(loss):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        return act

    try:
        with at_step(2, limit(100_000)), at_step(4, limit(resource.RLIM_INFINITY)):
            run = train(configure(*OPTIONS, "train.save_steps=1"))
        said = capsys.readouterr().err
        assert "last.pt could not be written (File too large); that of epoch 1, after 1 steps of it stands; tries again" in said
        assert said.count("could not be written") == 2
        assert_same_run(run, whole)
        with (
            at_step(12, limit(100_000)),
            pytest.raises(OSError, match="train.out: last.pt could not be written .*epoch 2, after"),
        ):
            train(configure(*OPTIONS, "train.save_steps=4"), overwrite=True, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert_same_run(train(configure(*OPTIONS), resume=True, quiet=True), whole)


def test_a_log_waits_for_room(tmp_path):
    path, said = tmp_path / "log.jsonl", []
    log = Log(path, warn=said.append)
    log.write("step", 1, step=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, resource.RLIM_INFINITY))
        log.write("step", 1, step=2)
        log.write("step", 1, step=3)
        with pytest.raises(OSError):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert said == ["log.jsonl could not be written (File too large); tries again"]
    log.write("step", 1, step=4)
    log.sync()
    log.close()
    assert [r["step"] for r in read(path)] == [1, 2, 3, 4]


def test_a_board_that_fails_is_told_no_more(tmp_path):
    class Board:
        def write(self, *_):
            raise ValueError("full")

    said = []
    log = Log(tmp_path / "log.jsonl", boards=[Board()], warn=said.append)
    log.write("step", 1, step=1)
    log.write("step", 1, step=2)
    log.close()
    assert said == ["Board is told no more: ValueError: full"] and len(read(tmp_path / "log.jsonl")) == 2


def test_a_checkpoint_is_read_where_it_lies(tmp_path):
    """Eight processes of one machine that go on from a file do not hold it in memory eight times."""

    def held():
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])

    content = dict.fromkeys(("model_config", "config", "optimizer", "rng"), {})
    torch.save({**content, "epoch": 1, "state_dict": {"x": torch.ones(1 << 25)}}, tmp_path / "last.pt")
    before = held()
    stored = checkpoint.read(tmp_path / "last.pt")
    assert stored["state_dict"]["x"].sum() == 1 << 25 and held() - before < 1 << 15  # KiB, of 128 MiB


def nan_gradient(loss):
    loss.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda loss: loss * float("inf"), "the loss is inf at step 9 of 12, epoch 2"),
        (nan_gradient, "the gradient's norm is nan at step 9 of 12"),
    ],
    ids=["loss", "gradient"],
)
def test_a_bad_step_changes_nothing_and_names_its_clips(configure, whole, act, message):
    config = configure(*OPTIONS)
    with at_step(9, act), pytest.raises(Diverged, match=message) as error:
        train(config, quiet=True)
    stored = checkpoint.read(Path(config.train.out) / "last.pt")
    assert (stored["epoch"], stored["within"]["step"]) == (1, 2)
    record = read(Path(config.train.out) / "log.jsonl")[-1]
    assert record["event"] == "diverged" and record["step"] == 9
    data = inputs.splits(config).train
    sampler = inputs.sampler(config, data)
    sampler.epoch = 1
    assert record["clips"] == [data.table.id(row) for row in list(sampler)[2]]
    assert ", ".join(record["clips"][:3]) + " and 5 more, all in log.jsonl" in str(error.value)
    assert_same_run(train(config, resume=True, quiet=True), whole)


def test_a_spike_is_compared_with_the_losses_before_it(configure):
    options = ("train.batch_size=4", "train.save_minutes=0", "schedule.name=constant")
    whole = train(configure(*options, out="whole"), quiet=True)
    config = configure(*options, "train.spike=2")
    with (
        at_step(18, lambda loss: 4 * loss),
        pytest.raises(Diverged, match="above the .* that train.spike = 2 allows, at step 18"),
    ):
        train(config, quiet=True)
    assert_same_run(train(config, resume=True, quiet=True), whole)
    with at_step(9, lambda loss: 4 * loss):  # of too few to compare it with
        train(config, overwrite=True, quiet=True)


def test_a_batch_that_cannot_be_had_loses_nothing(configure, whole):
    config = configure(*OPTIONS)
    original, calls = inputs.draw_patches, []

    def failing(*arguments):
        calls.append(1)
        return 1 / 0 if len(calls) == 8 * 8 + 3 else original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(inputs, "draw_patches", failing)
        train(config, quiet=True)
    stored = checkpoint.read(Path(config.train.out) / "last.pt")
    assert (stored["epoch"], stored["within"]["step"]) == (1, 2)
    assert_same_run(train(config, resume=True, quiet=True), whole)


def test_a_batch_that_cannot_be_computed_loses_nothing(configure, whole):
    config = configure(*OPTIONS)
    with at_step(5, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):
        train(config, quiet=True)
    with at_step(4, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):
        train(config, resume=True, quiet=True)
    assert checkpoint.read(Path(config.train.out) / "last.pt")["within"]["step"] == 1
    assert_same_run(train(config, resume=True, quiet=True), whole)


def test_a_checkpoint_that_was_cut_short(configure):
    path = train(configure("train.epochs=1"), quiet=True)["checkpoint"]
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="last.pt' is damaged or was cut short, at 100,000 bytes: copy it again"):
        train(configure("train.epochs=1"), resume=True, quiet=True)


def test_paths_are_stored_so_that_they_hold_elsewhere(configure, tmp_path, monkeypatch):
    config = configure("train.epochs=1")
    for section, name in (("data", "annotations"), ("data", "videos"), ("train", "out")):
        place = os.path.relpath(getattr(getattr(config, section), name), tmp_path)
        setattr(getattr(config, section), name, place)
    monkeypatch.chdir(tmp_path)
    train(config, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    written = tmp_path / "new/folder/metrics.json"
    assert main(["eval", "--checkpoint", "../run/last.pt", "--json", str(written)]) == 0
    assert json.loads(written.read_text())["clips"] == 16


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.mark.parametrize("parallel, saved", [("fsdp", "parts"), pytest.param("ddp", "file", marks=pytest.mark.slow)])
def test_torchrun_starts_a_job_again_and_another_number_of_processes_ends_it(configure, tmp_path, parallel, saved):
    """Two ranks; one is killed; both are started again and go on; torchrun is told to stop; one process does the rest."""
    configure(*OPTIONS)
    how = (*OPTIONS, "train.save_steps=1", f"train.parallel={parallel}", f"train.save_as={saved}")
    overrides, torchrun = [f"--set={text}" for text in how], [*TORCHRUN, "2"]
    environ = environment() | {"OMP_NUM_THREADS": "1"}
    arguments = ["train", str(tmp_path / "run.toml"), *overrides]
    run = subprocess.run(
        [*torchrun, "-m", "evaat_fast", *arguments, f"--set=train.out={tmp_path}/two"],
        capture_output=True,
        text=True,
        env=environ,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    two = untimed(tmp_path / "two/log.jsonl")
    begin = time.monotonic()
    run = subprocess.run(
        [*torchrun, "--max-restarts", "1", str(SCRIPT), "rank", "4", *arguments],
        capture_output=True,
        text=True,
        env=environ,
        timeout=240,
    )
    assert run.returncode != 0 and time.monotonic() - begin < 120
    assert "goes on in epoch 1, after step " in run.stdout, run.stdout + run.stderr[-3000:]
    assert run.stderr.count("which is saved; --resume continues") == 1
    found = untimed(tmp_path / "run/log.jsonl")
    assert found == two[: len(found)] and 7 <= [r["step"] for r in found if r["event"] == "step"][-1] < 12
    train(load(tmp_path / "run.toml", OPTIONS), resume=True, quiet=True)
    ended = untimed(tmp_path / "run/log.jsonl")
    assert len(ended) == len(two)
    for ours, theirs in zip(ended, two, strict=True):
        assert ours["event"] == theirs["event"] and ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("parallel, saved", [("ddp", "file"), ("fsdp", "file"), ("fsdp", "parts")])
def test_killed_it_goes_on_to_the_bit_and_elsewhere_to_rounding(configure, tmp_path, parallel, saved):
    """In float64: two ranks, of which one is killed, end as two that were not; one and four that go on, within 1e-10."""
    configure(*OPTIONS)
    how = (*OPTIONS, "train.save_steps=2", f"train.parallel={parallel}", f"train.save_as={saved}")

    def run(count, out, when, *more):
        arguments = ["train", str(tmp_path / "run.toml"), *(f"--set={text}" for text in (*how, f"train.out={tmp_path / out}"))]
        start = [*TORCHRUN, str(count)] if count > 1 else [sys.executable]
        command = [*start, str(SCRIPT), "float64", str(when), *arguments, *more]
        environ = environment() | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)

    def ended(out):
        stored = checkpoint.read(checkpoint.find(tmp_path / out))
        assert stored["epoch"] == 2 and all(x.dtype == torch.float64 for x in stored["state_dict"].values())
        return {name: stored[name] for name in ("state_dict", "optimizer")}, untimed(tmp_path / out / "log.jsonl")

    assert (first := run(2, "whole", 0)).returncode == 0, first.stderr[-3000:]
    killed = run(2, "killed", 9)
    assert killed.returncode != 0 and "Signal 9 (SIGKILL) received" in killed.stderr, killed.stderr[-3000:]
    whole, log = ended("whole")
    for count in (2, 1, 4):
        out = f"killed-{count}"
        shutil.copytree(tmp_path / "killed", tmp_path / out)
        again = run(count, out, 0, "--resume")
        assert again.returncode == 0 and "goes on in epoch 2, after step 2 of 6" in again.stdout, again.stderr[-3000:]
        found, told = ended(out)
        bound = 0 if count == 2 else 1e-10
        torch.testing.assert_close(found, whole, rtol=bound, atol=bound)
        assert len(told) == len(log)
        for ours, theirs in zip(told, log, strict=True):
            assert ours["event"] == theirs["event"] and ours.get("loss", 0) == pytest.approx(
                theirs.get("loss", 0), rel=bound, abs=0
            )
        assert count != 2 or told == log


def test_a_job_that_overwrites_is_started_again_as_what_it_is(configure, monkeypatch):
    """Not from the checkpoint of the run that it replaces, but from its own."""
    old = train(configure(*OPTIONS, "train.seed=7", "train.epochs=1"), quiet=True)
    config = configure(*OPTIONS, "train.save_steps=1")
    with at_step(1, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):
        train(config, overwrite=True, quiet=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert checkpoint.read(old["checkpoint"])["config"]["train"]["seed"] == 7
    with at_step(3, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):
        train(config, overwrite=True, quiet=True)
    assert checkpoint.read(old["checkpoint"])["within"]["step"] == 2
    with at_step(1, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):  # before it has saved anything itself
        train(config, overwrite=True, quiet=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with at_step(1, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):
        train(config, overwrite=True, quiet=True)
    assert [r["step"] for r in read(old["log"]) if r["event"] == "step"] == [1, 2]
    run = train(config, overwrite=True, quiet=True)
    assert [r["step"] for r in read(run["log"]) if r["event"] == "step"] == list(range(1, 13))


@pytest.mark.parametrize("saved", ["file", "parts"])
def test_a_run_that_replaces_another_and_is_killed_before_it_saves(configure, whole, capsys, saved):
    """--resume goes on with it, and not with the one that it replaced."""
    old = train(configure(*OPTIONS, "train.seed=7", "train.epochs=1", f"train.save_as={saved}"), quiet=True)
    config = configure(*OPTIONS)
    with at_step(1, lambda loss: 1 / 0), pytest.raises(ZeroDivisionError):
        train(config, overwrite=True, quiet=True)
    assert checkpoint.find(config.train.out) == old["checkpoint"]
    run = train(config, resume=True)
    said = capsys.readouterr().out
    assert "is of the run that this one replaced before it was killed" in said and "no checkpoint to resume yet" in said
    assert_same_run(run, whole)


def test_another_file_to_start_from_is_not_read_and_said(configure, capsys):
    train(configure(*OPTIONS, "train.epochs=1"), quiet=True)
    train(configure(*OPTIONS, "train.init=other.pt"), resume=True)
    said = capsys.readouterr().err
    assert "other.pt' is not read, as the run goes on; it began from ''" in said


def test_what_is_asked_is_not_what_was(configure):
    train(configure(*OPTIONS, "train.epochs=1"), quiet=True)
    with pytest.raises(ConfigError, match="made with train.ema = 0.0, this run has 0.9"):
        train(configure(*OPTIONS, "train.epochs=1", "train.ema=0.9"), resume=True, quiet=True)


def test_time_to_save_is_said_once_and_a_failure_is_tried_again(configure, monkeypatch):
    now, written, said = [1000.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    full = False

    def write(at):
        if full:
            raise OSError(28, "No space left on device")
        written.append(at)

    save = checkpoint.Saver(write, configure("train.save_minutes=30"), True, said.append)
    assert not save.due(1)
    now[0] += 1801
    assert save.due(2) and not save.due(3)  # of several processes all save a step after one has asked
    save(checkpoint.Position(0, 3))
    assert written == [checkpoint.Position(0, 3)] and not save.due(4)
    now[0] += 1801
    full = True
    assert save.due(5)
    save(checkpoint.Position(0, 6))
    assert said == [
        "last.pt could not be written (No space left on device); that of epoch 1, after 3 steps of it stands; tries again"
    ]
    now[0] += 61
    full = False
    assert save.due(7)
    save(checkpoint.Position(1, 0))
    now[0] += 61
    assert written[-1] == checkpoint.Position(1) and not save.due(8)
    other = checkpoint.Saver(write, configure("train.save_steps=1"), False, said.append)
    other(checkpoint.Position(2))
    assert not other.due(1) and len(written) == 2
