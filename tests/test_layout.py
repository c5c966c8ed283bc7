"""Where videos lie, and what of a clip they hold."""

import math
import os

import pytest

from evaat_fast.data import layout, video
from evaat_fast.data.layout import Source

pytest.importorskip("av")
from films import film, numbers  # noqa: E402

SLOW = {"options": {"g": "250", "crf": "40"}}


def seconds(path, length):
    """A film of so many seconds, 10 frames in each."""
    return film(path, [n / 10 for n in range(round(length * 10))], rate=10, **SLOW)


@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov"])
@pytest.mark.parametrize("place", ["{v}", "videos/{v}", "P01/{v}", "P01/videos/{v}"])
def test_whole_files(tmp_path, place, suffix):
    path = tmp_path / (place.format(v="P01_01") + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not looked at")
    (path.parent / "P01_01.jpg").write_bytes(b"no video")
    assert layout.find(tmp_path, ["P01/P01_01"]) == {"P01/P01_01": Source((path,), (0.0,), "whole")}


def test_missing_videos_are_counted_and_named(tmp_path):
    (tmp_path / "P01").mkdir()
    (tmp_path / "P01" / "P01_01.MP4").write_bytes(b"")
    names = ["P01/P01_01", *(f"P01/P01_0{n}" for n in range(2, 7))]
    with pytest.raises(
        FileNotFoundError, match=r"videos: 5 of 6 videos are not in .*: P01/P01_02, P01/P01_03, P01/P01_04, \.\.\."
    ):
        layout.find(tmp_path, names)
    assert list(layout.find(tmp_path, names, missing="skip")) == ["P01/P01_01"]
    with pytest.raises(FileNotFoundError, match="videos: there is no folder 'nowhere'"):
        layout.find("nowhere", names)


def test_what_is_no_file_is_not_there(tmp_path):
    """Links of a download whose files are gone, as git-annex and caches leave them, and pipes with a video's name."""
    seconds(tmp_path / "a.mp4", 3)
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "whole.mp4").symlink_to(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ["a", "gone", "whole", "pipe"]
    assert list(layout.find(tmp_path, names, "skip")) == ["a", "whole"]
    with pytest.raises(FileNotFoundError, match="2 of 4 videos are not in .*: gone, pipe"):
        layout.find(tmp_path, names)
    assert layout.find_clips(tmp_path, ["gone"], ["v"], [0.0]) == {}


def test_a_name_does_not_lead_out_of_the_folder(tmp_path):
    seconds(tmp_path / "a.mp4", 1)
    (tmp_path / "videos").mkdir()
    names = ["../a", str(tmp_path / "a"), "x/../../a", ".."]
    assert layout.find(tmp_path / "videos", names, "skip") == {}
    assert list(layout.find(tmp_path, ["a"])) == ["a"]


def test_two_files_of_one_video_are_an_error(tmp_path):
    for name in ("a.mp4", "a.webm"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="2 videos 'a': a"):
        layout.find(tmp_path, ["a"])


@pytest.mark.parametrize("folder", ["v", "v.mp4", "v.MP4"])
def test_chunks_named_by_their_first_second(tmp_path, folder):
    for start, length in ((0, 3), (3, 3), (9, 1)):  # the chunk of second 6 is not there
        seconds(tmp_path / folder / f"{start}.mp4", length)
    source = layout.find(tmp_path, ["v"])["v"]
    assert (source.layout, source.starts) == ("chunks", (0.0, 3.0, 9.0))
    assert layout.of_path(tmp_path / folder) == source


def test_chunks_of_one_second(tmp_path):
    for start in range(3):
        seconds(tmp_path / "v" / f"{start}.mp4", 1)
    source = layout.find(tmp_path, ["v"])["v"]
    assert (source.layout, source.starts) == ("chunks", (0.0, 1.0, 2.0))


def test_numbered_chunks(tmp_path):
    for number, length in enumerate((6, 5.9, 2)):  # a chunk may be a frame short
        seconds(tmp_path / "uid" / f"{number}.mp4", length)
    seconds(tmp_path / "other" / "0.mp4", 4)  # alone it could be either
    found = layout.find(tmp_path, ["uid", "other"])
    assert (found["uid"].layout, found["uid"].starts) == ("indexed", (0.0, 6.0, 12.0))
    assert found["other"].starts == (0.0,)
    assert numbers(video.read_clip(found["uid"], 6.0, 7.0, 2).numpy()) == [2, 7]
    assert numbers(video.read_clip(tmp_path / "uid", 12.0, 13.0, 2).numpy()) == [2, 7]


def test_a_missing_numbered_chunk_is_a_gap(tmp_path):
    for number in (0, 1, 3):
        seconds(tmp_path / "uid" / f"{number}.mp4", 6)
    source = layout.find(tmp_path, ["uid"])["uid"]
    assert (source.layout, source.starts) == ("indexed", (0.0, 6.0, 18.0))
    assert numbers(video.read_clip(source, 18.0, 19.0, 2).numpy()) == [2, 7]
    with pytest.raises(video.OutsideError, match="a chunk that is missing"):
        video.read_clip(source, 12.5, 14.0, 2)


def test_a_folder_of_both_kinds_is_an_error(tmp_path):
    for number in (0, 1):
        seconds(tmp_path / "a" / f"{number}.mp4", 6)
        seconds(tmp_path / "b" / f"{6 * number}.mp4", 6)
    with pytest.raises(ValueError, match="named by their first second .*b.* and numbered ones .*a.* in one corpus"):
        layout.find(tmp_path, ["a", "b"])


def test_a_broken_chunk_does_not_hide_what_names_mean(tmp_path):
    for start in (0, 3, 6):
        seconds(tmp_path / "v" / f"{start}.mp4", 3)
    (tmp_path / "v" / "0.mp4").write_bytes(b"broken")
    source = layout.find(tmp_path, ["v"])["v"]
    assert source.layout == "chunks"
    assert numbers(video.read_clip(source, 3, 4, 2).numpy()) == [2, 7]
    with pytest.raises(video.VideoError, match="0.mp4: "):
        video.read_clip(source, 0, 1, 2)


@pytest.mark.parametrize("folder", ["P01", "clips/P01", ""])
def test_cut_clips(tmp_path, folder):
    for n in range(2):
        seconds(tmp_path / folder / f"P01_01_{n}.mp4", 1 + n)
    ids, videos, starts = ["P01_01_0", "P01_01_1"], ["P01/P01_01"] * 2, [30.25, 31.5]
    one, two = layout.find_clips(tmp_path, ids, videos, starts).values()
    assert (one.layout, one.starts, two.starts) == ("clips", (30.25,), (31.5,))
    assert numbers(video.read_clip(two, 31.5, 33.5, 4).numpy()) == [2, 7, 12, 17]
    with pytest.raises(FileNotFoundError, match="1 of 3 clips are not in .*P01_01_2"):
        layout.find_clips(tmp_path, [*ids, "P01_01_2"], ["P01/P01_01"] * 3, [*starts, 40.0])


def test_whole_videos_are_no_cut_clips(tmp_path):
    seconds(tmp_path / "P01" / "P01_01.mp4", 1)
    assert layout.find_clips(tmp_path, ["a", "b"], ["P01/P01_01"] * 2, [0.0, 0.5]) == {}


# Clips that their videos do not hold.


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Chunks of three seconds at 10 a second: the second lacks its last frame, the third is missing, the last is short."""
    folder = tmp_path_factory.mktemp("three") / "v"
    for start, frames in ((0, 30), (3, 29), (9, 10)):
        seconds(folder / f"{start}.mp4", frames / 10)
    return layout.of_path(folder)


def test_a_clip_over_several_chunks(tmp_path):
    for start in (0, 2, 4):
        seconds(tmp_path / "v" / f"{start}.mp4", 2)
    assert numbers(video.read_clip(tmp_path / "v", 0.5, 5.5, 5).numpy()) == [10, 0, 10, 0, 10]


def test_a_frame_that_a_chunk_lacks_is_its_last(three):
    assert numbers(video.read_clip(three, 5.5, 6.0, 5).numpy()) == [25, 26, 27, 28, 28]


@pytest.mark.parametrize("start, stop", [(5.5, 7.5), (6.5, 8), (6.5, 9.5), (8.0, 9.2)])
def test_frames_in_a_missing_chunk(three, start, stop):
    with pytest.raises(
        video.OutsideError, match=r"3.mp4: the clip from .* lies in a chunk that is missing: this one ends at 5.90 s"
    ):
        video.read_clip(three, start, stop, 4)


def test_the_first_chunk_is_missing(tmp_path):
    seconds(tmp_path / "v" / "3.mp4", 3)
    seconds(tmp_path / "v" / "6.mp4", 3)
    with pytest.raises(video.OutsideError, match="v: the chunk of 1.00 s is missing: the first begins at 3 s"):
        video.read_clip(tmp_path / "v", 1, 2, 2)


def test_clips_at_the_end(three):
    assert numbers(video.read_clip(three, 9.5, 10.0, 5).numpy()) == [5, 6, 7, 8, 9]
    assert numbers(video.read_clip(three, 9.5, 10.1, 3).numpy())[-1] == 9
    assert numbers(video.read_clip(three, 9.5, 11.5, 4).numpy()) == [7, 9, 9, 9]
    with pytest.raises(video.OutsideError, match="begins after the end of its video, 10.00 s"):
        video.read_clip(three, 1800.0, 1802.0, 4)


def test_a_whole_video(three, tmp_path):
    path = seconds(tmp_path / "v.mp4", 4)
    assert numbers(video.read_clip(path, math.nan, math.nan, 4).numpy()) == [5, 15, 25, 35]
    with pytest.raises(video.OutsideError, match="a chunk that is missing"):
        video.read_clip(three, math.nan, math.nan, 8)
