"""Videos within tar files, as WebDataset's shards hold them, are what they are outside."""

import io
import json
import tarfile

import numpy as np
import pytest
from films import film, numbers

from evaat_fast.cli import main
from evaat_fast.data import ClipDataset, ClipTable, decode
from evaat_fast.data.decode import VideoError, members
from evaat_fast.data.plain import PlainClips
from evaat_fast.data.readers import plain
from evaat_fast.train import load

pytest.importorskip("av")
pytest.importorskip("pyarrow")
TIMES = [k / 10 for k in range(30)]


def pack(path, files):
    """A tar file of {name: content, or the path of a file}."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path):
    """Two shards, of which the name of one is odd."""
    loose = {
        "000.mp4": film(tmp_path / "loose/000.mp4", TIMES, turn=90, rate=10),
        "001.mp4": film(tmp_path / "loose/001.mp4", TIMES, shift=-0.25, sound=True, rate=10),
        "deep/002.mkv": film(tmp_path / "loose/002.mkv", TIMES, rate=10),
        "003.mp4": film(tmp_path / "loose/003.mp4", TIMES, rate=10, container={"movflags": "frag_keyframe+empty_moov"}),
    }
    (tmp_path / "in").mkdir()
    first = {"000.mp4": loose["000.mp4"], "000.txt": b"runs\n", "000.json": b'{"caption": "runs, it says"}'}
    first |= {"001.mp4": loose["001.mp4"], "001.json": json.dumps({"text": ["sits", "rests"], "fps": 10}).encode()}
    second = {"./deep/002.mkv": loose["deep/002.mkv"], "deep/002.txt": b"sings", "003.mp4": loose["003.mp4"]}
    second |= {"003.json": b"[1]", "004.mp4": b"no film", "._003.mp4": b"x"}
    pack(tmp_path / "in/00000.tar", first)
    pack(tmp_path / "in/odd, name:1.tar", second)
    places = {name: tmp_path / "in" / ("00000.tar" if name < "002" else "odd, name:1.tar") / name for name in loose}
    return {loose[name]: places[name] for name in loose}


def test_a_member_is_read_as_the_file_that_it_was(shards):
    for outside, inside in shards.items():
        one, other = decode.probe(outside), decode.probe(inside)
        assert {**one.__dict__, "path": None} == {**other.__dict__, "path": None}, inside
        with decode.open_video(outside, "av") as a, decode.open_video(inside, "av") as b:
            assert a.end == b.end and a.likely_end == b.likely_end
            np.testing.assert_array_equal(a.read([2.71, 0.0, 1.3]), b.read([2.71, 0.0, 1.3]))
    with decode.open_video(list(shards.values())[2], "av") as reader:
        assert numbers(reader.read([0.05, 1.25, 2.95])) == [0, 12, 29]


def test_what_is_no_member(shards, tmp_path):
    tar = tmp_path / "in/00000.tar"
    for name in (tar / "009.mp4", tar / "000.mp4/x", tar):
        with pytest.raises(VideoError):
            decode.probe(name)
    with pytest.raises(VideoError, match="decord reads no part of a tar file"):
        pytest.importorskip("decord")
        with decode.open_video(tar / "000.mp4", "decord"):
            pass
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:1500])
    with pytest.raises(VideoError, match="cut.tar: not a tar file that can be read: unexpected end of data"):
        members.names(cut)
    cut.write_bytes(tar.read_bytes())  # the index is of the file as it is
    assert members.names(cut)[0] == "000.mp4" and members.read(cut / "000.txt") == b"runs\n"
    (tmp_path / "junk.tar").write_bytes(b"x" * 4000)
    with pytest.raises(VideoError, match="junk.tar: not a tar file that can be read"):
        members.place(tmp_path / "junk.tar/a.mp4")


def test_clips_of_members(shards, tmp_path):
    text = "path,caption,start,stop\n00000.tar/001.mp4,runs,0,1\n"
    text += '"odd, name:1.tar/deep/002.mkv",sings,1.0,2.0\n00000.tar/gone.mp4,sits,,\n'
    (tmp_path / "captions.csv").write_text(text)
    table = plain.read(tmp_path / "captions.csv", tmp_path / "in", "train", test_share=0.0)
    data = PlainClips(table, tmp_path / "in", num_frames=2, training=False, missing="broken")
    outside = ClipTable.of({"id": ["a"], "video": ["002"], "start": [1.0], "stop": [2.0], "texts": [["x"]]})
    same = ClipDataset(outside, tmp_path / "loose", num_frames=2, training=False)
    np.testing.assert_array_equal(data[1]["video"], same[0]["video"])
    assert data.source(0) is not None and data.source(2) is None


def test_init_finds_shards(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/junk.tar").write_bytes(b"x" * 4000)
    assert main(["init", "in"]) == 0
    said = capsys.readouterr().out
    assert "4 videos in in" in said and "4 captions of 3 files beside 3 videos, and 1 videos to caption" in said
    assert "'junk.tar': not a tar file" in said and "'odd, name:1.tar/004.mp4'" in said and "1 hidden names" in said
    assert main(["check", "config.toml"]) == 0
    found = plain.read("captions.csv", "in", "train", test_share=0.0)
    assert {clip.video: clip.texts for clip in found} == {
        "00000.tar/000.mp4": ("runs",),
        "00000.tar/001.mp4": ("sits", "rests"),
        "odd, name:1.tar/deep/002.mkv": ("sings",),
    }
    assert load("config.toml").data.kind == "csv"
