"""Decoders behind one interface: open a file, read the frames that are on screen at given times.

    with open_video("P01_01.MP4") as reader:
        frames = reader.read([0.5, 1.0])        # uint8 [2, H, W, 3], RGB, as displayed

PyAV reads the headers and time stamps for all of them, so that all of them show the same frames; they differ in who makes the
pixels. What one of them would get wrong it refuses with a VideoError.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Protocol

import numpy as np

from evaat_fast.data.choices import DECODERS, Decoder, check_choice
from evaat_fast.data.decode import members
from evaat_fast.data.decode.errors import OutsideError, VideoError
from evaat_fast.data.decode.header import Header, VideoInfo
from evaat_fast.data.decode.sums import Sums

# In the order in which "auto" tries them, each with the reason for its place.
ORDER: dict[Decoder, str] = {
    "av": "right for every file that the tests have, refuses damaged pictures, and is the fastest",
    "torchcodec": "right too, but for open groups of pictures and AVI, which it refuses; reads a whole file first",
    "decord": "refuses edit lists, open groups of pictures and more, reads a whole file first, and believes most damage",
}
_MODULES = {"av": "AvReader", "torchcodec": "TorchcodecReader", "decord": "DecordReader"}

__all__ = [
    "DECODERS",
    "ORDER",
    "Decoder",
    "Header",
    "OutsideError",
    "Reader",
    "Sums",
    "VideoError",
    "VideoInfo",
    "chosen",
    "open_video",
    "probe",
    "reader_of",
    "why_not",
]


class Reader(Protocol):
    """An open file. Times are seconds from where its presentation begins.

    path. fps: frames per second on average.
    """

    path: Path
    fps: float

    @property
    def likely_end(self) -> float | None:
        """Seconds: where its headers say that it ends; None where they do not."""

    @property
    def end(self) -> float:
        """Seconds: where its last frame ends."""

    def read(self, times: Sequence[float]) -> np.ndarray:
        """uint8 [len(times), H, W, 3]: the frames on screen at these times, RGB, as displayed.

        Before the first frame that is the first one. Raises VideoError for what cannot be decoded or lies beyond the end.
        """

    def close(self) -> None: ...


def open_video(path: str | Path, decoder: Decoder = "auto", sums: Sums | None = None) -> AbstractContextManager[Reader]:
    """An open file, to be used in a `with`.

    Args:
        path: a video file. decoder: one of DECODERS; "auto" is the first of ORDER that can be imported. None replaces another.
        sums: checksums that it is held to, see `decode.sums`.

    Raises:
        VideoError: the file is missing, damaged, not what its checksums say, or one that this decoder gets wrong.
        ImportError: the decoder, or PyAV, is not installed.
        ValueError: an unknown decoder.
    """
    make = reader_of(decoder)
    return closing(make(_file(path), sums=sums))


def reader_of(decoder: Decoder) -> Callable[..., Reader]:
    """The class of a decoder's readers, its packages imported."""
    check_choice("decoder", decoder, DECODERS)
    if decoder == "auto":
        decoder = chosen()
    elif problem := why_not(decoder):
        others = ", ".join(repr(d) for d in ORDER if d != decoder)
        package = "torchcodec" if decoder == "torchcodec" else "evaat-fast[video]"
        raise ImportError(f"decoder {decoder!r} cannot be imported ({problem}): pip install {package}, or choose {others}")
    name = "pyav" if decoder == "av" else decoder
    return getattr(importlib.import_module(f"evaat_fast.data.decode.{name}"), _MODULES[decoder])


def why_not(decoder: Decoder) -> str | None:
    """Why a decoder cannot be used here; None where it can."""
    for name in dict.fromkeys((decoder, "av")):
        try:
            importlib.import_module("torchcodec.decoders" if name == "torchcodec" else name)
        except Exception as error:  # ImportError; OSError or RuntimeError of a shared library
            lines = str(error).strip().splitlines()
            return lines[0] if lines else type(error).__name__
    return None


def chosen() -> Decoder:
    """The decoder that "auto" stands for here."""
    problems = {}
    for name in ORDER:
        problem = why_not(name)
        if problem is None:
            return name
        problems[name] = problem
    listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise ImportError(f"no decoder can be imported ({listed}): pip install evaat-fast[video]")


def probe(path: str | Path, sums: Sums | None = None) -> VideoInfo:
    """What the headers of a video file say, in milliseconds.

    Raises:
        VideoError: it is missing, its headers cannot be read, or it is not what its checksums say. ImportError: PyAV is not
        installed.
    """
    if problem := why_not("av"):
        raise ImportError(f"reading a video's headers needs PyAV ({problem}): pip install evaat-fast[video]")
    head = Header(_file(path), sums)
    try:
        return head.info()
    finally:
        head.close()


def _file(path):
    path = Path(path)
    if members.place(path) is None:
        raise VideoError(f"{path}: no such video")
    return path
