"""What a run needs before it begins: a device that is there, a folder that can be written to, its model."""

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import evaat_fast
from evaat_fast.model import EVA02AT
from evaat_fast.train.config import KEYS, Config, ConfigError
from evaat_fast.train.sections import default

# What a run may be continued with another value of: its gradients are clipped from there on, or cost less memory.
_FREE = ("optim.clip_norm", "model.grad_checkpointing")
# What decides what is learned besides the sections of which all does.
_BOUND = (
    *("data.kind", "data.crop_scale", "data.jitter", "data.sampler", "data.positive"),
    *("data.labels", "data.test_share", "data.split_seed", "data.similarity"),
    *("train.batch_size", "train.seed", "train.distinct", "train.precision", "train.ema"),
)


def choose_device(config: Config) -> torch.device:
    """The torch.device that config.train.device names.

    Raises:
        ConfigError: an unknown device, or one that is not here.
    """
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes each has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device: expected auto, cpu, cuda or cuda:0, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device: expected auto, cpu, cuda or cuda:0, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device: {name!r} was asked for, but torch sees no CUDA device")
    if device.type != "cuda" and config.train.cuda_graph:
        raise ConfigError(f"train.cuda_graph: needs a CUDA device, got train.device = {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device: {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def check_folder(path: str | os.PathLike[str], name: str = "train.out") -> Path:
    """Proves that `path` is a folder that can be written to, or could be made; it makes nothing.

    Raises:
        ConfigError: neither.
    """
    path = Path(path)
    try:
        if any(len(os.fsencode(part)) > 200 for part in path.parts):  # names may have 255 bytes, and ours are longer
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists() or p.is_symlink())
        probe = nearest / f".write-test.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{name}: the folder {str(path)!r} cannot be written to: {error.strerror}") from None
    return path


def check_same_run(stored: Mapping[str, Any], config: Config, source: str | os.PathLike[str]) -> None:
    """Raises ConfigError where a checkpoint was made by another run than `config` describes, or by a longer one."""
    ours = config.to_dict()
    names = [f"{section}.{name}" for section in ("model", "loss", "optim", "schedule") for name in ours[section]]
    for key in (*names, *_BOUND):
        section, name = key.split(".")
        if key in _FREE:
            continue
        theirs = stored.get(section, {}).get(name, default(KEYS[key]))  # keys are younger than some runs
        if theirs != ours[section][name]:
            raise ConfigError(
                f"{source} was made with {key} = {theirs!r}, this run has {ours[section][name]!r}; to start another run from "
                "its weights, give that a folder of its own and set train.init"
            )


def build_model(config: Config, stored: Mapping[str, Any] | None = None) -> EVA02AT:
    """The model of `config`, on the CPU, drawn from train.seed, with weights from train.init or model.pretrained; or, for a run
    that goes on from the checkpoint `stored`, without them, but with the `norm` that came with them.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or do not fit.
    """
    torch.manual_seed(config.train.seed)
    pretrained = (config.train.init or config.model.pretrained or None) if stored is None else None
    came = {} if stored is None or "norm" not in stored["model_config"] else {"norm": stored["model_config"]["norm"]}
    try:
        model = evaat_fast.create_model(
            config.model.name,
            config.model.num_frames or None,
            pretrained,
            temperature=config.loss.temperature,
            **{**came, **config.model.overrides},
        )
    except (FileNotFoundError, ValueError) as error:
        if config.train.init and str(error).startswith("pretrained: "):
            raise type(error)(f"train.init: {str(error).removeprefix('pretrained: ')}") from None
        raise
    except (RuntimeError, MemoryError) as error:  # sizes that no memory holds
        raise ConfigError(f"model: cannot be built: {str(error).splitlines()[0] if str(error) else 'out of memory'}") from None
    with torch.no_grad():
        model.logit_scale.fill_(math.log(1 / config.loss.temperature))
    model.logit_scale.requires_grad_(config.loss.learnable_temperature)
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    return model
