"""Moments as files of their own: re-encoded, so that they begin and end when they should."""

import contextlib
import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.decode import VideoError
from evaat_fast.search.moments import Moments, clock

_BLOCK = 64 << 20  # bytes of frames that are decoded at once
_FASTEST = 60  # frames per second that are kept

__all__ = ["cut", "write"]


def cut(
    found: Moments, folder: str | os.PathLike[str], progress: Callable[[Path], object] | None = None
) -> dict[Path, str | None]:
    """Writes each moment as an mp4 file, named by its rank, its video and its time.

    Args:
        found: what `Index.search` returned. folder: made where it is missing. progress: called with each file.

    Returns:
        {file: None, or why it could not be written}.

    Raises:
        OSError: the folder cannot be written. ImportError: PyAV is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[Path, str | None] = {}
    for rank, moment in enumerate(found, 1):
        stem = re.sub(r"[^\w.-]+", "_", Path(moment.file).stem)[:80]
        path = folder / f"{rank:02}-{stem}-{clock(moment.start).replace(':', '.')}.mp4"
        try:
            write(moment.file, path, moment.start, moment.stop)
            written[path] = None
        except VideoError as error:
            written[path] = str(error).splitlines()[0]
        if progress is not None:
            progress(path)
    return written


def write(video: str | os.PathLike[str], path: Path, start: float, stop: float) -> None:
    """The part [start, stop) of a video, seconds, as H.264 with its sound, upright, at its own rate (60 at most).

    Raises:
        VideoError: it cannot be read. OSError: `path` cannot be written.
    """
    import av

    from evaat_fast.data.decode.pyav import AvReader

    part = path.with_name(f".{path.stem}.part.mp4")
    try:
        with contextlib.closing(AvReader(Path(video))) as reader:
            rate = Fraction(min(reader.fps, _FASTEST)).limit_denominator(1001)
            count = max(1, math.floor((stop - start) * rate + Fraction(1, 1000)))
            times = [start + float((i + Fraction(1, 2)) / rate) for i in range(count)]
            last = max(0.0, reader.end - 0.25 / reader.fps)
            sound = _sound(video, start, start + count / float(rate))
            at, frames = 0, reader.read([min(times[0], last)])
            more = max(1, _BLOCK // frames[0].nbytes)
            with av.open(str(part), "w") as out:
                stream = _stream(out, frames.shape[2], frames.shape[1], rate)
                voice: Any = out.add_stream("aac", rate=sound[0].sample_rate, layout=sound[0].layout.name) if sound else None
                while at < count:
                    for frame in reader.read([min(time, last) for time in times[at : at + more]]):
                        _put(out, stream, frame, at)
                        at += 1
                out.mux(stream.encode(None))
                if voice is not None:
                    for frame in sound:
                        out.mux(voice.encode(frame))
                    out.mux(voice.encode(None))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _stream(out, width, height, rate):
    stream = out.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
    stream.codec_context.time_base = 1 / rate
    stream.options = {"crf": "20", "preset": "veryfast"}
    return stream


def _put(out, stream, pixels, number):
    import av

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[: stream.height, : stream.width]), format="rgb24")
    picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601", threads=1)
    picture.pts, picture.time_base, picture.pict_type = number, stream.codec_context.time_base, 0
    out.mux(stream.encode(picture))


def _sound(video, start, stop):
    """Frames of the first sound track in [start, stop), for an encoder; none where there is none that can be read."""
    import av

    found: list[Any] = []
    try:
        with av.open(f"file:{video}", metadata_errors="replace") as container:
            if not container.streams.audio or not container.streams.video:
                return []
            stream = container.streams.audio[0]
            stereo = "mono" if stream.layout.nb_channels == 1 else "stereo"
            resampler = av.AudioResampler("fltp", stereo, stream.rate)
            zero = (container.start_time or 0) / 1e6  # where the presentation begins, as for pictures
            container.seek(max(0, int((start + zero - 0.5) * 1e6)))
            at = 0
            for frame in container.decode(stream):
                time = float(frame.time or 0.0) - zero
                if time >= stop:
                    break
                if time + frame.samples / frame.sample_rate <= start:
                    continue
                for part in resampler.resample(frame):
                    part.pts, part.time_base = at, Fraction(1, part.sample_rate)
                    at += part.samples
                    found.append(part)
    except Exception:  # a damaged track is no reason to lose the pictures
        return []
    return found
