"""decord, as decord2 or 0.6: by number of frame, for files in which it counts the frames that are shown."""

from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.decode.errors import VideoError
from evaat_fast.data.decode.header import EXACT
from evaat_fast.data.decode.indexed import IndexedReader


class DecordReader(IndexedReader):
    """Frames of a file by time; see `decode.Reader`."""

    name = "decord"
    _video: Any = None

    def _open(self, path: Path) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # what goes wrong is in the exception
        if self._shown.hidden:
            raise VideoError(f"{path}: decord returns frames that its edit list hides; use the decoder 'av'")
        if self.info.codec not in EXACT:
            raise VideoError(f"{path}: decord miscounts the frames of {self.info.codec}; use the decoder 'av'")
        # One thread: data loaders bring their own, and a second one slows short clips down. Frames that it cannot decode it
        # replaces by others, unless it is told that none may be.
        self._video = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        if len(self._video) != len(self._shown.stamps):
            counts = f"{len(self._video)} frames where {len(self._shown.stamps)} are shown"
            raise VideoError(f"{path}: decord counts {counts}; use the decoder 'av'")

    def _fetch(self, numbers: list[int]) -> np.ndarray:
        batch = self._video.get_batch(numbers)
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    def close(self) -> None:
        self._video = None
