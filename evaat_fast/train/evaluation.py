"""What a model retrieves: the EK-100 metrics of a test split, and how often the verb is right."""

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from evaat_fast.data.dataset import Frames
from evaat_fast.data.ek100 import EK100
from evaat_fast.eval import mir
from evaat_fast.model import EVA02AT, trim
from evaat_fast.train import inputs
from evaat_fast.train.config import Config


@overload
def evaluate(
    model: EVA02AT,
    data: EK100,
    config: Config,
    device: torch.device,
    *,
    frames: Frames | None = None,
    return_similarity: Literal[False] = False,
) -> dict[str, float]: ...


@overload
def evaluate(
    model: EVA02AT,
    data: EK100,
    config: Config,
    device: torch.device,
    *,
    frames: Frames | None = None,
    return_similarity: Literal[True],
) -> tuple[dict[str, float], Tensor]: ...


def evaluate(
    model: EVA02AT,
    data: EK100,
    config: Config,
    device: torch.device,
    *,
    frames: Frames | None = None,
    return_similarity: bool = False,
) -> dict[str, float] | tuple[dict[str, float], Tensor]:
    """The metrics of `model` on a test split.

    Args:
        model: an EVA02AT. data: a test split. config: a Config. device: where the model is.
        frames: instead of config.eval.frames, what the model is shown of each clip: "ordered", "shuffled", "reversed"
            or "frozen" (one frame, repeated); see EK100.
        return_similarity: also return the float32 cosine similarities [clips, captions].

    Returns:
        A dict of percentages: what `mir.evaluate` gives, and "verb_accuracy": for how many clips the caption retrieved
        first has the clip's verb class.
    """
    similarity = embed(model, data, config, device, frames or config.eval.frames)
    metrics = measure(similarity, data)
    return (metrics, similarity) if return_similarity else metrics


def measure(similarity: Tensor, data: EK100) -> dict[str, float]:
    """The metrics of a similarity matrix [clips, captions]."""
    metrics = dict(mir.evaluate(similarity, data.relevancy))
    first = similarity.argmax(1)
    right = torch.as_tensor(data.caption_verbs)[first] == torch.as_tensor(data.clip_verbs)
    metrics["verb_accuracy"] = 100 * right.double().mean().item()
    return metrics


@torch.inference_mode()
def embed(model: EVA02AT, data: EK100, config: Config, device: torch.device, frames: Frames = "ordered") -> Tensor:
    """float32 cosine similarities [clips, captions], on the CPU."""
    was_training = model.training
    model.eval()
    with inputs.autocast(config, device, model):
        tokens = inputs.tokenizer(config)(data.captions)
        texts = [model.encode_text(trim(t).to(device), normalize=True).float() for t in tokens.split(config.eval.batch_size)]
        data.frames = frames
        clips = [model.encode_video(video.to(device), normalize=True).float() for video in inputs.clips(config, data, device)]
    model.train(was_training)
    return (torch.cat(clips) @ torch.cat(texts).T).cpu()


def summary(metrics: Mapping[str, float]) -> str:
    """One line."""
    return f"mAP {metrics['mAP']:.1f}  nDCG {metrics['nDCG']:.1f}  verbs {metrics['verb_accuracy']:.1f} %"
