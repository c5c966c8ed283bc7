"""Checkpoints of a run: all that continuing it needs, written so that a reader sees the old file or the new one.

The weights lie under "state_dict", the masters where a model holds rounded ones, and the model's configuration (with its
`norm`) under "model_config", as `evaat_fast.model` stores them: `create_model(name, pretrained="run/last.pt")` reads them too.
"""

import contextlib
import copy
import dataclasses
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import evaat_fast
from evaat_fast import _parts
from evaat_fast._files import damage, write_atomically
from evaat_fast.train.averaging import Average
from evaat_fast.train.config import Config, absolute
from evaat_fast.train.masters import Masters
from evaat_fast.train.ranks import Ranks
from evaat_fast.train.shards import likeness, parts_of, whole

LAST, PARTS = "last.pt", "last.parts"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        epoch: how many epochs are done. step: how many steps of the next one are, and of those
        loss: the sum of the losses, seconds, waited: of these for data, replaced: how many clips could not be read.
        recent: the last losses, which the next ones are compared with.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    replaced: int = 0
    recent: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, after {self.step} steps of it" if self.step else f"the end of epoch {self.epoch}"


def save(
    path: str | os.PathLike[str],
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    at: int | Position,
    config: Config,
    clips: Mapping[str, int] | None = None,
    average: Average | None = None,
    ranks: Ranks | None = None,
    run: str = "",
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: the file, or a folder of parts where its name ends in ".parts". masters: a model's. optimizer: theirs. at: where
            the run stands, or how many epochs are done.
        config: the run's Config, whose paths are stored as absolute ones. clips: of `fingerprint`, what it was trained on.
        average: of the weights, stored as "model_ema", which those who load a model take before "state_dict".
        ranks: the processes. Where weights are shared out, or parts written, every process must call.
        run: what tells it from another run in its folder. ready: called on the process that writes, before the new file
            takes the place of an older one.

    Raises:
        OSError: it cannot be written; an older file stands as it was.
    """
    at, path, ranks = at if isinstance(at, Position) else Position(at), Path(path), ranks or Ranks()
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    content = {
        "state_dict": masters.state_dict(),
        "model_config": dataclasses.asdict(masters.model.config),
        "optimizer": optimizer.state_dict(),
        "epoch": at.epoch,
        "within": {k: v for k, v in dataclasses.asdict(at).items() if k != "epoch"},
        "config": absolute(config).to_dict(),
        "rng": rng,
        "clips": dict(clips or {}),
        "run": run,
        "version": evaat_fast.__version__,
    }
    if average is not None:
        content["model_ema"] = average.state_dict()
    if path.suffix == ".parts":
        if not ranks.main:
            del content["rng"]  # the first one's is kept
        _parts.write(path, content, ranks.group, ready)
        return
    content = whole(content, ranks.main, ranks.group if ranks.again else None)
    if not ranks.main:
        return
    ready()
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # torch's, that its file is not as long as it should be; the reason lies behind it
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class Saver:
    """Writes `last.pt` of a run: when it is time, and on the process that writes.

    Args:
        write: called with a Position, and those of other processes that are not the run's, writes the file. config: a Config.
        main: whether this process writes. say: is told what could not be written, while the run goes on. together: every
            process takes part in writing. shared: none has all the weights.
    """

    def __init__(
        self,
        write: Callable[..., None],
        config: Config,
        main: bool,
        say: Callable[[str], object],
        together: bool = False,
        shared: bool = False,
    ):
        self._write, self._main, self._say, self._together, self.shared = write, main, say, together or shared, shared
        self._name = PARTS if config.train.save_as == "parts" else LAST
        self._steps, self._seconds = config.train.save_steps, 60 * config.train.save_minutes
        self._last, self._failed, self._asked = time.monotonic(), False, False
        self.at: Position | None = None  # what the file holds

    def due(self, step: int) -> bool:
        """Whether the run should be saved after so many steps of its own, in the midst of an epoch."""
        late = self._seconds and time.monotonic() - self._last > (min(self._seconds, 60) if self._failed else self._seconds)
        due = self._main and bool((late and not self._asked) or (self._steps and step % self._steps == 0))
        self._asked = self._asked or due  # once, until it is saved
        return due

    def __call__(self, at: Position, must: bool = False, ranks: Ranks | None = None) -> None:
        """Saves. What fails is said, and tried again within a minute: the run goes on, and the older file stands.

        Args:
            at: where the run stands. must: there is no later time. ranks: those that are left of the run's processes.

        Raises:
            OSError: it failed, and `must`.
        """
        if not (self._main or self._together):
            self.at = at
            return
        try:
            self._write(at, *([] if ranks is None else [ranks]))
            self.at, self._failed = at, False
        except OSError as error:
            stands = "nothing is saved yet" if self.at is None else f"that of {self.at} stands"
            text = f"{self._name} could not be written ({error.strerror or error}); {stands}"
            if must:
                raise OSError(f"train.out: {text}") from error
            self._failed = True
            if self._main:
                self._say(f"{text}; tries again")
        self._last, self._asked = time.monotonic(), False


def fingerprint(rows: np.ndarray) -> dict[str, int]:
    """Of the clips of a table that a run draws from, int64 rows: how many they are, and a sum that tells others from them."""
    return {"count": len(rows), "crc32": zlib.crc32(np.ascontiguousarray(rows, np.int64).tobytes())}


def read(path: str | os.PathLike[str], tensors: bool = True) -> dict[str, Any]:
    """A checkpoint of a run as a dict. The tensors of a file are read where they are used: processes of one machine that read
    the same file share its memory.

    Args:
        path: the file, or a folder of parts. tensors: False has None in place of those of a folder.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that `save` did not write.
    """
    path = Path(path)
    if _parts.is_parts(path):
        return _checked(_parts.read(path, tensors), path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is none of its own
        if found := damage(path):
            raise ValueError(f"checkpoint: {str(path)!r} {found}: copy it again, or start anew with --overwrite") from None
        raise ValueError(
            f"checkpoint: {str(path)!r} is not a checkpoint that torch can read safely ({type(error).__name__})"
        ) from None
    return _checked(content, path)


def _checked(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {str(path)!r} is not a checkpoint of a run, but a {type(content).__name__}")
    missing = [k for k in ("state_dict", "model_config", "optimizer", "epoch", "config", "rng") if k not in content]
    if missing:
        raise ValueError(f"checkpoint: {str(path)!r} is not a checkpoint of a run: it lacks {', '.join(missing)}")
    content.setdefault("within", {})  # it is younger than some runs
    kinds = {"state_dict": dict, "optimizer": dict, "epoch": int, "config": dict, "rng": dict, "within": dict}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind) or (kind is int and content[name] < 0):
            raise ValueError(f"checkpoint: {str(path)!r} is damaged: its {name} is {str(content[name])[:40]!r}")
    return content


def find(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of a run's folder, the newer one of file and parts; None without any."""
    file, parts = Path(folder) / LAST, Path(folder) / PARTS
    found = ([file] if file.is_file() else []) + ([parts] if _parts.standing(parts) else [])
    if not found and _parts.is_parts(parts):
        return parts  # damaged, which is no reason to begin a run anew
    return max(found, key=written) if found else None


def written(path: Path) -> int:
    """When a checkpoint was written, in nanoseconds."""
    stands = _parts.standing(path)
    return (path if stands is None else stands / ".metadata").stat().st_mtime_ns


def named(described: Path) -> str | None:
    """How the run of a folder is called in its config.json; None: there is none, or an older version wrote it."""
    try:
        name = json.loads(described.read_text()).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def is_of(stored: Mapping[str, Any], described: Path) -> bool:
    """Whether a checkpoint is of the run that began last in its folder, and not of one that this was to replace."""
    return named(described) in (None, stored.get("run", ""))


def remove_other(path: Path) -> None:
    """Once a run is saved as a file, its parts are of the past, and the other way round."""
    if path.name == LAST:
        _parts.remove(path.with_name(PARTS))
    else:
        with contextlib.suppress(OSError):  # the newer one is found all the same
            path.with_name(LAST).unlink()


def position(stored: Mapping[str, Any], path: str | os.PathLike[str]) -> Position:
    """Where the run of a checkpoint stood.

    Raises:
        ValueError: what the file says of it makes no sense.
    """
    try:
        at = Position(stored["epoch"], **stored["within"])
        return dataclasses.replace(at, step=int(at.step), loss=float(at.loss), recent=tuple(map(float, at.recent)))
    except (TypeError, ValueError):
        raise ValueError(f"checkpoint: {str(path)!r} is damaged: its within is {str(stored['within'])[:40]!r}") from None


def restore(
    stored: Mapping[str, Any],
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    path: str | os.PathLike[str],
    average: Average | None = None,
) -> dict[str, Any]:
    """Puts a checkpoint's weights, moments and random state in their places.

    Args:
        stored: of `read`; where it has no tensors, this process's parts of them are read. masters: a model's.
        optimizer: theirs. path: where it was read. average: of the weights.

    Returns:
        The random state, for `restore_rng`, in memory of its own.

    Raises:
        ValueError: they do not fit, so the file is damaged or another version wrote it.
    """
    if stored["rng"].get("cpu") is None and _parts.is_parts(path):
        stored = _checked(_parts.read(path, like=likeness(masters.parameters, optimizer)), Path(path))
    try:
        stored = parts_of(stored, masters.parameters, optimizer)
        masters.load_state_dict(stored["state_dict"])
        optimizer.load_state_dict(stored["optimizer"])
        if average is not None:
            average.load_state_dict(stored["model_ema"])
        restore_rng(stored["rng"])
        return copy.deepcopy(stored["rng"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {str(path)!r} cannot be continued: {reason}") from None


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Puts torch's generators back to a checkpoint's state, those of the GPUs where as many are there."""
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
