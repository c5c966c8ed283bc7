"""What a run tells while it trains: its rates, and the boards that show its log."""

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaat_fast
from evaat_fast.train import boards, meter, train
from evaat_fast.train import log as logs
from evaat_fast.train.log import read

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")


def test_work_is_that_of_the_products():
    """Of the base model, by hand: 12 blocks of width 768 on 785 tokens, 12 of width 512 on 16."""
    with torch.device("meta"):
        model = evaat_fast.create_model("eva02_at_base_patch16_224", num_frames=4)
    vision = 12 * (785 * (4 * 768**2 + 3 * 768 * 2048) + 2 * 785**2 * 768) + 784 * 768 * 768
    text = 12 * (16 * 12 * 512**2 + 16**2 * 512)
    assert meter.flop(model, 16) == 6 * (vision + text)
    half = 12 * (393 * (4 * 768**2 + 3 * 768 * 2048) + 2 * 393**2 * 768) + 392 * 768 * 768
    assert meter.flop(model, 16, 0.5) == 6 * (half + text)
    assert meter.matmul_peak(torch.device("cpu")) is None


def test_a_meter_reads_the_last_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = evaat_fast.create_model("eva02_at_tiny_patch16_64")
    read = meter.Meter(64, torch.device("cpu"), peak=1000 * meter.flop(model, 9))
    assert read.line() == "" and read.clips_per_second is None
    for _ in range(30):
        now[0] += 0.5
        read.step(0.1)
    assert read.clips_per_second == pytest.approx(128) and re.fullmatch(r"128 clips/s  data 20%  \d+\.\d GiB", read.line())
    read.know(model, 9)
    assert "data 20%  MFU 12.8%  " in read.line()
    read.pause()
    assert read.line() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_memory_is_the_most_that_was_held():
    status = Path("/proc/self/status").read_text()
    most = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert abs(meter.peak_memory(torch.device("cpu")) - most) < 1 << 22


def test_a_line_a_minute_where_there_is_no_terminal(configure, monkeypatch, capsys):
    monkeypatch.setattr(logs, "LIVE_SECONDS", 0.0)
    train(configure("train.epochs=1"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "clips/s" in line]
    assert len(lines) == 2 and lines[-1].startswith("run: epoch 1  step 3/3  loss ")
    assert "|g| " in lines[-1] and "data " in lines[-1]


def test_steps_have_norms_and_epochs_their_waits(configure):
    records = read(train(configure("optim.clip_norm=0.01"), quiet=True)["log"])
    assert all(r["grad_norm"] > 0.01 for r in records if r["event"] == "step")
    assert all(0 <= r["seconds_waited"] <= r["seconds"] for r in records if r["event"] == "epoch")


def test_tensorboard(configure, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = read(train(configure("train.tensorboard=true"), quiet=True)["log"])
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({r["step"]: r["loss"] for r in records if r["event"] == "step"})
    assert [event.step for event in events.Scalars("eval/mAP")] == [6]


def test_tensorboard_after_a_kill(tmp_path):
    """Each step once: what a checkpoint knows is there, what came after it is the resumed run's, and none of a replaced one."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown():
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(event.step, event.value) for event in events.Scalars("train/loss")]

    def told(done, *losses):
        log = logs.Log(tmp_path / "log.jsonl", 0, done, [boards.TensorBoard(tmp_path, done)])
        for step, loss in enumerate(losses, done + 1):
            log.write("step", 1, step=step, loss=loss)
        return log

    killed = told(0, 1.0, 2.0)
    killed.sync()  # as a checkpoint is written
    assert shown() == [(1, 1.0), (2, 2.0)]
    killed.write("step", 1, step=3, loss=9.0)
    killed.close()
    told(2, 3.0, 4.0).close()
    assert shown() == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    told(0, 5.0).close()
    assert shown() == [(1, 5.0)]


def test_wandb(configure, monkeypatch, tmp_path):
    """A stand-in for the package: what it is told, once, and by which name a resumed run finds its own."""
    said = []

    def init(**options):
        said.append(options)
        return SimpleNamespace(log=lambda values, step: said.append((step, values)), finish=lambda: said.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train(configure("train.wandb=kitchens", "train.epochs=1"), quiet=True)
    first, *told, last = said
    assert first["project"] == "kitchens" and first["resume"] == "allow" and first["config"]["train"]["epochs"] == 1
    assert last == "finished" and [step for step, _ in told] == [1, 2, 3, 3, 3]
    assert set(told[0][1]) == {"train/epoch", "train/loss", "train/lr", "train/grad_norm"} and "eval/mAP" in told[-1][1]
    said.clear()
    train(configure("train.wandb=kitchens", "train.epochs=2"), resume=True, quiet=True)
    assert said[0]["id"] == first["id"] and [x[0] for x in said[1:-1] if "train/loss" in x[1]] == [4, 5, 6]
    said.clear()
    train(configure("train.wandb=kitchens", "train.epochs=1"), overwrite=True, quiet=True)
    assert said[0]["id"] != first["id"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_board_that_is_not_installed_is_named_before_the_run(configure, monkeypatch, tmp_path, name):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    value = "true" if name == "tensorboard" else "kitchens"
    with pytest.raises(ImportError, match=f"train.{name} needs {name}: pip install {name}"):
        train(configure(f"train.{name}={value}"), quiet=True)
    assert not (tmp_path / "run").exists()
