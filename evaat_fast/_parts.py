"""A checkpoint as a folder that several processes write together, each its own parts of tensors: torch's DCP.

Everything in it is a tensor by name; what is none lies under "rest", as JSON. The table of contents is DCP's own, a pickle, of
which nothing is taken but what such a table is made of: a folder from elsewhere executes nothing.
"""

import contextlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_REST = "rest"


def write(path: str | os.PathLike[str], tree: Any, group: Any = None, ready: Callable[[], object] = lambda: None) -> None:
    """Writes dicts, lists and tuples of tensors, numbers and strings. Every process of the group must call; what is no tensor
    is the first one's. A folder that is there already stands until the new one is whole.

    Args:
        path: the folder. tree: where it has DTensors, each process writes its part. group: a process group; None: this process.
        ready: called on the first process before what is written takes its place; what it raises is an OSError here.

    Raises:
        OSError: it cannot be written, on every process.
    """
    from torch.distributed import barrier, get_rank
    from torch.distributed import checkpoint as dcp

    path, main = Path(path), group is None or get_rank(group) == 0
    new, old = _beside(path)
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(tree, "", tensors))
    if main:
        tensors[_REST] = torch.frombuffer(bytearray(skeleton.encode()), dtype=torch.uint8)
        shutil.rmtree(new, ignore_errors=True)
    if group is not None:
        barrier(group)
    try:
        with _quietly():
            dcp.save(tensors, checkpoint_id=str(new), process_group=group, no_dist=group is None)
    except (Exception, dcp.CheckpointException) as error:  # of any process, raised on all of them
        if main:
            shutil.rmtree(new, ignore_errors=True)  # a disk that was full need not stay so
        raise OSError(f"the parts of a checkpoint could not be written: {_reason(error)}") from error
    problem = None
    if main:
        try:
            ready()
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            problem = error
    if group is not None:  # or the others would take it for written, and wait where the first one does not come
        problem = _first_of(problem, group)
    if problem is not None:
        raise problem


def read(
    path: str | os.PathLike[str],
    tensors: bool | Callable[[str], bool] = True,
    like: Callable[[str, torch.Size], Tensor | None] = lambda name, size: None,
) -> Any:
    """What `write` wrote, whole, on the CPU; any process reads all of it alone.

    Args:
        path: the folder. tensors: which are read, by a name as "/optimizer/state/0/step"; False: none. Others are None in what
            is returned.
        like: makes the tensor that is filled with one of such a name and size: a DTensor, and only this process's part is read;
            None: a whole one on the CPU.

    Raises:
        ValueError: no such checkpoint, or one with parts missing or damaged.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import StorageMeta

    found = standing(path)
    if found is None and is_parts(path):
        raise ValueError(f"checkpoint: {str(path)!r} lacks .metadata, its table of contents, which tells what its parts are of")
    if found is None:
        raise ValueError(f"checkpoint: {str(path)!r} is no folder of parts of a checkpoint")
    folder: Path = found

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *arguments, **options):
            with open(folder / ".metadata", "rb") as file:
                contents = _Contents(file).load()
            contents.storage_meta = contents.storage_meta or StorageMeta()
            contents.storage_meta.load_id = self.load_id
            return contents

    try:
        reader = Reader(str(folder))
        known = reader.read_metadata().state_dict_metadata
        chosen = tensors if callable(tensors) else lambda name: tensors
        content = {}
        for name, of in known.items():
            if name == _REST or chosen(name):
                given = like(name, of.size)
                content[name] = torch.empty(of.size, dtype=of.properties.dtype) if given is None else given
        with _quietly():
            dcp.load(content, storage_reader=reader, no_dist=True)
        rest = json.loads(bytes(content[_REST].numpy()).decode())
        absent = dict.fromkeys(known.keys() - content.keys())  # by name: one that is in no file at all is an error
        return _unpack(rest, {**content, **absent})
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(f"checkpoint: {str(path)!r} lacks parts, or they are damaged: {_reason(error)}") from None


def standing(path: str | os.PathLike[str]) -> Path | None:
    """The folder that holds the checkpoint: `path`, or where a process was killed between two renames, one beside it."""
    return next((x for x in (Path(path), *_beside(Path(path))) if (x / ".metadata").is_file()), None)


def is_parts(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds parts, or is meant to: that its table of contents is lost is for `read` to say."""
    return standing(path) is not None or any(Path(path).glob("*.distcp"))


def remove(path: str | os.PathLike[str]) -> None:
    for folder in (Path(path), *_beside(Path(path))):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


class _Contents(pickle.Unpickler):
    """Reads a table of contents."""

    _OTHERS = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    }

    def find_class(self, module, name):
        if (module, name) in self._OTHERS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module == "torch.distributed.checkpoint.metadata" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"its table of contents names {module}.{name}, which none is made of")


def _first_of(x, group):
    """The first process's x, on every process."""
    found = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, x, group=group)
    return found[0]


@contextlib.contextmanager
def _quietly():
    """Without the warning that one process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _beside(path):
    """The folder that is being written, and the one whose place it takes."""
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _reason(error):
    """The innermost of DCP's errors, on one line."""
    while getattr(error, "failures", None):
        error = next(iter(error.failures.values()))
        error = error[0] if isinstance(error, tuple) else error
    while error.__cause__ is not None:
        error = error.__cause__
    text = "a part was cut short" if isinstance(error, EOFError) else str(error)
    if "unexpected pos" in text:  # what torch has to say of a full disk
        text = "a part could not be written whole: the disk is full, or files may not be so large"
    return f"{type(error).__name__}: {text}".splitlines()[0][:200]


def _pack(x, path, tensors):
    """x as JSON, whose tensors are names in `tensors`."""
    if isinstance(x, Tensor):
        tensors[path] = x.detach()
        return {"tensor": path}
    if isinstance(x, dict):
        return {"dict": [[key, _pack(value, f"{path}/{key}", tensors)] for key, value in x.items()]}
    if isinstance(x, (list, tuple)):
        return {type(x).__name__: [_pack(value, f"{path}/{i}", tensors) for i, value in enumerate(x)]}
    return {"value": x}


def _unpack(x, tensors):
    [(kind, value)] = x.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(y, tensors) for key, y in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_unpack(y, tensors) for y in value)
    return value
