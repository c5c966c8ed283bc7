"""Re-encoding to chunks: the same frames at the same times, whatever was interrupted."""

import random
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from corpus import corpus

from evaat_fast.cli import main
from evaat_fast.data import chunks, layout, video

av = pytest.importorskip("av")
from films import film, numbers, shown  # noqa: E402

EVEN = [n / 30 for n in range(130)]
JITTER = [round(3000 * n + random.Random(n).uniform(-1000, 1000) * (n > 0)) / 90_000 for n in range(130)]
SMALL = chunks.Settings(seconds=2, short_side=112, crf=10)


@pytest.mark.parametrize(
    "times, how, begin",
    [
        (EVEN, {}, 0),
        (EVEN, {"options": {"g": "250"}, "shift": -0.7}, 0.7),
        (JITTER, {}, 0),
        ([n / 29.97 for n in range(130)], {"rate": 30}, 0),
    ],
    ids=["even", "edit list", "jitter", "ntsc"],
)
def test_chunks_show_what_the_video_shows(tmp_path, times, how, begin):
    film(tmp_path / "in" / "P01" / "videos" / "v.MP4", times, **how)
    videos = chunks.discover(tmp_path / "in")
    assert list(videos) == ["P01/v"]
    assert chunks.write(videos, tmp_path / "out", SMALL, workers=1) == {}
    source = layout.find(tmp_path / "out", videos)["P01/v"]
    assert (source.layout, source.starts) == ("chunks", (0.0, 2.0, 4.0) if not begin else (0.0, 2.0))
    assert video.probe(source.files[0]).fps == pytest.approx(video.probe(videos["P01/v"].files[0]).fps, abs=0.1)
    frames = (np.arange(1, 105, 7) + 0.5) / 30
    clip = [video.read_clip(source, t - 0.5 / 30, t, 1).numpy()[0] for t in frames]
    assert np.abs(np.array(numbers(clip)) - shown([t - begin for t in times], frames)).max() <= (0 if times is EVEN else 1)


def test_a_rate_that_does_not_divide_its_seconds_moves_nothing(tmp_path):
    rate = Fraction(62, 5)  # the seconds 2, 4, 6 and 8 are frames 24.8, 49.6, 74.4 and 99.2
    film(tmp_path / "in" / "v.mp4", [float(n / rate) for n in range(124)], rate=rate)
    videos = chunks.discover(tmp_path / "in")
    assert chunks.write(videos, tmp_path / "out", SMALL, workers=1) == {}
    source = layout.find(tmp_path / "out", videos)["v"]
    for first in (0, 20, 70, 73, 74, 75, 96, 99, 100):
        span = [float(n / rate) for n in (first, first + 24)]
        both = [numbers(video.read_clip(files, *span, 24).numpy()) for files in (videos["v"], source)]
        assert both[0] == both[1] == list(range(first, first + 24))
    # Frame 74 begins before second 6 and is mostly after it: whoever asks for its middle looks into the chunk of second 6.
    (tmp_path / "out" / "v.mp4").rename(tmp_path / "out" / "v.mp4.part")
    (tmp_path / "out" / "v.mp4.part" / "6.mp4").rename(tmp_path / "6.mp4")
    chunks.write(videos, tmp_path / "out", SMALL, workers=1)
    assert (tmp_path / "out" / "v.mp4" / "6.mp4").read_bytes() == (tmp_path / "6.mp4").read_bytes()


def test_they_are_small_upright_and_decode_fast(tmp_path):
    film(tmp_path / "in" / "v.mp4", EVEN, turn=90, size=(256, 128))
    chunks.write(chunks.discover(tmp_path / "in"), tmp_path / "out", chunks.Settings(seconds=3, short_side=112), workers=1)
    path = tmp_path / "out" / "v.mp4" / "0.mp4"
    info = video.probe(path)
    assert (info.width, info.height, info.rotation) == (112, 224, 0)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert [n for n, p in enumerate(packets) if p.is_keyframe] == list(range(0, 90, 15))
    assert all(p.pts == p.dts for p in packets)


@pytest.mark.parametrize("options", [{}, {"x264-params": "open-gop=1:keyint=12:bframes=3"}], ids=["closed", "open"])
def test_work_goes_on_where_it_was(tmp_path, options):
    film(tmp_path / "in" / "v.mp4", EVEN, options=options)
    videos = chunks.discover(tmp_path / "in")
    chunks.write(videos, tmp_path / "whole", SMALL, workers=1)
    chunks.write(videos, tmp_path / "out", SMALL, workers=1)
    (tmp_path / "out" / "v.mp4").rename(tmp_path / "out" / "v.mp4.part")
    for name in ("2.mp4", "4.mp4"):
        (tmp_path / "out" / "v.mp4.part" / name).unlink()
    (tmp_path / "out" / "v.mp4.part" / "2.part").write_bytes(b"half of it")
    kept = (tmp_path / "out" / "v.mp4.part" / "0.mp4").stat().st_mtime_ns
    chunks.write(videos, tmp_path / "out", SMALL, workers=1)
    folder = tmp_path / "out" / "v.mp4"
    assert sorted(p.name for p in folder.iterdir()) == ["0.mp4", "2.mp4", "4.mp4"]
    assert (folder / "0.mp4").stat().st_mtime_ns == kept
    for name in ("2.mp4", "4.mp4"):
        one, two = (video.read_clip(f / "v.mp4" / name, 0, 0.3, 4) for f in (tmp_path / "whole", tmp_path / "out"))
        assert (one == two).all()
    assert chunks.write(videos, tmp_path / "out", SMALL, workers=1) == {}


def test_several_runs_into_one_folder(tmp_path):
    for name in "abc":
        film(tmp_path / "in" / f"{name}.mp4", EVEN)
    videos = chunks.discover(tmp_path / "in")
    chunks.write(videos, tmp_path / "whole", SMALL, workers=1)
    with ProcessPoolExecutor(3) as pool:
        runs = [pool.submit(chunks.write, videos, tmp_path / "out", SMALL, workers=1) for _ in range(3)]
        assert [run.result() for run in runs] == [{}] * 3
    found = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "whole", tmp_path / "out")
    ]
    assert found[0] == found[1]


def test_workers_end_with_a_run_that_was_killed(tmp_path):
    for name in "abcd":
        film(tmp_path / "in" / f"{name}.mp4", EVEN)
    code = f"""
from evaat_fast.data import chunks
chunks.write(chunks.discover({str(tmp_path / "in")!r}), {str(tmp_path / "out")!r}, chunks.Settings(seconds=2), workers=2)
"""
    # All of them hold its output open, which ends with the last.
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any((tmp_path / "out").glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    assert run.communicate(timeout=20) == (b"", None)
    videos = chunks.discover(tmp_path / "in")
    assert chunks.write(videos, tmp_path / "out", chunks.Settings(seconds=2), workers=1) == {}


def test_what_cannot_be_read_is_told(tmp_path):
    film(tmp_path / "in" / "a.mp4", EVEN)
    (tmp_path / "in" / "b.mp4").write_bytes(b"no video")
    short = film(tmp_path / "in" / "c.mp4", EVEN, container={"movflags": "faststart"})
    short.write_bytes(short.read_bytes()[:-3000])
    seen = []
    videos = chunks.discover(tmp_path / "in")
    failed = chunks.write(videos, tmp_path / "out", SMALL, workers=2, progress=lambda *args: seen.append(args))
    assert sorted(failed) == ["b", "c"] and "b.mp4: " in failed["b"] and "c.mp4: " in failed["c"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.mp4", "chunks.json"]
    with pytest.raises(ValueError, match="chunks of other settings are there: .*112"):
        chunks.write(videos, tmp_path / "out", chunks.Settings(seconds=2))
    assert sorted(name for name, _, _ in seen) == ["a", "b", "c"] and [done for _, done, _ in seen] == [1, 2, 3]


def test_the_cost_is_told_first(tmp_path):
    for name in "abc":
        film(tmp_path / "in" / f"{name}.mp4", EVEN)
    videos, settings = chunks.discover(tmp_path / "in"), chunks.Settings(seconds=2)
    cost = chunks.estimate(videos, tmp_path / "out", settings, workers=2)
    assert not (tmp_path / "out").exists()
    assert "3 videos, 0.2 minutes: about 1 minutes and" in str(cost)
    assert chunks.write(videos, tmp_path / "out", settings, workers=2) == {}
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.mp4") if p.is_file())
    assert cost.bytes == pytest.approx(written, rel=0.2)
    assert chunks.estimate(videos, tmp_path / "out").videos == 0


@pytest.mark.parametrize("name, value", [("seconds", 0), ("short_side", 8.5), ("crf", -1), ("gop", True)])
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an int from"):
        chunks.Settings(**{name: value})


def test_a_name_twice_is_an_error(tmp_path):
    for place in ("P01/v.mp4", "P01/videos/v.mp4"):
        film(tmp_path / place, EVEN[:5])
    with pytest.raises(ValueError, match="two files of 'P01/v'"):
        chunks.discover(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no video in"):
        chunks.discover(tmp_path / "empty")


@pytest.mark.parametrize("words", [["--chunk-seconds", "0"], ["--workers", "0"], ["--workers", "-1"], ["--crf", "-1"], []])
def test_a_mistake_on_the_command_line_is_one_line(words, tmp_path, capsys):
    made = corpus()
    for name in ("P01_00", "P02_00"):
        film(tmp_path / "in" / f"{name}.mp4", EVEN[:5])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chunks.json").write_text("{}" if not words else "")
    words = ["--videos", str(tmp_path / "in"), "--out", str(tmp_path), "--chunk", str(tmp_path / "out"), *words]
    assert main(["prepare", "ek100-mir", str(made.annotations), *words]) == 2
    assert re.search("expected an int from|chunks of other settings", capsys.readouterr().err)
