"""What a search found as a page: one HTML file with a picture of each moment, which plays the videos where they lie."""

import base64
import io
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from evaat_fast._files import write_atomically
from evaat_fast.data.decode import VideoError
from evaat_fast.data.video import read_clip
from evaat_fast.search.moments import Moment, Moments, clock, printable

_WIDTH = 480  # pixels of a picture

__all__ = ["poster", "write"]


def write(found: Moments, path: str | os.PathLike[str]) -> Path:
    """Writes the page; it needs nothing but the videos.

    Returns:
        The file, absolute.

    Raises:
        ImportError: jinja2 or pillow is missing. OSError: it cannot be written.
    """
    try:
        import jinja2
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs {error.name}: pip install 'evaat-fast[train]'") from None
    source = resources.files("evaat_fast.search").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(source).render(query=found.query, moments=[_shown(moment) for moment in found])
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode("utf-8")))
    return path


def _shown(moment: Moment) -> dict[str, Any]:
    try:
        picture = "data:image/jpeg;base64," + base64.b64encode(poster(moment.file, moment.peak)).decode()
    except VideoError:  # gone since it was indexed
        picture = None
    return {
        "score": f"{moment.score:.3f}",
        "time": f"{clock(moment.start)} – {clock(moment.stop)}",
        "folder": printable(os.path.dirname(moment.file)),
        "name": printable(os.path.basename(moment.file)),
        "date": moment.date.strftime("%Y-%m-%d %H:%M"),
        "address": f"{Path(moment.file).as_uri()}#t={moment.start:.3f},{moment.stop:.3f}",
        "picture": picture,
    }


def poster(video: str | os.PathLike[str], time: float, width: int = _WIDTH) -> bytes:
    """The picture of a video at a time, seconds, as JPEG, at most `width` pixels wide.

    Raises:
        VideoError: the video cannot be read.
    """
    from PIL import Image

    frame = read_clip(video, max(0.0, time - 0.05), time + 0.05, 1)[0]
    picture = Image.fromarray(torch.Tensor.numpy(frame))
    picture.thumbnail((width, 4 * width))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return out.getvalue()
