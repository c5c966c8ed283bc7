"""What decoders that count frames share: PyAV reads when each frame is shown, and they are asked for its number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaat_fast.data.decode.errors import VideoError, reason
from evaat_fast.data.decode.header import Header
from evaat_fast.data.decode.sums import Sums


class IndexedReader(ABC):
    """Frames of a file by time; see `decode.Reader`. A subclass opens the file and fetches frames by number."""

    name: str

    def __init__(self, path: Path, sums: Sums | None = None):
        if sums is not None:
            sums.hold(path)
        head = Header(path)
        try:
            self.info, self._shown = head.info(), head.shown()
        finally:
            head.close()
        self._head = head  # its numbers; the container is closed
        self.path, self.fps = path, head.fps
        if not path.is_file():
            raise VideoError(f"{path}: {self.name} reads no part of a tar file; use the decoder 'av'")
        a, b, c, d = self.info.matrix
        if a * d - b * c < 0:
            raise VideoError(f"{path}: a mirrored picture; use the decoder 'av'")
        if self._shown.opened:
            wrong = f"{self.name} takes others for the frames of open groups of pictures"
            raise VideoError(f"{path}: {wrong}; use the decoder 'av'")
        try:
            self._open(path)
        except VideoError:
            raise
        except Exception as error:  # decoders raise errors of their own, RuntimeError or OSError, by version
            raise VideoError(f"{path}: {reason(path, error)}") from error

    @abstractmethod
    def _open(self, path: Path) -> None: ...

    @abstractmethod
    def _fetch(self, numbers: list[int]) -> np.ndarray: ...

    @abstractmethod
    def close(self) -> None: ...

    @property
    def likely_end(self) -> float | None:
        """Seconds, by the headers; None where they say nothing of the video alone."""
        return self._head.duration if self._head.own_duration else None

    @property
    def end(self) -> float:
        """Seconds: where the last frame ends; VideoError for a file cut short."""
        return self._head.checked_end(self._head.seconds(self._shown.end))

    def read(self, times: Sequence[float]) -> np.ndarray:
        """uint8 [len(times), H, W, 3]."""
        stamps, ticks = self._shown.stamps, [self._head.ticks(t) for t in times]
        numbers = np.maximum(np.searchsorted(stamps, ticks, "right") - 1, 0)  # before the first frame there is the first
        if numbers.max() == len(stamps) - 1:
            self._head.check_last(max(ticks), self._shown.end)
        try:
            frames = self._fetch(numbers.tolist())
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(f"{self.path}: {reason(self.path, error)}") from error
        if frames.shape != (len(times), self.info.height, self.info.width, 3) or frames.dtype != np.uint8:
            raise VideoError(f"{self.path}: frames of {frames.shape[1:]}, {frames.dtype}, where its header says otherwise")
        return frames
