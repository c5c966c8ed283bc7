"""The configurations of EVA02-AT: what a model is made of, by name."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

# Mean and standard deviation of R, G, B in units of 0..255. "clip" is what EVA02-CLIP weights were trained with.
# "lavila" is LaViLa's and AVION's: red is 0.48145466 * 225, a slip for 255, and checkpoints trained with it need it.
NORMS = {
    "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    "lavila": ((108.3272985, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
}


@dataclass(frozen=True)
class ModelConfig:
    """One EVA02-AT model.

    image_size, patch_size: pixels. num_frames: T. embed_dim: E, the space where videos meet captions.
    vision_*, text_*: width, layers and heads of the two transformers; vision_mlp: hidden width of the SwiGLU.
    rope_grid: side of the patch grid that the spatial rotary frequencies are scaled to; 16 is EVA-02's pretraining
        grid.
    norm: a name in NORMS; it belongs to the weights and is stored with them.
    temperature: initial temperature of the contrastive loss; exp(logit_scale) starts at 1 / temperature.

    Raises:
        TypeError: a value of the wrong type. ValueError: values that do not fit together.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int = 256
    num_frames: int = 4
    rope_grid: int = 16
    rope_theta: float = 10000.0
    context_length: int = 77
    vocab_size: int = 49408
    norm: str = "clip"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind: Any = field.type
            kinds = (int, float) if kind is float else kind
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{field.name}: expected {kind.__name__}, got {value!r}")
            if kind is not str and not value > 0:
                raise ValueError(f"{field.name}: expected a positive number, got {value!r}")
            if kind is not str and value > 1e9:
                raise ValueError(f"{field.name}: expected at most 1e9, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size={self.patch_size}, got {self.image_size}")
        for tower, multiple in (("vision", 4), ("text", 1)):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % (heads * multiple):
                wanted = f"{tower}_heads={heads}" + f" times {multiple}" * (multiple > 1)
                raise ValueError(f"{tower}_width: expected a multiple of {wanted}, got {width}")
        if self.vision_width // self.vision_heads > 256:
            raise ValueError(
                f"vision_heads: expected heads of at most 256 channels, got {self.vision_width // self.vision_heads}"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm: {unknown(self.norm, NORMS)}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, Hp, Wp): how many patches a clip has along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames, side, side


def _base(**changes: Any) -> ModelConfig:
    config = ModelConfig(
        image_size=224,
        patch_size=16,
        vision_width=768,
        vision_layers=12,
        vision_heads=12,
        vision_mlp=2048,
        text_width=512,
        text_layers=12,
        text_heads=8,
    )
    return replace(config, **changes)


def _large(**changes: Any) -> ModelConfig:
    large: dict[str, Any] = dict(patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp=2730)
    return _base(**large, text_width=768, text_heads=12, **changes)


# The tiny model is for CPUs: 0.6 M parameters in the vision blocks. Its text is narrow because the 49,408 rows of
# CLIP's vocabulary are what an optimiser step on a CPU spends its time on.
_tiny: dict[str, Any] = dict(
    vision_width=128, vision_layers=3, vision_heads=2, vision_mlp=320, text_width=64, text_layers=2, text_heads=2
)

CONFIGS = {
    "eva02_at_tiny_patch16_64": _base(image_size=64, rope_grid=4, embed_dim=128, num_frames=8, **_tiny),
    "eva02_at_base_patch16_224": _base(),
    "eva02_at_large_patch14_224": _large(),
    "eva02_at_large_patch14_336": _large(image_size=336),
}

# No EVA02-AT weights are published: these are the EVA02-CLIP weights that it starts from, at the Hugging Face hub.
PRETRAINED = {
    "eva02_at_base_patch16_224": {"merged2b_s8b_b131k": "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"},
    "eva02_at_large_patch14_224": {"merged2b_s4b_b131k": "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k"},
    "eva02_at_large_patch14_336": {"merged2b_s6b_b61k": "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"},
}


def get_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration called `name` with some fields changed.

    Raises:
        ValueError: no such model or field (the nearest is named), or values that do not fit. TypeError: a value of
            the wrong type.
    """
    if name not in CONFIGS:
        raise ValueError(f"name: {unknown(name, CONFIGS)}")
    known = [f.name for f in fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"overrides: {unknown(key, known)}")
    return replace(CONFIGS[name], **overrides)


def unknown(name: object, known: Iterable[str]) -> str:
    """The end of an error message: that `name` is not known, the nearest that is, and all that are."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.3)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return f"there is no {name!r}{guess} Known: {', '.join(known) or 'none'}"
