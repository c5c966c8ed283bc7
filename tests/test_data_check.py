"""The check before training: every fault that would train in silence is named, counted, and tells which clips it touches."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from corpus import configuration, copied, corpus

from evaat_fast.cli import main
from evaat_fast.data import EK100, ClipDataset, ClipTable
from evaat_fast.data.check import check
from evaat_fast.data.video import VideoError
from evaat_fast.train import inputs, train
from evaat_fast.train.config import ConfigError

pytest.importorskip("av")
pytest.importorskip("pyarrow")


@pytest.fixture
def copy(tmp_path):
    return copied(tmp_path)


def rewrite(copy, change, split="train"):
    """The split's CSV file with `change` applied to every row, a dict, numbered from 0."""
    path = copy.annotations / f"EPIC_100_retrieval_{split}.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        change(number, row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def split(copy, name="train", **options):
    return EK100(copy.annotations, copy.videos, name, num_frames=2, missing="broken", **options)


def findings(report):
    return {finding.what: finding for finding in report.findings}


def clock(seconds):
    return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:05.2f}"


def seconds(text):
    hours, minutes, rest = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


@pytest.mark.parametrize("files", ["ends", "all"])
def test_a_whole_corpus_passes(files):
    steps = []
    report = check(split(corpus()), files=files, progress=lambda done, total: steps.append((done, total)))
    assert not report.findings and report.share == 0 and len(report.usable) == report.clips == 48
    assert steps[-1] == (report.files, report.files) and "nothing wrong found" in str(report)


def test_a_missing_video(copy):
    shutil.rmtree(copy.videos / "P01" / "P01_00.MP4")
    found = findings(check(split(copy)))["videos that are missing"]
    assert len(found.rows) == 48 and not found.usable and "P01/P01_00" in found.examples[0]


def test_a_missing_chunk_in_the_middle(copy):
    """Else its clips would be four copies of the last frame before it."""
    (copy.videos / "P01" / "P01_00.MP4" / "15.MP4").unlink()
    data = split(copy)
    touched = [i for i, c in enumerate(data.table) if c.stop > 15.5 and c.start < 30]
    found = findings(check(data))["clips in a part of their video that has no file"]
    assert found.rows.tolist() == touched and len(touched) > 5


@pytest.mark.parametrize("name", ["0.MP4", "15.MP4"])
@pytest.mark.parametrize("length", [0, 1000])
def test_a_damaged_file(copy, name, length):
    path = copy.videos / "P01" / "P01_00.MP4" / name
    path.write_bytes(path.read_bytes()[:length])
    report = check(split(copy), files="all")
    found = findings(report)["files that cannot be read"]
    assert name in found.examples[0] and len(found.rows) and report.share > 0
    if length == 0:  # seen in the folder alone
        assert findings(check(split(copy)))["files that cannot be read"].rows.tolist() == found.rows.tolist()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_chunk_that_is_no_file(copy, kind):
    path = copy.videos / "P01" / "P01_00.MP4" / "15.MP4"
    path.unlink()
    path.symlink_to("nowhere") if kind == "link" else path.mkdir()
    report = check(split(copy))
    assert "15.MP4: no such video" in findings(report)["files that cannot be read"].examples[0] and report.share > 0


def test_a_file_that_was_cut_short_behind_its_index(copy, tmp_path):
    import av

    path = next((copy.videos / "P01").glob("*/0.MP4"))
    with av.open(str(path)) as old, av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    content = (tmp_path / "fast.mp4").read_bytes()
    path.write_bytes(content)
    assert not check(split(copy)).findings
    path.write_bytes(content[: len(content) * 2 // 3])
    found = findings(check(split(copy)))["files that cannot be read"]
    assert len(found.rows) == 48 and "0.MP4: cut short: " in found.examples[0]


def test_a_wrong_unit_of_time(copy):
    def in_minutes(number, row):
        for name in ("start_timestamp", "stop_timestamp"):
            row[name] = clock(60 * seconds(row[name]) + 1800)

    rewrite(copy, in_minutes)
    found = findings(check(split(copy)))["clips that begin after their video ends"]
    assert (
        len(found.rows) == 48 and "are start and stop in seconds?" in found.examples[-1] and "P01/P01_00" in found.examples[0]
    )


def test_times_that_cannot_be():
    """Of a table that another program wrote; a reader of ours refuses them."""
    nan, inf = math.nan, math.inf
    times = [(0.0, 1.0), (nan, nan), (-1.0, 1.0), (2.0, 1.0), (nan, 1.0), (1.0, nan), (1.0, inf), (-inf, 1.0)]
    columns = {"id": list("abcdefgh"), "video": ["P01/P01_00"] * 8, "texts": [[name] for name in "abcdefgh"]}
    columns["start"], columns["stop"] = zip(*times, strict=True)
    data = ClipDataset(ClipTable.of(columns), corpus().videos, num_frames=2, retries=0, max_broken=1.0)
    report = check(data)
    found = findings(report)["clips whose times are of no part of a video"]
    assert report.broken.tolist() == found.rows.tolist() == [2, 3, 4, 5, 6, 7]
    data.set_epoch(0)
    assert [data[row]["replaced"] for row in range(8)] == [False] * 2 + [True] * 6
    data.on_error = "raise"
    with pytest.raises(VideoError, match="clip c: its times, -1 to 1 s, are of no part of a video"):
        data[2]


def test_no_captions_at_all():
    columns = {"id": ["a", "b"], "video": ["P01/P01_00"] * 2, "texts": [[], []], "start": [0.0, 1.0], "stop": [1.0, 2.0]}
    data = ClipDataset(ClipTable.of(columns), corpus().videos, num_frames=2)
    assert len(data.caption_kinds()) == 2 and check(data).share == 1


def test_one_clip_that_begins_or_ends_too_late(copy):
    def late(number, row):
        if number in (3, 5):
            row["stop_timestamp"] = clock(3000)
        if number == 5:
            row["start_timestamp"] = clock(2000)

    rewrite(copy, late)
    found = findings(check(split(copy)))
    assert found["clips that begin after their video ends"].rows.tolist() == [5]
    assert "seconds?" not in " ".join(found["clips that begin after their video ends"].examples)
    assert found["clips that end after their video, whose last frame is repeated"].rows.tolist() == [3]
    assert check(split(copy)).broken.tolist() == [5]


def test_clips_without_a_caption(copy):
    rewrite(copy, lambda number, row: row.update(narration=" " if number in (0, 7) else row["narration"]))
    found = findings(check(split(copy)))["clips without a caption"]
    assert found.rows.tolist() == [0, 7]
    assert not check(split(copy, training=False)).findings


def test_labels_and_captions_that_are_all_alike(copy):
    rewrite(copy, lambda number, row: row.update(verb_class="1", all_noun_classes="[2]", narration="do it"))
    found = findings(check(split(copy)))
    assert set(found) == {"labels that are all alike", "captions that are all alike"}
    assert all(f.usable and len(f.rows) == 48 for f in found.values())
    assert "'do it'" in found["captions that are all alike"].examples[0]


def test_several_faults_count_a_clip_once(copy):
    (copy.videos / "P01" / "P01_00.MP4" / "15.MP4").unlink()
    rewrite(copy, lambda number, row: row.update(narration=""))
    report = check(split(copy))
    assert report.share == 1 and len(report.broken) == 48 and len(report.usable) == 0


def test_training_goes_on_below_the_share_that_was_set(copy, tmp_path, capsys):
    def late(number, row):
        if number == 5:
            row.update(start_timestamp=clock(2000), stop_timestamp=clock(2001))

    rewrite(copy, late)
    places = [f'data.annotations="{copy.annotations}"', f'data.videos="{copy.videos}"']
    with pytest.raises(
        ConfigError, match=r"1 of 48 training clips \(2.08 %\) cannot be used, more than data.max_broken = 0.01"
    ):
        train(configuration(tmp_path, *places), quiet=True)
    assert not (tmp_path / "run").exists()
    config = configuration(tmp_path, *places, "data.max_broken=0.05", "train.epochs=1", "train.batch_size=47")
    seen = []
    data = inputs.splits(config)
    usable = inputs.inspect(config, data, seen.append).usable
    assert usable.tolist() == [i for i in range(48) if i != 5] and "clips that begin after their video ends: 1 clips" in seen[0]
    assert sorted(i for batch in inputs.sampler(config, data.train, usable) for i in batch) == usable.tolist()
    train(config)
    assert "47 clips" in capsys.readouterr().out


def test_a_test_split_must_be_whole(copy, tmp_path):
    rewrite(copy, lambda number, row: row.update(start_timestamp=clock(999), stop_timestamp=clock(999)), "test")
    places = [f'data.annotations="{copy.annotations}"', f'data.videos="{copy.videos}"', "data.max_broken=1.0"]
    with pytest.raises(ConfigError, match="16 of 16 test clips .* cannot be used, more than a metric can leave out"):
        train(configuration(tmp_path, *places), quiet=True)


def test_the_command(copy, tmp_path, capsys):
    configuration(tmp_path)
    arguments = ["check", str(tmp_path / "run.toml"), "--set", f"data.videos={json.dumps(str(copy.videos))}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "train: 48 clips" in printed and "test: 16 clips" in printed and printed.count("nothing wrong found") == 2
    shutil.rmtree(copy.videos / "P02")
    assert main([*arguments, "--all", "--json", str(tmp_path / "found.json")]) == 1
    printed = capsys.readouterr().out
    assert (
        "videos that are missing: 16 clips (100 %)" in printed and "16 clips (100 %) cannot be used, more than 0 %" in printed
    )
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["train"]["broken"] == 0 and record["test"]["broken"] == 16
    assert len(record["test"]["findings"][0]["clips"]) == 16


def test_an_evaluation_that_fails_costs_no_epoch(copy, tmp_path, capsys):
    path = next((copy.videos / "P02").glob("*/0.MP4"))
    whole = path.read_bytes()
    spoil(path)
    configuration(tmp_path)
    arguments = ["train", str(tmp_path / "run.toml"), "--set", f"data.videos={json.dumps(str(copy.videos))}"]
    assert main([*arguments, "--set", "train.epochs=1"]) == 2
    assert "0.MP4" in capsys.readouterr().err
    path.write_bytes(whole)
    assert main([*arguments, "--set", "train.epochs=1", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "nDCG" in printed and "epoch 1/1" not in printed


def spoil(path):
    """Leaves a file's headers and time stamps, and puts noise where its pictures are."""
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_headers_do_not_show_is_replaced_counted_and_stops_a_run(copy, tmp_path, capfd, caplog, workers):
    for path in (copy.videos / "P01").glob("*/15.MP4"):
        spoil(path)
    configuration(tmp_path)
    arguments = ["train", str(tmp_path / "run.toml"), "--set", f"data.videos={json.dumps(str(copy.videos))}"]
    arguments += ["--set", f"data.workers={workers}", "--set", "train.epochs=1", "--set", "train.batch_size=48"]
    assert main([*arguments, "--set", "data.max_broken=1.0"]) == 0
    told = [r.getMessage() for r in caplog.records if "replaced, as other clips of this video may be" in r.getMessage()]
    assert workers or (len(told) == 1 and "15.MP4" in told[0])  # a worker's log is its own
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    replaced = next(r["replaced"] for r in records if r["event"] == "epoch")
    assert replaced > 10 and f"{replaced} clips replaced" in capfd.readouterr().out
    assert main([*arguments, "--overwrite", "--set", "train.epochs=3"]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert (
        "clips could not be read, more than max_broken = 0.01 allows" in message
        and "15.MP4" in message
        and "clip P01_00_" in message
    )


@pytest.mark.parametrize("fault", ["missing", "spoilt"])
def test_a_cache_is_filled_with_what_can_be_used(copy, tmp_path, fault):
    """The clips of a broken video are neighbours: read in their order they were more than any share of those read so far."""
    times = {"start_timestamp": clock(40.0), "stop_timestamp": clock(41.0)}
    rewrite(copy, lambda number, row: row.update(times if number < 18 else {}))
    (last,) = (copy.videos / "P01").glob("*/30.MP4")
    last.unlink() if fault == "missing" else spoil(last)
    config = configuration(
        tmp_path, f"data.videos={json.dumps(str(copy.videos))}", "data.max_broken=0.7", "train.epochs=1", "train.batch_size=16"
    )
    config.data.annotations = str(copy.annotations)
    train(config, quiet=True)


def test_a_run_is_not_continued_on_other_clips(copy, tmp_path):
    """Their order would be another one, in silence."""
    places = [f'data.annotations="{copy.annotations}"', f'data.videos="{copy.videos}"', "data.max_broken=1.0"]
    train(configuration(tmp_path, *places, "train.epochs=1"), quiet=True)
    config = configuration(tmp_path, *places, "train.epochs=1")
    train(config, resume=True, quiet=True)
    (copy.videos / "P01" / "P01_00.MP4" / "15.MP4").unlink()
    with pytest.raises(ConfigError, match=r"last.pt was trained on 48 clips .* now others can, \d\d: "):
        train(config, resume=True, quiet=True)


@pytest.mark.parametrize("divided", [1, 60])
def test_times_in_minutes_are_noticed(tmp_path, divided):
    """They all lie inside their videos."""
    import av

    lengths = {"a": 400, "b": 1200, "short": 40}
    for name, seconds_of in lengths.items():
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=1)
            stream.width = stream.height = 64
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            for _ in range(seconds_of):
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    rows = [(name, 0.9 * lengths[name] * n / 20 / divided) for name in lengths for n in range(20)]
    columns = {"id": [str(n) for n in range(len(rows))], "video": [name for name, _ in rows]}
    columns |= {"texts": [[f"does {n}"] for n in range(len(rows))]}
    times = {"start": [at for _, at in rows], "stop": [at + 1 / divided for _, at in rows]}
    report = check(ClipDataset(ClipTable.of(columns | times), tmp_path, num_frames=2))
    found = findings(report)
    name = "clips that all lie in the first sixtieth of their videos, as times in minutes would"
    assert (name in found) == (divided == 60)
    if divided == 60:
        assert found[name].rows.tolist() == list(range(40)) and found[name].usable and report.share == 0
