"""Joins the toy kitchen's chunk files into whole videos, packet by packet, and cuts clips out of those, frame by frame."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from evaat_fast.data.decode.header import rational
from evaat_fast.data.kitchen_render import finish, open_film

__all__ = ["cut", "whole"]


def whole(source: Path, target: Path) -> float:
    """Copies a file, or the packets of a folder's chunks {0,15,...}.MP4, into one file; returns its seconds.

    A chunk's packets keep their times: where a chunk lacks its last frame, so does the file.
    """
    import av

    target.parent.mkdir(parents=True, exist_ok=True)
    chunks = sorted(source.iterdir(), key=lambda p: int(p.stem)) if source.is_dir() else [source]
    end = Fraction(0)
    with av.open(str(target), "w", format="mp4") as out:
        stream = None
        for chunk in chunks:
            with av.open(str(chunk)) as file:
                video = file.streams.video[0]
                if stream is None:
                    stream = out.add_stream_from_template(video)
                base = rational(video.time_base)
                assert base is not None
                shift = int((int(chunk.stem) if source.is_dir() else 0) / base)
                for packet in file.demux(video):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    end = max(end, (packet.pts + (packet.duration or 0)) * base)
                    out.mux(packet)
    return float(end)


def cut(source: Path, pieces: Mapping[Path, tuple[float, float]]) -> None:
    """Encodes the frames of each stretch of seconds into a file of its own; the source is decoded once."""
    import av

    open_, rest = {}, sorted(pieces.items(), key=lambda item: item[1])
    try:
        with av.open(str(source)) as file:
            video = file.streams.video[0]
            rate, base = round(rational(video.average_rate) or 30), rational(video.time_base)
            for frame in file.decode(video):
                assert frame.pts is not None and base is not None
                shown = float(frame.pts * base) + 0.5 / rate
                while rest and rest[0][1][0] <= shown:
                    path, (_, stop) = rest.pop(0)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    open_[path] = (stop, open_film(av, path, frame.width, rate))
                if not open_:
                    continue
                picture: Any = frame.to_ndarray(format="rgb24")
                for path, (stop, container) in list(open_.items()):
                    if shown >= stop:
                        finish(open_.pop(path)[1])
                    else:
                        container[0].mux(container[1].encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    finally:
        for _, container in open_.values():
            finish(container)
    if rest:
        raise ValueError(f"{source}: ends before {rest[0][1][0]:g} s, where {rest[0][0].name} begins")
