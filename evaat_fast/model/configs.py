"""The configurations of EVA02-AT, and of the CLIP models that it is compared with: what a model is made of, by name."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

# Mean and standard deviation of R, G, B in units of 0..255. "clip" is what EVA02-CLIP weights were trained with.
# "lavila" is LaViLa's and AVION's: red is 0.48145466 * 225, a slip for 255, and checkpoints trained with it need it. "timm" is
# AVION's `--norm-style timm`, ImageNet's.
NORMS = {
    "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    "lavila": ((108.3272985, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
    "timm": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

# What a word may be, by field.
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": tuple(NORMS),
    "tower": ("eva02", "clip", "timesformer"),
    "rope": ("joint", "split", "spatial"),
    "activation": ("gelu", "quick_gelu"),
}


@dataclass(frozen=True)
class ModelConfig:
    """One video-text model: EVA02-AT, or a CLIP that it is compared with.

    image_size: pixels, an int for squares or (height, width), which a pair of equal sides becomes. patch_size: pixels.
    num_frames: T. embed_dim: E, the space where videos meet captions.
    vision_*, text_*: width, layers and heads of the two transformers; vision_mlp: hidden width of the SwiGLU, or of CLIP's MLP.
    rope_grid: side of the patch grid that the spatial rotary frequencies are scaled to; 16 is EVA-02's pretraining
        grid.
    norm: a name in NORMS; it belongs to the weights and is stored with them.
    temperature: initial temperature of the contrastive loss; exp(logit_scale) starts at 1 / temperature.
    tower: the vision tower: "eva02"; "clip", CLIP's with joint attention over all patches, as AVION has it; or "timesformer",
        CLIP's with attention over time and then over space in each block, as LaViLa has it. The last two have no RoPE.
    rope: of "eva02": "joint", the paper's, where time turns all channels and height and width share them; "split", where time
        turns a quarter of the channels, height and width half of the rest each; "spatial", EVA-02's own, without time.
    temporal_embed: whether a learnable embedding tells frames apart. With `rope` this is table IV of the paper: learnable is
        rope="spatial", rope is temporal_embed=False, both is the default.
    activation: of CLIP's MLPs, the text tower's included: "gelu", or OpenAI's "quick_gelu".
    vision_eps: of the vision tower's layer norms.

    Raises:
        TypeError: a value of the wrong type. ValueError: values that do not fit together.
    """

    image_size: int | tuple[int, int]
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
    tower: str = "eva02"
    rope: str = "joint"
    temporal_embed: bool = True
    activation: str = "gelu"
    vision_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _checked_size(self.image_size))
        for field in fields(self):
            value = getattr(self, field.name)
            kind: Any = field.type
            if field.name == "image_size":
                continue
            kinds = (int, float) if kind is float else kind
            if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{field.name}: expected {kind.__name__}, got {value!r}")
            if kind in (int, float) and not value > 0:
                raise ValueError(f"{field.name}: expected a positive number, got {value!r}")
            if kind in (int, float) and value > 1e9:
                raise ValueError(f"{field.name}: expected at most 1e9, got {value!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {unknown(getattr(self, name), known)}")
        if any(side % self.patch_size for side in self.size):
            raise ValueError(f"image_size: expected a multiple of patch_size={self.patch_size}, got {self.image_size}")
        for tower, multiple in (("vision", 4 if self.tower == "eva02" else 1), ("text", 1)):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % (heads * multiple):
                wanted = f"{tower}_heads={heads}" + f" times {multiple}" * (multiple > 1)
                raise ValueError(f"{tower}_width: expected a multiple of {wanted}, got {width}")
        head = self.vision_width // self.vision_heads
        if head > 256:
            raise ValueError(f"vision_heads: expected heads of at most 256 channels, got {head}")
        if self.rope == "split" and self.tower == "eva02" and head < 8:
            raise ValueError(f"rope: expected heads of at least 8 channels to split, got {head}")
        if self.tower != "eva02" and self.rope != "joint":
            raise ValueError(f"rope: tower={self.tower!r} has no rotary embedding, got {self.rope!r}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, Hp, Wp): how many patches a clip has along time, height and width."""
        height, width = self.size
        return self.num_frames, height // self.patch_size, width // self.patch_size


def _checked_size(value: Any) -> int | tuple[int, int]:
    """image_size as it is kept: an int, or a tuple of two that differ."""
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"image_size: expected int or (height, width), got {value!r}")
    for side in sides:
        if not 0 < side <= 1e9:
            raise ValueError(f"image_size: expected a positive number of at most 1e9, got {value!r}")
    return sides[0] if sides[0] == sides[1] else sides


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


def _clip(**changes: Any) -> ModelConfig:
    """OpenAI's ViT-B/16, which AVION and LaViLa begin with."""
    clip: dict[str, Any] = dict(tower="clip", activation="quick_gelu", vision_mlp=3072, embed_dim=512, vision_eps=1e-5)
    return _base(**{**clip, "num_frames": 1, **changes})


def _wide(image_size: int = 224) -> dict[str, Any]:
    """What ViT-L/14 has otherwise."""
    wide: dict[str, Any] = dict(patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp=4096)
    return dict(image_size=image_size, text_width=768, text_heads=12, embed_dim=768, **wide)


# Of AVION's code: the exact GELU in both towers, though it begins with weights that were trained with the quick one; epsilon
# 1e-6. Of LaViLa's: epsilon 1e-6, but that of the norm before the blocks. Both have projections of 256 and the typo in red.
_AVION: dict[str, Any] = dict(activation="gelu", vision_eps=1e-6, norm="lavila", num_frames=4)
_LAVILA: dict[str, Any] = dict(tower="timesformer", vision_eps=1e-6, norm="lavila", num_frames=4)
_PROJECTED = {"embed_dim": 256}

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
    "clip_vit_base_patch16_224": _clip(),
    "clip_vit_large_patch14_224": _clip(**_wide()),
    "clip_vit_large_patch14_336": _clip(**_wide(336)),
    "avion_vit_base_patch16_224": _clip(**_AVION, **_PROJECTED),
    "avion_vit_large_patch14_224": _clip(**{**_wide(), **_AVION, **_PROJECTED}),
    "avion_vit_large_patch14_336": _clip(**{**_wide(336), **_AVION, **_PROJECTED}),
    "lavila_tsf_base_patch16_224": _clip(**_LAVILA, **_PROJECTED),
    "lavila_tsf_large_patch14_224": _clip(**{**_wide(), **_LAVILA, **_PROJECTED}),
    "lavila_tsf_large_patch14_336": _clip(**{**_wide(336), **_LAVILA, **_PROJECTED}),
}

# At the Hugging Face hub. No EVA02-AT weights are published: these are the EVA02-CLIP weights that it starts from, and those of
# OpenAI, with which AVION and LaViLa start.
PRETRAINED = {
    "eva02_at_base_patch16_224": {"merged2b_s8b_b131k": "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"},
    "eva02_at_large_patch14_224": {"merged2b_s4b_b131k": "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k"},
    "eva02_at_large_patch14_336": {"merged2b_s6b_b61k": "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"},
    **{
        f"{kind}_{body}_{side}": {"openai": f"timm/vit_{body}_clip_{side}.openai"}
        for kind in ("clip_vit", "avion_vit", "lavila_tsf")
        for body, side in (("base_patch16", 224), ("large_patch14", 224), ("large_patch14", 336))
    },
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


def of_stored(stored: Mapping[str, Any], source: str) -> ModelConfig:
    """The configuration that was stored with weights, with the defaults of fields that are younger than the file.

    Raises:
        ValueError: fields that this version does not know, or that are missing.
    """
    known = {f.name for f in fields(ModelConfig)}
    if strange := sorted(map(str, stored.keys() - known)):
        raise ValueError(f"checkpoint: {source} has a configuration of another version: it says {', '.join(strange)}")
    try:
        return ModelConfig(**stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {source} has a damaged configuration: {error}") from None


def unknown(name: object, known: Iterable[str]) -> str:
    """The end of an error message: that `name` is not known, the nearest that is, and all that are."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.3)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    return f"there is no {name!r}{guess} Known: {', '.join(known) or 'none'}"
