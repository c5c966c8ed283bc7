"""What goes into a model: the data sets of a configuration, their batches, their tokens."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import evaat_fast
from evaat_fast.data.ek100 import EK100
from evaat_fast.data.ek100_files import Split
from evaat_fast.data.transforms import eval_transform, train_transform
from evaat_fast.model import EVA02AT, CLIPTokenizer, get_config, trim
from evaat_fast.train.config import Config
from evaat_fast.train.log import Progress
from evaat_fast.train.sampler import EpochSampler


def dataset(config: Config, split: Split) -> EK100:
    """The split of config.data as an EK100, with what its model needs.

    Raises:
        FileNotFoundError, ValueError: files that are missing or cannot be read.
    """
    wanted = get_config(config.model.name, **config.model.overrides)
    transform: Callable[..., Tensor]
    if split == "train":
        transform = train_transform(wanted.image_size, scale=(config.data.crop_scale, 1.0))
    else:
        transform = eval_transform(wanted.image_size)
    return EK100(
        config.data.annotations,
        config.data.videos,
        split,
        num_frames=config.model.num_frames or wanted.num_frames,
        transform=transform,
        training=split == "train" and config.data.jitter,
        on_error="replace" if split == "train" else "raise",
        positive=config.data.positive if split == "train" else "own",
        cache="memory" if config.data.cache else None,
        decoder=config.data.decoder,
        seed=config.train.seed if split == "train" else 0,
    )


def datasets(config: Config) -> dict[Split, EK100]:
    """{"train": EK100, "test": EK100}."""
    return {"train": dataset(config, "train"), "test": dataset(config, "test")}


def sampler(config: Config, data: EK100) -> EpochSampler:
    """The EpochSampler of the training split."""
    return EpochSampler(data.clip_kind, config.train.batch_size, config.train.seed, config.train.distinct)


def decode(data: EK100, progress: Progress) -> None:
    """Fills a data set's cache with all of its clips, on as many threads as there are cores.

    Args:
        data: an EK100. progress: a Progress, stepped once a clip.
    """
    data.set_epoch(0)
    data[0]  # makes the cache, which threads must not race for
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(data.__getitem__, range(len(data))):
            progress.step()


def loader(
    config: Config, data: EK100, batches: EpochSampler, tokenize: CLIPTokenizer, device: torch.device
) -> DataLoader[Any]:
    """The batches of an epoch: dict(video uint8 [B, T, H, W, 3], text int64 [B, L], kind [B], text_kind [B]).

    Args:
        config: a Config. data: the training split. batches: an EpochSampler. tokenize: from `tokenizer`.
        device: where the batches will go.
    """

    def collate(samples):
        batch = {name: torch.tensor([s[name] for s in samples]) for name in ("kind", "text_kind")}
        batch["video"] = torch.stack([s["video"] for s in samples])
        # Causal attention read at the end of the text: the padding that all rows share changes nothing.
        batch["text"] = trim(tokenize([s["text"] for s in samples]))
        return batch

    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=config.data.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if config.data.workers else None,
    )


def clips(config: Config, data: EK100, device: torch.device) -> DataLoader[Any]:
    """uint8 batches [B, T, H, W, 3] of all clips of a test split, in order."""

    def collate(samples):
        return torch.stack([s["video"] for s in samples])

    return DataLoader(
        data,
        config.eval.batch_size,
        num_workers=config.data.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if config.data.workers else None,
    )


def tokenizer(config: Config) -> CLIPTokenizer:
    """The model's tokenizer."""
    return evaat_fast.get_tokenizer(config.model.name)


def autocast(config: Config, device: torch.device, model: EVA02AT) -> torch.autocast:
    """The context that config.train.precision asks for on `device`: none for a model that holds its matrices in bfloat16."""
    precision = config.train.precision
    low = precision.startswith("bfloat16") or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low and model.matrix_dtype == torch.float32)
