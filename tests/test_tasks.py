"""The benchmarks from their real files to their records, on the toy kitchen."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from corpus import configuration, corpus

from evaat_fast._files import sha256
from evaat_fast.cli import main
from evaat_fast.data import EK100, corpora
from evaat_fast.data.video import VideoError
from evaat_fast.eval import mcq, mir, paper
from evaat_fast.train import checkpoint, inputs, masters, outcome, steps, tasks, trainer
from evaat_fast.train.config import ConfigError

CPU = torch.device("cpu")


@functools.cache
def formats():
    pytest.importorskip("pyarrow")
    from evaat_fast.data.kitchen_formats import write_all

    return write_all(corpus())


@pytest.fixture
def run(tmp_path):
    """(configuration, checkpoint of a run, its TOML file): random weights, the smallest model."""
    pytest.importorskip("tokenizers")
    config = configuration(tmp_path, "data.cache=false", "eval.batch_size=8")
    model = trainer.build_model(config)
    kept = masters.Masters(model, None)
    path = tmp_path / "last.pt"
    checkpoint.save(path, kept, steps.build_optimizer(model, config, kept), 3, config)
    return config, str(path), str(tmp_path / "run.toml")


def evaluated(capsys, *arguments):
    assert main(["eval", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_ek100_mir(run, tmp_path, capsys):
    config, weights, toml = run
    printed = evaluated(capsys, toml, "--checkpoint", weights, "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert "EVA02-AT-L + SMS" in printed and "ours, another test set" in printed and "R@1" in printed
    assert (record["task"], record["stage"], record["partial"]) == ("ek100-mir", "fine-tuned", False)
    assert record["clips"] == 16 and record["epoch"] == 3 and not record["published_test_set"]
    assert record["checkpoint_sha256"] == [sha256(weights)] and record["protocol"]["num_frames"] == 2
    assert "frames: ours 2, the paper's 16" in record["differences"] and "torch" in record["versions"]
    assert record["config"]["data"]["videos"] == config.data.videos and record["decoder"] != "auto"
    assert f"{record['mAP']:.2f}" in printed and f"{record['R@5_t2v']:.2f}" in printed
    config.train.init = weights
    data, model = inputs.test_split(config), trainer.build_model(config).eval()
    from evaat_fast.train import evaluation

    metrics = mir.evaluate(evaluation.embed(model, data, config, CPU), evaluation.exact_relevancy(data))
    assert {name: record[name] for name in metrics} == pytest.approx(metrics)


def test_a_run_s_checkpoint_needs_no_configuration(run, tmp_path, capsys):
    _, weights, toml = run
    with_file = evaluated(capsys, toml, "--checkpoint", weights)
    assert evaluated(capsys, "--checkpoint", weights) == with_file
    bare = tmp_path / "bare.pt"
    torch.save(torch.load(weights, weights_only=True)["state_dict"], bare)
    assert main(["eval", "--checkpoint", str(bare)]) == 2
    assert "is of no run, and does not say how clips are read" in capsys.readouterr().err


def test_egomcq(run, tmp_path, capsys):
    _, weights, toml = run
    made = formats()
    places = ["--task", "egomcq", "--annotations", str(made.egomcq), "--videos", str(made.ego4d_videos["video_15s"])]
    printed = evaluated(capsys, toml, "--checkpoint", weights, *places, "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["stage"] == "zero-shot" and record["inter_questions"] + record["intra_questions"] == record["questions"]
    assert 0 <= record["inter"] <= 100 and "of type 2" in printed and "EVA02-AT-L" in printed
    assert record["published_test_set"] is None and "its counts would tell, which are not known here" in printed
    lavila = evaluated(capsys, toml, "--checkpoint", weights, *places, "--scores", "lavila")
    assert "differs: scores: ours products with clips as long as they come (LaViLa), the paper's cosine" in lavila


def test_charades(run, tmp_path, capsys):
    _, weights, toml = run
    made = formats()
    places = ["--task", "charades-ego", "--annotations", str(made.charades), "--videos", str(made.charades_videos)]
    printed = evaluated(capsys, toml, "--checkpoint", weights, *places, "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["classes"] == 157 and record["absent"] > 0 and 0 < record["mAP"] <= 100
    assert f"note: {record['absent']} of 157 classes are in no video" in printed
    assert record["protocol"]["prompt"] == "{}" and record["stage"] == "zero-shot"
    printed = evaluated(
        capsys, toml, "--checkpoint", weights, *places, "--scores", "lavila", "--prompt", "#C C {}", "--stage", "fine-tuned"
    )
    assert "softmax over classes" in printed and "#C C {}" in printed and "42.5" in printed


def test_prepared_files_give_the_same(run, tmp_path, capsys):
    from evaat_fast.data.prepare import prepare

    _, weights, toml = run
    made = formats()
    for name, source, videos in (
        ("egomcq", made.egomcq, made.ego4d_videos["full_scale"]),
        ("charades-ego", made.charades, made.charades_videos),
    ):
        prepare(name, source, tmp_path / "prepared")
        shown = [
            evaluated(
                capsys, toml, "--checkpoint", weights, "--task", name, "--annotations", str(place), "--videos", str(videos)
            )
            for place in (source, tmp_path / "prepared" / name)
        ]
        assert shown[0] == shown[1]


def test_an_incomplete_test_set_is_refused_or_marked(run, tmp_path, capsys):
    config, weights, toml = run
    shutil.copytree(config.data.videos, tmp_path / "videos")
    data = inputs.test_split(config)
    (tmp_path / "videos" / f"{data.table.video(0)}.MP4" / "15.MP4").unlink()
    gone = int((data.table.column("stop") > 15.5).sum())  # half a second may be missing in either chunk
    assert 0 < gone < 16
    arguments = [toml, "--checkpoint", weights, "--videos", str(tmp_path / "videos")]
    assert main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert data.table.video(0) in error and "--allow-partial goes on without them" in error
    printed = evaluated(capsys, *arguments, "--allow-partial", "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["partial"] and record["left_out"] == gone and record["clips"] == 16 - gone
    assert "PARTIAL" in printed and f"{gone} clips were left out" in printed


def test_a_file_that_breaks_while_it_is_read(run, tmp_path, capsys):
    """Its header is whole, so that only decoding finds out."""
    made, (_, weights, toml) = formats(), run
    shutil.copytree(made.charades_videos, tmp_path / "videos")
    ids = [row.split(",")[0] for row in (made.charades / "CharadesEgo_v1_test_only1st.csv").read_text().splitlines()[1:]]
    path = next(p for p in (tmp_path / "videos").iterdir() if p.stem == ids[0])
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 64
    end = content.find(b"moov") - 8
    content[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(content)
    places = ["--task", "charades-ego", "--annotations", str(made.charades), "--videos", str(tmp_path / "videos")]
    code = main(["eval", toml, "--checkpoint", weights, *places])
    captured = capsys.readouterr()
    assert code == 2 and ids[0] in captured.err and "--allow-partial" in captured.err
    printed = evaluated(capsys, toml, "--checkpoint", weights, *places, "--allow-partial")
    assert "PARTIAL: 1 clips were left out" in printed


def test_tricks_are_said(run, tmp_path, capsys):
    _, weights, toml = run
    plain = evaluated(capsys, toml, "--checkpoint", weights, "--json", str(tmp_path / "plain.json"))
    assert " + " not in plain.splitlines()[-1]
    tricks = ["--trick", "flip", "--trick", "three-crops", "--trick", "dual-softmax"]
    printed = evaluated(capsys, toml, "--checkpoint", weights, *tricks, "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["protocol"]["tricks"] == ["flip", "three-crops", "dual-softmax"]
    assert "ours + flip + three-crops + dual-softmax" in printed
    assert "differs: tricks: ours flip, three-crops, dual-softmax, the paper's none" in printed
    other = tmp_path / "other.pt"
    content = torch.load(weights, weights_only=True)
    content["state_dict"] = {name: x + 0.05 * torch.randn_like(x) for name, x in content["state_dict"].items()}
    torch.save(content, other)
    printed = evaluated(capsys, toml, "--checkpoint", weights, "--checkpoint", str(other), "--json", str(tmp_path / "e.json"))
    both = json.loads((tmp_path / "e.json").read_text())
    assert "ours + ensemble" in printed and both["checkpoint"] == [weights, str(other)]
    assert both["mAP"] != json.loads((tmp_path / "plain.json").read_text())["mAP"]


def test_an_ensemble_is_the_mean_and_views_are_averaged(run):
    config, weights, _ = run
    options = tasks.Options(tricks=("flip",))
    task = tasks.open_task("ek100-mir", config, options)
    model = trainer.build_model(config).eval()
    rows = list(range(len(task.data)))
    seen, kept, _ = outcome.similarities(task, model, config, CPU, rows, options)
    video = torch.stack([task.data[row]["video"] for row in rows])
    with torch.inference_mode():
        clips = sum(model.encode_video(v, normalize=True) for v in (video, video.flip(3)))
        texts = model.encode_text(inputs.tokenizer(config)(task.texts), normalize=True)
    torch.testing.assert_close(seen, torch.nn.functional.normalize(clips, dim=1) @ texts.T, rtol=0, atol=1e-5)
    assert kept.all()
    twice = outcome.run("ek100-mir", config, [weights, weights], CPU)
    once = outcome.run("ek100-mir", config, [weights], CPU)
    assert twice["mAP"] == pytest.approx(once["mAP"]) and twice["protocol"]["tricks"] == ["ensemble"]


def test_an_ensemble_is_of_clips_that_all_could_read(run, monkeypatch):
    """A file that only one of two passes could read, as over a network that fails now and then."""
    config, weights, _ = run
    read, calls = EK100.__getitem__, []

    def flaky(self, index):
        calls.append(index)
        if len(calls) == 3:
            raise VideoError("gone for a moment")
        return read(self, index)

    monkeypatch.setattr(EK100, "__getitem__", flaky)
    record = outcome.run("ek100-mir", config, [weights, weights], CPU, options=tasks.Options(partial=True))
    assert len(calls) == 32 and record["partial"] and record["left_out"] == 1 and record["clips"] == 15


def test_a_prompt_may_hold_braces(run):
    config, _, _ = run
    made = formats()
    config.data.annotations, config.data.videos = str(made.charades), str(made.charades_videos)
    task = tasks.open_task("charades-ego", config, tasks.Options(prompt="a {video} of {}"))
    assert task.texts[0].startswith("a {video} of ") and "{}" not in task.texts[0]


def test_questions_are_scored_by_their_own_clips(run):
    config, weights, _ = run
    made = formats()
    config.data.annotations, config.data.videos = str(made.egomcq), str(made.ego4d_videos["full_scale"])
    task = tasks.open_task("egomcq", config, tasks.Options())
    questions = corpora.read_questions(made.egomcq)
    clips, texts = torch.randn(len(task.data), 8), torch.randn(len(task.texts), 8)
    sim = task.compare(clips, texts)
    for q in (0, len(questions) - 1):
        own = texts[task.texts.index(questions.texts[q])]
        expected = torch.nn.functional.cosine_similarity(own[None], clips[questions.choices[q]])
        torch.testing.assert_close(sim[q], expected)
    kept = torch.ones(len(clips), dtype=torch.bool)
    assert task.judge(sim, kept).metrics == mcq.report(sim, questions.answers, questions.types).metrics
    kept[questions.choices[0][0]] = False
    part = task.judge(sim, kept)
    assert part.counts["questions_left_out"] > 0
    assert part.counts["questions"] + part.counts["questions_left_out"] == len(questions)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "egomcq"], "--task egomcq: the configuration's data are 'ek100-mir'; give the task's own files"),
        (["--task", "charades-ego"], "--task charades-ego: the configuration's data are"),
        (["--scores", "lavila"], "--scores: expected cosine, or lavila for egomcq and charades-ego"),
        (["--prompt", "a photo"], "--prompt: expected a text with one {}"),
        (["--annotations", "/nowhere"], "/nowhere"),
        (["--task", "charades-ego", "--annotations", "/nowhere", "--trick", "dual-softmax"], "dual softmax is of retrieval"),
    ],
)
def test_mistakes(run, arguments, message, capsys):
    _, weights, toml = run
    assert main(["eval", toml, "--checkpoint", weights, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_stages_are_guessed_by_what_a_run_was_trained_on():
    of = lambda kind: {"config": {"data": {"kind": kind}}}  # noqa: E731
    assert outcome.guess_stage("ek100-mir", of("ek100-mir")) == "fine-tuned"
    assert outcome.guess_stage("ek100-mir", of("egoclip")) == "zero-shot"
    assert outcome.guess_stage("charades-ego", of("charades-ego")) == "fine-tuned"
    assert outcome.guess_stage("egomcq", of("ek100-mir")) == "zero-shot"
    assert outcome.guess_stage("ek100-mir", {}) == "zero-shot"
    assert outcome.guess_stage("ek100-mir", {"config": {"data": {"videos": "x"}}}) == "fine-tuned"  # of before there were kinds


def test_what_is_not_defined_is_null_and_a_dash(run):
    config, weights, _ = run
    record = outcome.run("ek100-mir", config, [weights], CPU)
    record = {**record, "mAP_v2t": None, "mAP": None}
    line = next(line for line in outcome.text(record).splitlines() if line.startswith("ours"))
    assert line.split("set")[1].split()[0] == "-" and not math.isnan(record["mAP_t2v"])


def test_unknown_tasks_and_tricks(run):
    config, _, _ = run
    with pytest.raises(ConfigError, match="--task: expected one of ek100-mir, egomcq, charades-ego, retrieval, got 'mir'"):
        tasks.open_task("mir", config, tasks.Options())
    with pytest.raises(ConfigError, match="--trick: expected one of flip"):
        tasks.open_task("ek100-mir", config, tasks.Options(tricks=("magic",)))
    with pytest.raises(ConfigError, match="an ensemble is of several checkpoints"):
        outcome.run("ek100-mir", config, ["x"], CPU, options=tasks.Options(tricks=("ensemble",)))
    assert set(paper.COUNTS) == set(paper.TASKS)
