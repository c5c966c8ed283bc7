"""A run on several processes is the run on one: over gloo, from steps in float64 to what torchrun starts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import formats
import pytest
import torch
import train_ranks
from corpus import configuration, corpus

from evaat_fast.data import EK100
from evaat_fast.train import ranks
from evaat_fast.train.config import ConfigError
from evaat_fast.train.log import read

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).with_name("train_ranks.py")
LOSSES = list(train_ranks.LOSSES)


def environment():
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"}


def places(folder):
    """Writes the overrides that find the data of each kind: the small corpus in all formats."""
    made, videos, rows = formats.kitchen(), corpus().videos, ["path,caption,start,stop,verb,noun,split"]
    for clip in EK100(made.ek100, videos, "train", num_frames=2).table:
        nouns = ";".join(f"n{n}" for n in clip.nouns)
        rows.append(f"{clip.video}.MP4,{clip.texts[0]},{clip.start},{clip.stop},v{clip.verbs[0]},{nouns},train")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    found = {
        "ek100-clips": (made.ek100_clips, made.ek100_clips / "clips"),
        "charades-ego": (made.charades, made.charades_videos),
        "egoclip": (made.egoclip, made.ego4d_videos["video_15s"]),
        "csv": (folder / "captions.csv", videos),
    }
    written = {kind: [f"data.annotations={a}", f"data.videos={b}"] for kind, (a, b) in found.items()}
    written["csv"].append("data.test_share=0")
    (folder / "places.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    "cases,worlds",
    [
        ("all,text-tower,ops ego ids", "2"),
        pytest.param("clip,sms,dropped,lamb,cached", "2", marks=pytest.mark.slow),
        pytest.param("clip,sms,dropped,lamb,cached", "3 4", marks=pytest.mark.slow),
        pytest.param(",".join(train_ranks.LABELS), "2 3 4", marks=pytest.mark.slow),
        pytest.param(",".join(LOSSES[:10]), "2 3 4", marks=pytest.mark.slow),
        pytest.param(",".join(LOSSES[10:]), "2 3 4", marks=pytest.mark.slow),
    ],
    ids=["some", "steps-2", "steps-3-4", "labels", "losses", "losses-2"],
)
def test_steps_are_those_of_one_process(tmp_path, cases, worlds):
    """Losses of 20 steps by DDP and by FSDP, and the parameters after them, within 1e-10; saved and begun anew half-way."""
    configuration(tmp_path, "train.batch_size=24")
    places(tmp_path)
    path = tmp_path / "run.toml"
    # With a narrow text tower, as its table of tokens is what takes time.
    narrow = {"batch_size = 16": "batch_size = 24", "text_layers = 1": "text_layers = 1, text_width = 16, text_heads = 1"}
    text = path.read_text()
    for before, after in narrow.items():
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    command = [sys.executable, str(SCRIPT), str(path), str(tmp_path), cases, *worlds.split()]
    run = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("agrees") == sum(map(int, worlds.split()))


def torchrun(count, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, "-m", "evaat_fast", *arguments], capture_output=True, text=True, env=environment(), timeout=240, **options
    )


def alone(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "evaat_fast", *arguments], capture_output=True, text=True, env=environment(), timeout=240
    )


def logged(folder):
    return [r for r in read(folder / "log.jsonl") if r["event"] in ("step", "eval")]


def on_two(folder, code):
    """Runs a script, whose argument is a configuration, as two processes of torchrun."""
    configuration(folder)
    (folder / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "script.py"), str(folder / "run.toml")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]


def test_torchrun_trains_as_one_process_and_writes_once(tmp_path):
    configuration(tmp_path)
    toml, epochs = str(tmp_path / "run.toml"), ["--set", "train.epochs=3"]

    def into(name):
        return [*epochs, "--set", f"train.out={json.dumps(str(tmp_path / name))}"]

    run = alone("train", toml, *into("one"))
    assert run.returncode == 0, run.stderr[-2000:]
    run = torchrun(2, "train", toml, *into("two"))
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("epoch 3/3") == run.stdout.count("verb accuracy") == 1 and "on cpu and 1 more" in run.stdout
    assert run.stdout.count("checkpoint ") == run.stdout.count("log  ") == 1
    parts = [*into("shared"), "--set", "train.parallel=fsdp", "--set", "train.save_as=parts"]
    run = torchrun(2, "train", toml, *parts)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "returned a view tensor" not in run.stderr
    one = logged(tmp_path / "one")
    for name in ("two", "shared"):
        for a, b in zip(one, logged(tmp_path / name), strict=True):
            assert a.keys() == b.keys() and a["event"] == b["event"]
            assert a["event"] == "eval" or b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    # One process goes on from what several wrote, which here is whole; with a part missing every process says so.
    run = alone("train", toml, *into("shared"), "--resume")
    assert run.returncode == 0 and "goes on after epoch 3, of 3 epochs" in run.stdout, run.stderr[-2000:]
    assert logged(tmp_path / "shared") == logged(tmp_path / "shared")[: len(one)]
    next((tmp_path / "shared" / "last.parts").glob("__1_*.distcp")).unlink()
    run = torchrun(2, "train", toml, *parts, "--resume")
    assert run.returncode != 0 and run.stderr.count("lacks parts, or they are damaged") >= 1


def test_a_job_may_train_twice(tmp_path):
    """As pretraining and fine-tuning in one script: the second run does not look for the first one's processes."""
    code = """
import os, socket, sys, time, torch
from evaat_fast.train import load, ranks
config = load(sys.argv[1])
for number in range(2):
    with ranks.started(config, torch.device("cpu")) as found:
        wires = [socket.socket(fileno=os.dup(descriptor)) for descriptor, _ in found.wires]
        wires = [x for x in wires if x.family != socket.AF_UNIX and x.type == socket.SOCK_STREAM]
        gone = [x.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for x in wires]
        assert gone and all(20_000 <= x <= 60_000 for x in gone), gone  # or a machine that is gone would not be missed
        assert all(x.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for x in wires)
        assert found.gather((number, found.rank)) == [(number, 0), (number, 1)]
    time.sleep(0 if found.rank else 2)
"""
    on_two(tmp_path, code)


@pytest.mark.slow
def test_a_process_that_is_late_is_waited_for(tmp_path):
    """Longer than for a machine that does not answer, with more to send than a connection holds."""
    code = """
import sys, time, torch
from evaat_fast.train import load, ranks
with ranks.started(load(sys.argv[1]), torch.device("cpu")) as found:
    time.sleep(40 * found.rank)
    x = torch.ones(1 << 24)
    torch.distributed.all_reduce(x, group=found.group)
    assert all(len(y) == 1 << 23 for y in found.gather(x[: 1 << 23])) and bool((x == 2).all())
"""
    on_two(tmp_path, code)


@pytest.mark.slow
def test_the_demo_under_torchrun(tmp_path):
    """Both processes train, one makes the videos, prints and writes."""
    run = torchrun(2, "demo", "--quick", "--out", str(tmp_path / "demo"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("1/4") == run.stdout.count("The page: ") == 1 and run.stdout.count("on cpu and 1 more") == 2
    assert (tmp_path / "demo" / "index.html").is_file()


def failing(tmp_path, *cases):
    """What `failing.py` says of them."""
    configuration(tmp_path)
    command = [sys.executable, str(SCRIPT.with_name("failing.py")), str(tmp_path / "run.toml"), str(tmp_path), *cases]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60 * (1 + len(cases)))
    assert run.returncode == 0, run.stderr[-3000:]
    for case in cases:
        assert f"{case} goes on" in run.stdout
    return run.stdout


def test_a_process_that_fails_loses_nothing(tmp_path):
    said = failing(tmp_path, "fsdp-parts-1-forward-8")
    assert "stands at 7" in said and "process 0, " in said
    assert "OtherFailed: process 1 failed: ZeroDivisionError: a bad batch" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        {"ddp-file-1-batch-3": 2, "ddp-file-1-forward-8": 7, "ddp-file-0-backward-8": 7, "ddp-parts-1-backward-9": 8},
        {"ddp-file-1-spike-12": 11, "ddp-file-1-update-8": 8, "ddp-parts-1-full-7": 6, "ddp-file-0-full-7": 6},
        {"fsdp-file-0-batch-9": 8, "fsdp-file-1-backward-8": 7, "fsdp-file-0-forward-2": 1, "fsdp-parts-1-forward-7": 6},
        {"fsdp-parts-1-loss-9": 8, "fsdp-parts-0-spike-12": 11, "fsdp-file-1-update-8": 6, "fsdp-parts-1-batch-1": 0},
        {"fsdp-parts-1-full-7": 6, "fsdp-file-0-full-7": 6},
    ],
    ids=["ddp", "ddp-2", "fsdp", "fsdp-2", "full"],
)
def test_whatever_fails_loses_nothing(tmp_path, cases):
    said = failing(tmp_path, *cases)
    for case, step in cases.items():
        # What was half updated cannot be kept, nor what a full disk has no room for: the last checkpoint stands, of an epoch.
        assert f"{case} stands at {step}" in said, said
    assert all(int(seconds) < 60 for seconds in re.findall(r", process \d, (\d+) s: ", said))


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run(tmp_path):
    """One that waits for it forever would be worse than any error."""
    configuration(tmp_path)
    code = """
import os, sys
from evaat_fast.train import inputs
from evaat_fast.cli import main
if os.environ["RANK"] == "1":
    inputs.draw_patches = lambda *a: 1 / 0
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "fails.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "fails.py"),
    ]
    toml = [str(tmp_path / "run.toml"), "--set", "model.patch_dropout=0.5"]
    run = subprocess.run([*command, "train", *toml], capture_output=True, text=True, env=environment(), timeout=60)
    assert run.returncode != 0 and "ZeroDivisionError" in run.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ("train.batch_size=15", "train.batch_size: expected a multiple of the 2 processes, got 15"),
        ("train.cuda_graph=true", "train.cuda_graph: one process only"),
    ],
)
def test_what_several_processes_cannot_do_is_said(tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message), ranks.started(configuration(tmp_path, change), torch.device("cpu")):
        pass


def test_too_few_processes_are_said(tmp_path):
    with pytest.raises(ConfigError, match="train.processes: expected 8, as torchrun --nproc-per-node starts them, got 1"):
        with ranks.started(configuration(tmp_path, "train.processes=8"), torch.device("cpu")):
            pass


def test_shares():
    parts = [ranks.Ranks(rank, 3) for rank in range(3)]
    assert [p.share(list(range(6))) for p in parts] == [[0, 1], [2, 3], [4, 5]]
    whole = torch.arange(7)
    assert torch.equal(ranks.in_order([whole[list(ranks.interleaved(7, p))] for p in parts]), whole)
    assert ranks.in_order([torch.zeros(0, 4)] * 2).shape == (0, 4)
