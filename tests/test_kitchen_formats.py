"""The toy kitchen in the real layouts: the same pictures in each, complete, repeatable, and the corpus itself untouched."""

import formats
import pytest
from corpus import corpus

pytest.importorskip("av")
pytest.importorskip("pyarrow")

from evaat_fast import cli
from evaat_fast.data import kitchen, video
from evaat_fast.data.kitchen_formats import write_all
from evaat_fast.data.readers import charades, egoclip, ek100, ek100_clips


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def frames(path, start=0.0, stop=None):
    return video.read_clip(path, start, stop, 4, decoder="av").float()


def near(one, other):
    """The same moments: the object is where it is, though encoded once more."""
    return one.shape == other.shape and (one - other).abs().mean() < 4


def test_every_layout_shows_the_same_pictures():
    made, source = formats.kitchen(), corpus()
    clips = ek100.read(made.ek100, "train")
    tagged = egoclip.read(made.egoclip)
    row = next(i for i, c in enumerate(clips) if c.start > 20)
    clip, key = clips[row], tagged[row].video
    shown = frames(source.videos / f"{clip.video}.MP4", clip.start, clip.stop)
    places = {name: folder / f"{key}.mp4" for name, folder in made.ego4d_videos.items()}
    for path in (
        made.ek100_videos / f"{clip.video}.MP4",
        places["full_scale"],
        places["video_15s"],
        places["video_288px"] / "0.mp4",
    ):
        assert near(shown, frames(path, clip.start, clip.stop)), path
    assert near(shown, frames(made.ego4d_videos["video_chunked"] / key / "0.mp4", clip.start, clip.stop))
    cut = ek100_clips.read(made.ek100_clips, "train")[row]
    assert near(shown, frames(made.ek100_clips / "clips" / f"{cut.video}.mp4", 0.0, clip.stop - clip.start))
    action = charades.read(made.charades, "train")[row]
    assert near(shown, frames(made.charades_videos / f"{action.video}.mp4", action.start, action.stop))
    other = frames(source.videos / f"{clip.video}.MP4", clip.start + 2, clip.stop + 2)
    assert not near(shown, other)


def test_the_corpus_stays_and_formats_are_found_again(tmp_path):
    small = dict(train_clips=8, test_clips=6)
    made = kitchen.generate(tmp_path / "k", **small)
    before, calls = tree(made.root), []
    formats_ = write_all(made, workers=1, progress=lambda *a: calls.append(a))
    assert calls == [(1, 2), (2, 2)]
    after = tree(made.root)
    assert {name: after[name] for name in before} == before and all(n in before or n.startswith("formats/") for n in after)
    assert write_all(made, progress=lambda *a: calls.append(a)) == formats_ and len(calls) == 2
    again = write_all(kitchen.generate(tmp_path / "again", **small), workers=2)
    assert {n: b for n, b in tree(again.root).items() if not n.endswith((".mp4", ".MP4"))} == {
        n: b for n, b in tree(formats_.root).items() if not n.endswith((".mp4", ".MP4"))
    }
    assert kitchen.generate(tmp_path / "k", **small).root == made.root


def test_what_fails_leaves_nothing(tmp_path):
    made = kitchen.generate(tmp_path / "k", train_clips=4, test_clips=2)
    before = tree(made.root)

    def broken(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_all(made, progress=broken)
    assert tree(made.root) == before and sorted(p.name for p in made.root.iterdir()) == [
        "annotations",
        "kitchen.json",
        "videos",
    ]


def test_the_command(tmp_path, capsys):
    arguments = ["make-kitchen", str(tmp_path / "k"), "--train-clips", "8", "--test-clips", "6"]
    assert cli.main(arguments) == 0 and not (tmp_path / "k" / "formats").exists()
    assert cli.main([*arguments, "--formats", "all"]) == 0
    assert f"formats     {tmp_path / 'k' / 'formats'}" in capsys.readouterr().out
    assert cli.main(["prepare", "egoclip", str(tmp_path / "k" / "formats" / "ego4d"), "--out", str(tmp_path)]) == 0
