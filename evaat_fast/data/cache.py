"""Decoded clips kept in memory that forked data-loader workers share."""

import mmap

import torch


class ClipCache:
    """Frames of up to `clips` clips of `num_frames` frames, all of the first one's size; others are not kept.

    The memory is an anonymous shared mapping: workers forked after `reserve` or the first `put` see and fill the same
    pages, and /dev/shm, 64 MB in a container by default, is not used. It is claimed page by page as clips come in.
    Pickling drops the contents, so spawned workers keep a cache each.
    """

    def __init__(self, clips, num_frames):
        self._clips, self._num_frames = clips, num_frames
        self._frames = self._filled = None

    def __getstate__(self):
        return {"_clips": self._clips, "_num_frames": self._num_frames, "_frames": None, "_filled": None}

    def reserve(self, height, width):
        """Maps the (still empty) memory. `put` does it too, but workers share only what is mapped when they fork."""
        shape = (self._clips, self._num_frames, height, width, 3)
        self._frames = _shared(shape)
        self._filled = _shared((self._clips,))

    def get(self, index):
        """uint8 [T, H, W, 3], a view not to be written to, or None."""
        return self._frames[index] if self._frames is not None and self._filled[index] else None

    def put(self, index, frames):
        """Keeps a copy of the frames if they have the size of the first ones."""
        if self._frames is None:
            self.reserve(*frames.shape[1:3])
        if frames.shape == self._frames.shape[1:]:
            self._frames[index] = frames
            self._filled[index] = 1  # last: a reader in another process sees whole clips only


def _shared(shape):
    size = 1
    for n in shape:
        size *= n
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(shape)
