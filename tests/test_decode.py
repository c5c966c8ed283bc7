"""Which frames come back from files with quirks, whoever decodes them, and what is refused."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest

from evaat_fast.data import decode, video
from evaat_fast.data.decode.header import rational

av = pytest.importorskip("av")
from films import film, numbers, shorten_edit, shown  # noqa: E402

NAMES = [name for name in decode.ORDER if decode.why_not(name) is None]
DECODERS = pytest.mark.parametrize("decoder", NAMES)
EVEN = [n / 30 for n in range(100)]
DROPS = [n / 30 for n in range(50)] + [50 / 30 + n / 10 for n in range(50)]  # a phone in the dark: 30 a second, then 10
JITTER = [round(3000 * n + random.Random(n).uniform(-1000, 1000) * (n > 0)) / 90_000 for n in range(100)]
OPEN = {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}
PYRAMID = {"x264-params": "open-gop=1:keyint=24:min-keyint=24:bframes=5:b-pyramid=normal:b-adapt=0:scenecut=0:ref=4"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
# name: (suffix, times, how it is made, seconds from the first stored frame to time 0)
FILMS = {
    "even": (".mp4", EVEN, {}, 0),
    "long groups": (".mp4", EVEN, {"options": {"g": "250"}}, 0),
    "no B-frames": (".mp4", EVEN, {"options": {"bf": "0", "g": "15"}}, 0),
    "rate drops": (".mp4", DROPS, {}, 0),
    "jitter": (".mp4", JITTER, {}, 0),
    "jitter in mkv": (".mkv", [round(t, 3) for t in JITTER], {}, 0),
    "edit list": (".mp4", EVEN, {"shift": -21 / 30}, 21 / 30),
    "edit list in a group": (".mp4", EVEN, {"shift": -5 / 30, "options": {"g": "250"}}, 5 / 30),
    "edit list, open groups": (".mp4", EVEN, {"shift": -40 / 30, "options": PYRAMID}, 40 / 30),
    "late": (".mp4", EVEN, {"shift": 1.3}, 0),
    "late beside sound": (".mp4", EVEN, {"shift": 0.5, "sound": True}, -0.5),
    "fragmented": (".mp4", EVEN, {"container": FRAGMENTS}, 0),
    "mkv": (".mkv", [round(t, 3) for t in EVEN], {}, 0),
    "mkv without an end": (".mkv", [round(t, 3) for t in EVEN], {"container": {"live": "1"}}, 0),
    "open groups": (".mp4", EVEN, {"options": OPEN}, 0),
    "open groups, pyramid": (".mov", EVEN, {"options": PYRAMID}, 0),
    "vp8": (".webm", [round(t, 3) for t in EVEN], {"codec": "libvpx", "options": {"b": "2M", "auto-alt-ref": "1"}}, 0),
    "vp9": (".webm", [round(t, 3) for t in EVEN], {"codec": "libvpx-vp9", "options": {"b": "2M", "deadline": "realtime"}}, 0),
    "hevc": (".mp4", EVEN, {"codec": "libx265", "options": {"x265-params": "log-level=none:crf=10:keyint=24"}}, 0),
    "avi": (".avi", EVEN, {"codec": "mpeg4", "options": {"bf": "2", "g": "12", "b": "2M"}}, 0),
}
# What a decoder would get wrong it refuses.
REFUSED = {
    "av": set(),
    "torchcodec": {"avi", "hevc", "open groups", "open groups, pyramid", "edit list, open groups"},
    "decord": {"avi", "vp8", "hevc", "mkv without an end", *(n for n in FILMS if n.startswith(("edit list", "open groups")))},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a film of FILMS once."""
    folder, done = tmp_path_factory.mktemp("films"), {}

    def make(name):
        if name not in done:
            suffix, times, how, _ = FILMS[name]
            done[name] = film(folder / f"{name}{suffix}", times, **how)
        return done[name]

    return make


def asked(times, begin):
    """Times in a film, in no order: each frame's own, between two, and just before and after a change of frames."""
    some = random.Random(0).sample(range(1, len(times)), 12)
    at = [times[n] + by for n in some for by in (0.0, 0.0004, 0.011, -0.0006)]
    return [0.0, *(t - begin for t in at if t - begin >= 0)]


@DECODERS
@pytest.mark.parametrize("name", FILMS)
def test_the_frame_on_screen(made, name, decoder):
    path, (_, times, _, begin) = made(name), FILMS[name]
    when = asked(times, begin)
    if name in REFUSED[decoder]:
        with pytest.raises(video.VideoError, match=f"{path.name}: .*(decoder 'av'|Failed to measure)"):
            with decode.open_video(path, decoder) as reader:
                reader.read(when)
        return
    expected = shown([t - begin for t in times], when)
    with decode.open_video(path, decoder) as reader:
        assert numbers(reader.read(when)) == expected
        assert numbers(reader.read(when[::-7])) == expected[::-7]  # again, and backwards
    for moment, number in list(zip(when, expected, strict=True))[:4]:
        with decode.open_video(path, decoder) as reader:
            assert numbers(reader.read([moment])) == [number]


@DECODERS
@pytest.mark.parametrize("name", FILMS)
def test_the_end(made, name, decoder):
    if name in REFUSED[decoder]:
        return
    path, (_, times, _, begin) = made(name), FILMS[name]
    with decode.open_video(path, decoder) as reader:
        last = times[-1] - begin
        assert last < reader.end <= last + 0.15
        assert numbers(reader.read([reader.end - 0.001])) == [99]
        with pytest.raises(video.VideoError, match="no frame at"):
            reader.read([0.0, reader.end + 1])


def test_decoders_agree_on_pixels(made):
    for name in ("even", "jitter", "open groups, pyramid", "vp9", "hevc"):
        clips = []
        for decoder in (d for d in NAMES if name not in REFUSED[d]):
            with decode.open_video(made(name), decoder) as reader:
                clips.append(reader.read([0.4, 1.1, 1.9, 2.7]).astype(int))
        assert all(np.abs(clip - clips[0]).mean() <= 1 for clip in clips)


@DECODERS
@pytest.mark.parametrize("options", [{}, {"g": "250"}, PYRAMID], ids=["short", "long", "open"])
def test_what_is_left_out_changes_no_pixel(tmp_path, options, decoder):
    """Frames read alone are those of reading all."""
    path = film(tmp_path / "v.mp4", EVEN, options=options)
    if decoder != "av" and options is PYRAMID:
        with pytest.raises(video.VideoError, match=f"{decoder} takes others for the frames of open groups"):
            video.read_clip(path, 0, 1, 2, decoder=decoder)
        return
    with decode.open_video(path, decoder) as reader:
        every = reader.read([t + 0.01 for t in EVEN])
    for n in (0, 1, 23, 24, 25, 26, 61, 98, 99):
        with decode.open_video(path, decoder) as reader:
            assert (reader.read([EVEN[n] + 0.01])[0] == every[n]).all()


@DECODERS
@pytest.mark.parametrize("turn", [90, 180, 270])
def test_frames_come_as_displayed(tmp_path, turn, decoder):
    path = film(tmp_path / "v.mp4", EVEN[:20], turn=turn)
    clip = video.read_clip(path, 0, 0.6, 4, decoder=decoder).numpy()
    assert clip.shape == ((4, 112, 128, 3) if turn == 180 else (4, 128, 112, 3))
    assert numbers(np.rot90(clip, -turn // 90, (1, 2))) == [2, 6, 11, 15]
    info = video.probe(path)
    assert (info.height, info.width) == clip.shape[1:3] and info.rotation == turn


@DECODERS
def test_a_mirrored_picture(tmp_path, decoder):
    path = film(tmp_path / "v.mp4", EVEN[:20], mirror=True)
    if decoder != "av":
        with pytest.raises(video.VideoError, match="a mirrored picture; use the decoder 'av'"):
            video.read_clip(path, 0, 0.6, 4, decoder=decoder)
        return
    assert numbers(video.read_clip(path, 0, 0.6, 4, decoder=decoder).numpy()[:, :, ::-1]) == [2, 6, 11, 15]


@DECODERS
def test_an_edit_list_that_cuts_the_end(tmp_path, decoder):
    path = film(tmp_path / "v.mp4", EVEN)
    shorten_edit(path, 1.0)
    if decoder == "decord":
        with pytest.raises(video.VideoError, match="decord returns frames that its edit list hides"):
            video.read_clip(path, 0, 1, 4, decoder=decoder)
        return
    assert numbers(video.read_clip(path, 0.5, 3.0, 3, decoder=decoder).numpy())[1:] == [29, 29]
    with pytest.raises(video.OutsideError, match="begins after the end of its video"):
        video.read_clip(path, 1.2, 2.0, 3, decoder=decoder)


@DECODERS
@pytest.mark.parametrize("name", ["even", "mkv", "fragmented"])
def test_a_file_that_was_cut_short(tmp_path, made, name, decoder):
    """What it still has is read; nothing takes the place of the rest."""
    path = tmp_path / f"short{made(name).suffix}"
    if name == "even":  # the index first, as files for the web have it
        film(path, EVEN, container={"movflags": "faststart"}, options={"b": "300k"})
    else:
        path.write_bytes(made(name).read_bytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(video.VideoError, match=f"{path.name}: "):
        video.read_clip(path, 2.5, 3.2, 4, decoder=decoder)
    with pytest.raises(video.VideoError, match=f"{path.name}: "):
        video.read_clip(path, 0.2, 3.2, 4, decoder=decoder)
    try:
        assert numbers(video.read_clip(path, 0.2, 0.6, 4, decoder=decoder).numpy()) == [7, 10, 13, 16]
    except video.VideoError:
        assert decoder != "av"


def test_an_even_film_cut_short_is_known_by_its_header(tmp_path):
    path = film(tmp_path / "v.mp4", EVEN, container={"movflags": "faststart"})
    assert video.probe(path).missing_bytes == 0
    path.write_bytes(path.read_bytes()[:-500])
    assert video.probe(path).missing_bytes == 500


def test_probe(made, tmp_path):
    info = video.probe(made("rate drops"))
    assert (info.width, info.height, info.rotation, info.codec, info.frames) == (128, 112, 0, "h264", 100)
    assert info.fps == pytest.approx(100 / 6.5, rel=0.02) and info.duration == pytest.approx(6.5, abs=0.15)
    assert video.probe(made("mkv without an end")).duration is None
    began = time.perf_counter()
    for _ in range(10):
        video.probe(made("even"))
    assert time.perf_counter() - began < 1
    (tmp_path / "song.mp4").write_bytes(b"no video at all")
    with pytest.raises(video.VideoError, match="song.mp4: "):
        video.probe(tmp_path / "song.mp4")


def test_names_that_ffmpeg_would_take_for_protocols(tmp_path):
    path = film(tmp_path / "concat:a|b.mp4", EVEN[:20])
    assert numbers(video.read_clip(path, 0, 0.6, 2).numpy()) == [4, 13]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_tags_that_are_not_utf8(tmp_path, suffix):
    """Of which a Matroska's duration is one."""
    path = film(tmp_path / f"v{suffix}", [round(t, 3) for t in EVEN], tags={"title": "A la cafeteria"})
    content = path.read_bytes()
    spoilt = content.replace(b"A la cafeteria", b"A la caf\xe9teria").replace(b"00:00:03.3", b"00:00:03.\xe9")
    assert len(spoilt) == len(content) and spoilt.count(b"\xe9") > content.count(b"\xe9") + (suffix == ".mkv")
    path.write_bytes(spoilt)
    info = video.probe(path)
    assert info.duration == pytest.approx(100 / 30, abs=0.01)
    json.dumps(asdict(info), default=str, ensure_ascii=False).encode()
    assert numbers(video.read_clip(path, 0, 0.6, 2).numpy()) == [4, 13]


def test_pyavs_rationals_of_every_version():
    kinds = [Fraction, *([av.AVRational] if hasattr(av, "AVRational") else [])]
    for kind in kinds:
        found = rational(kind(30_000, 1001))
        assert type(found) is Fraction and found == Fraction(30_000, 1001) and rational(kind(0, 1)) is None
    assert rational(None) is None and (kinds[-1] is Fraction or rational(kinds[-1](1, 0)) is None)


def test_auto_is_the_first_that_can_be_imported(made, monkeypatch):
    assert decode.chosen() == "av"
    assert decode.reader_of("auto") is decode.reader_of("av")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"no decoder can be imported \(av: .*pip install evaat-fast\[video\]"):
        video.read_clip(made("even"), 0, 1, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
@DECODERS
def test_workers_read_the_same_pixels(made, decoder):
    from torch.utils.data import DataLoader

    clips = [(0.1 * n, 0.1 * n + 0.8) for n in range(8)]

    class Clips:
        def __len__(self):
            return len(clips)

        def __getitem__(self, n):
            return video.read_clip(made("jitter"), *clips[n], 4, decoder=decoder)

    made("jitter")
    here = [Clips()[n] for n in range(8)]
    there = [batch[0] for batch in DataLoader(Clips(), batch_size=1, num_workers=2)]
    assert all((a == b).all() for a, b in zip(here, there, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process")
@DECODERS
@pytest.mark.sample(1)
def test_memory_stays_flat(made, decoder):
    """In a process of its own: 20 KB a clip would show."""
    code = f"""
import resource, sys
from evaat_fast.data import video
def read(n):
    for i in range(n):
        video.read_clip({str(made("even"))!r}, 0.02 * (i % 50), 0.02 * (i % 50) + 1, 4, decoder={decoder!r})
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
first = read(100)
print(read(400) - first)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 8, f"{grown:.1f} MiB in 400 clips"


@DECODERS
def test_a_damaged_first_key_frame_is_not_passed_over(tmp_path, decoder):
    """Its packet is then no key frame to anyone, and the first that is one would stand for all before it."""
    path = film(tmp_path / "film.mp4", EVEN, options={"g": "30", "keyint_min": "30", "sc_threshold": "0"})
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 1000] = np.random.default_rng(0).bytes(1000)
    path.write_bytes(content)
    with pytest.raises(video.VideoError):
        video.read_clip(path, 0, 1, 1, decoder=decoder)
    if decoder == "av":  # which needs no more of a file than a clip's own frames
        assert numbers(video.read_clip(path, 2, 3, 1).numpy()) == [75]
