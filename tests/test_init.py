"""evaat-fast init: what lies in a folder becomes a file of captions and a configuration that trains on them."""

import csv
import os
import types

import pytest
import torch
from films import film

from evaat_fast.cli import main
from evaat_fast.train import inputs, load, pace, sections
from evaat_fast.train.pace import step_seconds

pytest.importorskip("av")
pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two seconds of film each, at any depth, with odd names; and what is no film."""
    monkeypatch.chdir(tmp_path)
    videos = tmp_path / "my videos"
    for name in ("one.mp4", "trip/Été, 1.mp4", 'trip/"quoted".mov', "trip/deep/line\nbreak.mkv"):
        film(videos / name, [k / 10 for k in range(20)], rate=10)
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("no film")
    (videos / "cut.mp4").write_bytes((videos / "one.mp4").read_bytes()[:-400])
    (videos / "folder.mp4").mkdir()
    (videos / ".hidden.mp4").write_bytes((videos / "one.mp4").read_bytes())
    (videos / "._one.mp4").write_bytes(b"\0\5\26\7")
    (videos / ".trash").mkdir()
    os.symlink(videos / "gone", videos / "dangling.mp4")
    (videos / "shard.tar.gz").write_bytes(b"\x1f\x8b")
    (videos / "notes.txt").write_text("not beside a video")
    return videos


@pytest.fixture(autouse=True)
def a_step_takes_a_tenth_of_a_second(monkeypatch):
    monkeypatch.setattr(pace, "step_seconds", lambda config, device: 0.1)


def run(capsys, *arguments, code=0):
    found = main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.err if code else printed.out


def rows(path="captions.csv"):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def fill(path="captions.csv", text="clip {}", split=()):
    content = rows(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "caption", "start", "stop", *["split"] * bool(split)])
        writer.writeheader()
        for i, row in enumerate(content):
            row["caption"] = row["caption"] or text.format(i)
            writer.writerow({**row, "split": split[i]} if split else row)


def test_from_a_folder_to_a_run(folder, tmp_path, capsys):
    said = run(capsys, "init", folder)
    assert "4 videos in" in said and "3 hidden names" in said and "notes.txt" not in said
    for name in ("empty.mp4': the file is empty", "text.mp4': ", "cut.mp4': ", "dangling.mp4': no such video"):
        assert f"cannot be read: '{name}" in said
    assert "cannot be read: 'shard.tar.gz': compressed: unpack it" in said
    assert "Errno" not in said and f"evaat-fast index '{folder}' --checkpoint run\n" in said
    assert f"evaat-fast index '{folder}' --checkpoint eva02_clip_b16\n" in said and "  evaat-fast serve --open" in said
    assert f"evaat-fast init '{folder}' --overwrite " in said
    assert "fill in the column caption of captions.csv" in said and "evaat-fast check config.toml" in said
    found = {row["path"]: (row["caption"], float(row["start"]), float(row["stop"])) for row in rows()}
    assert set(found) == {"one.mp4", "trip/Été, 1.mp4", 'trip/"quoted".mov', "trip/deep/line\nbreak.mkv"}
    assert all(values == ("", 0, pytest.approx(2, abs=0.11)) for values in found.values())
    assert "none of its 4 rows has a caption" in run(capsys, "check", "config.toml", code=2)
    before = {name: (tmp_path / name).read_bytes() for name in ("captions.csv", "config.toml")}
    assert "'captions.csv' is there already: --overwrite" in run(capsys, "init", folder, code=2)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    run(capsys, "init", folder, "--overwrite")

    fill()
    written = (tmp_path / "captions.csv").read_bytes()
    assert "'config.toml' is there already" in run(capsys, "init", folder, code=2)
    said = run(capsys, "init", folder, "--overwrite")
    assert "captions: captions.csv, 4 clips of 4 videos" in said and "fill in" not in said
    assert (tmp_path / "captions.csv").read_bytes() == written
    assert "train: 2 clips" in run(capsys, "check", "config.toml")
    config = load("config.toml")
    assert config.data.cache and config.train.batch_size == 2 and config.model.num_frames == 8
    pytest.importorskip("tokenizers")
    small = ["--set", "train.epochs=1", "--set", "model.overrides={patch_size=32, vision_layers=1, text_layers=1}"]
    said = run(capsys, "train", "config.toml", *small, "--set", "train.device=cpu", "--set", "model.num_frames=2")
    assert "R@1" in said and (tmp_path / "run/last.pt").is_file()
    fill(split=["train", "train", "train", "test"])
    said = run(
        capsys, "train", "config.toml", *small, "--set", "model.num_frames=2", "--set", "train.device=cpu", "--overwrite"
    )
    assert "not measured: too few test clips" in said and "R@1" not in said


def test_captions_beside_the_videos(folder, tmp_path, capsys, monkeypatch):
    (folder / "one.srt").write_bytes(
        b"\xef\xbb\xbf1\r\n00:00:00,250 --> 00:00:01,000\r\n<i>he runs</i>\r\n{\\an8}fast\r\n\r\n"
        b"2\r\n00:00:01,000 --> 00:00:01,000\r\nnothing\r\n\r\n3\r\n00:00:01,500 --> 00:00:02,000\r\nstops\r\n"
    )
    (folder / "trip/Été, 1.txt").write_text("sings\n\nsings\nsings loudly\n")
    (folder / 'trip/"quoted".mov.vtt').write_text("WEBVTT\n\n00:00.500 --> 00:01.500 align:start\nwaves\n")
    (folder / "trip/deep/line\nbreak.srt").write_text("1\nsoon --> later\nx\n")
    said = run(capsys, "init", folder, "--out", "work", "--minutes", "2.5")
    assert "5 captions of 3 files beside 3 videos, and 1 videos to caption" in said
    assert (
        "fill in the column caption of work/captions.csv" in said and "--out work --minutes 2.5 --overwrite    # sizes" in said
    )
    assert "no captions taken from: 'trip/deep/line\\nbreak.srt': expected times as" in said
    found = [(row["path"], row["caption"], row["start"], row["stop"]) for row in rows("work/captions.csv") if row["caption"]]
    assert sorted(found) == [
        ("one.mp4", "he runs fast", "0.250", "1.000"),
        ("one.mp4", "stops", "1.500", "2.000"),
        ('trip/"quoted".mov', "waves", "0.500", "1.500"),
        ("trip/Été, 1.mp4", "sings", "", ""),
        ("trip/Été, 1.mp4", "sings loudly", "", ""),
    ]
    said = run(capsys, "check", "work/config.toml")
    assert "nothing wrong found" in said and load("work/config.toml").data.videos == str(folder)
    monkeypatch.chdir("work")
    said = run(capsys, "init", folder, "--overwrite", "--out", "..")
    assert f"evaat-fast serve --open --index '{folder}'" in said and "--checkpoint ../run\n" in said


def test_a_file_of_captions_in_the_folder(folder, tmp_path, capsys):
    content = "path\tcaption\tverb\none.mp4\truns\trun\nÉté, 1.mp4\tsings\tsing\nother.mp4\tsits\tsit\n"
    (folder / "mine.tsv").write_text(content)
    (folder / "prices.csv").write_text("what,price\nfilm,3\n")
    said = run(capsys, "init", folder, "--out", folder)
    assert f"captions: {folder / 'mine.tsv'}, 3 clips of 3 videos" in said and "2 videos have no caption there" in said
    assert "1 of its videos are not there or cannot be read, first 'other.mp4'" in said
    assert not (folder / "captions.csv").exists() and (folder / "mine.tsv").read_text() == content
    config = load(folder / "config.toml")
    assert config.data.annotations == str(folder / "mine.tsv") and (folder / "config.toml").read_text().count("./") == 0


def test_captions_of_other_videos_are_never_replaced(folder, tmp_path, capsys):
    (tmp_path / "captions.csv").write_text("path,caption\nelsewhere.mp4,precious\n")
    said = run(capsys, "init", folder, "--overwrite", code=2)
    assert "'captions.csv' is there already, and of something else" in said
    assert "precious" in (tmp_path / "captions.csv").read_text()


def test_one_video_is_not_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "v" / "long.mp4", [k / 10 for k in range(60)], rate=10)
    lines = [f"long.mp4,does {k % 3},{k},{k + 1}" for k in range(6)]
    (tmp_path / "captions.csv").write_text("path,caption,start,stop\n" + "\n".join(lines) + "\n")
    run(capsys, "init", "v")
    config = load("config.toml")
    assert config.data.test_share == 0 and config.train.distinct and config.train.batch_size == 2
    assert "train: 6 clips" in run(capsys, "check", "config.toml")


def gpu(monkeypatch, gib, step):
    """A machine with a GPU on which a training step, of whatever configuration, takes so many seconds."""
    asked = []

    def timed(config, device):
        asked.append((config.model.name, config.train.batch_size, config.train.micro_batch, device.type))
        if isinstance(step, Exception):
            raise step
        return step

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=gib << 30))
    monkeypatch.setattr(pace, "step_seconds", timed)
    return asked


@pytest.mark.parametrize("gib,batch,micro", [(80, 64, 0), (8, 64, 8)])
def test_a_gpu_gets_the_base_model_with_a_batch_that_fits(folder, monkeypatch, capsys, gib, batch, micro):
    asked = gpu(monkeypatch, gib, 0.1)
    text = "path,caption,start,stop\n" + "".join(
        f"{name},does {k},{k / 100},{k / 100 + 3}\n" for k in range(160) for name in ("one.mp4", '"trip/Été, 1.mp4"')
    )
    (folder / "captions.csv").write_text(text)
    run(capsys, "init", folder)
    config = load("config.toml")
    assert (config.train.batch_size, config.train.micro_batch) == (batch, micro) and config.model.pretrained
    assert config.model.num_frames == 8 and config.optim.lr == 3e-5 and config.train.epochs == 200
    assert asked == [("eva02_at_base_patch16_224", batch, micro, "cuda")]


def test_a_gpu_without_room(folder, monkeypatch, capsys):
    gpu(monkeypatch, 80, torch.OutOfMemoryError("CUDA out of memory"))
    (folder / "captions.csv").write_text("path,caption\none.mp4,runs\n" + '"trip/Été, 1.mp4",sings\n')
    said = run(capsys, "init", folder, code=2)
    assert "the GPU has no room for a training step of 2 clips" in said and not (folder.parent / "config.toml").exists()


def test_a_step_is_timed_without_videos_or_weights():
    small = sections.Model("eva02_at_tiny_patch16_64", 2, "nowhere.safetensors", {"patch_size": 32, "rope_grid": 2})
    config = sections.Config(small, train=sections.Train(batch_size=2, init="nowhere.pt"))
    assert 0 < step_seconds(config, torch.device("cpu")) < 60


def test_as_many_epochs_as_fit_into_the_minutes(folder, capsys):
    """640 clips, 20 batches of 32, 0.1 s each."""
    rows = "".join(f"one.mp4,{(k % 32)},{k / 1000},{k / 1000 + 0.5}\n" for k in range(640))
    (folder / "captions.csv").write_text("path,caption,start,stop\n" + rows)
    for minutes, epochs, said in (("2", 60, "2 min"), ("0.001", 5, "10 s"), ("60", 200, "7 min")):
        told = run(capsys, "init", folder, "--overwrite", "--minutes", minutes)
        assert f"wrote config.toml: {epochs} epochs, {20 * epochs} steps, about {said} on this machine" in told
        assert load("config.toml").train.epochs == epochs
        assert f"epochs = {epochs}    # {20 * epochs} steps, about {said} on this machine" in open("config.toml").read()


@pytest.mark.parametrize("classes,batch,distinct", [(3, 32, False), (20, 16, True), (40, 32, True)])
def test_batches_are_of_what_classes_leave_apart(folder, capsys, classes, batch, distinct):
    """80 clips of 40 captions: kinds are classes where there are any."""
    rows = "".join(f"one.mp4,does {k % 40},{k / 100},{k / 100 + 0.5},c{k % classes},train\n" for k in range(80))
    (folder / "captions.csv").write_text("path,caption,start,stop,label,split\n" + rows + '"trip/Été, 1.mp4",x,,,,test\n')
    run(capsys, "init", folder)
    config = load("config.toml")
    assert (config.train.batch_size, config.train.distinct) == (batch, distinct)
    assert len(inputs.sampler(config, inputs.splits(config).train)) >= 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["empty"], "FOLDER: no video in 'empty'"),
        (["my videos", "--minutes", "0"], "minutes: expected a number above 0, got 0.0"),
        (["broken"], "no video in 'broken'; 1 cannot be read, first 'a.mp4': the file is empty"),
        (["my videos", "--out", "/dev/null/x"], "--out: the folder '/dev/null/x' cannot be written to"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.mp4").touch()
    before = sorted(tmp_path.iterdir())
    said = run(capsys, "init", *arguments, code=2)
    assert message in said and len(said.splitlines()) == 1 and sorted(tmp_path.iterdir()) == before
