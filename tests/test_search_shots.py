"""Clips that keep to their shot: cuts are found, and nothing that only looks like one."""

import json

import numpy as np
import pytest
from test_search import place  # noqa: F401, a fixture

from evaat_fast.cli import main
from evaat_fast.search import Index, shots, windows
from evaat_fast.search.store import BadIndex

av = pytest.importorskip("av")
RATE = 15


def view(scene, x, y=0.0):
    """float [112, 128, 3]: a part of a landscape."""
    rng = np.random.default_rng(scene)
    coarse = rng.uniform(0, 255, (7, 20, 3)) * rng.uniform(0.3, 1, 3)
    wide = coarse.repeat(32, 0).repeat(32, 1)
    x, y = round(x), round(y)
    return wide[40 + y : 152 + y, 20 + x : 148 + x]


def film(path, pictures, rate=RATE):
    with av.open(str(path), "w", format="matroska" if path.suffix == ".mkv" else "mp4") as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 128, 112, "yuv420p"
        stream.options = {"crf": "20", "g": "250", "sc_threshold": "0", "preset": "veryfast"}
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8)), format="rgb24")
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


def found(path):
    return windows.windows(str(path), 2.0, 1.0, 4, by_shot=True)


def test_cuts_and_what_is_none(tmp_path):
    """Between all pairs of shots, and nowhere within one: a flash, a fade, a pan, a hand that shakes."""
    parts = [still(30), slow_pan(40), shaken(35), flash(40), fade(40), fast_pan(20), still(33)]
    path = film(tmp_path / "all.mp4", [picture for part in parts for picture in part])
    some = found(path)
    begins = np.cumsum([0, *map(len, parts)]) / RATE
    assert {*some.start.round(3)} >= {*begins[:-1].round(3)}
    for a, b in zip(some.start, some.stop, strict=True):
        assert np.searchsorted(begins, a + 1e-6) == np.searchsorted(begins, b - 1e-6)
    for n, part in enumerate((flash(40), fade(40), fast_pan(25), shaken(60), slow_pan(60))):
        alone, plain = found(path := film(tmp_path / f"{n}.mp4", part)), windows.windows(str(path), 2.0, 1.0, 4)
        assert all(np.array_equal(getattr(alone, x), getattr(plain, x)) for x in ("start", "stop", "times")), n


def test_frames_are_those_of_the_shot(tmp_path):
    """Also of a shot shorter than a clip, and where the rate is not the grid's."""
    black, white = np.zeros((112, 128, 3)), np.full((112, 128, 3), 255.0)
    for name, rate in (("a.mp4", 15), ("b.mkv", 24)):  # whose time stamps are milliseconds
        path = film(tmp_path / name, [*[black] * 29, *[white] * 11, *[black] * 37], rate)
        some = found(path)
        bounds = np.array([0, 29, 40, 77]) / rate
        frames, where = windows.decode(str(path), some.times, lambda x: x[:, :4, :4])
        bright = frames[where].mean((2, 3, 4)) > 127
        middle = (some.start + some.stop) / 2
        assert (bright == ((middle > bounds[1]) & (middle < bounds[2]))[:, None]).all()
        assert bright.any() and np.allclose(some.start[bright[:, 0]], bounds[1], atol=2e-3)


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
