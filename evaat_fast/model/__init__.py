"""The EVA02-AT model: create it by name, load weights into it, tokenise for it.

model = evaat_fast.create_model("eva02_at_base_patch16_224", num_frames=4)
tokens = evaat_fast.get_tokenizer()(["#C C cuts the onion"])
out = model(video, tokens)                       # dict(image_embed, text_embed, logit_scale)
"""

import os
from pathlib import Path
from typing import Any

from evaat_fast.model.checkpoints import (
    Converted,
    Report,
    check_config,
    convert,
    download,
    load_checkpoint,
    read,
    save_checkpoint,
)
from evaat_fast.model.checkpoints.load import load_stored, said
from evaat_fast.model.clip import EVA02AT
from evaat_fast.model.configs import CONFIGS, NORMS, PRETRAINED, ModelConfig, get_config, unknown
from evaat_fast.model.patches import draw_patches
from evaat_fast.model.text import trim
from evaat_fast.model.tokenizer import CLIPTokenizer

__all__ = [
    "EVA02AT",
    "NORMS",
    "CLIPTokenizer",
    "Converted",
    "ModelConfig",
    "Report",
    "convert",
    "create_model",
    "draw_patches",
    "get_config",
    "get_tokenizer",
    "list_models",
    "list_pretrained",
    "load_checkpoint",
    "save_checkpoint",
    "trim",
]


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(CONFIGS)


def list_pretrained() -> list[tuple[str, str]]:
    """(model, tag) pairs for `create_model(model, pretrained=tag)`: EVA02-CLIP and OpenAI's CLIP; no EVA02-AT weights are
    published."""
    return [(name, tag) for name, tags in sorted(PRETRAINED.items()) for tag in tags]


def create_model(
    name: str, num_frames: int | None = None, pretrained: str | os.PathLike[str] | None = None, **overrides: Any
) -> EVA02AT:
    """Creates an EVA02-AT.

    Args:
        name: one of `list_models()`.
        num_frames: T, frames per clip; None for the configuration's own (4, tiny 8).
        pretrained: None; the path of a file or folder that `evaat_fast.model.checkpoints.read` takes (our own, EVA's,
            open_clip's, AVION's, ...); "hf-hub:owner/name"; or a tag of `list_pretrained()`. CLIP weights with another
            embedding width than `embed_dim` keep the fresh projections. A file that stores its `norm`, or is of a code that had
            another one, sets the model's.
        overrides: fields of ModelConfig, such as embed_dim=512 or norm="lavila".

    Returns:
        An EVA02AT in float32 on the CPU. Without weights it is initialised from torch's generator: torch.manual_seed
        makes it repeatable.

    Raises:
        ValueError: an unknown name, tag or field (the nearest is named), or weights that do not fit.
        FileNotFoundError: no such file. RuntimeError: a download that failed.
    """
    if num_frames is not None:
        overrides["num_frames"] = num_frames
    config = get_config(name, **overrides)
    if pretrained is None:
        return EVA02AT(config)
    path = _resolve(name, pretrained)
    stored = read(path)
    known = said(stored) if stored.config is None else stored.config
    if "norm" in known and "norm" not in overrides:
        config = get_config(name, **overrides, norm=known["norm"])
    if stored.config is not None:
        check_config(stored.config, config, path)
    model = EVA02AT(config)
    load_stored(model, stored, fresh_heads=stored.config is None)
    return model


def _resolve(name, pretrained):
    """A local file or folder for what `pretrained` names."""
    if isinstance(pretrained, (str, os.PathLike)) and str(pretrained) and Path(pretrained).exists():
        return pretrained
    if not isinstance(pretrained, str):
        if isinstance(pretrained, os.PathLike):
            raise FileNotFoundError(f"pretrained: there is no file {str(pretrained)!r}")
        raise TypeError(f"pretrained: expected None, a path, 'hf-hub:...' or a tag, got {pretrained!r}")
    if pretrained.startswith("hf-hub:"):
        return download(pretrained.removeprefix("hf-hub:").strip("/"))
    tags = PRETRAINED.get(name, {})
    if pretrained in tags:
        return download(tags[pretrained])
    if os.sep in pretrained or Path(pretrained).suffix in (".pt", ".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(f"pretrained: there is no file {pretrained!r}")
    raise ValueError(f"pretrained: {unknown(pretrained, tags)} (tags of {name}), or a path, or 'hf-hub:owner/name'")


def get_tokenizer(name: str | None = None, context_length: int | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer, as all models here use.

    Args:
        name: a model's name, or None. context_length: L, the model's by default (77).

    Returns:
        A callable: str or list of str to int64 [B, L].

    Raises:
        ValueError: no such model. ImportError: tokenizers, ftfy or regex is missing.
    """
    if name is not None:
        context_length = get_config(name).context_length if context_length is None else context_length
    return CLIPTokenizer(77 if context_length is None else context_length)
