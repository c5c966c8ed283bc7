"""Sampling and decoding: which frames, from which files, the same from both decoders."""

import shutil
import sys

import numpy as np
import pytest
import torch

from evaat_fast.data import decode, video

av = pytest.importorskip("av")

NAMES = [name for name in decode.ORDER if decode.why_not(name) is None]
DECODERS = pytest.mark.parametrize("decoder", NAMES)


def write(path, numbers, fps=30, size=128):
    """An H.264 file whose frames show their number in binary, as black and white stripes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.options = {"crf": "10", "g": "12"}  # with B-frames: order must come from time stamps
        for n in numbers:
            bits = (n >> np.arange(8) & 1) * 255
            frame = np.broadcast_to(bits.repeat(size // 8).astype(np.uint8)[None, :, None], (size, size, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def numbers(clip):
    """The frames' numbers, read off their stripes."""
    stripes = clip.double().mean((1, 3)).unflatten(1, (8, -1)).mean(2) > 127
    return (stripes * 2 ** torch.arange(8)).sum(1).tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "v.MP4"
    write(path, range(100))
    return path


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """100 frames at 30 a second in chunks of one second; the chunk of second 1 lacks its last frame, number 59."""
    folder = tmp_path_factory.mktemp("chunked") / "v.MP4"
    for second, (first, stop) in enumerate([(0, 30), (30, 59), (60, 90), (90, 100)]):
        write(folder / f"{second}.MP4", range(first, stop))
    (folder / "notes.txt").write_text("not a chunk")
    return folder


@pytest.mark.parametrize(
    "sampler, expected",
    [("avion", [2, 7, 12, 17]), ("lavila", [2, 7, 12, 16])],
)
def test_midpoints(sampler, expected):
    assert video.frame_ids(0, 20, 4, sampler) == expected


def test_avion_midpoints_are_those_of_linspace():
    for start, stop, count in [(0, 16, 4), (7, 100, 16), (3.5, 60.25, 5)]:
        edges = np.linspace(start, stop, count + 1)
        assert video.frame_ids(start, stop, count) == ((edges[1:] + edges[:-1]) / 2).astype(int).tolist()


@pytest.mark.parametrize("sampler", video.SAMPLERS)
@pytest.mark.parametrize("start, stop, count", [(0, 100, 8), (10, 14, 8), (5, 5, 3), (0, 1, 1), (0, 450, 16)])
def test_jitter_stays_in_its_segment(sampler, start, stop, count):
    draws = np.array([video.frame_ids(start, stop, count, sampler, jitter=True) for _ in range(200)])
    assert (np.diff(draws, axis=1) >= 0).all()
    assert draws.min() >= start and draws.max() <= max(stop - 1, start)
    middle = np.array(video.frame_ids(start, stop, count, sampler))
    assert np.abs(draws - middle).max() <= (stop - start) / count / 2 + 1.5
    if stop - start > 10 * count:
        assert (draws.std(0) > 0).all()


@pytest.mark.parametrize("sampler", video.SAMPLERS)
def test_the_generator_decides_the_jitter(sampler):
    def draw(seed):
        return video.frame_ids(0, 300, 8, sampler, jitter=True, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 10, 4, "uniform"), "sampler: expected one of avion, lavila, got 'uniform'"),
        ((0, 10, 0), "num_frames: expected a positive int, got 0"),
        ((0, 10, 2.0), "num_frames: expected a positive int"),
        ((10, 5, 2), "stop: expected a frame not before start=10, got 5"),
        ((0, float("nan"), 2), "stop: expected a frame"),
    ],
)
def test_bad_samples(arguments, message):
    with pytest.raises(ValueError, match=message):
        video.frame_ids(*arguments)


@DECODERS
def test_whole_file(whole, decoder):
    clip = video.read_clip(whole, 1.0, 2.0, 5, decoder=decoder)
    assert clip.dtype == torch.uint8 and clip.shape == (5, 128, 128, 3)
    assert numbers(clip) == [33, 39, 45, 51, 57]


@DECODERS
def test_chunks_give_what_the_whole_file_gives(whole, chunked, decoder):
    for start, stop in [(0, 1), (0.5, 1.5), (0.2, 3.2), (2.9, 3.3)]:
        one, many = (video.read_clip(p, start, stop, 6, decoder=decoder) for p in (whole, chunked))
        assert numbers(one) == numbers(many), (start, stop)


@DECODERS
def test_a_short_chunk_repeats_its_last_frame(chunked, decoder):
    assert numbers(video.read_clip(chunked, 57 / 30, 62 / 30, 5, decoder=decoder)) == [57, 58, 58, 60, 61]


@DECODERS
def test_past_the_end_is_the_last_frame(whole, chunked, decoder):
    for path in (whole, chunked):
        assert numbers(video.read_clip(path, 3.2, 9.0, 3, decoder=decoder)) == [99, 99, 99]
        with pytest.raises(video.OutsideError, match=r"3?.MP4: the clip from 50.00 to 60.00 s begins after .*, 3.33 s"):
            video.read_clip(path, 50, 60, 2, decoder=decoder)


@DECODERS
def test_seconds_follow_the_files_own_rate(tmp_path, decoder):
    write(tmp_path / "v.MP4", range(100), fps=50)
    assert numbers(video.read_clip(tmp_path / "v.MP4", 1.0, 1.4, 4, decoder=decoder)) == [52, 57, 62, 67]


def test_decoders_agree_to_the_last_bit(chunked):
    one, *others = (video.read_clip(chunked, 0.3, 2.7, 9, decoder=d) for d in NAMES)
    for other in others:
        assert (one.int() - other.int()).abs().max() <= 1


@DECODERS
def test_files_are_closed(whole, decoder):
    import os

    video.read_clip(whole, 0, 1, 2, decoder=decoder)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(20):
        video.read_clip(whole, 0, 1, 2, decoder=decoder)
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after <= before


@DECODERS
@pytest.mark.parametrize("content", [b"", b"no video at all", None], ids=["empty", "text", "truncated"])
def test_broken_files_are_named(tmp_path, whole, decoder, content):
    path = tmp_path / "broken.MP4"
    path.write_bytes(whole.read_bytes()[:2000] if content is None else content)
    with pytest.raises(video.VideoError, match="broken.MP4: " + ("the file is empty" if content == b"" else "")):
        video.read_clip(path, 0, 1, 2, decoder=decoder)


@DECODERS
def test_frames_too_narrow_are_read_or_explained(tmp_path, decoder):
    write(tmp_path / "v.MP4", range(10), size=96)
    try:
        assert video.read_clip(tmp_path / "v.MP4", 0, 0.3, 2, decoder=decoder).shape == (2, 96, 96, 3)
    except video.VideoError as error:
        assert decoder == "decord" and "use the decoder 'av'" in str(error)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(video.VideoError, match="nowhere.MP4: no such video"):
        video.read_clip(tmp_path / "nowhere.MP4", 0, 1, 2)
    (tmp_path / "hollow.MP4").mkdir()
    with pytest.raises(video.VideoError, match="hollow.MP4: a folder without chunks"):
        video.read_clip(tmp_path / "hollow.MP4", 0, 1, 2)


def test_chunks_of_different_sizes_are_an_error(tmp_path, chunked):
    shutil.copytree(chunked, tmp_path / "v.MP4")
    write(tmp_path / "v.MP4" / "1.MP4", range(30, 60), size=160)
    with pytest.raises(video.VideoError, match="its chunks have different frame sizes"):
        video.read_clip(tmp_path / "v.MP4", 0.5, 1.5, 4)


@pytest.mark.parametrize("start", [-0.1, float("nan"), float("inf")])
def test_bad_times(whole, start):
    with pytest.raises(ValueError, match="start: expected a time of 0 seconds or later"):
        video.read_clip(whole, start, 2.0, 2)


def test_unknown_decoder(whole):
    with pytest.raises(ValueError, match="decoder: expected one of auto, av, torchcodec, decord, got 'ffmpeg'"):
        video.read_clip(whole, 0, 1, 2, decoder="ffmpeg")


@pytest.mark.parametrize("decoder", decode.ORDER)
def test_a_missing_decoder_says_what_to_install(whole, monkeypatch, decoder):
    monkeypatch.setitem(sys.modules, f"{decoder}.decoders" if decoder == "torchcodec" else decoder, None)
    with pytest.raises(ImportError, match=rf"decoder '{decoder}' cannot be imported .* pip install "):
        video.read_clip(whole, 0, 1, 2, decoder=decoder)
