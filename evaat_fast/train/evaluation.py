"""What a model retrieves: the EK-100 metrics of a test split, and how often the verb is right; of one's own clips recalls and
ranks, and with label columns the same metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from evaat_fast.data.choices import Frames
from evaat_fast.data.kinds import kinds_relevancy
from evaat_fast.data.plain import PlainClips
from evaat_fast.data.video import VideoError
from evaat_fast.eval import Result, mir, recall
from evaat_fast.model import EVA02AT
from evaat_fast.train import embedding
from evaat_fast.train.config import Config
from evaat_fast.train.inputs import Retrieval
from evaat_fast.train.ranks import Ranks, in_order, interleaved


@overload
def evaluate(
    model: EVA02AT,
    data: Retrieval,
    config: Config,
    device: torch.device,
    *,
    frames: Frames | None = None,
    ranks: Ranks | None = None,
    return_similarity: Literal[False] = False,
) -> dict[str, float]: ...


@overload
def evaluate(
    model: EVA02AT,
    data: Retrieval,
    config: Config,
    device: torch.device,
    *,
    frames: Frames | None = None,
    ranks: Ranks | None = None,
    return_similarity: Literal[True],
) -> tuple[dict[str, float], Tensor]: ...


def evaluate(
    model: EVA02AT,
    data: Retrieval,
    config: Config,
    device: torch.device,
    *,
    frames: Frames | None = None,
    ranks: Ranks | None = None,
    return_similarity: bool = False,
) -> dict[str, float] | tuple[dict[str, float], Tensor]:
    """The metrics of `model` on a test split.

    Args:
        model: an EVA02AT. data: a test split. config: a Config. device: where the model is.
        frames: instead of config.eval.frames, what the model is shown of each clip: "ordered", "shuffled", "reversed"
            or "frozen" (one frame, repeated); see `ClipDataset`.
        ranks: the processes that share the work; each returns all of it.
        return_similarity: also return the float32 cosine similarities [clips, captions].

    Returns:
        A dict of percentages: what `measure` gives.
    """
    similarity = embed(model, data, config, device, frames or config.eval.frames, ranks)
    metrics = measure(similarity, data)
    return (metrics, similarity) if return_similarity else metrics


def measure(similarity: Tensor, data: Retrieval) -> dict[str, float]:
    """The metrics of a similarity matrix [clips, captions]: what `mir.evaluate` gives, Recall@1, 5 and 10 and median ranks,
    and, where there are several verbs, "verb_accuracy": for how many clips the caption retrieved first has the clip's
    verb class, in per cent. nan for what the labels leave nothing to measure of."""
    result = report(similarity, data)
    return {**result.metrics, **{name: n for name, n in result.counts.items() if name in ("excluded_v2t", "excluded_t2v")}}


def report(similarity: Tensor, data: Retrieval, kept: Tensor | None = None) -> Result:
    """The metrics of `measure` with counts and notes.

    Args:
        similarity: [clips, captions]. data: a test split. kept: bool [clips], which clips count; None: all. A caption whose
            every right clip is left out is no query any more, but still a candidate.
    """
    every = torch.ones(len(similarity), dtype=torch.bool) if kept is None else kept
    relevancy = exact_relevancy(data)[every]
    similarity = similarity[every.to(similarity.device)]
    found = recall.report(similarity, relevancy == 1)
    if isinstance(data, PlainClips) and not data.labelled:
        note = (
            "without label columns the right captions are a clip's own, and there is no mAP or nDCG, which are of graded labels"
        )
        return Result(found.metrics, found.counts, (note, *found.notes))
    result = mir.report(similarity, relevancy)
    metrics, counts = {**result.metrics, **found.metrics}, dict(result.counts)
    if isinstance(data, PlainClips):
        return Result(metrics, counts, result.notes + found.notes)
    verbs, caption_verbs = torch.as_tensor(data.clip_verbs)[every], torch.as_tensor(data.caption_verbs)
    if len(caption_verbs.unique()) > 1:
        right = caption_verbs[similarity.argmax(1).cpu()] == verbs
        metrics["verb_accuracy"] = 100 * right.double().mean().item()
        counts["verbs"] = len(verbs.unique())
    return Result(metrics, counts, result.notes + found.notes)


def exact_relevancy(data: Retrieval) -> Tensor:
    """float64 [clips, captions]: data.relevancy, which is float32, as the published matrices have it."""
    if isinstance(data, PlainClips):
        return data.relevancy
    return kinds_relevancy(data.kinds, torch.float64)[data.clip_kind][:, data.caption_kind]


@torch.inference_mode()
def embed(
    model: EVA02AT,
    data: Retrieval,
    config: Config,
    device: torch.device,
    frames: Frames = "ordered",
    ranks: Ranks | None = None,
) -> Tensor:
    """float32 cosine similarities [clips, captions], on the CPU. With `ranks`, each process embeds its share, and all have all.

    Raises:
        VideoError: a clip that cannot be read, on every rank.
    """
    ranks, was_training = ranks or Ranks(), model.training
    model.eval()
    data.frames = frames
    mine = interleaved(len(data.captions), ranks)
    texts = list(embedding.of_texts(model, [data.captions[i] for i in mine], config, device))
    clips, problem = [], None
    for batch in embedding.of_clips(model, data, config, device, rows=interleaved(len(data), ranks)):
        problem = problem or next(iter(batch.unreadable.values()), None)
        clips.append(batch.embeddings)
    model.train(was_training)
    none = torch.zeros(0, model.config.embed_dim)
    # A rank that raised alone would leave the others waiting for it.
    parts = ranks.gather((torch.cat([none, *clips]), torch.cat([none, *texts]), problem))
    for *_, problem in parts:
        if problem:
            raise VideoError(problem)
    of_clips, of_texts = (in_order([part[i] for part in parts]) for i in range(2))
    return of_clips @ of_texts.T


def summary(metrics: Mapping[str, float]) -> str:
    """One line."""
    verbs = f"  verbs {metrics['verb_accuracy']:.1f} %" if "verb_accuracy" in metrics else ""
    if "mAP" not in metrics:
        both = {k: (metrics[f"R@{k}_v2t"] + metrics[f"R@{k}_t2v"]) / 2 for k in (1, 5, 10)}
        return "  ".join(f"R@{k} {value:.1f}" for k, value in both.items() if math.isfinite(value))
    return f"mAP {metrics['mAP']:.1f}  nDCG {metrics['nDCG']:.1f}{verbs}"


def lines(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """A table of both directions of the metrics, with averages where there are any; verbs, and what mAP leaves out."""

    def shown(name: str, width: int) -> str:
        value = metrics.get(name, math.nan)
        return f"{value:>{width}.2f}" if math.isfinite(value) else f"{'-':>{width}}"

    average = any(name in metrics for name in names)
    found = [f"{'':<6}{'video->text':>13}{'text->video':>13}" + f"{'average':>9}" * average]
    for name in names:
        found.append(f"{name:<6}{shown(f'{name}_v2t', 13)}{shown(f'{name}_t2v', 13)}" + shown(name, 9) * average)
    if "verb_accuracy" in metrics:
        found.append(f"verb accuracy of the caption retrieved first: {shown('verb_accuracy', 0)} %")
    clips, captions = (int(metrics.get(f"excluded_{way}", 0)) for way in ("v2t", "t2v"))
    if clips or captions:
        found.append(f"left out of mAP, for nothing matches them exactly: {clips} clips, {captions} captions")
    return found
