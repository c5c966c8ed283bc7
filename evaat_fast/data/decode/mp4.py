"""The boxes of an MP4 file, and how it says that its picture is turned: read without a decoder, in microseconds."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from evaat_fast.data.decode.members import place

UPRIGHT = (1, 0, 0, 1)
_MOST = 200_000  # boxes of a file; damaged ones have more


def rotation_of(matrix: tuple[int, int, int, int]) -> int:
    """Degrees counter-clockwise, mirrors left out."""
    return {(1, 0): 0, (0, -1): 90, (-1, 0): 180, (0, 1): 270}.get(matrix[:2], 0)


def turned(frame: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A frame [H, W, 3] as displayed; a view."""
    a, b, c, d = matrix
    across, down = (c, b) if a == 0 else (a, d)
    frame = frame.transpose(1, 0, 2) if a == 0 else frame
    return frame[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def right_angles(nine: Sequence[float]) -> tuple[int, int, int, int]:
    """A display matrix of nine fixed-point numbers as signs; one that is not of right angles is left out."""
    a, b, c, d = (int(np.sign(nine[i])) for i in (0, 1, 3, 4))
    return (a, b, c, d) if abs(a * d - b * c) == 1 and a * b == 0 else UPRIGHT


def track_matrix(path: Path) -> tuple[int, int, int, int]:
    """The display matrix of an mp4's (first, if there are several) video track, from its boxes."""
    try:
        whole, first, size = place(path) or (path, 0, 0)
        with open(whole, "rb") as file:
            moov = next((body for name, body in boxes(file, first, first + size) if name == b"moov"), None)
            for name, trak in boxes(file, *moov) if moov else ():
                if name != b"trak":
                    continue
                inside = dict(boxes(file, *trak))
                handler = dict(boxes(file, *inside[b"mdia"])).get(b"hdlr") if b"mdia" in inside else None
                if handler is None or b"tkhd" not in inside or _bytes(file, handler)[8:12] != b"vide":
                    continue
                head = _bytes(file, inside[b"tkhd"])
                at = 52 if head[0] == 1 else 40
                return right_angles(struct.unpack(">9i", head[at : at + 36]))
    except (OSError, struct.error, IndexError, ValueError):  # what is wrong with it, its decoder says better
        pass
    return UPRIGHT


def missing_bytes(path: Path) -> int:
    """By how many bytes the last box of an mp4 is longer than the file."""
    whole, first, size = place(path) or (path, 0, 0)
    with open(whole, "rb") as file:
        return max([0, *(end - first - size for _, (_, end) in boxes(file, first, first + size))])


def boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(name, (first byte of the body, end)) of each box of a range; the last one may end beyond it."""
    for _ in range(_MOST):
        if at + 8 > end:
            return
        file.seek(at)
        head = file.read(16)
        size, name = struct.unpack(">I4s", head[:8])
        body = at + 8
        if size == 1 and len(head) == 16:
            size, body = struct.unpack(">Q", head[8:16])[0], at + 16
        size = end - at if size == 0 else size
        if size < body - at:
            return
        yield name, (body, at + size)
        at += size


def _bytes(file, span):
    file.seek(span[0])
    return file.read(min(span[1] - span[0], 4096))
