"""Checkpoints in parts: what is written is read, what is damaged is said, and nothing in them is executed."""

import os
import pickle
import shutil

import pytest
import torch

from evaat_fast import _parts
from evaat_fast.model.checkpoints import read_checkpoint
from evaat_fast.train import checkpoint


def tree():
    return {
        "state": {"x": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "none": torch.zeros(0, 3)},
        "moments": {0: {"step": torch.tensor(3.0), "count": 5}, 11: {"step": torch.tensor(4.0)}},
        "list": [1, (2.5, None, 'é/"q"'), []],
        "yes": True,
    }


def check_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            check_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            check_same(x, y)
    else:
        assert a == b


def test_round_trip(tmp_path, recwarn):
    given = tree()
    for _ in range(2):  # the second takes the place of the first
        given["yes"] = not given["yes"]
        _parts.write(tmp_path / "last.parts", given)
        check_same(given, _parts.read(tmp_path / "last.parts"))
    assert os.listdir(tmp_path) == ["last.parts"]
    assert not [w for w in recwarn if "torch.distributed" in str(w.message)]


def test_missing_and_damaged_parts_are_said(tmp_path):
    path = tmp_path / "last.parts"
    with pytest.raises(ValueError, match="is no folder of parts"):
        _parts.read(path)
    _parts.write(path, tree())
    [part] = path.glob("*.distcp")
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="lacks parts, or they are damaged"):
        _parts.read(path)
    part.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged: EOFError: a part was cut short"):
        _parts.read(path)
    part.unlink()
    with pytest.raises(ValueError, match="lacks parts, or they are damaged: FileNotFoundError"):
        _parts.read(path)


def test_without_its_table_of_contents_a_checkpoint_is_damaged_and_not_absent(tmp_path):
    path = tmp_path / "last.parts"
    _parts.write(path, {"state_dict": {"x": torch.randn(3)}})
    (path / ".metadata").unlink()
    assert checkpoint.find(tmp_path) == path  # a run would begin anew, over what can be mended
    for reads in (lambda: checkpoint.read(path), lambda: read_checkpoint(path), lambda: read_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match="lacks .metadata, its table of contents"):
            reads()
    (tmp_path / "last.pt").write_bytes(b"a file")  # its parts were being removed
    assert checkpoint.find(tmp_path) == tmp_path / "last.pt"


def test_what_is_no_tensor_is_read_alone(tmp_path):
    path, given = tmp_path / "last.parts", tree()
    _parts.write(path, given)
    found = _parts.read(path, tensors=False)
    assert found["state"] == {"x": None, "half": None, "none": None} and found["moments"][0]["count"] == 5
    assert found["list"] == given["list"] and found["yes"] is True


def test_what_is_not_wanted_is_not_read(tmp_path):
    path = tmp_path / "last.parts"
    _parts.write(path, {"state_dict": {"x": torch.ones(3)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}})
    asked = []
    found = _parts.read(path, lambda name: name.startswith("/state_dict/"), lambda name, size: asked.append((name, size)))
    assert found["optimizer"]["state"][0]["exp_avg"] is None and torch.equal(found["state_dict"]["x"], torch.ones(3))
    assert ("/state_dict/x", torch.Size([3])) in asked and not [name for name, _ in asked if "optimizer" in name]


@pytest.mark.parametrize("module,name", [("os", "system"), ("torch.distributed.checkpoint.metadata", "os.system")])
def test_a_table_of_contents_executes_nothing(tmp_path, module, name):
    path, hit = tmp_path / "last.parts", tmp_path / "hit"
    _parts.write(path, tree())
    pushed = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, f"touch {hit}")]
    (path / ".metadata").write_bytes(b"\x80\x04" + pushed[0] + pushed[1] + b"\x93" + pushed[2] + b"\x85R.")
    with pytest.raises(ValueError, match="which none is made of"):
        _parts.read(path)
    assert not hit.exists()
    if name == "system":  # the pickle is what it is meant to be
        pickle.loads((path / ".metadata").read_bytes())
        assert hit.exists()


def test_a_write_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.parts"
    _parts.write(path, {"n": 1})
    (tmp_path / ".last.parts.new").write_text("in the way")
    with pytest.raises(OSError, match="could not be written"):
        _parts.write(path, {"n": 2})
    assert _parts.read(path) == {"n": 1}


def test_killed_between_two_renames(tmp_path):
    path = tmp_path / "last.parts"
    _parts.write(path, {"n": 1})
    shutil.copytree(path, tmp_path / "copy")
    path.rename(tmp_path / ".last.parts.old")
    assert _parts.read(path) == {"n": 1}
    _parts.write(tmp_path / "copy", {"n": 2})
    (tmp_path / "copy").rename(tmp_path / ".last.parts.new")  # whole, and newer than what it takes the place of
    assert _parts.read(path) == {"n": 2}
    _parts.write(path, {"n": 3})
    assert _parts.read(path) == {"n": 3} and os.listdir(tmp_path) == ["last.parts"]
    _parts.remove(path)
    assert _parts.standing(path) is None
