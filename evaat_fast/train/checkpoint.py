"""Checkpoints of a run: all that continuing it needs, written so that a reader sees the old file or the new one.

The weights lie under "state_dict", the masters where a model holds rounded ones, and the model's configuration (with its
`norm`) under "model_config", as `evaat_fast.model` stores them: `create_model(name, pretrained="run/last.pt")` reads them too.
"""

import dataclasses
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaat_fast._files import write_atomically
from evaat_fast.train.config import Config
from evaat_fast.train.masters import Masters

LAST = "last.pt"


def save(
    path: str | os.PathLike[str],
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    config: Config,
    clips: Mapping[str, int] | None = None,
) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: the file. masters: a model's. optimizer: theirs. epoch: how many epochs are done.
        config: the run's Config. clips: of `fingerprint`, what it was trained on.
    """
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    content = {
        "state_dict": masters.state_dict(),
        "model_config": dataclasses.asdict(masters.model.config),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "config": config.to_dict(),
        "rng": rng,
        "clips": dict(clips or {}),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def fingerprint(rows: np.ndarray) -> dict[str, int]:
    """Of the clips of a table that a run draws from, int64 rows: how many they are, and a sum that tells others from them."""
    return {"count": len(rows), "crc32": zlib.crc32(np.ascontiguousarray(rows, np.int64).tobytes())}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of a run as a dict.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that `save` did not write.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is none of its own
        raise ValueError(
            f"checkpoint: {str(path)!r} is not a checkpoint that torch can read safely ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {str(path)!r} is not a checkpoint of a run, but a {type(content).__name__}")
    missing = [k for k in ("state_dict", "model_config", "optimizer", "epoch", "config", "rng") if k not in content]
    if missing:
        raise ValueError(f"checkpoint: {str(path)!r} is not a checkpoint of a run: it lacks {', '.join(missing)}")
    kinds = {"state_dict": dict, "optimizer": dict, "epoch": int, "config": dict, "rng": dict}
    for name, kind in kinds.items():
        if not isinstance(content[name], kind) or (kind is int and content[name] < 0):
            raise ValueError(f"checkpoint: {str(path)!r} is damaged: its {name} is {str(content[name])[:40]!r}")
    return content


def restore(
    stored: Mapping[str, Any], masters: Masters, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]
) -> None:
    """Puts a checkpoint's weights, moments and random state in their places.

    Raises:
        ValueError: they do not fit, so the file is damaged or another version wrote it.
    """
    try:
        masters.load_state_dict(stored["state_dict"])
        optimizer.load_state_dict(stored["optimizer"])
        restore_rng(stored["rng"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {str(path)!r} cannot be continued: {reason}") from None


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Puts torch's generators back to a checkpoint's state, those of the GPUs where as many are there."""
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available() and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
