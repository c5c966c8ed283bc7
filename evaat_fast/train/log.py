"""What a run tells: a JSONL file for programs, a progress bar or plain lines for people."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from evaat_fast._files import write_atomically


class Log:
    """One JSON object a line. Every record has "event" ("start", "step", "epoch" or "eval") and "epoch".

    Args:
        path: the file; None: nothing is written, as by all processes but the first. keep: how many epochs of an earlier run
            stay; what it logged after them is dropped, so that the log of a run that was resumed is that of a run that was not.
    """

    def __init__(self, path: str | os.PathLike[str] | None, keep: int = 0):
        self._file: Any = None
        if path is None:
            return
        kept = [json.dumps(r) + "\n" for r in read(path) if r["epoch"] <= keep] if keep else []
        write_atomically(path, lambda file: file.write("".join(kept).encode()))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()

    def write(self, event: str, epoch: int, **values: Any) -> None:
        if self._file is None:
            return
        # JSON has no NaN, which a metric is where labels leave nothing to measure.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"event": event, "epoch": epoch, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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
    """A tqdm bar on a terminal; elsewhere nothing but the lines given to `say`.

    Args:
        total: steps. label: what goes on. quiet: neither bar nor lines.
    """

    def __init__(self, total: int, label: str, quiet: bool = False):
        self._quiet = quiet
        self.bar = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                raise ImportError("the progress bar needs tqdm: pip install 'evaat-fast[train]'") from None
            scale = total > 1 << 24  # of bytes
            self.bar = tqdm(total=total, desc=label, leave=False, dynamic_ncols=True, unit_scale=scale)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, **values: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)
            self.bar.update()

    def to(self, done: int, total: int) -> None:
        """Where things stand, for what counts its steps itself."""
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        elif not self._quiet:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
