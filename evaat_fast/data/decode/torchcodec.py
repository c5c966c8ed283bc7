"""torchcodec: by number of frame, each one's time stamp checked."""

from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.decode.errors import VideoError
from evaat_fast.data.decode.indexed import IndexedReader


class TorchcodecReader(IndexedReader):
    """Frames of a file by time; see `decode.Reader`."""

    name = "torchcodec"
    _video: Any = None

    def _open(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder

        self._video = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")

    def _fetch(self, numbers: list[int]) -> np.ndarray:
        batch, base = self._video.get_frames_at(numbers), float(self._head.base)
        wanted = self._shown.stamps[numbers] * base
        if np.abs(batch.pts_seconds.numpy() - wanted).max() > base / 2:
            raise VideoError(f"{self.path}: torchcodec returns frames of other times; use the decoder 'av'")
        return batch.data.numpy()

    def close(self) -> None:
        self._video = None
