"""Decoded clips kept in memory that forked data-loader workers share."""

import math
import mmap

import torch
from torch import Tensor


class ClipCache:
    """Frames of up to `clips` clips of `num_frames` frames, all of the first one's size; others are not kept.

    The memory is an anonymous shared mapping: workers forked after `reserve` or the first `put` see and fill the same
    pages, and /dev/shm, 64 MB in a container by default, is not used. It is claimed page by page as clips come in.
    Pickling drops the contents, so spawned workers keep a cache each.
    """

    def __init__(self, clips: int, num_frames: int):
        self._clips, self._num_frames = clips, num_frames
        self._frames: Tensor | None = None
        self._filled: mmap.mmap | None = None  # a byte a clip

    def __getstate__(self) -> dict[str, int | None]:
        return {"_clips": self._clips, "_num_frames": self._num_frames, "_frames": None, "_filled": None}

    def reserve(self, height: int, width: int) -> None:
        """Maps the (still empty) memory. `put` does it too, but workers share only what is mapped when they fork."""
        shape = (self._clips, self._num_frames, height, width, 3)
        self._frames = torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
        self._filled = mmap.mmap(-1, self._clips)

    def get(self, index: int) -> Tensor | None:
        """uint8 [T, H, W, 3], a view not to be written to, or None."""
        if self._frames is None or self._filled is None or not self._filled[index]:
            return None
        return self._frames[index]

    def put(self, index: int, frames: Tensor) -> None:
        """Keeps a copy of the frames if they have the size of the first ones."""
        if self._frames is None or self._filled is None:
            self.reserve(frames.shape[1], frames.shape[2])
        assert self._frames is not None and self._filled is not None
        if frames.shape == self._frames.shape[1:]:
            self._frames[index] = frames
            self._filled[index] = 1  # last: a reader in another process sees whole clips only
