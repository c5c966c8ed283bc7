"""The model of an index: which it is, and what it makes of clips and texts."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from evaat_fast import _parts, factory
from evaat_fast._files import sha256
from evaat_fast.model import trim
from evaat_fast.search.store import BadIndex
from evaat_fast.train.checkpoint import find

_FRAMES = 4  # of a clip, for weights that were trained on pictures: EVA02-AT's own number

__all__ = ["Embedder", "Settings", "device_of", "weights_of"]


@dataclass(frozen=True)
class Settings:
    """What the vectors of an index are of.

    checkpoint: the weights, as `evaat_fast.load` takes them. sha256: of their bytes. model: the configuration. seconds: of a
    clip. overlap: the share of a clip that the next one has, too. shots: whether no clip reaches beyond a cut.
    """

    checkpoint: str
    sha256: str
    model: dict[str, Any]
    seconds: float = 2.0
    overlap: float = 0.5
    shots: bool = False

    def __post_init__(self) -> None:
        for name, value, least, most in (("seconds", self.seconds, 0.5, 60.0), ("overlap", self.overlap, 0.0, 0.9)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, got {value!r}")
        if not isinstance(self.shots, bool):
            raise ValueError(f"shots: expected True or False, got {self.shots!r}")

    @property
    def stride(self) -> float:
        """Seconds from one clip to the next."""
        return self.seconds * (1 - self.overlap)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Settings":
        try:
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise BadIndex(f"the index has damaged settings ({error}); remove the folder and index again") from None


def weights_of(checkpoint: str | os.PathLike[str]) -> tuple[str, str]:
    """(what `evaat_fast.load` takes, wherever it is called; the hash of the weights), of a file, a run's folder or a name.

    Raises:
        FileNotFoundError: no such file or name. RuntimeError: a download that failed. ImportError: huggingface_hub is needed.
    """
    name = os.fspath(checkpoint)
    path = factory.locate(name)
    if Path(path).is_dir():
        path = os.fspath(find(path) or path)
    if not Path(path).exists():
        raise FileNotFoundError(f"checkpoint: there is no file {path!r}; it may also be one of {', '.join(factory.NAMES)}")
    hashed = sha256(_parts.standing(path) or path) if not Path(path).is_dir() or _parts.is_parts(path) else _of_folder(path)
    return (os.path.abspath(path) if Path(name).exists() else name), hashed


def _of_folder(path):
    """Of a folder as the hub has them: its files of weights."""
    digest = hashlib.sha256()
    for part in sorted(x for x in Path(path).rglob("*") if x.is_file()):
        digest.update(sha256(part).encode())
    return digest.hexdigest()


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        ValueError: an unknown device, or one that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:0, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


class Embedder:
    """A model with its tokenizer and crop.

    Args:
        checkpoint: as for `evaat_fast.load`. device: where it computes, "auto", "cpu" or "cuda". model: fields that the weights
            leave open, such as num_frames. Weights of pictures are inflated to 4 frames where it does not say.

    Raises:
        As `evaat_fast.load`, and ValueError for a device that is not here.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: str = "auto", **model: Any):
        self.device = device_of(device)
        loaded = factory.load(checkpoint, **model)
        if loaded.model.config.num_frames == 1 and "num_frames" not in model:
            loaded = factory.load(checkpoint, num_frames=_FRAMES, **model)
        self.model, self.tokenizer, self.crop = loaded.model.to(self.device), loaded.tokenizer, loaded.transform
        self.config = self.model.config
        self._low = self.device.type == "cuda" or _products_in_bfloat16()

    @classmethod
    def of(cls, settings: Settings, device: str = "auto") -> "Embedder":
        """The model of an index.

        Raises:
            BadIndex: its weights are not there, or others now.
        """
        try:
            _, found = weights_of(settings.checkpoint)
        except (FileNotFoundError, RuntimeError) as error:
            raise BadIndex(f"the weights of the index, {settings.checkpoint}, are not there: {error}") from None
        check_same(settings, settings.checkpoint, found)
        # The two that are the user's to choose; the others are the weights' own.
        free = {name: settings.model[name] for name in ("num_frames", "image_size")}
        free["image_size"] = tuple(free["image_size"]) if isinstance(free["image_size"], list) else free["image_size"]
        return cls(settings.checkpoint, device, **free)

    def described(self) -> dict[str, Any]:
        """The configuration, as JSON keeps it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}

    @torch.inference_mode()
    def clips(self, video: torch.Tensor) -> np.ndarray:
        """uint8 [B, T, S, S, 3] to float16 [B, E] of length 1."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._low):
            found = self.model.encode_video(video.to(self.device, non_blocking=True))
        return F.normalize(found.float(), dim=-1).half().cpu().numpy()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [B, E] of length 1, on the CPU."""
        tokens = trim(self.tokenizer(list(texts))).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu()


def _products_in_bfloat16() -> bool:
    """Whether this CPU has them: a small model's batch then takes half as long. Others would compute them by way of float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def check_same(settings: Settings, checkpoint: str, found: str) -> None:
    """Raises BadIndex unless the weights with the hash `found` are those of the index."""
    if found != settings.sha256:
        other = f" ({settings.checkpoint})" if settings.checkpoint != checkpoint else ""
        raise BadIndex(
            f"checkpoint: {checkpoint} is not what the index was made with{other}: its vectors mean nothing to other weights; "
            "index anew with --overwrite, or into another folder with --out"
        )


def check_settings(stored: Settings, asked: dict[str, Any]) -> None:
    """Raises BadIndex where what is asked for (None: nothing) differs from what the index has."""
    has = {**dataclasses.asdict(stored), "frames": stored.model["num_frames"]}
    for name, value in asked.items():
        if value is not None and value != has[name]:
            raise BadIndex(
                f"--{name}: the index has {has[name]!r}, got {value!r}; index anew with --overwrite, or into another folder "
                "with --out"
            )
