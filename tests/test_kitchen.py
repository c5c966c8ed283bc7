"""The generated corpus: its layout, its balance, that seeds repeat it, and that the middle frame does not tell the verb."""

import csv
import json
import os
import stat
import sys

import numpy as np
import pytest
import torch
from corpus import corpus

from evaat_fast.data import EK100, kitchen, kitchen_render

pytest.importorskip("av")


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_layout_is_that_of_ek100():
    made = corpus()
    rows = table(made.annotations / "EPIC_100_retrieval_train.csv")
    columns = "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame "
    columns += "stop_frame narration verb verb_class noun noun_class all_nouns all_noun_classes"
    assert list(rows[0]) == columns.split()
    assert len(rows) == 48 and len(table(made.annotations / "EPIC_100_retrieval_test.csv")) == 16
    assert rows[0]["narration_id"] == "P01_00_0" and rows[0]["start_timestamp"].startswith("00:00:00.")
    chunks = sorted(int(p.stem) for p in (made.videos / "P01" / "P01_00.MP4").iterdir())
    assert chunks == list(range(0, 15 * len(chunks), 15)) and len(chunks) > 2
    sentences = table(made.annotations / "EPIC_100_retrieval_test_sentence.csv")
    assert list(sentences[0]) == ["narration_id", "narration"]
    texts = [s["narration"] for s in sentences]
    assert len(set(texts)) == len(texts)
    assert set(texts) == {r["narration"] for r in table(made.annotations / "EPIC_100_retrieval_test.csv")}


def test_clips_cross_chunks_and_one_chunk_is_short():
    import av

    made = corpus()
    spans = [(r["start_timestamp"], r["stop_timestamp"]) for r in table(made.annotations / "EPIC_100_retrieval_train.csv")]
    seconds = [[float(t[3:5]) * 60 + float(t[6:]) for t in span] for span in spans]
    assert any(start // 15 != stop // 15 for start, stop in seconds)
    lengths = {}
    for path in (made.videos / "P01" / "P01_00.MP4").iterdir():
        with av.open(str(path)) as container:
            lengths[path.stem] = container.streams.video[0].frames
            assert container.streams.video[0].average_rate == 30
    assert lengths["0"] == 449 and lengths["15"] == 450


def test_splits_share_no_participant():
    made = corpus()
    people = [{r["participant_id"] for r in table(made.annotations / f"EPIC_100_retrieval_{s}.csv")} for s in ("train", "test")]
    assert not people[0] & people[1]


def test_verbs_and_nouns_are_balanced():
    plan = kitchen._plan(np.random.default_rng(0), 192, 30)
    kinds = [(s.verb, s.colour, s.shape) for _, segments in plan for s in segments]
    assert len(set(kinds)) == 96 and all(kinds.count(k) == 2 for k in set(kinds))


def test_narrations_name_the_classes():
    for row in table(corpus().annotations / "EPIC_100_retrieval_train.csv"):
        verb = kitchen.VERBS[int(row["verb_class"])]
        shape, colour = eval(row["all_nouns"])
        assert eval(row["all_noun_classes"]) == [4 + kitchen.SHAPES.index(shape), list(kitchen.COLOURS).index(colour)]
        assert sorted(row["narration"].split()) == sorted([*verb.split(), colour, shape])


def test_a_seed_repeats_files_and_another_does_not(tmp_path):
    small = dict(train_clips=6, test_clips=2)
    one, again = (kitchen.generate(tmp_path / n, seed=3, workers=w, **small) for n, w in (("a", 1), ("b", 2)))
    other = kitchen.generate(tmp_path / "c", seed=4, **small)
    assert tree(one.root) == tree(again.root)
    mine, theirs = tree(one.annotations), tree(other.annotations)
    assert mine != theirs


def test_a_finished_corpus_is_found_again(tmp_path):
    small = dict(train_clips=3, test_clips=2)
    calls = []
    kitchen.generate(tmp_path / "k", progress=lambda *a: calls.append(a), **small)
    assert calls == [(1, 2), (2, 2)]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "k").rglob("*")}
    made = kitchen.generate(str(tmp_path / "k"), progress=lambda *a: calls.append(a), **small)
    assert len(calls) == 2 and {p: p.stat().st_mtime_ns for p in made.root.rglob("*")} == times


def test_whole_files_hold_the_same_pictures(tmp_path):
    whole = kitchen.generate(tmp_path / "k", train_clips=48, test_clips=16, chunk_seconds=0)
    assert (whole.videos / "P01" / "P01_00.MP4").is_file()
    one, other = (EK100(c.annotations, c.videos, "test", num_frames=4, decoder="av") for c in (whole, corpus()))
    for i in range(0, len(one), 5):
        # Encoded in other groups of pictures: the same frames, not the same bits.
        assert (one[i]["video"].int() - other[i]["video"].int()).abs().float().mean() < 3


def test_another_corpus_is_never_overwritten(tmp_path):
    small = dict(train_clips=2, test_clips=1)
    made = kitchen.generate(tmp_path / "k", **small)
    before = tree(made.root)
    with pytest.raises(FileExistsError, match="holds a toy kitchen of another seed; remove it or name another"):
        kitchen.generate(tmp_path / "k", seed=1, **small)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="full is not empty and holds no toy kitchen"):
        kitchen.generate(tmp_path / "full", **small)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file exists and is not a folder"):
        kitchen.generate(tmp_path / "file", **small)
    assert tree(made.root) == before and sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "k"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "k").mkdir()
    assert kitchen.generate(tmp_path / "k", train_clips=1, test_clips=1).annotations.is_dir()
    assert json.loads((tmp_path / "k" / "kitchen.json").read_text())["train_clips"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) & 0o500 == 0o500


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kitchen.generate(tmp_path / "k", train_clips=2, test_clips=1, progress=broken)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        kitchen.generate(tmp_path / "file" / "k", train_clips=1, test_clips=1)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            kitchen.generate(tmp_path / "locked" / "k", train_clips=1, test_clips=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_clips": 0}, "train_clips: expected an int of at least 1, got 0"),
        ({"test_clips": -3}, "test_clips: expected an int of at least 1"),
        ({"seed": -1}, "seed: expected an int of at least 0"),
        ({"size": 64}, "size: expected an int of at least 98, got 64"),
        ({"size": 101}, "size: expected an even number of pixels"),
        ({"fps": 29.97}, "fps: expected an int of at least 8, got 29.97"),
        ({"workers": 0}, "workers: expected an int of at least 1"),
        ({"chunk_seconds": True}, "chunk_seconds: expected an int"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        kitchen.generate(tmp_path / "k", **settings)
    assert not (tmp_path / "k").exists()


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install evaat-fast\[video\]"):
        kitchen.generate(tmp_path / "k")
    assert list(tmp_path.iterdir()) == []


def test_a_swing_covers_its_range_evenly():
    values = kitchen_render.swing(np.linspace(0, 3, 30_001))
    counts, _ = np.histogram(values, 10, (-1, 1))
    assert counts.min() > 0.95 * counts.max()


def test_in_the_middle_all_verbs_look_alike():
    """Position, size and orientation have one distribution, whatever the verb: Kolmogorov-Smirnov distances."""
    draws = 2000
    states = []
    for verb in range(len(kitchen.VERBS)):
        rngs = (np.random.default_rng((verb, i)) for i in range(draws))
        states.append(np.array([np.ravel(kitchen_render.motion(verb, np.array([0.5]), 1.0, r)) for r in rngs]))
    states = np.stack(states)  # [verb, draw, (x, y, size, angle)]
    states[..., 3] = states[..., 3] % (2 * np.pi) / np.pi - 1
    grid = np.linspace(-1, 1, 41)
    below = (states[:, :, :, None] <= grid).mean(1)  # [verb, state, grid]: distribution functions
    # 2,000 draws stray from their law by 0.05 once in 10,000 (Kolmogorov); the law is estimated by all verbs together.
    assert np.abs(below - below.mean(0)).max() < 0.05


@pytest.mark.parametrize("verb, state, sign", [(0, 0, -1), (1, 0, 1), (2, 1, -1), (3, 1, 1), (4, 2, 1), (5, 2, -1)])
def test_a_verb_moves_its_own_way(verb, state, sign):
    seconds = np.arange(30) / 30
    ways = []
    for i in range(100):
        moved = np.diff(np.array(kitchen_render.motion(verb, seconds, 1.0, np.random.default_rng(i))), axis=1)
        assert (np.delete(moved, state, 0) == 0).all()
        ways.append((np.sign(moved[state]) == sign).mean())
    assert np.mean(ways) == 1


def test_the_object_is_in_the_picture_and_in_its_colour():
    data = EK100(corpus().annotations, corpus().videos, "test", num_frames=3, decoder="av")
    colours = torch.tensor(list(kitchen.COLOURS.values())).float()
    for i in range(len(data)):
        colour = min(data.clips[i].nouns)
        distance = (data[i]["video"].float() - colours[colour]).abs().amax(-1)
        assert (distance < 60).float().mean((1, 2)).min() > 0.008, data.clips[i].texts[0]
