"""A folder of videos and one file of captions, from the check to embeddings, by the command line."""

import json

import numpy as np
import pytest
import torch
from corpus import corpus

from evaat_fast.cli import main
from evaat_fast.data import EK100
from evaat_fast.train import embedding, inputs, load, similarity, trainer

TINY = """
[model]
name = "eva02_at_tiny_patch16_64"
num_frames = 2
overrides = { patch_size = 32, vision_layers = 1, text_layers = 1 }
[data]
kind = "csv"
annotations = "captions.csv"
videos = "VIDEOS"
[train]
out = "run"
epochs = 2
batch_size = 8
device = "cpu"
"""


@pytest.fixture
def toml(tmp_path):
    """The toy kitchen's clips in one file: a video to train on, one to test."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("pyarrow")
    kitchen, rows = corpus(), ["path,caption,start,stop,verb,noun,split"]
    for split in ("train", "test"):
        for clip in EK100(kitchen.annotations, kitchen.videos, split, num_frames=2).table:
            nouns = ";".join(f"n{n}" for n in clip.nouns)
            rows.append(f"{clip.video}.MP4,{clip.texts[0]},{clip.start},{clip.stop},v{clip.verbs[0]},{nouns},{split}")
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "run.toml").write_text(TINY.replace("VIDEOS", str(kitchen.videos)))
    return tmp_path / "run.toml"


def run(capsys, *arguments, code=0):
    found = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.err if code else printed.out


def logged(folder, kind):
    lines = map(json.loads, (folder / "run/log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def test_from_the_check_to_embeddings(toml, tmp_path, capsys):
    assert "train: 48 clips" in (said := run(capsys, "check", toml)) and "test: 16 clips" in said
    said = run(capsys, "train", toml, "--set", "loss.name=sms", "--set", "eval.every=1")
    assert "nDCG" in said and "R@1" in said and "MedR" in said
    assert len(logged(tmp_path, "eval")) == 2 and 0 < logged(tmp_path, "eval")[1]["mAP"] <= 100
    # Verbs and nouns make the labels of EK-100: the same numbers as by its own task.
    kitchen, written = corpus(), tmp_path / "out.json"
    said = run(capsys, "eval", "--checkpoint", tmp_path / "run", "--json", written)
    record = json.loads(written.read_text())
    assert record["task"] == "retrieval" and record["clips"] == 16 and record["stage"] == "fine-tuned"
    assert f"{record['nDCG']:.2f}" in said and "paper" not in said and "R@5" in said
    places = ("--annotations", kitchen.annotations, "--videos", kitchen.videos)
    run(capsys, "eval", "--task", "ek100-mir", "--checkpoint", tmp_path / "run", *places, "--json", written)
    for name in ("mAP_v2t", "nDCG_v2t", "nDCG_t2v"):
        assert json.loads(written.read_text())[name] == pytest.approx(record[name], abs=1e-3)
    said = run(capsys, "features", "--checkpoint", tmp_path / "run", "--out", tmp_path / "f", "--format", "npz")
    assert "16 clips" in said
    assert np.load(next((tmp_path / "f").glob("clips-*")))["video"][0].endswith(".MP4")


def test_without_labels(toml, tmp_path, capsys):
    config = load(toml, ["data.labels=[]", "train.distinct=true"])
    assert not inputs.splits(config).test.labelled
    said = run(capsys, "train", toml, "--set", "data.labels=[]", "--set", "train.epochs=1", "--set", "train.distinct=true")
    assert "R@1" in said and "mAP" not in said and "mAP" not in logged(tmp_path, "eval")[0]
    said = run(capsys, "eval", "--checkpoint", tmp_path / "run")
    assert "note: without label columns the right captions are a clip's own, and there is no mAP or nDCG" in said
    said = run(capsys, "train", toml, "--set", "train.epochs=1", "--resume", code=2)
    assert "was made with data.labels = []" in said
    said = run(capsys, "train", toml, "--overwrite", "--set", 'train.distinct="nouns"', code=2)
    assert 'train.distinct: "nouns" needs clips with noun classes' in said and (tmp_path / "run/last.pt").exists()


def test_a_run_that_tests_nothing(toml, tmp_path, capsys):
    text = (tmp_path / "captions.csv").read_text().replace(",test\n", ",train\n")
    (tmp_path / "captions.csv").write_text(text)
    said = run(capsys, "train", toml, "--set", "data.test_share=0", "--set", "train.epochs=1")
    assert "checkpoint" in said and "R@1" not in said and not logged(tmp_path, "eval")
    said = run(capsys, "eval", "--checkpoint", tmp_path / "run", code=2)
    assert "it has no clip to test on" in said and "with data.test_share = 0 nothing is tested" in said


def test_labels_of_the_text_tower(toml, tmp_path, capsys):
    said = run(capsys, "train", toml, "--set", "loss.name=sms", "--set", "data.similarity=text-tower", code=2)
    assert "data.similarity: 'text-tower' is that of the weights that the run starts from: set train.init" in said
    run(capsys, "train", toml, "--set", "train.epochs=1", "--set", f"train.out={tmp_path / 'first'}")
    (tmp_path / "captions.csv").write_text((tmp_path / "captions.csv").read_text() + "P01/P01_00.MP4,once more,0,1,,,train\n"
                                           "P01/P01_00.MP4,and again,0,1,,,train\n")  # fmt: skip
    soft = [
        "--set",
        "loss.name=sms",
        "--set",
        "data.similarity=text-tower",
        "--set",
        f"train.init={tmp_path / 'first/last.pt'}",
    ]
    run(capsys, "train", toml, *soft, "--set", "train.epochs=1")
    overrides = [*soft[1::2], "train.epochs=1"]
    config = load(toml, overrides)
    data, model = inputs.splits(config).train, trainer.build_model(config).eval()
    table = similarity.labels(config, data, tmp_path / "run", torch.device("cpu"), model=model)
    assert table.shape == (len(data.own), len(data.captions)) and len(data.own) == len(data.captions) - 1
    assert 0 <= table.min() and table.max() == 1
    embedded = torch.cat(list(embedding.of_texts(model, data.captions, config, torch.device("cpu"))))
    square = similarity.graded(embedded)
    torch.testing.assert_close(square, square.T, rtol=0, atol=0)
    assert bool((square.diagonal() == 1).all())
    above = (square > 0).float().sum() - len(square)
    assert abs(above / (len(square) * (len(square) - 1)) - similarity.SHARE) < 0.02
    both = next(numbers for numbers in data.own if len(numbers) == 2)
    row = table[int(next(k for k, numbers in enumerate(data.own) if numbers == both))]
    torch.testing.assert_close(row, square[list(both)].amax(0))
    # What is kept is taken while captions and weights are the same, and made anew else.
    path = tmp_path / "run" / similarity.FILE
    stamp = path.stat().st_mtime_ns
    similarity.labels(config, data, tmp_path / "run", torch.device("cpu"), model=model)
    torch.testing.assert_close(similarity.labels(config, data, tmp_path / "run", torch.device("cpu")), table, rtol=0, atol=0)
    assert path.stat().st_mtime_ns == stamp
    with torch.no_grad():
        model.text.text_projection.mul_(-1).add_(0.1)
    similarity.labels(config, data, tmp_path / "run", torch.device("cpu"), model=model)
    assert path.stat().st_mtime_ns != stamp


def test_graded_labels_of_few_captions():
    assert similarity.graded(torch.ones(3, 4) / 2).tolist() == torch.eye(3).tolist()
    assert similarity.graded(torch.ones(1, 4) / 2).tolist() == [[1]]
    table = similarity.graded(torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.5, 1]]), dim=1))
    assert table[0, 1] > 0 and table[0, 2] == 0
