"""An index of videos: what is in it, whatever was killed, changed or broken, and what is found."""

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaat_fast
from evaat_fast.cli import main
from evaat_fast.model import save_checkpoint
from evaat_fast.search import Index, cut, find, moments, page, query, windows
from evaat_fast.search.store import BadIndex, File, Places, alone
from evaat_fast.search.vectors import Vectors

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")

import films  # noqa: E402, needs av
from test_decode_fuzz import mutated  # noqa: E402

from evaat_fast.data.video import read_clip  # noqa: E402

HERE = Path(__file__).parent
SMALL = dict(patch_size=32, vision_layers=1, text_layers=1, vision_width=32, vision_heads=1, vision_mlp=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights, and videos of some seconds that are copied by the tests."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(1)
    for name, frames in (("weights", 4), ("others", 4), ("pictures", 1)):
        model = evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=frames, **SMALL)
        save_checkpoint(model, folder / f"{name}.safetensors")
    for name, length in (("one", 2.5), ("two", 4.0), ("three", 7.2)):
        films.film(folder / f"{name}.mp4", [n / 10 for n in range(round(10 * length))], rate=10)
    return folder


def three(place, folder):
    """Three videos, one of them below, with the times of the originals."""
    (folder / "below").mkdir(parents=True)
    for name, to in (("one", "one.mp4"), ("two", "two.mp4"), ("three", "below/three.mp4")):
        shutil.copy2(place / f"{name}.mp4", folder / to)
    return folder


@pytest.fixture(scope="module")
def built(place):
    """An index of them."""
    made = Index.create(three(place, place / "built") / ".evaat-index", place / "weights.safetensors", device="cpu")
    assert made.add(place / "built").videos == 3
    return made


@pytest.fixture
def videos(place, tmp_path):
    return three(place, tmp_path / "videos")


@pytest.fixture
def index(built, videos):
    """A copy of it, for the same videos elsewhere."""
    shutil.copytree(built.folder, videos / ".evaat-index")
    return Index.open(videos, device="cpu")


def test_vectors_are_those_of_clips_that_are_read_one_by_one(index):
    """The same frames as `read_clip`'s to the bit, so the same vectors but for bfloat16."""
    assert [file.name for file in index.files] == ["below/three.mp4", "one.mp4", "two.mp4"]
    embedder, start, stop = index.embedder, index.places.start, index.places.stop
    for file in index.files:
        path = index.path(file.name)
        some = windows.windows(path, 2.0, 1.0, 4)
        frames, where = windows.decode(path, some.times, embedder.crop)
        for row, clip in zip(range(file.first, file.last), frames[where], strict=True):
            read = embedder.crop(read_clip(path, start[row], stop[row], 4))
            assert (torch.from_numpy(clip) == read).all(), f"{file.name} at {start[row]}"
            with torch.no_grad():
                expected = embedder.model.encode_video(read[None], normalize=True)[0]
            assert torch.dot(index.vectors.row(row), expected) > 0.999
    three = index.files[0]
    assert start[three.first : three.last].tolist() == [0, 1, 2, 3, 4, 5] and stop[three.last - 1] == 7.0
    assert (start[6], stop[6]) == (0, 2) and (start[7], stop[7]) == (0.5, 2.5)  # what is left of 2.5 s is a quarter of a clip


def test_text_and_clips_add_and_subtract(index):
    a, b, c = index.embedder.texts(["push left", "a t-shirt", "C++"])
    like = query.Like(index.path("two.mp4"), 1.4)
    row = next(f for f in index.files if f.name == "two.mp4").first  # its clips' middles are at 1, 2 and 3 s
    total = torch.nn.functional.normalize(a + b - c + torch.nn.functional.normalize(index.vectors.row(row), dim=0), dim=0)
    assert torch.allclose(index.vector(query.parse_query("push left + a t-shirt - C++"), [like]), total, atol=1e-5)
    found = index.search("push left + a t-shirt - C++", k=50, merge=False)
    scores = index.vectors.scores(index.vector(query.parse_query("push left + a t-shirt - C++")))
    assert np.allclose(found.score, np.sort(scores)[::-1], atol=1e-5) and len(found) == len(index) == 11
    expected = torch.stack([index.vectors.row(r) for r in range(11)]) @ index.vector([query.Term("push left", 1)])
    assert np.allclose(index.vectors.scores(index.vector([query.Term("push left", 1)])), expected.numpy(), atol=1e-6)


def test_the_product_is_that_of_all_rows(tmp_path):
    """In several threads, whose parts are no multiple of anything, and twice: what was dropped is read again."""
    rows = torch.randn(100_003, 96).half()
    (tmp_path / "v").write_bytes(rows.numpy().tobytes() + b"behind")
    query, mapped = torch.randn(96), Vectors(tmp_path / "v", len(rows), 96)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            assert np.allclose(mapped.scores(query), (rows.float() @ query).numpy(), atol=1e-4)
    finally:
        torch.set_num_threads(before)
    assert len(Vectors(tmp_path / "none", 0, 96).scores(query)) == 0


def test_queries_are_read():
    terms = query.parse_query("push left + a red-hot block - a hand")
    assert [(t.text, t.sign) for t in terms] == [("push left", 1), ("a red-hot block", 1), ("a hand", -1)]
    assert [(t.text, t.sign) for t in query.parse_query("- a hand")] == [("a hand", -1)]
    assert [t.text for t in query.parse_query("C++ a+b")] == ["C++ a+b"]
    for bad in ("", "  ", "a + + b", "a -  - b", "a - ", "-"):
        with pytest.raises(ValueError, match="query: expected text"):
            query.parse_query(bad)
    with pytest.raises(ValueError, match="query: expected at most 64 texts, got 65"):
        query.parse_query("a + " * 64 + "a")
    assert len(query.parse_query("- \x1b[31m\U0001f35d" * 64)) == 1
    for text, time in (("a@b.mp4@12.5", 12.5), ("a.mp4@01:02", 62), ("a.mp4@1:02:03.5", 3723.5), ("a.mp4@.5", 0.5)):
        assert query.parse_like(text) == query.Like(text.rpartition("@")[0], time)
    for bad in ("a.mp4", "a@b.mp4", "@3", "a.mp4@", "a.mp4@nan", "a.mp4@-1", "a.mp4@1:2:3:4"):
        with pytest.raises(ValueError, match="like: expected"):
            query.parse_like(bad)


def rows(*clips):
    """Places of videos with so many clips of 2 s each second."""
    files, at = [], 0
    for n, count in enumerate(clips):
        files.append(File(f"{n}.mp4", at, at + count, 1, 0))
        at += count
    start = np.concatenate([np.arange(n, dtype=float) for n in clips])
    return Places(tuple(files), np.repeat(np.arange(len(clips)), clips).astype(np.int32), start, start + 2)


def test_hits_of_one_event_are_one():
    places, scores = rows(10, 4), np.zeros(14, np.float32)
    scores[[2, 3, 4]] = 0.9, 1.0, 0.88  # an event
    scores[5] = 0.5  # its shoulder, which is no event of its own
    scores[8] = 0.95  # another one
    scores[[9, 10]] = 0.3, 0.99  # the last clip of a video, and the first of the next
    found = moments.events(scores, places, 4)
    assert [tuple(event) for event in found[:3]] == [(2, 4, 3), (10, 10, 10), (8, 8, 8)]
    assert found[3].best not in (1, 2, 3, 4, 5, 7, 8, 9)
    assert [e.best for e in moments.events(scores, places, 3, merge=False)] == [3, 10, 8]
    allowed = np.ones(14, bool)
    allowed[:10] = False
    assert moments.events(scores, places, 9, allowed)[0].best == 10
    still = moments.events(np.ones(500, np.float32), rows(500), 100)
    assert all(event.last - event.first <= moments.LONGEST for event in still)  # a picture that stands still


def test_dead_rows_are_not_found():
    places = rows(3, 3)
    gone = Places(places.files[1:], np.array([-1, -1, -1, 0, 0, 0], np.int32), places.start, places.stop)
    assert {e.best for e in moments.events(np.array([9, 9, 9, 1, 2, 3], np.float32), gone, 9, merge=False)} == {3, 4, 5}


def test_new_changed_and_deleted_videos(index, videos, place):
    assert str(index.add(videos)).startswith("0 videos indexed, 0 clips; 3 unchanged")
    shutil.copy(place / "two.mp4", videos / "one.mp4")
    (videos / "below/three.mp4").unlink()
    shutil.copy(place / "one.mp4", videos / "new.mp4")
    opened = Index.open(videos)  # as another process has it
    report = index.add(videos)
    assert (report.videos, report.changed, report.removed, report.unchanged) == (2, 1, 1, 1)
    assert {f.name: f.last - f.first for f in index.files} == {"one.mp4": 3, "two.mp4": 3, "new.mp4": 2}
    found = index.search("push left", k=99, merge=False)
    assert len(found) == len(index) == 8 and {Path(f).name for f in found.file} == {"one.mp4", "two.mp4", "new.mp4"}
    assert len(opened) == 11  # what it has mapped stays
    table = opened.search("push left", k=3)
    assert table._repr_html_().count("<tr>") == 1 + len(table) and table[0] == next(iter(table))
    opened.reload()
    assert len(opened) == 8 and len(opened.search("push left", k=99, merge=False)) == 8
    fresh = Index.create(videos.parent / "fresh", place / "weights.safetensors", device="cpu")
    fresh.add(videos)
    theirs = {(m.file, m.start): m.score for m in fresh.search("push left", k=99, merge=False)}
    assert {(m.file, m.start): pytest.approx(m.score, abs=2e-3) for m in found} == theirs
    assert index.add(videos / "one.mp4").unchanged == 1 and len(index) == 8  # of a file alone nothing else is gone
    assert index.update().unchanged == 3


def test_the_last_video_changes_again_and_again(index, videos, place):
    """Its dead rows lie right before its new ones, of the same name."""
    for name, clips in (("three", 6), ("one", 2), ("three", 6), ("two", 3)):
        shutil.copy(place / f"{name}.mp4", videos / "two.mp4")
        for opened in (index, Index.open(videos)):
            report = index.add(videos)
            opened.reload()
            assert {f.name: f.last - f.first for f in opened.files} == {"below/three.mp4": 6, "one.mp4": 2, "two.mp4": clips}
        assert (report.videos, report.unchanged) == (0, 3)
    assert len(index.search("push left", k=99, merge=False)) == len(index) == 11


def test_videos_and_index_can_be_moved(index, videos, tmp_path):
    videos.rename(tmp_path / "moved")
    moved = Index.open(tmp_path / "moved")
    assert moved.add(tmp_path / "moved").unchanged == 3
    assert all(Path(f).is_file() for f in moved.search("push left").file)


def kill(folder, checkpoint, *phases, shots=False):
    job = {"videos": str(folder), "checkpoint": str(checkpoint), "shots": shots, "phases": phases}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "index_killed.py")]
    run = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=280, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def commits(tmp_path_factory):
    """Clips of a second every tenth of it: a video of one commit of 256, one of two, one that breaks off after its first, and
    one that is no video."""
    folder = tmp_path_factory.mktemp("commits")
    for name, length in (("0", 107), ("1", 214), ("2", 160)):
        films.film(folder / f"{name}.mp4", [i / 4 for i in range(length)], rate=4)
    data = bytearray((folder / "2.mp4").read_bytes())
    at = data.index(b"mdat") + int(0.8 * (data.index(b"moov") - data.index(b"mdat")))
    data[at : at + 150] = random.Random(0).randbytes(150)
    (folder / "2.mp4").write_bytes(data)
    (folder / "1-broken.mp4").write_bytes(b"no video")
    return folder


def held(lines):
    """Every index opened, and went on to the same bytes. Returns how many runs were killed, and the rows that they left."""
    undisturbed, *killed = lines
    assert undisturbed[1] == 0
    for how, ended, _, opens, _, again, files in killed:
        assert ended in (0, 9) and opens == 0 and again == 0, how
        assert files == undisturbed[6], f"{how}: {files}"
    return sum(line[1] == 9 for line in killed), {line[4] for line in killed}


def test_killed_runs_go_on_to_the_same_bytes(commits, place, tmp_path):
    folder = tmp_path / "v"
    shutil.copytree(commits, folder)
    kills = [["replace", 3], ["replace", 7], ["fsync", 12]]
    # Then one is gone and one is new, so that the dead rows are many and the others are copied.
    more = {"kills": [["replace", 4], ["replace", 6]], "remove": ["0.mp4"], "add": {"4.mp4": str(place / "one.mp4")}}
    lines = kill(folder, place / "weights.safetensors", {"kills": kills}, more)
    killed, left = held(lines[:4])
    assert killed == 3 and left == {0, 514, 770}  # before the first commit, and within the second and third video
    assert held(lines[4:])[0] == 2
    manifest = json.loads((folder / ".evaat-index/index.json").read_text())
    assert manifest["vectors"] == "vectors-0001.f16" and not manifest["dead"] and not manifest["partial"]
    assert [f.name for f in Index.open(folder).files] == ["1.mp4", "4.mp4"]
    assert manifest["unreadable"].keys() == {"1-broken.mp4", "2.mp4"}


def test_killed_runs_find_the_same_shots(commits, place, tmp_path):
    """Within a video, of which the cuts before are found again."""
    folder = tmp_path / "v"
    folder.mkdir()
    shutil.copy(commits / "1.mp4", folder)
    killed, left = held(kill(folder, place / "weights.safetensors", {"kills": [["replace", 5]]}, shots=True))
    assert killed == 1 and left == {256} and len(Index.open(folder)) == 288


@pytest.mark.slow
@pytest.mark.parametrize("shots", [False, True])
def test_fifty_random_moments(commits, place, tmp_path, shots):
    folder, draw = tmp_path / "v", random.Random(0)
    shutil.copytree(commits, folder)
    whole = kill(folder, place / "weights.safetensors", {"kills": []}, shots=shots)[0][2]
    shutil.rmtree(folder / ".evaat-index")
    kills = [["after", draw.uniform(0, whole)] for _ in range(50)]
    killed, left = held(kill(folder, place / "weights.safetensors", {"kills": kills}, shots=shots))
    assert killed >= 30 and len(left) > 2


def hostile(folder, film, count):
    """Mutated videos, and what only looks like one. Returns the names of those."""
    data = film.read_bytes()
    for seed in range(count):
        (folder / f"mutated-{seed:03}.mp4").write_bytes(mutated(data, seed)[1])
    (folder / "folder.mp4").mkdir()
    shutil.copy(film, folder / "folder.mp4" / "inside.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "dangling.mkv").symlink_to("nowhere.mkv")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "text.MOV").write_text("no video")
    for name in ("new\nline.mp4", "quote\"'<b>.mp4", "\u202eleft \U0001f35d.mp4", "-x.mp4", " .mp4"):
        shutil.copy(film, folder / name)
    try:
        shutil.copy(film, os.fsencode(folder) + b"/latin\xe9.mp4")
    except OSError:  # a file system that takes UTF-8 alone
        pass
    (folder / ".hidden.mp4").write_bytes(b"")
    return {"empty.mp4", "dangling.mkv", "pipe.mp4", "text.MOV"}


@pytest.mark.parametrize(
    "count, shots",
    [(20, False), (10, True), *(pytest.param(300, shots, marks=pytest.mark.slow) for shots in (False, True))],
)
def test_hostile_files_neither_stop_nor_slow_it(place, tmp_path, capsys, count, shots):
    bad = hostile(tmp_path, place / "one.mp4", count)
    command = ["index", str(tmp_path), "--checkpoint", str(place / "weights.safetensors"), "--json", str(tmp_path / "r")]
    assert main(command + ["--shots"] * shots) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "r").read_text())
    assert "cannot be read" in out and "\u202e" not in out
    index = Index.open(tmp_path)
    there = {file.name for file in index.files}
    assert {"folder.mp4/inside.mp4", "new\nline.mp4", "quote\"'<b>.mp4", "\u202eleft \U0001f35d.mp4", "-x.mp4"} <= there
    assert bad <= report["unreadable"].keys() == index.unreadable.keys() and not bad & there
    assert report["unreadable"]["pipe.mp4"] == "not a file" and ".hidden.mp4" not in there | index.unreadable.keys()
    mutants = {f"mutated-{n:03}.mp4" for n in range(count)}
    assert mutants <= there | index.unreadable.keys() and len(mutants & index.unreadable.keys()) > count / 3
    assert not any(str(tmp_path) in why for why in index.unreadable.values())
    assert report["seconds"] < 2 + 0.05 * count
    again = index.add(tmp_path)
    assert again.videos == 0 and again.unreadable == report["unreadable"]
    shutil.copy(place / "one.mp4", tmp_path / "text.MOV")  # repaired
    assert index.add(tmp_path).videos == 1
    assert index.add(tmp_path, retry=True).videos == 0


def test_filters(index, videos):
    os.utime(videos / "one.mp4", (datetime.datetime(2020, 5, 1, 12).timestamp(),) * 2)
    index.add(videos)
    names = lambda **how: sorted({Path(f).name for f in index.search("push left", k=99, **how).file})  # noqa: E731
    assert names(before="2020-05-02") == ["one.mp4"] and names(before="2020-05-01") == []
    assert names(after="2020-05-01", before=datetime.date(2020, 5, 2)) == ["one.mp4"]
    assert names(after="2020-05-02") == ["three.mp4", "two.mp4"]
    assert names(folder=videos / "below") == names(folder="below") == ["three.mp4"] and len(names(folder=videos)) == 3
    with pytest.raises(ValueError, match="folder: expected one with videos of the index below it"):
        index.search("push left", folder=videos / "belo")
    with pytest.raises(ValueError, match="after: expected a date as 2026-05-31, got 'May'"):
        index.search("push left", after="May")


def test_more_like_this(index, videos, place):
    found = index.search(like=f"{videos}/two.mp4@1", k=99, merge=False)
    assert not any(Path(m.file).name == "two.mp4" and m.start <= 1 <= m.stop for m in found)
    # The same film elsewhere, which is decoded for it: what it is most like is its own copy.
    found = index.search(like=[query.Like(str(place / "two.mp4"), 1.0)])
    assert (Path(found.file[0]).name, found.peak[0]) in {("two.mp4", 1.0), ("one.mp4", 1.0), ("three.mp4", 1.0)}
    assert found.score[0] > 0.999
    for bad, why in ((f"{videos}/two.mp4@9", "from 0 to 4.00 s"), ("nothing.mp4@1", "there is no file 'nothing.mp4'")):
        with pytest.raises(ValueError, match=why):
            index.search(like=bad)


def test_the_command_line(index, videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(videos / "below")  # the index of a folder above
    assert main(["search", "push left - a hand", "--json", "-k", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["query"] == "push left - a hand" and len(found["moments"]) == 2
    assert {"score", "file", "start", "stop", "peak", "date"} == found["moments"][0].keys()
    assert found["moments"] == Index.open(videos).search("push left - a hand", k=2).to_dicts()
    assert (
        main(["search", "--like", "../two.mp4@00:01", "--cut", str(tmp_path / "cut"), "--page", str(tmp_path / "p.html")]) == 0
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["score", "time", "file"] and str(tmp_path / "p.html") in out
    assert len(list((tmp_path / "cut").glob("*.mp4"))) == len(out.splitlines()) - 2 - out.count("/cut/")


def test_moments_as_files(videos, tmp_path):
    """Frames, length, sound and size of what is cut."""
    sound = films.film(videos / "sound.mp4", [n / 10 for n in range(30)], rate=10, sound=True, size=(128, 112), turn=90)
    one = moments.Moments(
        "x", np.ones(2), [str(sound), str(videos / "gone.mp4")], *np.array([[1.0] * 2, [2.5] * 2, [2] * 2]), []
    )
    written = cut.cut(dataclass_dates(one), tmp_path / "cut")
    first, second = written.items()
    assert first[1] is None and first[0].name == "01-sound-00.01.0.mp4" and "gone.mp4" in second[1] and not second[0].exists()
    with av.open(str(first[0])) as file:
        assert [s.type for s in file.streams] == ["video", "audio"] or not file.streams.audio
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    assert len(frames) == 15 and frames[0].shape == (128, 112, 3)
    back = np.stack([np.rot90(f, k) for f in frames for k in (1, 3)])
    assert list(range(10, 25)) in (films.numbers(back[::2]), films.numbers(back[1::2]))
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["01-sound-00.01.0.mp4"]


def dataclass_dates(found):
    return moments.Moments(
        *(getattr(found, n) for n in ("query", "score", "file", "start", "stop", "peak")), [datetime.datetime.now()] * 2
    )


def test_the_page_is_safe_and_whole(videos, tmp_path):
    pytest.importorskip("PIL")
    odd = videos / "<script>alert(1)<script>#'\"\n\u00fc.mp4"
    shutil.copy(videos / "one.mp4", odd)
    table = moments.Moments("<b>x</b>", np.ones(2), [str(odd), "/gone.mp4"], *np.array([[0.5] * 2, [2.0] * 2, [1.0] * 2]), [])
    text = page.write(dataclass_dates(table), tmp_path / "page.html").read_text()
    assert "<script>" not in text and "<b>x" not in text and text.count("<video") == 2 and text.count("data:image/jpeg") == 1
    assert f"{odd.as_uri()}#t=0.500,2.000" in text and "http" not in text


def test_an_index_is_made_anew_of_other_weights(index, videos, place, capsys):
    """Who has opened the old one still searches it, and takes up the new one; a mistake leaves it as it was."""
    before = (index.folder / "index.json").read_bytes()
    other = ["--checkpoint", str(place / "others.safetensors"), "--seconds", "1"]
    assert main(["index", str(videos), "--overwrite"]) == 2 and "--checkpoint: of what?" in capsys.readouterr().err
    assert main(["index", str(videos), "--overwrite", *other, "--overlap", "2"]) == 2
    assert main(["index", str(videos), "--overwrite", "--checkpoint", "nothing"]) == 2
    with alone(index.folder):
        assert main(["index", str(videos), "--overwrite", *other]) == 2
    assert (index.folder / "index.json").read_bytes() == before
    query, mine = torch.ones(index.vectors.width), len(index)
    scores = index.vectors.scores(query)
    assert main(["index", str(videos), "--overwrite", *other]) == 0
    assert "next: evaat-fast search TEXT --index " in capsys.readouterr().out
    assert (index.vectors.scores(query) == scores).all() and len(index) == mine
    index.reload()
    fresh = Index.create(videos.parent / "fresh", place / "others.safetensors", seconds=1, device="cpu")
    fresh.add(videos)
    assert len(index) == len(fresh) > mine and np.array_equal(index.vectors.scores(query), fresh.vectors.scores(query))
    assert [p.name for p in index.folder.glob("vectors-*")] == ["vectors-0001.f16"]
    assert main(["index", str(videos)]) == 0 and "next:" not in capsys.readouterr().out


def test_an_index_is_found(tmp_path, monkeypatch):
    """That of a folder, or above it, or the only one directly below."""
    some = [tmp_path / name / ".evaat-index" for name in ("a", "b b", ".")]

    def made(folder):
        folder.mkdir(parents=True)
        (folder / "index.json").touch()

    with pytest.raises(BadIndex, match="there is no index in .*, above it or directly below"):
        find(tmp_path)
    made(some[0])
    assert find(tmp_path) == find(some[0].parent) == some[0]
    made(some[1])
    with pytest.raises(BadIndex, match="2 indexes below .*, of 'a', 'b b': --index names one"):
        find(tmp_path)
    made(some[2])
    (tmp_path / "c").mkdir()
    assert find(tmp_path) == find(tmp_path / "c") == some[2] and find(some[1].parent) == some[1]


def test_what_is_wrong_is_said(index, videos, place, tmp_path, capsys, monkeypatch):
    def error(*arguments):
        assert main(list(map(str, arguments))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is not what the index was made with" in error("index", videos, "--checkpoint", place / "others.safetensors")
    assert "--seconds: the index has 2.0, got 3.0" in error("index", videos, "--seconds", 3)
    assert "--checkpoint: of what?" in error("index", tmp_path)
    assert "--out: where to?" in error("index", videos, tmp_path)
    assert "there is no file" in error("index", tmp_path, "--checkpoint", tmp_path / "nothing.pt")
    assert "overlap: expected a number from 0 to 0.9" in error(
        "index", tmp_path, "--checkpoint", place / "weights.safetensors", "--overlap", 1
    )
    assert "QUERY: expected text" in error("search", "--index", videos)
    assert "k: expected an int from 1, got 0" in error("search", "x", "--index", videos, "-k", 0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "evaat-fast index VIDEOS makes one" in error("search", "x")
    with alone(index.folder):
        assert "another process is indexing" in error("index", videos)
    manifest = index.folder / "index.json"
    text = manifest.read_text()
    manifest.write_text(text[:50])
    assert "is damaged" in error("search", "x", "--index", videos)
    manifest.write_text(text.replace('"format": 1', '"format": 99'))
    assert "of format 99" in error("search", "x", "--index", videos)
    manifest.write_text(text)
    shutil.copy(place / "others.safetensors", tmp_path / "w.safetensors")
    manifest.write_text(text.replace(str(place / "weights.safetensors"), str(tmp_path / "w.safetensors")))
    assert "is not what the index was made with" in error("search", "x", "--index", videos)
    (tmp_path / "w.safetensors").unlink()
    assert "are not there" in error("search", "x", "--index", videos)
    assert main(["search", "--like", f"{videos}/two.mp4@1", "--index", str(videos)]) == 0  # which needs no weights
    (index.folder / "vectors-0000.f16").write_bytes(b"")
    with pytest.raises(BadIndex, match="lacks vectors"):
        Index.open(videos)
