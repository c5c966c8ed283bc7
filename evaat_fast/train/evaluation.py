"""What a model retrieves: the EK-100 metrics of a test split, and how often the verb is right."""

import torch

from evaat_fast.eval import mir
from evaat_fast.model import trim
from evaat_fast.train import inputs


def evaluate(model, data, config, device, *, frames=None, return_similarity=False):
    """The metrics of `model` on a test split.

    Args:
        model: an EVA02AT. data: a test split. config: a Config (eval.batch_size, eval.frames, precision). device: where.
        frames: instead of config.eval.frames, what the model is shown of each clip: "ordered", "shuffled" (another
            seeded order for each clip), "reversed" or "frozen" (the middle frame, repeated).
        return_similarity: also return the float32 cosine similarities [clips, captions].

    Returns:
        A dict of percentages: what `mir.evaluate` gives, and "verb_accuracy": for how many clips the caption retrieved
        first has the clip's verb class.
    """
    similarity = embed(model, data, config, device, frames or config.eval.frames)
    metrics = measure(similarity, data)
    return (metrics, similarity) if return_similarity else metrics


def measure(similarity, data):
    """The metrics of a similarity matrix [clips, captions]."""
    metrics = dict(mir.evaluate(similarity, data.relevancy))
    first = similarity.argmax(1)
    right = torch.as_tensor(data.caption_verbs)[first] == torch.as_tensor(data.clip_verbs)
    metrics["verb_accuracy"] = 100 * right.double().mean().item()
    return metrics


@torch.inference_mode()
def embed(model, data, config, device, frames="ordered"):
    """float32 cosine similarities [clips, captions], on the CPU."""
    was_training = model.training
    model.eval()
    with inputs.autocast(config, device):
        tokens = inputs.tokenizer(config)(data.captions)
        texts = [
            model.encode_text(trim(t).to(device), normalize=True).float() for t in tokens.split(config.eval.batch_size)
        ]
        clips, seen = [], 0
        for video in inputs.clips(config, data, device):
            video = arrange(video, frames, seen)
            seen += len(video)
            clips.append(model.encode_video(video.to(device), normalize=True).float())
    model.train(was_training)
    return (torch.cat(clips) @ torch.cat(texts).T).cpu()


def arrange(video, frames, first=0):
    """Clips [B, T, H, W, 3] as a control shows them. `first`: the number of the first clip, which seeds its shuffle."""
    if frames == "reversed":
        return video.flip(1)
    if frames == "frozen":
        middle = video.shape[1] // 2
        return video[:, middle : middle + 1].expand_as(video)
    if frames == "shuffled":
        orders = (
            torch.randperm(video.shape[1], generator=torch.Generator().manual_seed(first + i))
            for i in range(len(video))
        )
        return torch.stack([clip[order] for clip, order in zip(video, orders, strict=True)])
    return video


def summary(metrics):
    """One line."""
    return f"mAP {metrics['mAP']:.1f}  nDCG {metrics['nDCG']:.1f}  verbs {metrics['verb_accuracy']:.1f} %"
