"""Video files with the quirks of real ones, made with PyAV. Each frame shows its number, as black and white stripes."""

import math
import struct
from fractions import Fraction

import av
import numpy as np

BASE = Fraction(1, 90_000)
SIZE = (128, 112)  # decord2 cannot read frames of fewer than 98 pixels on every CPU, upright or turned


def picture(number, size=SIZE):
    """uint8 [H, W, 3]"""
    bits = (number >> np.arange(8) & 1) * 255
    frame = np.broadcast_to(bits.repeat(size[0] // 8).astype(np.uint8)[None, :, None], (size[1], size[0], 3))
    return np.ascontiguousarray(frame)


def numbers(frames):
    """The numbers that frames [T, H, W, 3] show."""
    stripes = np.asarray(frames, np.float64).mean((1, 3)).reshape(len(frames), 8, -1).mean(2) > 127
    return (stripes * 2 ** np.arange(8)).sum(1).tolist()


def film(
    path,
    times,
    *,
    codec="libx264",
    options=None,
    container=None,
    shift=0.0,
    turn=0,
    mirror=False,
    sound=False,
    size=SIZE,
    rate=30,
    tags=None,
):
    """Writes a file whose frame n is stored for times[n] + shift seconds; what is negative an mp4 hides by an edit list.

    The suffix decides the container. turn: degrees. sound: a second of silence from 0 on, beside it. tags: of the file.
    Returns the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffixes = {".mkv": "matroska", ".webm": "webm", ".avi": "avi", ".mov": "mov"}
    with av.open(str(path), "w", format=suffixes.get(path.suffix.lower(), "mp4"), options=container or {}) as out:
        out.metadata.update(tags or {})
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        avi = path.suffix == ".avi"  # a grid of frames is all that it has
        stream.time_base = stream.codec_context.time_base = Fraction(1, rate) if avi else BASE
        stream.codec_context.thread_count = 1
        usual = {"crf": "10", "g": "12"} if codec == "libx264" else {}  # with B-frames
        stream.options = {**usual, **(options or {})}
        if sound:
            voice = out.add_stream("aac", rate=8000, layout="mono")
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 8192), np.float32), "fltp", "mono")
            quiet.sample_rate, quiet.pts = 8000, 0
            out.mux(voice.encode(quiet))
            out.mux(voice.encode(None))
        moved = round(shift / BASE)

        def mux(packets):
            for packet in packets:
                if moved:
                    packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                out.mux(packet)

        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.time_base = Fraction(1, rate) if avi else BASE
            frame.pts = number if avi else round(time / BASE)
            mux(stream.encode(frame))
        mux(stream.encode(None))
    if turn or mirror:  # PyAV 17 cannot be told
        across, down = (round(f(math.radians(turn))) for f in (math.cos, math.sin))
        flip, one = -1 if mirror else 1, 1 << 16
        data = bytearray(path.read_bytes())
        matrix = (flip * across * one, -down * one, 0, flip * down * one, across * one, 0, 0, 0, 1 << 30)
        struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
        path.write_bytes(data)
    return path


def shorten_edit(path, seconds):
    """Makes the (one) edit of an mp4's video end so many seconds after it begins."""
    data = bytearray(path.read_bytes())
    scale = struct.unpack(">I", data[data.index(b"mvhd") + 16 : data.index(b"mvhd") + 20])[0]
    at = data.index(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", round(seconds * scale))
    path.write_bytes(data)


def shown(times, asked):
    """The numbers of the frames on screen: the last stored at or before each asked time, the first before that."""
    return [max((n for n, time in enumerate(times) if time <= t + 1e-9), default=0) for t in asked]


def phone(folder):
    """A dozen videos as a phone's folder has them, each some seconds: turned and upright ones, of variable frame rate, with odd
    names and endings; and beside them what is none. Returns the names of those that cannot be read."""

    def shot(name, count, rate=15, wobble=0.0, **how):
        times = [(n + wobble * (n % 3)) / rate for n in range(count)]
        return film(folder / name, times, rate=rate, **{"size": (192, 112), **how})

    first = shot("IMG_0001.MOV", 45, turn=90, sound=True)
    shot("IMG_0002.MOV", 40, turn=180)
    shot("IMG_0003.MOV", 60, turn=270, sound=True)
    shot("hevc.mov", 30, codec="libx265", options={"x265-params": "log-level=none"})
    shot("screen.webm", 30, codec="libvpx-vp9")
    shot('clip\'s "best" 100%.mp4', 38)
    shot("tiny.mp4", 5)
    shot("Sommer 2026/VID 20260801 (1).mp4", 45, wobble=0.3)
    shot("Sommer 2026/Café größe 猫.mp4", 50, rate=12)
    shot("Sommer 2026/Strand/PXL_20260802.mp4", 30, size=(112, 192))
    shot("WhatsApp/VID-20260803-WA0001.mp4", 45, wobble=0.2, size=(176, 144))
    shot("old/MOV00001.3gp", 40, rate=10, size=(176, 144))
    (folder / "half copied.mp4").write_bytes(first.read_bytes()[:1500])
    for name in ("empty.mp4", ".DS_Store", "._IMG_0001.MOV", "IMG_0004.HEIC", "Thumbs.db"):
        (folder / name).touch()
    return {"half copied.mp4", "empty.mp4"}
