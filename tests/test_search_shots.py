"""Clips that keep to their shot: cuts are found, and nothing that only looks like one."""

import contextlib
import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest
from test_search import place  # noqa: F401, a fixture

from evaat_fast.cli import main
from evaat_fast.data.decode import VideoError
from evaat_fast.data.transforms import CentreCrop
from evaat_fast.search import Index, by_shot, shots, windows
from evaat_fast.search.store import BadIndex

av = pytest.importorskip("av")

from evaat_fast.data.decode.pyav import AvReader  # noqa: E402, needs av

RATE = 15


def view(scene, x, y=0.0):
    """float [112, 128, 3]: a part of a landscape."""
    rng = np.random.default_rng(scene)
    coarse = rng.uniform(0, 255, (7, 20, 3)) * rng.uniform(0.3, 1, 3)
    wide = coarse.repeat(32, 0).repeat(32, 1)
    x, y = round(x), round(y)
    return wide[40 + y : 152 + y, 20 + x : 148 + x]


def film(path, pictures, rate=RATE, wobble=0.0):
    kind = {".mkv": "matroska", ".avi": "avi"}.get(path.suffix, "mp4")
    with av.open(str(path), "w", format=kind) as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 128, 112, "yuv420p"
        stream.options = {"crf": "20", "g": "250", "sc_threshold": "0", "preset": "veryfast"}
        if wobble:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000 * rate)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8)), format="rgb24")
            if wobble:
                frame.time_base, frame.pts = Fraction(1, 1000 * rate), round(1000 * (n + wobble * (n % 3)))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def still(n):
    return [view(0, 0)] * n


def slow_pan(n):
    return [view(1, 1.5 * i) for i in range(n)]


def fast_pan(n):
    return [view(2, 9 * i) for i in range(n)]


def shaken(n):
    rng = np.random.default_rng(9)
    return [view(3, *rng.uniform(-4, 4, 2)) for _ in range(n)]


def flash(n):
    """A camera's, that fades."""
    pan = slow_pan(n)
    return [p + 220 * 0.4 ** (i - n // 2) * (i >= n // 2) for i, p in enumerate(pan)]


def fade(n):
    a, b = view(4, 0), view(5, 0)
    return [a + (b - a) * np.clip((i - n / 4) / (n / 2), 0, 1) for i in range(n)]


SMALL = CentreCrop(16)


def found(path, seconds=2.0, stride=1.0, frames=4, size=50, skip=0):
    """(start, stop, clips uint8 [n, T, 16, 16, 3]), as a video goes by once."""
    some = list(by_shot.spans(str(path), seconds, stride, frames, SMALL, size, skip))
    assert [span.share == 1 for span in some] == [False] * (len(some) - 1) + [True]
    assert all(len(span.where) == size for span in some[:-1]) and len(some[-1].where) <= size
    return [np.concatenate(x) for x in zip(*((s.start, s.stop, s.frames[s.where]) for s in some), strict=True)]


def twice(path, seconds=2.0, stride=1.0, frames=4):
    """The same, and each frame's times, by all cuts first, and then the frames of clips."""
    fps, end = windows.facts(str(path))
    with contextlib.closing(AvReader(path)) as reader:
        cuts = shots.cuts(((shown.time, shown.picture) for shown in reader.frames(*shots.SIZE)), fps)
    some = [
        windows.of_shot(a, b, a + windows.sliding(b - a, seconds, stride), seconds, fps, end, frames)
        for a, b in shots.limits(cuts, end)
    ]
    start, stop, times = (np.concatenate([getattr(x, name) for x in some]) for name in ("start", "stop", "times"))
    decoded, where = windows.decode(str(path), times, SMALL)
    return start, stop, decoded[where], times


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_cuts_and_what_is_none(tmp_path):
    """Between all pairs of shots, and nowhere within one: a flash, a fade, a pan, a hand that shakes."""
    parts = [still(30), slow_pan(40), shaken(35), flash(40), fade(40), fast_pan(20), still(33)]
    path = film(tmp_path / "all.mp4", [picture for part in parts for picture in part])
    start, stop, _ = found(path)
    begins = np.cumsum([0, *map(len, parts)]) / RATE
    assert {*start.round(3)} >= {*begins[:-1].round(3)}
    for a, b in zip(start, stop, strict=True):
        assert np.searchsorted(begins, a + 1e-6) == np.searchsorted(begins, b - 1e-6)
    for n, part in enumerate((flash(40), fade(40), fast_pan(25), shaken(60), slow_pan(60))):
        alone, plain = found(path := film(tmp_path / f"{n}.mp4", part)), windows.windows(str(path), 2.0, 1.0, 4)
        decoded, where = windows.decode(str(path), plain.times, SMALL)
        assert same(alone, (plain.start, plain.stop, decoded[where])), n


def edited(path, rate=RATE, wobble=0.0):
    """Shots of all kinds and lengths; with `wobble` of variable frame rate."""
    parts = [slow_pan(50), still(3), shaken(11), fade(40), flash(40), still(7), fast_pan(25), slow_pan(9), shaken(33)]
    return film(path, [picture for part in parts for picture in part], rate, wobble)


@pytest.mark.parametrize("name, rate, wobble", [("a.mp4", 30, 0.0), ("b.mkv", 24, 0.0), ("c.mp4", 15, 0.3), ("d.avi", 15, 0.0)])
def test_once_is_as_good_as_twice(tmp_path, name, rate, wobble):
    """The same clips to the bit, in spans of any size, and from any clip on."""
    path = edited(tmp_path / name, rate, wobble)
    for how in ((2.0, 1.0, 4), (1.0, 0.1, 4), (4.0, 3.0, 8)):
        expected = twice(path, *how)[:3]
        assert len(expected[0]) > 6 and same(found(path, *how), expected), how
        skip = len(expected[0]) // 2
        assert same(found(path, *how, size=7, skip=skip), [x[skip:] for x in expected]), how


@pytest.mark.parametrize("large", [False, True])
def test_of_large_pictures_not_all_are_kept(tmp_path, monkeypatch, large):
    """Clips on the grid of their shot have the frames that they have else, and the last ones of shots some near those; what is
    kept is bounded, however long the video is."""
    path, most = edited(tmp_path / "a.mp4"), []
    size = 128 * 112 * 3 // 2
    start, stop, clips, times = twice(path, 1.0, 0.5)
    monkeypatch.setattr(by_shot, "_HELD", 9 * size)
    monkeypatch.setattr(by_shot, "_RECENT", size * shots.Detector(RATE).reach * (1 if large else 2) - 1)
    judged = by_shot._Shots._judged

    def counted(self, *given):
        most.append(sum(not isinstance(kept.frame, np.ndarray) for kept in self.kept))
        return judged(self, *given)

    monkeypatch.setattr(by_shot._Shots, "_judged", counted)
    start_now, stop_now, now = found(path, 1.0, 0.5)
    assert same((start_now, stop_now), (start, stop))
    exact = (now == clips).all((1, 2, 3, 4))
    assert exact.sum() > len(exact) / 3 and not exact.all()
    with contextlib.closing(AvReader(path, windows.cropped(SMALL))) as reader:
        every = [(shown.time, reader.take(shown)) for shown in reader.frames(*shots.SIZE)]
    for a, b, clip, expected, when in zip(start, stop, now, clips, times, strict=True):
        for frame, other, time in zip(clip, expected, when, strict=True):
            if not (frame == other).all():
                near = [t for t, one in every if a - 1e-6 <= t < b and (one == frame).all()]
                assert near and min(abs(t - time) for t in near) <= 1 / 9 + 1 / RATE, (a, b, time)
    assert max(most) <= (1 if large else 9 + shots.Detector(RATE).reach + 2)


@pytest.mark.parametrize("needed", [False, True])
def test_damage_is_found_where_frames_are_asked_for(tmp_path, needed):
    """A picture that nothing is made of may be damaged, as without cuts; a key frame not."""
    path = edited(tmp_path / "a.mp4")
    whole = found(path)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [p for p in file.demux(video=0) if p.size]
    times = {round(t, 3) for t in (np.floor(twice(path)[3] * RATE) / RATE).ravel().tolist()}  # of frames that clips have
    # In H.264 a picture that no other one refers to says so in the first byte of its data.
    alone = (
        p for p in packets if not p.is_keyframe and not bytes(p)[4] & 0x60 and round(float(p.pts * p.time_base), 3) not in times
    )
    for packet in [packets[0]] if needed else itertools.islice(alone, 5):
        data[packet.pos + 5 : packet.pos + packet.size] = random.Random(0).randbytes(packet.size - 5)
    path.write_bytes(data)
    if needed:
        with pytest.raises(VideoError):
            found(path)
        return
    with contextlib.closing(AvReader(path)) as reader:
        assert len(list(reader.frames(8, 8))) + len(reader.lost) == len(packets) and reader.lost
    start, stop, clips, _ = twice(path)
    assert same(found(path), (start, stop, clips))
    assert (clips[0] == whole[2][0]).all()


def test_frames_are_those_of_the_shot(tmp_path):
    """Also of a shot shorter than a clip, and where the rate is not the grid's."""
    black, white = np.zeros((112, 128, 3)), np.full((112, 128, 3), 255.0)
    for name, rate in (("a.mp4", 15), ("b.mkv", 24)):  # whose time stamps are milliseconds
        path = film(tmp_path / name, [*[black] * 29, *[white] * 11, *[black] * 37], rate)
        start, stop, clips = found(path)
        bounds = np.array([0, 29, 40, 77]) / rate
        bright = clips.mean((2, 3, 4)) > 127
        middle = (start + stop) / 2
        assert (bright == ((middle > bounds[1]) & (middle < bounds[2]))[:, None]).all()
        assert bright.any() and np.allclose(start[bright[:, 0]], bounds[1], atol=2e-3)


def test_quick_cuts():
    """From shot to shot each second and faster; the picture that comes back at once is a flash."""
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 255, (36, 64, 3)).astype(np.uint8) for _ in range(12)]

    def cuts(lengths, order):
        pictures = [scenes[n] for n, length in zip(order, lengths, strict=True) for _ in range(length)]
        return shots.cuts(((i / 30, picture) for i, picture in enumerate(pictures)), 30)

    lengths = [30, 15, 12, 14, 40, 13]
    assert np.allclose(cuts(lengths, range(6)), np.cumsum(lengths)[:-1] / 30)
    assert np.allclose(cuts([30, 8, 30], [0, 1, 2]), [1, 38 / 30])
    assert cuts([30, 8, 30], [0, 1, 0]) == [] and cuts([30], [0]) == [] and cuts([], []) == []
    assert np.allclose(cuts([1, 30, 1], [0, 1, 2]), [1 / 30, 31 / 30])


def test_nothing_comes_before_the_first_frame():
    """What moves from the first frame on does not seem to have stood still before: 51 is not twice what 15 and 30 are."""
    pictures = [np.full((36, 64, 3), value, np.uint8) for value in (0, 5, 22, 32)]
    assert shots.cuts(((i / 5, picture) for i, picture in enumerate(pictures)), 5) == []
    pictures[3][:] = 26
    assert shots.cuts(((i / 5, picture) for i, picture in enumerate(pictures)), 5) == [2 / 5]


def test_the_index_knows(place, tmp_path, capsys):  # noqa: F811
    """It is a setting: asked for, said, and kept by what is added later."""
    for name in ("a", "b"):
        film(tmp_path / f"{name}.mp4", [*still(25), *slow_pan(40)])
    (tmp_path / "later").mkdir()
    (tmp_path / "b.mp4").rename(tmp_path / "later" / "b.mp4")
    made = tmp_path / "index"
    command = ["index", str(tmp_path / "a.mp4"), "--out", str(made), "--device", "cpu"]
    assert main([*command, "--checkpoint", str(place / "weights.safetensors"), "--shots"]) == 0
    assert json.loads((made / "index.json").read_text())["settings"]["shots"] is True
    assert main(["index", str(tmp_path / "later"), "--out", str(made), "--device", "cpu"]) == 0
    opened = Index.open(made)
    for file in opened.files:
        rows = slice(file.first, file.last)
        assert not ((opened.places.start[rows] < 25 / RATE - 1e-6) & (opened.places.stop[rows] > 25 / RATE + 1e-6)).any()
    capsys.readouterr()
    plain = Index.create(tmp_path / "plain", place / "weights.safetensors", device="cpu")
    assert not plain.settings.shots and plain.add(tmp_path / "a.mp4").videos == 1
    assert main(["index", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "plain"), "--shots"]) == 2
    assert "--shots: the index has False, got True; index anew" in capsys.readouterr().err
    with pytest.raises(BadIndex, match="--shots"):
        opened.check(shots=False)
    with pytest.raises(ValueError, match="shots: expected True or False, got 3"):
        Index.create(tmp_path / "no", place / "weights.safetensors", shots=3)
