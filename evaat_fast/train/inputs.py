"""What goes into a model: the data sets of a configuration, their batches, their tokens."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import evaat_fast
from evaat_fast.data.ek100 import EK100
from evaat_fast.data.ek100_files import Split
from evaat_fast.data.transforms import eval_transform, train_transform
from evaat_fast.model import EVA02AT, CLIPTokenizer, ModelConfig, draw_patches, get_config, trim
from evaat_fast.train.config import Config
from evaat_fast.train.log import Progress
from evaat_fast.train.sampler import EpochSampler

TEXT_STEP = 16  # captions of a CUDA graph are padded to a multiple of it, or their lengths would make dozens of graphs


def model_config(config: Config) -> ModelConfig:
    """Of the model that the run trains."""
    frames = {"num_frames": config.model.num_frames} if config.model.num_frames else {}
    return get_config(config.model.name, **config.model.overrides, **frames)


def dataset(config: Config, split: Split) -> EK100:
    """The split of config.data as an EK100, with what its model needs.

    Raises:
        FileNotFoundError, ValueError: files that are missing or cannot be read.
    """
    wanted = model_config(config)
    transform: Callable[..., Tensor]
    if split == "train":
        transform = train_transform(wanted.image_size, scale=(config.data.crop_scale, 1.0))
    else:
        transform = eval_transform(wanted.image_size)
    return EK100(
        config.data.annotations,
        config.data.videos,
        split,
        num_frames=wanted.num_frames,
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
    """The batches of an epoch: dict(video uint8 [B, T, H, W, 3], text int64 [B, L], kind [B], text_kind [B]), and with
    model.patch_dropout patches int64 [B, N'], drawn from the seed, the epoch and the batch's clips.

    Args:
        config: a Config. data: the training split. batches: an EpochSampler. tokenize: from `tokenizer`.
        device: where the batches will go.
    """
    model, dropped = model_config(config), config.model.patch_dropout

    def collate(samples):
        batch = {name: torch.tensor([s[name] for s in samples]) for name in ("kind", "text_kind")}
        batch["video"] = torch.stack([s["video"] for s in samples])
        # Causal attention read at the end of the text: the padding that all rows share changes nothing.
        text = trim(tokenize([s["text"] for s in samples]))
        if config.train.cuda_graph:  # here, as what is padded after it was pinned is copied while the host waits
            length = min(math.ceil(text.shape[1] / TEXT_STEP) * TEXT_STEP, model.context_length)
            text = torch.nn.functional.pad(text, (0, length - text.shape[1]))
        batch["text"] = text
        if dropped:
            seed = np.random.SeedSequence((config.train.seed, batches.epoch, *(s["index"] for s in samples)))
            generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            batch["patches"] = draw_patches(len(samples), model.grid, dropped, generator)
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
