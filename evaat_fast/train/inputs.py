"""What goes into a model: the data sets of a configuration, their batches, their tokens."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

import evaat_fast
from evaat_fast.data.check import Report, check
from evaat_fast.data.choices import Split
from evaat_fast.data.corpora import open_corpus
from evaat_fast.data.dataset import ClipDataset
from evaat_fast.data.decode.sums import Written, write
from evaat_fast.data.ek100 import EK100
from evaat_fast.data.labels import ActionClips, LabelledClips
from evaat_fast.data.plain import PlainClips
from evaat_fast.data.readers import plain
from evaat_fast.data.transforms import eval_transform, train_transform
from evaat_fast.model import EVA02AT, CLIPTokenizer, ModelConfig, draw_patches, get_config, trim
from evaat_fast.train.config import Config, ConfigError
from evaat_fast.train.log import Progress
from evaat_fast.train.ranks import Ranks
from evaat_fast.train.sampler import EpochSampler

TEXT_STEP = 16  # captions of a CUDA graph are padded to a multiple of it, or their lengths would make dozens of graphs


def model_config(config: Config) -> ModelConfig:
    """Of the model that the run trains."""
    frames = {"num_frames": config.model.num_frames} if config.model.num_frames else {}
    return get_config(config.model.name, **config.model.overrides, **frames)


# Test sets whose clips and captions are retrieved by each other.
Retrieval = EK100 | PlainClips


@dataclass(frozen=True)
class Splits:
    """What a run trains on, and what it evaluates on: None for the corpora that have no retrieval test of their own."""

    train: ClipDataset
    test: Retrieval | None


def splits(config: Config, missing: Literal["raise", "broken"] = "raise") -> Splits:
    """Those of config.data, with what its model needs. Missing videos of the training split count as broken, those of the
    test split too with missing="broken".

    Raises:
        FileNotFoundError, ValueError: files that are missing or cannot be read.
    """
    wanted = model_config(config)
    train = open_split(
        config,
        "train",
        transform=train_transform(wanted.image_size, scale=(config.data.crop_scale, 1.0)),
        jitter=config.data.jitter,
        max_broken=config.data.max_broken,
        missing="broken",
        seed=config.train.seed,
        cache=_cache(config),
        **({"positive": config.data.positive} if config.data.kind == "ek100-mir" else {}),
        **({"similarity": config.data.similarity} if config.data.kind == "csv" else {}),
        **_shared(config),
    )
    tested = config.data.kind == "ek100-mir" or (config.data.kind == "csv" and _has_test(config))
    return Splits(train, test_split(config, missing) if tested else None)


def open_split(config: Config, split: Split, **options: Any) -> ClipDataset:
    """`open_corpus` of config.data."""
    data, own = config.data, {}
    if data.kind == "csv":
        own = {"labels": data.labels, "test_share": data.test_share, "split_seed": data.split_seed}
    return open_corpus(data.kind, data.annotations, data.videos, split, **own, **options)


def _has_test(config):
    data = config.data
    if data.test_share:  # then some video is tested
        return True
    return len(plain.read(data.annotations, data.videos, "test", labels=data.labels, test_share=0.0)) > 0


def test_split(config: Config, missing: Literal["raise", "broken"] = "raise") -> Retrieval:
    """The test split of config.data.

    Raises:
        FileNotFoundError, ValueError: as `splits`. ConfigError: the corpus has none.
    """
    if config.data.kind not in ("ek100-mir", "csv"):
        raise ConfigError(f"data.kind: {config.data.kind!r} has no retrieval test; evaluate with evaat-fast eval --task")
    data = open_split(config, "test", cache=_cache(config), **of_evaluation(config, missing))
    assert isinstance(data, Retrieval)
    return data


def of_evaluation(config: Config, missing: Literal["raise", "broken"] = "raise") -> dict[str, Any]:
    """The options of a data set that config's model is evaluated on."""
    transform = eval_transform(model_config(config).image_size)
    return {"transform": transform, "training": False, "missing": missing, **_shared(config)}


def _shared(config: Config) -> dict[str, Any]:
    frames = model_config(config).num_frames
    data = config.data
    return {"num_frames": frames, "sampler": data.sampler, "decoder": data.decoder, "sums": data.sums or None}


def write_sums(config: Config, progress: Callable[[int, int], object] | None = None) -> Written:
    """Makes the checksums of all files that the splits of config.data name, in config.data.sums.

    Raises:
        FileNotFoundError, ValueError: as `splits`. ConfigError: data.sums is not set.
    """
    if not config.data.sums:
        raise ConfigError("data.sums: expected the folder that the checksums are to lie in, got none")
    found = splits(dataclasses.replace(config, data=dataclasses.replace(config.data, sums="")), missing="broken")
    sources = [source for data in (found.train, found.test) if data is not None for source in data.sources.values()]
    files = sorted({path for source in sources for path in source.files})
    return write(config.data.sums, config.data.videos, files, progress=progress)


def _cache(config: Config) -> Literal["memory"] | None:
    return "memory" if config.data.cache else None


def inspect(config: Config, data: Splits, say: Callable[[str], object]) -> Report:
    """What is wrong with the training clips, from the headers of their files, within seconds; test clips are looked at too.

    Args:
        config: a Config. data: from `splits`. say: is told each report that found something.

    Raises:
        ConfigError: more of the training clips are broken than config.data.max_broken allows, or any test clip.
    """
    report = check(data.train)
    _judge("training", report, config.data.max_broken, f"data.max_broken = {config.data.max_broken:g} allows", say)
    if data.test is not None:
        _judge("test", check(data.test), 0.0, "a metric can leave out", say)
    return report


def _judge(split, report, allowed, words, say):
    if report.findings:
        say(f"{split}: {report}")
    if report.share > allowed:
        raise ConfigError(
            f"data: {len(report.broken)} of {report.clips} {split} clips ({100 * report.share:.3g} %) cannot be used, more "
            f"than {words}; {report.worst}. evaat-fast check lists all"
        )


def sampler(config: Config, data: ClipDataset, rows: np.ndarray | None = None) -> EpochSampler:
    """The EpochSampler of the training split, over the clips `rows`."""
    kinds = data.clip_kind
    if kinds is None:
        kinds = data.caption_kinds() if config.train.distinct else torch.zeros(len(data), dtype=torch.int64)
    usable = None if rows is None else torch.from_numpy(rows)
    groups = _noun_groups(data) if config.train.distinct == "nouns" else None
    return EpochSampler(kinds, config.train.batch_size, config.train.seed, bool(config.train.distinct), usable, groups)


def _noun_groups(data):
    """For each clip the number of its set of noun classes."""
    if not isinstance(data, LabelledClips) or isinstance(data, ActionClips):
        raise ConfigError(
            'train.distinct: "nouns" needs clips with noun classes, as data.kind = "ek100-mir" has them; expected true'
        )
    numbers: dict[frozenset[int], int] = {}
    groups = torch.tensor([numbers.setdefault(nouns, len(numbers)) for _, nouns in data.kinds])
    return groups[data.clip_kind]


def decode(data: ClipDataset, progress: Progress, rows: np.ndarray | None = None) -> None:
    """Fills a data set's cache, on as many threads as there are cores.

    Args:
        data: a ClipDataset. progress: a Progress, stepped once a clip. rows: of the clips; None for all of them.
    """
    data.set_epoch(0)
    rows = np.arange(len(data)) if rows is None else rows
    # Not in their order: the clips of a damaged file follow one another, and so many at once would be too many of the first.
    order = np.random.default_rng(0).permutation(rows).tolist()
    data[order[0]]  # makes the cache, which threads must not race for
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(data.__getitem__, order):
            progress.step()


def loader(
    config: Config,
    data: ClipDataset,
    batches: EpochSampler,
    tokenize: CLIPTokenizer,
    device: torch.device,
    ranks: Ranks | None = None,
    first: int = 0,
) -> DataLoader[Any]:
    """The batches of an epoch, from the one numbered `first` on: dict(video uint8 [B, T, H, W, 3], text int64 [B, L]), of a
    corpus with labels also kind [B] and text_kind [B], and with model.patch_dropout patches int64 [B, N'], drawn from the seed,
    the epoch and each clip.

    Args:
        config: a Config. data: the training split. batches: an EpochSampler. tokenize: from `tokenizer`.
        device: where the batches will go. ranks: the processes that share each batch; None: this one has all of it.
    """
    model, dropped = model_config(config), config.model.patch_dropout

    def patches(index):
        # Of the clip alone: which other clips are in this process's part must not matter.
        seed = np.random.SeedSequence((config.train.seed, batches.epoch, index))
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return draw_patches(1, model.grid, dropped, generator)

    def collate(samples):
        batch = {name: torch.tensor([s[name] for s in samples]) for name in ("kind", "text_kind") if name in samples[0]}
        batch["video"] = torch.stack([s["video"] for s in samples])
        # Causal attention read at the end of the text: the padding that all rows share changes nothing.
        text = trim(tokenize([s["text"] for s in samples]))
        if config.train.cuda_graph:  # here, as what is padded after it was pinned is copied while the host waits
            length = min(math.ceil(text.shape[1] / TEXT_STEP) * TEXT_STEP, model.context_length)
            text = torch.nn.functional.pad(text, (0, length - text.shape[1]))
        batch["text"] = text
        if dropped:
            batch["patches"] = torch.cat([patches(s["index"]) for s in samples])
        return batch

    return DataLoader(
        data,
        batch_sampler=_Shares(batches, ranks or Ranks(), first),
        num_workers=config.data.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if config.data.workers else None,
    )


class _Shares:
    """The parts of an epoch's batches that are this process's, from one of them on."""

    def __init__(self, batches: EpochSampler, ranks: Ranks, first: int):
        self.batches, self.ranks, self.first = batches, ranks, first

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.ranks.share, itertools.islice(self.batches, self.first, None))


def tokenizer(config: Config) -> CLIPTokenizer:
    """The model's tokenizer."""
    return evaat_fast.get_tokenizer(config.model.name)


def autocast(config: Config, device: torch.device, model: EVA02AT) -> torch.autocast:
    """The context that config.train.precision asks for on `device`: none for a model that holds its matrices in bfloat16."""
    precision = config.train.precision
    low = precision.startswith("bfloat16") or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low and model.matrix_dtype == torch.float32)
