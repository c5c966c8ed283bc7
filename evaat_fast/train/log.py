"""What a run tells: a JSONL file for programs, a progress bar or plain lines for people."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from evaat_fast._files import write_atomically

LIVE_SECONDS = 60.0  # between lines where there is no bar
_BYTES = 1 << 24  # what is more than this is shown as bytes are


class Board(Protocol):
    """Where a log is shown, too: see `evaat_fast.train.boards`."""

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Log:
    """One JSON object a line. Every record has "event" ("start", "step", "epoch", "eval", "extended" or "diverged") and
    "epoch". What a full disk has no room for is kept until it has.

    Args:
        path: the file; None: nothing is written, as by all processes but the first. keep, steps: how many epochs and steps of
            an earlier run stay; what it logged after them is dropped, so that the log of a run that was resumed is that of a
            run that was not. boards: are told the same; one that fails is told no more. warn: is told what cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        keep: int = 0,
        steps: int = 0,
        boards: Sequence["Board"] = (),
        warn: Callable[[str], object] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self._file: Any = None
        self._boards, self._step, self._warn = list(boards), steps, warn
        self._waiting, self._failed = b"", False
        self.evaluated: set[int] = set()  # the epochs of an earlier run that were
        if path is None:
            return
        earlier = read(path) if keep or steps else []
        kept = [r for r in earlier if r["epoch"] <= keep or (r["event"] == "step" and r.get("step", steps + 1) <= steps)]
        self.evaluated = {r["epoch"] for r in kept if r["event"] == "eval"}
        lines = "".join(json.dumps(r) + "\n" for r in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()

    def write(self, event: str, epoch: int, **values: Any) -> None:
        if self._file is None:
            return
        # JSON has no NaN, which a metric is where labels leave nothing to measure.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._waiting += (json.dumps({"event": event, "epoch": epoch, **finite}) + "\n").encode()
        try:
            self._flush()
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._warn(f"log.jsonl could not be written ({error.strerror or error}); tries again")
            self._failed = True
        self._step = values.get("step", self._step)
        for board in list(self._boards):
            try:
                board.write(event, self._step, {"epoch": epoch, **finite})
            except Exception as error:  # a board is not worth a run
                self._boards.remove(board)
                self._warn(f"{type(board).__name__} is told no more: {type(error).__name__}: {error}")

    def _flush(self) -> None:
        while self._waiting:  # of a line a part may have room
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def sync(self) -> None:
        """Proves that what was written is on the disk: a checkpoint should not know more than the log.

        Raises:
            OSError: it is not.
        """
        if self._file is not None:
            self._flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._flush()
        self._file.close()
        for board in self._boards:
            board.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a log. A last line that a crash cut short is left out."""
    path, records = Path(path), []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise ValueError(f"{path}: line {number + 1} is not JSON") from None
    return records


class Progress:
    """A tqdm bar on a terminal; elsewhere nothing but the lines given to `say`, and those of `live`, one a minute.

    Args:
        total: steps. label: what goes on. quiet: neither bar nor lines.
    """

    def __init__(self, total: int, label: str, quiet: bool = False):
        self._quiet, self._label, self._told = quiet, label, time.monotonic()
        self.bar = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                raise ImportError("the progress bar needs tqdm: pip install 'evaat-fast[train]'") from None
            scale = total > _BYTES
            self.bar = tqdm(total=total, desc=label, leave=False, dynamic_ncols=True, unit_scale=scale)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def quiet(self) -> bool:
        """Whether it tells nothing but warnings."""
        return self._quiet

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def live(self, line: str) -> None:
        """One step more, and how things are: behind the bar, or where there is none once a minute."""
        if self.bar is not None:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update()
        elif not self._quiet and time.monotonic() - self._told >= LIVE_SECONDS:
            self.say(f"{self._label}: {line}")
            self._told = time.monotonic()

    def to(self, done: int, total: int, line: str = "") -> None:
        """Where things stand, for what counts its steps itself; a line with it is shown as `live` shows one."""
        if self.bar is not None:
            self.bar.total = total
            self.bar.unit_scale = total > _BYTES
            if line:
                self.bar.set_postfix_str(line, refresh=False)
            self.bar.update(done - self.bar.n)
        elif line and not self._quiet and time.monotonic() - self._told >= LIVE_SECONDS:
            self.say(f"{self._label}: {line}")
            self._told = time.monotonic()

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        elif not self._quiet:
            print(line, flush=True)

    def warn(self, line: str) -> None:
        """What people should hear of even where they want to hear nothing else."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """In words: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
