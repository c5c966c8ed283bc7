"""A model together with what belongs to it: imported after model and data, so that neither needs the other."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from evaat_fast.data.transforms import CentreCrop, RandomResizedCrop, eval_transform, train_transform
from evaat_fast.model import EVA02AT, CLIPTokenizer, create_model, get_tokenizer
from evaat_fast.model.checkpoints import config_of, download, read
from evaat_fast.model.checkpoints.load import load_stored

__all__ = ["NAMES", "Loaded", "create_model_and_transforms", "load", "locate"]

# Weights by name: image-text models of EVA02-CLIP (arXiv 2303.15389), whose pictures are inflated to clips.
NAMES = {
    "eva02_clip_b16": "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
    "eva02_clip_l14": "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k",
    "eva02_clip_l14_336": "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k",
}


class Loaded(NamedTuple):
    """What `load` returns. model: in evaluation mode. tokenizer: captions to int64 [B, L]. transform: uint8 [T, H, W, 3] to
    what the model takes, uint8 [T, image height, width, 3]."""

    model: EVA02AT
    tokenizer: CLIPTokenizer
    transform: CentreCrop


def load(path: str | os.PathLike[str], **overrides: Any) -> Loaded:
    """A model from a file alone, with its tokenizer and the crop of evaluation: `model, tokenizer, transform = load(path)`.

    Args:
        path: a checkpoint of a run (or its folder), our weights, or those of others that say by names and shapes what they are
            of: all that `evaat_fast.model.checkpoints.read` takes; a key of `NAMES`, such as "eva02_clip_b16", or
            "hf-hub:owner/name", which are downloaded once.
        overrides: fields of ModelConfig that the weights leave open, such as num_frames=16, image_size=(224, 320), or
            activation="quick_gelu" for a CLIP of open_clip.

    Returns:
        A Loaded: (model, tokenizer, transform), on the CPU in float32.

    Raises:
        ValueError: overrides that the weights do not allow, weights that leave a field open, or that are no such model's.
        FileNotFoundError: no such file. ImportError: tokenizers or safetensors is needed and missing. RuntimeError: a download
            that failed.
    """
    stored = read(locate(path))
    config = config_of(stored, overrides)
    try:
        model = EVA02AT(config).eval()
    except (RuntimeError, MemoryError) as error:  # sizes that no memory holds
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise ValueError(f"checkpoint: {stored.source}: its model cannot be built: {reason}") from None
    load_stored(model, stored)
    return Loaded(model, get_tokenizer(context_length=config.context_length), eval_transform(config.image_size))


def locate(path: str | os.PathLike[str]) -> str:
    """The local file or folder that `load` takes for `path`: itself, or what was downloaded for a name.

    Raises:
        ImportError: huggingface_hub is needed and missing. RuntimeError: a download that failed.
    """
    name = os.fspath(path)
    if name.startswith("hf-hub:"):
        return download(name.removeprefix("hf-hub:").strip("/"))
    return download(NAMES[name]) if name in NAMES and not Path(name).exists() else name


def create_model_and_transforms(
    name: str, num_frames: int | None = None, pretrained: str | os.PathLike[str] | None = None, **overrides: Any
) -> tuple[EVA02AT, RandomResizedCrop, CentreCrop]:
    """`create_model`, and how to crop clips for it.

    Args:
        name, num_frames, pretrained, overrides: as `evaat_fast.create_model`.

    Returns:
        (model, train_transform, eval_transform); the transforms take uint8 [T, H, W, 3] to uint8 [T, image height, width, 3].
        The model normalises inside.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `evaat_fast.create_model`.
    """
    model = create_model(name, num_frames, pretrained, **overrides)
    size = model.config.image_size
    return model, train_transform(size), eval_transform(size)
