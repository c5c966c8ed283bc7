"""The command line: what it prints, what it writes, and one line for each mistake."""

import json
import subprocess
import sys

import pytest
import torch
from corpus import corpus

from evaat_fast.cli import main
from evaat_fast.data.choices import FRAMES
from evaat_fast.data.chunks import Settings
from evaat_fast.data.prepare import DATASETS
from evaat_fast.eval import paper, tricks
from evaat_fast.train import features, load, packages, tasks

TINY = """
[model]
name = "eva02_at_tiny_patch16_64"
num_frames = 2
overrides = { patch_size = 32, vision_layers = 1, text_layers = 1 }
[data]
annotations = "ANNOTATIONS"
videos = "VIDEOS"
[train]
out = "run"
batch_size = 16
device = "cpu"
"""


@pytest.fixture
def toml(tmp_path):
    pytest.importorskip("decord")
    pytest.importorskip("tokenizers")
    kitchen = corpus()
    path = tmp_path / "run.toml"
    path.write_text(TINY.replace("ANNOTATIONS", str(kitchen.annotations)).replace("VIDEOS", str(kitchen.videos)))
    return str(path)


def test_train_then_eval(toml, tmp_path, capsys, monkeypatch):
    assert main(["train", toml, "--set", "train.epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed and "nDCG" in printed and "log.jsonl" in printed
    checkpoint, written = str(tmp_path / "run/last.pt"), tmp_path / "metrics.json"
    assert main(["eval", toml, "--checkpoint", checkpoint, "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    assert "video->text" in printed and "verb accuracy" in printed
    metrics = json.loads(written.read_text())
    assert {"mAP_v2t", "mAP_t2v", "mAP", "nDCG_v2t", "nDCG_t2v", "nDCG", "verb_accuracy"} <= metrics.keys()
    assert metrics["clips"] == 16 and metrics["frames"] == "ordered"
    assert f"{metrics['mAP']:.2f}" in printed
    assert main(["eval", toml, "--checkpoint", checkpoint, "--frames", "frozen", "--json", str(written)]) == 0
    assert json.loads(written.read_text())["frames"] == "frozen"

    # A run in parts is evaluated as it lies, as its folder, and from anywhere.
    parts = tmp_path / "parts"
    arguments = ["--set", "train.epochs=1", "--set", "train.save_as=parts", "--set", f"train.out={parts}"]
    assert main(["train", toml, *arguments]) == 0
    monkeypatch.chdir(tmp_path.parent)
    for path in (parts / "last.parts", parts):
        assert main(["eval", "--checkpoint", str(path), "--json", str(written)]) == 0
        found = json.loads(written.read_text())
        assert found["mAP"] == pytest.approx(metrics["mAP"]) and found["stage"] == "fine-tuned" and found["epoch"] == 1
    next(parts.glob("last.parts/*.distcp")).unlink()
    assert main(["eval", "--checkpoint", str(parts)]) == 2
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((tmp_path / "run/last.pt").read_bytes()[:-1000])
    assert main(["eval", "--checkpoint", str(damaged)]) == 2
    said = capsys.readouterr().err
    assert "lacks parts, or they are damaged" in said and "was cut short" in said

    assert main(["train", toml, "--set", "train.epochs=1"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", toml, "--set", "train.epochs=1", "--resume"]) == 0
    assert main(["train", toml, "--set", "train.epochs=1", "--overwrite"]) == 0
    # What is saved in parts is evaluated as it lies, and says as much of its run.
    assert main(["train", toml, "--set", "train.epochs=1", "--set", "train.save_as=parts", "--resume"]) == 0
    assert f"checkpoint {tmp_path / 'run/last.pt'}\n" in capsys.readouterr().out  # nothing was left to train, or to save
    assert main(["train", toml, "--set", "train.epochs=1", "--set", "train.save_as=parts", "--overwrite"]) == 0
    found = []
    for path in (tmp_path / "run/last.parts", tmp_path / "run"):
        assert main(["eval", "--task", "ek100-mir", "--checkpoint", str(path), "--json", str(written)]) == 0
        record = json.loads(written.read_text())
        assert (record["epoch"], record["stage"], record["checkpoint"]) == (1, "fine-tuned", str(tmp_path / "run/last.parts"))
        found.append(record["checkpoint_sha256"])
    assert found[0] == found[1] and record["mAP"] == pytest.approx(metrics["mAP"])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "missing.toml"], "there is no configuration file 'missing.toml'"),
        (["train", "TOML", "--set", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "TOML", "--set", "train.out=/dev/null/x"], "'/dev/null/x' cannot be written to"),
        (["train", "TOML", "--set", "data.videos=/nowhere"], "there is no folder '/nowhere'"),
        (["train", "TOML", "--set", "train.batch_size=1000"], "more than the 48 training clips"),
        (["eval", "TOML", "--checkpoint", "/nowhere.pt"], "--checkpoint: there is no file '/nowhere.pt'"),
        (["eval", "TOML", "--checkpoint", "TOML"], "is not a file of weights"),
        (["eval", "TOML", "--checkpoint", "TOML", "--json", "/dev/null/x/m.json"], "--json: the folder"),
        (["demo", "--out", "/dev/null/demo"], "--out: the folder '/dev/null/demo' cannot be written to"),
        (["demo", "--out", "TMP/demo", "--set", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["make-kitchen", "/dev/null/kitchen"], "/dev/null/kitchen"),
        (["make-kitchen", "TMP/kitchen", "--train-clips", "0"], "train_clips"),
        (["make-kitchen", "TMP"], "is not empty"),
        (["make-kitchen", "TMP/" + "k" * 300], "DIR: the folder"),
        (["demo", "--out", "TMP/" + "d" * 300], "--out: the folder"),
        (["train", "TOML", "--set", "train.out=TMP/" + "r" * 300], "cannot be written to: File name too long"),
        (["train", "TOML", "--set", "train.init=/nowhere.pt"], "train.init: there is no"),
        (["train", "TOML", "--set", "loss.name=sms", "--set", "loss.rule=ego4d"], "loss.rule: expected one of code, paper"),
        (["train", "TOML", "--set", "optim.learning_rate=1"], "there is no such key; [optim] has name, lr, weight_decay"),
        (["train", "TOML", "--set", "train.num_workers=1"], "did you mean 'data.workers'"),
        (["train", "TOML", "--set", "lr=1"], "did you mean 'optim.lr'"),
        (["train", "TOML", "--set", "optim.lr=fast"], "optim.lr: expected a number, got 'fast'"),
        (["train", "TOML", "--set", "train.seed=9223372036854775807"], "train.seed: expected a value of at most 2147483647"),
        (["train", "TOML", "--set", "model.overrides.embed_dim=100000000"], "model: cannot be built"),
        (["eval", "TOML", "--checkpoint", "TOML", "--json", "TMP"], "is a folder; expected a file to write"),
        (["convert", "TOML", "TMP"], "is a folder; expected a file to write"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(toml, tmp_path, arguments, message, capsys):
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments = [toml if a == "TOML" else a.replace("TMP", str(tmp_path)) for a in arguments]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"evaat-fast {arguments[0]}: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments", [["fly"], ["train"], ["demo", "--seed", "-1"], ["demo", "--seed", "9" * 20], ["eval", "x.toml"]]
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: evaat-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,hidden,named,extras",
    [
        (["demo", "--out", "TMP/demo"], "av decord ftfy jinja2", "av, ftfy, jinja2", "train,video"),
        (
            ["demo", "--out", "TMP/demo", "--set", "data.decoder=decord"],
            "decord matplotlib",
            "decord, matplotlib",
            "train,video",
        ),
        (["train", "TOML"], "av pyarrow tokenizers regex", "av, pyarrow, regex, tokenizers", "train,video"),
        (["train", "TOML"], "decord ftfy", "ftfy", "train"),
        (["check", "TOML"], "pyarrow", "pyarrow", "video"),
        (["eval", "TOML", "--checkpoint", "TOML"], "av tokenizers", "av, tokenizers", "train,video"),
        (["make-kitchen", "TMP/kitchen"], "av", "av", "video"),
    ],
)
def test_all_missing_packages_are_named_before_anything_is_made(
    toml, tmp_path, arguments, hidden, named, extras, capsys, monkeypatch
):
    for name in hidden.split():
        monkeypatch.setitem(sys.modules, name, None)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([toml if a == "TOML" else a.replace("TMP", str(tmp_path)) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f" needs {named}: pip install 'evaat-fast[{extras}]'\n") and captured.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_broken_package_says_why(tmp_path, monkeypatch):
    (tmp_path / "decord.py").write_text("raise OSError('libavcodec.so.58: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "decord", raising=False)
    with pytest.raises(
        ImportError, match=r"the test needs decord \(libavcodec.so.58: cannot open .* install 'evaat-fast\[video\]'"
    ):
        packages.require("the test", "decord")


def test_make_kitchen(tmp_path, capsys):
    pytest.importorskip("av")
    folder = tmp_path / "kitchen"
    assert main(["make-kitchen", str(folder), "--train-clips", "12", "--test-clips", "4"]) == 0
    assert str(folder / "videos") in capsys.readouterr().out
    assert (folder / "annotations/EPIC_100_retrieval_train.csv").is_file()
    assert main(["make-kitchen", str(folder), "--train-clips", "12", "--test-clips", "4"]) == 0


def test_doctor_is_what_no_arguments_print(capsys):
    assert main([]) == 0
    plain = capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == plain and f"torch {torch.__version__}" in plain


def test_keys_are_a_file_with_every_default(tmp_path, capsys):
    assert main(["train", "--keys"]) == 0
    path = tmp_path / "keys.toml"
    path.write_text(capsys.readouterr().out)
    places = ["data.annotations=a", "data.videos=v", "train.out=o"]
    (tmp_path / "none.toml").write_text("")
    assert load(path, places).to_dict() == load(tmp_path / "none.toml", places).to_dict()


def test_a_named_backend_that_cannot_serve_is_one_line(toml, tmp_path):
    def run(*arguments):
        command, environment = [sys.executable, "-m", "evaat_fast", *arguments], {"EVAAT_FAST_BACKEND": "joint_attention=cpu"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin", **environment})

    training, doctor = run("train", toml), run("doctor")
    assert training.returncode == 2 and "joint_attention: backend 'cpu' was asked for" in training.stderr.splitlines()[-1]
    assert doctor.returncode == 0 and "! EVAAT_FAST_BACKEND asks for cpu" in doctor.stdout


def test_a_bad_environment_variable_is_one_line(tmp_path):
    environment = {"PATH": "/usr/bin", "EVAAT_FAST_BACKEND": "bogus"}
    command = [sys.executable, "-m", "evaat_fast", "doctor"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("evaat-fast doctor: EVAAT_FAST_BACKEND='bogus': expected one of auto")


def test_output_may_be_cut_short(tmp_path):
    command = f"{sys.executable} -m evaat_fast | head -c 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert run.stderr == ""


def test_module_and_script_are_one_command_line(tmp_path):
    run = subprocess.run([sys.executable, "-m", "evaat_fast", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and run.stdout.startswith("usage: evaat-fast")
    for command in ("demo", "train", "eval", "make-kitchen", "doctor"):
        assert command in run.stdout


def test_the_help_names_what_the_library_takes(capsys):
    """The parser has words of its own, or it would wait for what they are of."""
    offered = {}
    for command in ("eval", "features", "prepare"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        offered[command] = " ".join(capsys.readouterr().out.split())
    for words in (tasks.TASKS, paper.STAGES, FRAMES, tasks.SCORES, [name for name in tricks.TRICKS if name != "ensemble"]):
        assert f"{{{','.join(words)}}}" in offered["eval"]
    assert f"{{{','.join(features.FORMATS)}}}" in offered["features"]
    assert all(name in offered["prepare"] for name in DATASETS)
    for name in ("seconds", "short_side", "crf"):
        assert f"({getattr(Settings(), name)})" in offered["prepare"]
