"""The demo's page: one HTML file without any outside resource, readable in light and in dark."""

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaat_fast._files import write_atomically
from evaat_fast.data.ek100 import EK100
from evaat_fast.data.transforms import eval_transform
from evaat_fast.data.video import read_clip

# A placeholder that becomes currentColor: the figure's text and axes follow the page's theme.
_INK = "#123456"
_COLOURS = {"blue": "#3b82c4", "green": "#2e9e6b", "orange": "#d9822b"}


def write(
    path: Path,
    results: Mapping[str, Any],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    queries: Mapping[str, Any],
    searches: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> Path:
    """Writes the page.

    Args:
        path: the HTML file. results: what `demo.run` returns. logs: {"pretrain": records, "finetune": records}.
        queries: from `queries`. searches: each one or two texts side by side, as `search` gives them.

    Returns:
        path.
    """
    try:
        import jinja2
    except ImportError:
        raise ImportError("the page needs jinja2: pip install 'evaat-fast[train]'") from None
    source = resources.files("evaat_fast.train").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.1f}"
    page = environment.from_string(source).render(results=results, curves=curves(logs), searches=searches, **queries)
    write_atomically(path, lambda file: file.write(page.encode("utf-8")))
    return path


def queries(similarity: Tensor, data: EK100, shown: int = 5) -> dict[str, Any]:
    """What the model retrieves for one caption and one clip of each verb: the first of its verb in the test files.

    Args:
        similarity: [clips, captions]. data: the test split. shown: how many to list.

    Returns:
        dict(text_to_video, video_to_text): lists of dicts for the template.
    """
    relevancy, strips = data.relevancy, {}

    def strip(clip):
        if clip not in strips:
            strips[clip] = _strip(data, clip)
        return strips[clip]

    def judge(clip, caption):
        return {**_judged(data, clip, caption), "relevancy": float(relevancy[clip, caption])}

    captions, clips = _first_of_each(data.caption_verbs), _first_of_each(data.clip_verbs)
    to_video = []
    for caption in captions:
        best = similarity[:, caption].topk(min(shown, len(similarity)))
        found = [
            {"strip": strip(clip), "text": data.clips[clip].texts[0], "score": score, **judge(clip, caption)}
            for score, clip in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        matching = int((relevancy[:, caption] == 1).sum())
        to_video.append({"text": data.captions[caption], "matching": matching, "found": found})
    to_text = []
    for clip in clips:
        best = similarity[clip].topk(min(shown, similarity.shape[1]))
        found = [
            {"text": data.captions[caption], "score": score, **judge(clip, caption)}
            for score, caption in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        to_text.append({"strip": strip(clip), "text": data.clips[clip].texts[0], "found": found})
    transform: Any = data.transform
    return {"text_to_video": to_video, "video_to_text": to_text, "frames": data.num_frames, "size": transform.image_size}


def search(
    data: EK100, caption: int, moments: Sequence[Mapping[str, Any]], clips: Sequence[int], seconds: float, root: Path
) -> dict[str, Any]:
    """What a search found, for the template.

    Args:
        data: the test split. caption: of it, what was searched. moments: what was found: file, start, stop, peak, score.
        clips: the test clip that each shows, -1 for none. seconds: of a picture. root: the folder that files are named from.
    """
    found = []
    for moment, clip in zip(moments, clips, strict=True):
        first, last = max(0.0, moment["peak"] - seconds / 2), moment["peak"] + seconds / 2
        frames = eval_transform(_sides(data))(read_clip(moment["file"], first, last, data.num_frames))
        place = os.path.relpath(moment["file"], os.path.realpath(root))
        time = f"{moment['start']:.1f} – {moment['stop']:.1f} s"
        text = data.clips[clip].texts[0] if clip >= 0 else "between two clips"
        judged = _judged(data, clip, caption)
        found.append({"strip": _film(frames), "file": place, "time": time, "text": text, "score": moment["score"], **judged})
    return {"text": data.captions[caption], "found": found}


def _judged(data, clip, caption):
    """What is right of a test clip, -1 for none, for a caption."""
    if clip < 0:
        return {"right": False, "verb": False, "noun": False}
    (verb, nouns), (own_verb, own_nouns) = data.kinds[data.clip_kind[clip]], data.kinds[data.caption_kind[caption]]
    return {"right": verb == own_verb and nouns == own_nouns, "verb": verb == own_verb, "noun": nouns == own_nouns}


def _first_of_each(verbs: Tensor) -> list[int]:
    """The first index of each verb class, in the order of the classes."""
    first: dict[int, int] = {}
    for index, verb in enumerate(torch.as_tensor(verbs).tolist()):
        first.setdefault(verb, index)
    return [first[verb] for verb in sorted(first)]


def _strip(data, clip):
    """The frames that the model is given of a clip; sharper than a small model's."""
    own, data.frames = data.transform, "ordered"
    data.transform = eval_transform(_sides(data))
    try:
        return _film(data[clip]["video"])
    finally:
        data.transform = own


def _sides(data):
    """(height, width) of pictures on the page, in its pixels."""
    return max(72, data.transform.height), max(72, data.transform.width)


def _film(frames):
    """Frames [T, H, W, 3] side by side, as a JPEG data URI."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("the page's pictures need pillow: pip install 'evaat-fast[train]'") from None
    buffer = io.BytesIO()
    Image.fromarray(torch.cat(list(frames), 1).numpy()).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss and metrics over the epochs of both stages, as inline SVG."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the page's curves need matplotlib: pip install 'evaat-fast[train]'") from None
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, _INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": "evaat-fast",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
    }
    with rc_context(style):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        axes = figure.subplots(1, 3, width_ratios=(1, 0.8, 1.2))
        stages = (("pretrain", "InfoNCE loss, pretraining"), ("finetune", "SMS loss, fine-tuning"))
        for axis, (stage, title) in zip(axes, stages, strict=False):
            steps = [r for r in logs[stage] if r["event"] == "step"]
            axis.plot(
                [r["step"] for r in steps],
                [r["loss"] for r in steps],
                color=_COLOURS["blue"],
                linewidth=0.6,
                alpha=0.45,
            )
            ends, per_epoch = [r for r in logs[stage] if r["event"] == "epoch"], len(steps) / steps[-1]["epoch"]
            axis.plot(
                [r["epoch"] * per_epoch for r in ends],
                [r["loss"] for r in ends],
                color=_COLOURS["blue"],
                linewidth=2,
                marker="o" if len(ends) < 8 else None,
                markersize=4,
            )
            axis.set(title=title, xlabel="step", ylim=(0, None))
        start, handles = 0, {}
        for stage, _ in stages:
            records = [r for r in logs[stage] if r["event"] == "eval"]
            for name, key, colour in (
                ("mAP", "mAP", "blue"),
                ("nDCG", "nDCG", "green"),
                ("verb accuracy", "verb_accuracy", "orange"),
            ):
                epochs, values = [start + r["epoch"] for r in records], [r[key] for r in records]
                (handles[name],) = axes[2].plot(epochs, values, color=_COLOURS[colour], linewidth=2, marker="o", markersize=4)
            if stage == "pretrain":
                start = records[-1]["epoch"]
                axes[2].axvline(start, color=_INK, linewidth=0.8, linestyle=":")
        axes[2].set(title="test clips, percent (dotted: fine-tuning)", xlabel="epoch", ylim=(0, 100))
        axes[2].legend(handles.values(), handles, frameon=False, loc="lower right", ncols=3, fontsize=9)
        axes[2].xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" role="img" aria-label="loss and metrics">',
        svg,
        count=1,
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return _safe(svg)


def _safe(svg):
    """Marks the figure's SVG, which is made of our own numbers and labels, as markup."""
    from markupsafe import Markup

    assert "<script" not in svg and "http" not in html.unescape(svg).replace("http://www.w3.org/", "")
    return Markup(svg)
