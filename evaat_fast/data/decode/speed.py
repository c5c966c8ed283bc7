"""How fast a decoder is on one core, on a file made for it: what the doctor says and bench/decode.py measures."""

import math
import tempfile
import time
from pathlib import Path

import numpy as np

from evaat_fast.data.decode import Decoder, open_video

# What x264 is told: its defaults, a key frame a second, and what `prepare --chunk` writes.
ENCODINGS = {
    "GOP 250": {},
    "GOP 30": {"g": "30"},
    "chunks": {"g": "15", "bf": "0", "tune": "fastdecode", "sc_threshold": "0"},
}
WIDTH, HEIGHT, RATE = 568, 320, 30


def make(path: Path, seconds: float, encoding: str = "chunks") -> None:
    """A file of a moving texture, some 1 to 2.5 Mb/s."""
    import av

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (60, 90, 3)).repeat(16, 0).repeat(16, 1)
    wall = np.clip(0.7 * coarse + rng.integers(0, 60, coarse.shape), 0, 255).astype(np.uint8)
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", **ENCODINGS[encoding]}
        stream.codec_context.thread_count = 1
        for n in range(round(seconds * RATE)):
            top, left = int(200 + 150 * math.sin(n / 40)), int(300 + 250 * math.sin(n / 57))
            view = wall[top : top + HEIGHT, left : left + WIDTH].copy()
            view[100:160, 3 * n % 500 : 3 * n % 500 + 60] = 200
            out.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        out.mux(stream.encode(None))


def read(path: Path, begin: float, length: float, frames: int, decoder: Decoder) -> np.ndarray:
    """`frames` frames evenly spread over a clip."""
    numbers = (begin + length * (np.arange(frames) + 0.5) / frames) * RATE
    with open_video(path, decoder) as reader:
        return reader.read(((np.floor(numbers) + 0.5) / RATE).tolist())


def clips_per_second(decoder: Decoder, frames: int = 16, seconds: float = 0.3) -> float:
    """Clips of 2 seconds that one core reads in one, from a chunk as `prepare --chunk` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chunk.mp4"
        make(path, 3.0)
        read(path, 0.0, 2.0, frames, decoder)
        count, began = 0, time.process_time()
        while time.process_time() - began < seconds:
            read(path, 0.05 * (count % 20), 2.0, frames, decoder)
            count += 1
        return count / (time.process_time() - began)
