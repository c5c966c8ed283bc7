"""`evaat-fast prepare`: what it makes of each data set, what it says is missing or damaged, and that it may be run again."""

import json
import math
import os
import pickle
import shutil

import formats
import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("av")
from films import film  # noqa: E402

from evaat_fast import cli
from evaat_fast.data import EK100, ClipTable, layout, prepare_videos
from evaat_fast.data.prepare import DATASETS, prepare
from evaat_fast.data.readers import ek100


def place(dataset):
    """(source, folder of videos) of the kitchen in a data set's format."""
    made = formats.kitchen()
    return {
        "ek100-mir": (made.ek100, made.ek100_videos),
        "ek100-clips": (made.ek100_clips, None),
        "egoclip": (made.egoclip, made.ego4d_videos["video_15s"]),
        "egoclip-plus": (made.ego4d, made.ego4d_videos["video_288px"]),
        "egomcq": (made.ego4d, made.ego4d_videos["video_chunked"]),
        "charades-ego": (made.charades, made.charades_videos),
    }[dataset]


TABLES = {
    "ek100-mir": {"train": 48, "test": 16},
    "ek100-clips": {"train": 48, "test": 16},
    "egoclip": {"train": 48},
    "egoclip-plus": {"train": 96, "human": 48, "uncovered": 48, "val": 16},
    "egomcq": {"test": None},
    "charades-ego": {"test": 3, "train": 48, "val": 16},
}


def tree(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set(dataset, tmp_path, capsys):
    source, videos = place(dataset)
    arguments = ["prepare", dataset, str(source), "--out", str(tmp_path), *(["--videos", str(videos)] if videos else [])]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "INCOMPLETE" not in said
        and "complete" in said
        and f"next: evaat-fast {'eval' if dataset in ('egomcq', 'charades-ego') else 'train'}" in said
        and ("next: evaat-fast eval" in said or f'data.kind = "{dataset}"' in said)
        and "left out" not in said
    )
    folder = tmp_path / dataset
    for name, count in TABLES[dataset].items():
        table, parquet = (ClipTable.open(folder / f"{name}{suffix}") for suffix in (".arrow", ".parquet"))
        assert table.dataset == dataset and count in (None, len(table)) and len(table) > 0
        assert [repr(c) for c in table] == [repr(c) for c in parquet]
    before = {name: fact for name, fact in tree(folder).items() if name != "prepared.json"}
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("up to date") == len(TABLES[dataset])
    assert {name: fact for name, fact in tree(folder).items() if name != "prepared.json"} == before


def test_relevancy_is_the_data_sets(tmp_path):
    made = formats.kitchen()
    prepare("ek100-mir", made.ek100, tmp_path)
    for split in ("train", "test"):
        with np.load(tmp_path / "ek100-mir" / f"{split}-relevancy.npz") as built:
            built = dict(built)
        data = EK100(made.ek100, made.ek100_videos, split, num_frames=1, decoder="av")
        assert torch.equal(torch.from_numpy(built["table"][built["clip_kind"]][:, built["caption_kind"]]), data.relevancy)
        assert [data.clips[i].texts[0] for i in built["caption_clip"]] == data.captions
        again = EK100(tmp_path / "ek100-mir", made.ek100_videos, split, num_frames=1)
        assert again.clips.path is not None and list(again.clips) == list(data.clips)
        assert again.captions == data.captions and torch.equal(again.relevancy, data.relevancy)


def test_questions_are_kept(tmp_path):
    report = prepare("egomcq", formats.kitchen().egomcq, tmp_path)
    with np.load(tmp_path / "egomcq" / "test-questions.npz") as built:
        assert built["choices"].shape == (32, 5) and built["texts"].dtype.kind == "U"
        assert built["types"].tolist().count(1) == 16
        table = ClipTable.open(report.tables["test"])
        right = built["choices"][np.arange(32), built["answers"]]
        assert [table.texts(int(row))[0] for row in right] == built["texts"].tolist()
    assert "32 questions, 16 inter-video (type 1) and 16 intra-video (type 2)" in str(report)


def test_what_changed_is_made_anew(tmp_path):
    source = formats.ek100(tmp_path / "source")
    formats.ek100(source, "train")
    report = prepare("ek100-mir", source, tmp_path)
    assert "up to date" not in str(report) and "(published: 9,668)" in str(report)
    path = source / "EPIC_100_retrieval_test.csv"
    os.utime(path, (1, 1))  # copied again: another time, the same bytes
    assert str(prepare("ek100-mir", source, tmp_path)).count("up to date") == 2
    path.write_text(formats.EK100.replace("take plate", "drop plate"))
    report = prepare("ek100-mir", source, tmp_path)
    assert str(report).count("up to date") == 1 and ClipTable.open(report.tables["test"])[0].texts == ("drop plate",)
    (tmp_path / "ek100-mir" / "train.parquet").unlink()
    assert str(prepare("ek100-mir", source, tmp_path)).count("up to date") == 1
    assert str(prepare("ek100-mir", source, tmp_path, force=True)).count("up to date") == 0
    (tmp_path / "ek100-mir" / "prepared.json").write_text("{")
    assert str(prepare("ek100-mir", source, tmp_path)).count("up to date") == 0


def test_a_relevancy_pickle_that_differs_is_reported(tmp_path):
    source = formats.ek100(tmp_path / "source")
    matrix = np.zeros((4, 3))
    formats.write(source, "relevancy/caption_relevancy_EPIC_100_retrieval_test.pkl", pickle.dumps(matrix))
    report = prepare("ek100-mir", source.parent / "source", tmp_path)
    assert "differs from the closed form in 6 of 12 cells, first at clip 0, caption 0, by 1 at most" in str(report)
    assert ("train", "not there", "EPIC_100_retrieval_train.csv, EPIC_100_retrieval_train_sentence.csv") in report.rows


def test_an_error_leaves_nothing_half_done(tmp_path, capsys):
    source = formats.ek100(tmp_path / "source")
    formats.ek100(source, "train")
    prepare("ek100-mir", source, tmp_path)
    before = {name: fact for name, fact in tree(tmp_path / "ek100-mir").items() if name != "prepared.json"}
    (source / "EPIC_100_retrieval_test.csv").write_text(formats.EK100.replace("00:00:49.15", "soon"))
    assert cli.main(["prepare", "ek100-mir", str(source), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        "EPIC_100_retrieval_test.csv: line 4 cannot be read: start_timestamp: expected a time" in said and said.count("\n") == 1
    )
    assert {name: fact for name, fact in tree(tmp_path / "ek100-mir").items() if name != "prepared.json"} == before


def test_mistakes(tmp_path, capsys):
    for arguments, message in (
        (["epic", "x"], "DATASET: expected one of ek100-mir, .*charades-ego, got 'epic'"),
        (["egomcq", str(tmp_path)], "expected .*egomcq.json; there is none of them"),
        (["charades-ego", str(tmp_path / "nowhere")], "there is none of them"),
    ):
        assert cli.main(["prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and __import__("re").search(message, said), said
    with pytest.raises(FileNotFoundError, match="videos: there is no folder"):
        prepare("egomcq", formats.kitchen().egomcq, tmp_path, videos=tmp_path / "nowhere")


@pytest.fixture
def videos(tmp_path):
    """(the test split's table, a copy of the corpus's chunks to be spoiled)."""
    from corpus import corpus

    shutil.copytree(corpus().videos, tmp_path / "videos")
    return ek100.read(formats.kitchen().ek100, "test"), tmp_path / "videos"


def test_broken_videos_are_named_and_counted(videos, tmp_path, capsys):
    table, root = videos
    folder = next((root / "P02").iterdir())
    assert prepare_videos.check(table, root).complete
    first = folder / "0.MP4"
    first.write_bytes(first.read_bytes()[:-1000])
    found = prepare_videos.check(table, root)
    assert list(found.damaged) == [f"P02/{folder.name}/0.MP4"] and "cut short: its part '" in str(found)
    assert found.lost == 16 and "16 clips cannot be read" in str(found)
    first.write_bytes(b"")
    assert list(prepare_videos.check(table, root).damaged.values()) == ["the file is empty"]
    first.write_bytes(b"<html>404 Not Found</html>" * 40)
    assert list(prepare_videos.check(table, root).damaged.values()) == ["no MP4 file, by its first bytes"]
    first.unlink()
    found = prepare_videos.check(table, root)
    assert found.damaged == {f"P02/{folder.name}": "its chunk 0.MP4 is missing"} and found.lost == 16
    shutil.rmtree(folder)
    found = prepare_videos.check(table, root)
    assert found.missing == ["P02/P02_00"] and "0 of 1 videos in 0 files; 1 missing, first P02/P02_00" in str(found)
    source = formats.kitchen().ek100
    assert cli.main(["prepare", "ek100-mir", str(source), "--videos", str(root), "--out", str(tmp_path)]) == 1
    assert "next: get what is missing and run this again" in capsys.readouterr().out


@pytest.mark.parametrize("names, lost", [(("0", "30", "60"), "15.mp4"), (("0", "1", "3"), "2.mp4")], ids=["seconds", "numbers"])
def test_a_missing_chunk_is_named(names, lost, tmp_path):
    """Every other one of those named by seconds, so that the names themselves have no gap, or one of numbered ones."""
    for name in names:
        film(tmp_path / "v" / f"{name}.mp4", [float(n) for n in range(15)], rate=1)
    table = ClipTable.of({"id": ["a"], "video": ["v"], "texts": [["a"]], "start": [0.0], "stop": [1.0]})
    found = prepare_videos.check(table, tmp_path)
    assert found.damaged == {"v": f"its chunk {lost} is missing"} and not found.complete


@pytest.mark.parametrize("fault", ["empty", "cut short", "another split's"])
def test_a_relevancy_file_that_is_not_the_table_s_is_refused(tmp_path, fault, capsys):
    source, videos = place("ek100-mir")
    folder = prepare("ek100-mir", source, tmp_path).out
    path = folder / "test-relevancy.npz"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut short": whole[:500]}.get(fault, (folder / "train-relevancy.npz").read_bytes()))
    with pytest.raises(ValueError, match="test-relevancy.npz: (cannot be read|of another table).*prepare --force"):
        EK100(folder, videos, "test", num_frames=2)
    assert cli.main(["prepare", "ek100-mir", str(source), "--out", str(tmp_path), "--force"]) == 0
    assert path.read_bytes() == whole and len(EK100(folder, videos, "test", num_frames=2)) > 0


def test_clips_beyond_their_video_are_named(videos):
    table, root = videos
    last = sorted(next((root / "P02").iterdir()).iterdir(), key=lambda p: int(p.stem))[-1]
    begins = int(last.stem)
    last.unlink()
    found = prepare_videos.check(table, root)
    late = [c.id for c in table if c.start >= begins + 1]
    assert late and found.outside == late and f"{len(late)} clips begin after their video ends, first {late[0]}" in str(found)


def test_headers_are_read_once(videos):
    table, root = videos
    found = prepare_videos.check(table, root)
    known = {name: [*fact[:2], None, "as it was said before"] for name, fact in found.known.items()}
    assert set(prepare_videos.check(table, root, known=known).damaged.values()) == {"as it was said before"}
    os.utime(next(iter(found.known)), (1, 1))
    assert len(prepare_videos.check(table, root, known=known).damaged) == len(known) - 1


def test_what_cannot_be_opened_is_named(videos):
    table, root = videos
    first = next((root / "P02").iterdir()) / "0.MP4"
    first.unlink()
    first.symlink_to(root / "nowhere.MP4")
    assert "No such file" in prepare_videos.check(table, root).damaged[str(first.relative_to(root))]


def test_an_interrupted_check_goes_on(tmp_path, monkeypatch):
    made = formats.kitchen()

    def stop(what, done, of):
        if what == "videos of test":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("ek100-mir", made.ek100, tmp_path, videos=made.ek100_videos, progress=stop)
    record = json.loads((tmp_path / "ek100-mir" / "prepared.json").read_text())
    assert set(record["tables"]) == {"train", "test"} and len(record["videos"]) == 1
    assert prepare("ek100-mir", made.ek100, tmp_path, videos=made.ek100_videos).complete


def test_durations_are_the_containers(videos):
    import av

    for path in sorted(videos[1].rglob("[0-9]*.MP4"))[:4]:
        with av.open(str(path)) as container:
            assert prepare_videos.header(path) == (pytest.approx(container.duration / 1e6, abs=2e-3), None)


def test_the_record_is_json_of_what_was_made(tmp_path):
    source, folder = place("egoclip")
    prepare("egoclip", source, tmp_path, videos=folder)
    record = json.loads((tmp_path / "egoclip" / "prepared.json").read_text())
    size, _, digest = record["tables"]["train"]["sources"][str(source)]
    assert size == source.stat().st_size and len(digest) == 64 and record["tables"]["train"]["clips"] == 48
    assert all(math.isfinite(fact[2]) for fact in record["videos"].values())


def test_the_videos_that_a_data_set_names_are_cut_into_chunks(tmp_path, capsys):
    made, out = formats.kitchen(), tmp_path / "chunks"
    words = ["prepare", "ek100-mir", str(made.ek100), "--videos", str(made.ek100_videos), "--out", str(tmp_path / "prepared")]
    assert cli.main([*words, "--chunk", str(out), "--dry-run"]) == 0
    assert f"chunks of 15 s in {out}: 2 videos, " in capsys.readouterr().out and not out.exists()
    assert cli.main([*words, "--chunk", str(out), "--chunk-seconds", "20", "--short-side", "32", "--workers", "2"]) == 0
    assert "2 of 2: " in capsys.readouterr().out
    found = layout.find(out, ["P01/P01_00", "P02/P02_00"])
    assert found["P01/P01_00"].starts[:2] == (0.0, 20.0)
    for more, message in (((), "chunks of other settings are there"), (("--crf", "-1"), "crf: expected an int from 0, got -1")):
        assert cli.main([*words, "--chunk", str(out), *more]) == 2
        assert message in capsys.readouterr().err
