"""Ctrl-C and SIGTERM: the step that runs is finished, what was trained is saved, and only then the run ends.

A flag, and no exception wherever Python happens to be: one that is raised inside a destructor is printed and forgotten.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A terminal tells torchrun and its processes alike, and torchrun tells them again: that is one Ctrl-C and not two.
_ECHO_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        status: what the process should exit with, 128 and the signal's number: 130 or 143.
    """

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.status = 128 + signum


class Signals:
    """`with Signals(quiet) as signals:` hears Ctrl-C and SIGTERM. `signals.heard` is the first one's number, 0 before it; a
    second Ctrl-C raises KeyboardInterrupt wherever the program is, a third ends the process.

    Outside the main thread, where Python lets nobody handle signals, it hears nothing. Processes that are forked meanwhile, as
    a loader's workers, ignore them: they end with their parent.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.heard, self._quiet, self._pid = 0, quiet, os.getpid()
        self._at_once, self._times, self._first = False, 0, 0.0
        self._echo = _ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # who ignores them, as nohup does, has a reason
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Of the signal that was heard."""
        return "Ctrl-C" if self.heard == signal.SIGINT else signal.Signals(self.heard).name

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where nothing would be lost: a signal raises Stopped at once, one that came before too."""
        self._at_once = True
        try:
            if self.heard:
                raise Stopped(f"stopped by {self.name}", self.heard)
            yield
        finally:
            self._at_once = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if not self.heard:
            self.heard, self._first = number, time.monotonic()
            if self._at_once:
                raise Stopped(f"stopped by {self.name}", number)
            if not self._quiet:  # print is not for signal handlers: it may have been interrupted itself
                os.write(2, f"\n{self.name}: finishes the step and saves; once more stops at once\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._first >= self._echo:
            self._times += 1
            if self._times > 1:
                os._exit(128 + number)
            raise KeyboardInterrupt
