"""What a model makes of clips and captions, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaat_fast.data.video import VideoError
from evaat_fast.eval import tricks
from evaat_fast.model import EVA02AT, trim
from evaat_fast.train import inputs
from evaat_fast.train.config import Config

VIEWS = ("flip", "three-crops")  # the tricks that are of several views of a clip


@dataclass(frozen=True)
class Batch:
    """rows: int64 [B], of the data set. embeddings: float32 [B, E] on the CPU. unreadable: why, by row, for those that are
    in neither."""

    rows: Tensor
    embeddings: Tensor
    unreadable: dict[int, str]


class ThreeCrops:
    """Three square crops along the longer side, each resized to S: `transform(clip)`, uint8 [T, H, W, 3] to [T, S, 3 S, 3]."""

    def __init__(self, crop: Callable[[Tensor], Tensor]):
        self.crop = crop

    def __call__(self, clip: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.cat([self.crop(view) for view in tricks.crops(clip, 3)], dim=2)


class _Readable(Dataset):
    """Of each item its row and its video, or why there is none: what a worker raises arrives as a page of its own."""

    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = int(self.rows[index])
        try:
            return row, self.data[row]["video"], ""
        except VideoError as error:
            return row, None, str(error).splitlines()[0]


def _collate(items):
    videos = [video for _, video, _ in items if video is not None]
    rows = torch.tensor([row for row, video, _ in items if video is not None], dtype=torch.int64)
    return rows, torch.stack(videos) if videos else None, {row: why for row, video, why in items if video is None}


@torch.inference_mode()
def of_clips(
    model: EVA02AT,
    data: Dataset,
    config: Config,
    device: torch.device,
    *,
    rows: Sequence[int] | None = None,
    views: Sequence[str] = (),
    normalize: bool = True,
) -> Iterator[Batch]:
    """Embeds clips in order; memory stays that of a few batches.

    Args:
        model: an EVA02AT in evaluation mode. data: items dict(video uint8 [T, H, W, 3]), that raise VideoError.
        config: its batch size, workers and precision. device: where the model is.
        rows: of data; None: all. views: of VIEWS; their embeddings are averaged.
        normalize: to length 1.

    Raises:
        ValueError: views whose mean is not to be normalised.
    """
    if views and not normalize:
        raise ValueError("normalize: several views are averaged at length 1, so their mean cannot be left as it comes")
    loader: DataLoader[Any] = DataLoader(
        _Readable(data, range(len(data)) if rows is None else rows),  # type: ignore[arg-type]
        config.eval.batch_size,
        num_workers=config.data.workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if config.data.workers else None,
    )
    width = model.config.size[1]

    def encode(video: Tensor) -> Tensor:
        return model.encode_video(video, normalize=normalize).float()

    with inputs.autocast(config, device, model):
        for found, video, unreadable in loader:
            if video is None:
                yield Batch(found, torch.zeros(0, model.config.embed_dim), unreadable)
                continue
            video = video.to(device, non_blocking=True)
            if not views:
                yield Batch(found, encode(video).cpu(), unreadable)
                continue
            seen = list(video.split(width, dim=-2)) if "three-crops" in views else [video]
            if "flip" in views:
                seen += [tricks.flip(view) for view in seen]
            yield Batch(found, tricks.mean_view(encode, [view.contiguous() for view in seen]).cpu(), unreadable)


@torch.inference_mode()
def of_texts(
    model: EVA02AT, texts: Sequence[str], config: Config, device: torch.device, normalize: bool = True
) -> Iterator[Tensor]:
    """float32 [B, E] on the CPU, for batches of the texts in order."""
    tokenize, size = inputs.tokenizer(config), config.eval.batch_size
    with inputs.autocast(config, device, model):
        for first in range(0, len(texts), size):
            tokens = trim(tokenize(list(texts[first : first + size]))).to(device)
            yield model.encode_text(tokens, normalize=normalize).float().cpu()


def similarity(clips: Tensor, texts: Tensor) -> Tensor:
    """float32 cosine similarities [clips, texts] of embeddings."""
    return F.normalize(clips.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
