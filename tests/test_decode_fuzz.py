"""Damaged bytes: an error that names the file, or a clip; no crash, no hang, no other exception.

Each block of mutations runs in a process of its own, since a decoder may take the interpreter with it.
"""

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from evaat_fast.data import decode
from evaat_fast.data.decode import sums

av = pytest.importorskip("av")

NAMES = [name for name in decode.ORDER if decode.why_not(name) is None]
FORMATS = {
    "mp4": ("mp4", {}),
    "faststart.mp4": ("mp4", {"movflags": "faststart"}),
    "fragments.mp4": ("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "mkv": ("matroska", {}),
}
KINDS = ("cut", "bytes", "burst", "hole", "head")
BLOCK = 25


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A moving texture in each container, which fills its frames with bits."""
    folder = tmp_path_factory.mktemp("texture")
    big = np.random.default_rng(0).integers(0, 255, (30, 35, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    for name, (container, options) in FORMATS.items():
        with av.open(str(folder / f"v.{name}"), "w", format=container, options=options) as out:
            stream = out.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 128, 112, "yuv420p"
            stream.options = {"crf": "28", "g": "15"}
            stream.codec_context.thread_count = 1
            for n in range(100):
                view = np.ascontiguousarray(big[2 * n : 2 * n + 112, 3 * n : 3 * n + 128])
                out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
            out.mux(stream.encode(None))
    return folder


def mutated(data, seed):
    """(kind of damage, the bytes)."""
    rng, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    data = bytearray(data)
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "bytes":
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "burst":
        at, size = rng.randrange(len(data)), rng.randrange(1, 200)
        data[at : at + size] = rng.randbytes(size)
    elif kind == "hole":
        at = rng.randrange(len(data))
        del data[at : at + rng.randrange(1, 300)]
    else:
        at = max(data.find(b"moov"), 0)
        for _ in range(rng.randrange(1, 8)):
            data[min(len(data) - 1, at + rng.randrange(1500))] = rng.randrange(256)
    return kind, bytes(data)


CHILD = textwrap.dedent(
    """
    import json, sys
    from evaat_fast.data import decode, video
    decoder, films = sys.argv[1], json.load(sys.stdin)
    sums = decode.Sums(*sys.argv[2:]) if sys.argv[2:] else None
    clips = [(0.5, 2.0), (2.0, 3.2)]
    for truth, paths in films.items():
        whole = [video.read_clip(truth, *clip, 4, decoder=decoder) for clip in clips]
        for path in paths:
            for clip, expected in zip(clips, whole):
                try:
                    frames = video.read_clip(path, *clip, 4, decoder=decoder, sums=sums)
                    found = "same" if frames.shape == expected.shape and (frames == expected).all() else "other"
                    assert frames.ndim == 4 and len(frames) == 4 and str(frames.dtype) == "torch.uint8"
                except video.VideoError as error:
                    assert path in str(error) and "\\n" not in str(error), str(error)
                    found = "error"
                print(json.dumps([path, found]), flush=True)
            try:
                video.probe(path, sums)
            except video.VideoError:
                pass
    """
)


def outcomes(films, tmp_path, decoder, seeds_of, with_sums=False):
    """[(file, kind, outcome)], two for each seed of each film: seeds_of is {name: seeds}. with_sums: the films' checksums are
    made before they are damaged."""
    kinds, tried = {}, {}
    for name, seeds in seeds_of.items():
        truth = films / f"v.{name}"
        for seed in seeds:
            path = tmp_path / f"{name}-{seed}{truth.suffix}"
            path.write_bytes(truth.read_bytes())
            tried.setdefault(str(truth), []).append(str(path))
    if with_sums:
        sums.write(tmp_path / "sums", tmp_path, [Path(path) for paths in tried.values() for path in paths])
    for truth, paths in tried.items():
        for path in paths:
            kinds[path], data = mutated(Path(truth).read_bytes(), int(Path(path).stem.rsplit("-", 1)[1]))
            Path(path).write_bytes(data)
    # A hang is a failure: these files take milliseconds.
    command = [sys.executable, "-c", CHILD, decoder, *([tmp_path / "sums", tmp_path] if with_sums else [])]
    run = subprocess.run(command, input=json.dumps(tried), capture_output=True, text=True, timeout=200)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{decoder}, after {lines[-1:]}: exit {run.returncode}: {run.stderr[-600:]}"
    assert len(lines) == 2 * len(kinds)
    return [(Path(path).name, kinds[path], found) for path, found in lines]


@pytest.mark.parametrize("decoder", NAMES)
@pytest.mark.parametrize("block", range(10))
@pytest.mark.sample(2)
def test_damaged_bytes(films, tmp_path, block, decoder):
    """1,000 mutations a decoder in all."""
    seeds_of = {name: range(1000 * i + BLOCK * block, 1000 * i + BLOCK * (block + 1)) for i, name in enumerate(FORMATS)}
    for name, kind, found in outcomes(films, tmp_path, decoder, seeds_of):
        if decoder == "av" and kind == "cut":
            assert found != "other", f"{name}: a file that was cut short gives other frames"


@pytest.mark.parametrize("decoder", NAMES)
@pytest.mark.parametrize("block", range(10))
@pytest.mark.sample(2)
def test_no_damage_passes_checksums(films, tmp_path, block, decoder):
    """As many mutations, none of which gives other frames: of those that hit nothing that a clip needs, its own."""
    seeds_of = {name: range(1000 * i + BLOCK * block, 1000 * i + BLOCK * (block + 1)) for i, name in enumerate(FORMATS)}
    found = outcomes(films, tmp_path, decoder, seeds_of, with_sums=True)
    assert {outcome for *_, outcome in found} <= {"error", "same"}, [name for name, _, outcome in found if outcome == "other"]
    assert any(outcome == "error" for *_, outcome in found)


@pytest.mark.slow
def test_most_damage_to_pictures_is_seen(films, tmp_path):
    """H.264 has no checksum: what decodes is believed. Most does not."""
    found = [o for _, kind, o in outcomes(films, tmp_path, "av", {"faststart.mp4": range(200)}) if kind in ("burst", "hole")]
    assert found.count("error") > 2 * found.count("other"), {o: found.count(o) for o in set(found)}


def test_files_that_are_no_videos(films, tmp_path):
    from evaat_fast.data import video

    for name, data in {
        "empty": b"",
        "text": b"no video",
        "zeros": bytes(5000),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    }.items():
        path = Path(tmp_path / f"{name}.mp4")
        path.write_bytes(data)
        for decoder in NAMES:
            with pytest.raises(video.VideoError, match=f"{name}.mp4: "):
                video.read_clip(path, 0, 1, 2, decoder=decoder)
