"""Checksums of videos: what they are kept by, what they say of a file that changed, and who hears of it."""

import pickle
import tarfile

import numpy as np
import pytest
import torch
from corpus import configuration, copied

from evaat_fast.cli import main
from evaat_fast.data import EK100
from evaat_fast.data.check import check
from evaat_fast.data.decode import sums
from evaat_fast.data.video import VideoError, read_clip
from evaat_fast.train import inputs
from evaat_fast.train.config import ConfigError

pytest.importorskip("av")
pytest.importorskip("pyarrow")


@pytest.fixture
def copy(tmp_path):
    return copied(tmp_path)


def movies(copy):
    return sorted(path for path in copy.videos.rglob("*") if path.suffix.lower() == ".mp4" and path.is_file())


def of(copy):
    return f'data.annotations="{copy.annotations}"', f'data.videos="{copy.videos}"'


def flip(path, at):
    """One bit of a byte is another; negative: from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def made(folder, root, files):
    written = sums.write(folder, root, files)
    return written, sums.Sums(folder, root)


def blocks(tmp_path, *sizes):
    """Files of noise."""
    paths = []
    for i, size in enumerate(sizes):
        paths.append(tmp_path / "noise" / f"{i}.bin")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(np.random.default_rng(i).bytes(size))
    return paths


def test_every_byte_counts(tmp_path):
    """Of files with no byte, less than a block, a block, and a block and more."""
    paths = blocks(tmp_path, 0, 5, sums.BLOCK, sums.BLOCK + 1, 3 * sums.BLOCK - 1)
    written, known = made(tmp_path / "sums", tmp_path, paths)
    assert (written.new, written.kept, written.changed, len(known)) == (5, 0, 0, 5)
    for path in paths:
        known.hold(path)
        for at in {0, path.stat().st_size // 2, path.stat().st_size - 1} if path.stat().st_size else ():
            flip(path, at)
            with pytest.raises(VideoError, match=rf"{path.name}: damaged since its checksums were made, in bytes [\d,]+ to"):
                known.hold(path)
            flip(path, at)
        known.hold(path)


def test_a_checked_file_is_read_as_a_file(tmp_path):
    (path,) = blocks(tmp_path, 2 * sums.BLOCK + 100)
    _, known = made(tmp_path / "sums", tmp_path, [path])
    data, file = path.read_bytes(), known.open(path)
    for seek, size in (
        (0, 10),
        (sums.BLOCK - 3, 10),
        (sums.BLOCK, 1 << 20),
        (len(data) - 4, 50),
        (len(data), 5),
        (len(data) + 9, 5),
    ):
        assert file.seek(seek) == seek == file.tell()
        found = file.read(size)
        assert found == data[seek : seek + len(found)] and (found or seek >= len(data))
    assert file.seek(-7, 2) == len(data) - 7 and file.seek(3, 1) == len(data) - 4
    file.close()


def test_files_in_tar_files(copy, tmp_path):
    movie, tar = movies(copy)[0], tmp_path / "shards" / "0.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as archive:
        archive.add(movie, "clips/a.mp4")
    path = tar / "clips" / "a.mp4"
    _, known = made(tmp_path / "sums", tmp_path / "shards", [path])
    assert torch.equal(read_clip(path, 0, 1, 2, sums=known), read_clip(movie, 0, 1, 2))
    flip(tar, 512 + movie.stat().st_size // 2)
    with pytest.raises(VideoError, match="a.mp4: damaged since"):
        read_clip(path, 0, float(10**4), 64, sums=known)


def test_what_is_known_stays(tmp_path):
    """Damage is not taken for the truth when checksums are added to; another size is another file."""
    first, second = blocks(tmp_path, 1000, 2000)
    made(tmp_path / "sums", tmp_path, [first])
    flip(first, 500)
    written, known = made(tmp_path / "sums", tmp_path, [first, second, second])
    assert (written.new, written.kept, written.changed) == (1, 1, 0) and "1 files read; 1 were known" in str(written)
    with pytest.raises(VideoError, match="damaged since"):
        known.hold(first)
    first.write_bytes(b"shorter")
    with pytest.raises(VideoError, match="7 bytes where its checksums are of 1,000: it was damaged, or replaced by another"):
        known.hold(first)
    written, known = made(tmp_path / "sums", tmp_path, [first, second])
    assert (written.new, written.kept, written.changed) == (1, 1, 1) and "of another size than before" in str(written)
    known.hold(first)
    known.hold(second)


def test_an_interrupted_run_goes_on(tmp_path):
    paths = blocks(tmp_path, *[sums.BLOCK + i for i in range(70)])
    made(tmp_path / "sums", tmp_path, paths[:3])
    with open(tmp_path / "sums" / "blocks.bin", "ab") as file:  # of files that no entry speaks of
        file.write(b"\1\2\3\4\5")

    def stop(done, total):
        assert total == sum(path.stat().st_size for path in paths[3:])
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sums.write(tmp_path / "sums", tmp_path, paths, progress=stop)
    written, known = made(tmp_path / "sums", tmp_path, paths)
    assert written.kept > 35  # of what the interrupted run had read
    for path in paths:
        known.hold(path)
        flip(path, -1)
        with pytest.raises(VideoError, match="damaged since"):
            known.hold(path)


def test_a_file_that_cannot_be_opened(copy, tmp_path, monkeypatch):
    """Is one that cannot be read, as without checksums: a clip of it is replaced."""
    _, known = made(tmp_path / "sums", copy.videos, movies(copy))

    known.hold(movies(copy)[0])  # by now the checksums themselves are mapped

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(VideoError, match="(?i)mp4: Permission denied"):
        read_clip(movies(copy)[0], 0, 1, 2, sums=known)


def test_the_root_may_move(copy, tmp_path):
    _, known = made(tmp_path / "sums", copy.videos, movies(copy))
    moved = copy.videos.rename(tmp_path / "elsewhere")
    path = moved / movies(copy.__class__(copy.root, copy.annotations, moved))[0].relative_to(moved)
    sums.Sums(tmp_path / "sums", moved).hold(path)
    again = pickle.loads(pickle.dumps(sums.Sums(tmp_path / "sums", moved)))  # as a worker gets them
    again.hold(path)
    with pytest.raises(ValueError, match="expected a video below"):
        known.hold(path)


def test_the_root_as_it_is_called(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(copy.videos)
    path = movies(copy)[0].relative_to(copy.videos)
    sums.write(tmp_path / "sums", ".", [path])
    for root, called in ((".", path), (copy.videos, copy.videos / path), (f"{copy.videos}/", copy.videos / path)):
        assert sums.Sums(tmp_path / "sums", root).has(called)


def test_checksums_that_cannot_be_used(tmp_path):
    (path,) = blocks(tmp_path, 3 * sums.BLOCK)
    with pytest.raises(FileNotFoundError, match="sums: there are no checksums in .*nothing"):
        sums.Sums(tmp_path / "nothing", tmp_path)
    made(tmp_path / "sums", tmp_path, [path])
    (tmp_path / "sums" / "blocks.bin").write_bytes(b"1234567")
    with pytest.raises(ValueError, match="blocks.bin was cut short: 7 bytes for 12"):
        sums.Sums(tmp_path / "sums", tmp_path)
    (tmp_path / "sums" / "files.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="files.npy cannot be read"):
        sums.Sums(tmp_path / "sums", tmp_path)
    np.save(tmp_path / "sums" / "files.npy", np.zeros(3))
    with pytest.raises(ValueError, match="of another kind: float64"):
        sums.Sums(tmp_path / "sums", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such video"):
        sums.write(tmp_path / "sums2", tmp_path, [tmp_path / "none.mp4"])


def test_training_replaces_and_counts(copy, tmp_path):
    sums.write(tmp_path / "sums", copy.videos, movies(copy))
    options = {"num_frames": 2, "seed": 3, "max_broken": 1.0}
    whole = EK100(copy.annotations, copy.videos, "train", sums=tmp_path / "sums", **options)
    bare = EK100(copy.annotations, copy.videos, "train", **options)
    for data in (whole, bare):
        data.set_epoch(0)
    assert torch.equal(whole[0]["video"], bare[0]["video"]) and whole.replaced == 0
    path = whole.source(0).files[0]  # a chunk, behind which there are others
    for at in range(0, path.stat().st_size, sums.BLOCK):
        flip(path, at)
    item = whole[0]
    assert item["replaced"] and item["index"] != 0 and whole.replaced == 1
    strict = EK100(copy.annotations, copy.videos, "train", sums=tmp_path / "sums", on_error="raise", **options)
    with pytest.raises(VideoError, match=r"(?i)clip .*mp4: damaged since its checksums were made"):
        strict[0]


def test_check_and_train_hear_of_it(copy, tmp_path, capsys):
    """A file that changed its size, or in its header, is named before training; one without checksums is mentioned."""
    config = configuration(tmp_path, *of(copy), f'data.sums="{tmp_path / "sums"}"')
    files = movies(copy)
    sums.write(tmp_path / "sums", copy.videos, files[1:])
    data = inputs.splits(config, missing="broken").train
    (finding,) = (f for f in check(data).findings if f.what == "files without checksums, read as they are")
    assert finding.usable and len(finding.rows)
    with open(files[1], "ab") as file:
        file.write(b"more")
    said = str(check(data))
    assert "files that cannot be read" in said and "where its checksums are of" in said


def test_the_command(copy, tmp_path, capsys):
    config, path = configuration(tmp_path, *of(copy)), tmp_path / "check.toml"
    path.write_text(f'[data]\nannotations = "{copy.annotations}"\nvideos = "{copy.videos}"\n')
    assert main(["check", str(path), "--write-sums"]) == 2
    assert "data.sums: expected the folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="data.sums"):
        inputs.write_sums(config)
    with open(path, "a") as file:
        file.write(f'sums = "{tmp_path / "sums"}"\n')
    assert main(["check", str(path)]) == 2 and "no checksums" in capsys.readouterr().err
    assert main(["check", str(path), "--write-sums"]) == 0
    assert f"checksums: {len(movies(copy))} files read; 0 were known" in capsys.readouterr().out
    assert main(["check", str(path), "--write-sums"]) == 0
    assert f"checksums: 0 files read; {len(movies(copy))} were known" in capsys.readouterr().out
    flip(movies(copy)[0], 30)  # in the header, which the check reads
    main(["check", str(path)])
    assert "damaged since its checksums were made" in capsys.readouterr().out
