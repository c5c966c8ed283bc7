"""Everybody's names for the same weights, to ours and back.

| layout | of | vision tower | text tower |
|---|---|---|---|
| ours | this library | `visual.blocks`, qkv and both halves of a SwiGLU joined | `text.` |
| eva | EVA's `EVA02_CLIP_*.pt` | `visual.blocks`, `inner_attn_ln`, `w1`, `w2`, `w3` | `text.` |
| timm | timm, the vision tower alone | `blocks` without a prefix, q, k, v apart | none |
| open_clip | open_clip, EVA02 | timm's under `visual.trunk.` | `text.` |
| | and CLIP, as OpenAI's | `visual.transformer.resblocks` | no prefix |
| avion | AVION | OpenAI's, `Wqkv`, a flat `conv1`, `visual.image_projection`, `visual.temporal_embedding` | `textual.` |
| lavila | LaViLa | timm's, with `timeattn` in each block, `image_projection` outside | no prefix |

What wraps a model puts a word of its own into names (`module`, `_orig_mod`, ...): such words are taken out wherever they stand.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from evaat_fast.model.configs import ModelConfig

LAYOUTS = ("ours", "eva", "timm", "open_clip", "avion", "lavila")

# Of DDP, DataParallel, AveragedModel and timm's EMA; torch.compile; FSDP; activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Constants that others store: rotary tables, masks, counters, the sizes in OpenAI's files.
CONSTANTS = re.compile(
    r"(^|\.)(rope\.[^.]+|attn_mask|k_bias|position_ids)$|^(n_averaged|input_resolution|context_length|vocab_size)$"
)

Pairs = tuple[tuple[str, str], ...]
_EVA: Pairs = (
    (".attn.inner_attn_ln.", ".attn.norm."),
    (".mlp.w1.", ".mlp.fc1_g."),
    (".mlp.w2.", ".mlp.fc1_x."),
    (".mlp.w3.", ".mlp.fc2."),
    (".mlp.ffn_ln.", ".mlp.norm."),
)
_TIMM: Pairs = ((".attn.q_proj.bias", ".attn.q_bias"), (".attn.v_proj.bias", ".attn.v_bias"))
_OPENAI: Pairs = (
    ("visual.class_embedding", "visual.cls_token"),
    ("visual.positional_embedding", "visual.pos_embed"),
    ("visual.temporal_embedding", "visual.temporal_embed"),
    ("visual.conv1.", "visual.patch_embed.proj."),
    ("visual.ln_pre.", "visual.norm_pre."),
    ("visual.ln_post.", "visual.norm."),
    ("visual.proj", "visual.head.weight"),
    ("visual.transformer.resblocks.", "visual.blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
# AVION's flash attention, to OpenAI's.
_AVION: Pairs = (
    ("visual.image_projection", "visual.proj"),
    (".attn.Wqkv.weight", ".attn.in_proj_weight"),
    (".attn.Wqkv.bias", ".attn.in_proj_bias"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_FUSED = {"attn.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp.fc1": ("mlp.fc1_g", "mlp.fc1_x")}


def unwrap(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the words of wrappers, in any order and number, on the whole or on a part, and without constants.

    Raises:
        ValueError: two names become one.
    """
    found = renamed(state, lambda name: ".".join(part for part in name.split(".") if part not in _WRAPPERS))
    while found and all(name.startswith("model.") for name in found if not CONSTANTS.search(name)):
        found = renamed({k: v for k, v in found.items() if not CONSTANTS.search(k)}, lambda name: name.removeprefix("model."))
    return {name: x for name, x in found.items() if not CONSTANTS.search(name)}


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The state under new names.

    Raises:
        ValueError: two names become one.
    """
    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (short := rename(name)) in new:
            raise ValueError(f"checkpoint: two of its tensors are {short}, of which one is {name}")
        new[short] = tensor
    return new


def layout_of(state: Mapping[str, Tensor]) -> str:
    """Which of LAYOUTS the names of a state are of; "ours" where nothing speaks against it."""
    names = unwrap(state).keys()

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    if some(r"^textual\.|^visual\.(temporal_embedding|image_projection)$|\.attn\.Wqkv\."):
        return "avion"
    if some(r"^image_projection$"):
        return "lavila"
    if some(r"^visual\.trunk\.|^visual\.(conv1\.|transformer\.)|^(transformer|token_embedding)\.|^class_embedding$"):
        return "open_clip"
    if some(r"inner_attn_ln\.|\.mlp\.w1\."):
        return "eva"
    return "timm" if "cls_token" in names else "ours"


def implied(layout: str) -> dict[str, Any]:
    """The fields of a ModelConfig that files of a layout mean without saying so: AVION and LaViLa trained with the typo."""
    return {
        "avion": {"norm": "lavila", "activation": "gelu", "vision_eps": 1e-6},
        "lavila": {"norm": "lavila", "activation": "quick_gelu", "vision_eps": 1e-6},
    }.get(layout, {})


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any of the known layouts to our names.

    Args:
        state: name -> tensor. Not changed.

    Returns:
        A new dict. Names that are not recognised stay, so that loading reports them.

    Raises:
        ValueError: two names become one.
    """
    state = unwrap(state)
    if {"pos_embed", "cls_token"} <= state.keys() or {"class_embedding", "conv1.weight"} <= state.keys():
        state = {f"visual.{name}": x for name, x in state.items()}  # the vision tower alone
    state = renamed(state, _home)
    visual = {name: x for name, x in state.items() if name.startswith("visual.")}
    rest = {name: x for name, x in state.items() if name not in visual}
    if any(name.startswith(("visual.conv1.", "visual.class_embedding", "visual.transformer.")) for name in visual):
        visual = renamed(renamed(visual, _replacer(_AVION)), _replacer(_OPENAI))
    else:
        visual = renamed(visual, _replacer((("visual.ln_pre.", "visual.norm_pre."), ("visual.proj", "visual.head.weight"))))
        visual = _fuse(renamed(visual, _replacer(_EVA)))
    if "visual.head.weight" in visual and ("visual.image_projection" in state or "visual.proj" in state):
        visual["visual.head.weight"] = visual["visual.head.weight"].mT  # others multiply from the left
    return {**{name: _shaped(name, x) for name, x in visual.items()}, **rest}


def _home(name):
    """The tower's own prefix for a name."""
    if name.startswith("visual.trunk."):
        return name.replace("trunk.", "", 1)
    if name.startswith("textual."):
        return name.replace("textual.", "text.", 1)
    if name == "image_projection":
        return "visual.proj"
    return f"text.{name}" if name.startswith(_TEXT) else name


def _replacer(pairs: Iterable[tuple[str, str]], back: bool = False) -> Callable[[str], str]:
    """A function of a name that puts the second of each pair for the first: where it ends, unless the first ends in a dot."""
    pairs = [(new, old) if back else (old, new) for old, new in pairs]

    def rename(name: str) -> str:
        for old, new in pairs:
            at = name.find(old)
            if at >= 0 and (old.endswith(".") or at + len(old) == len(name)) and (old.startswith(".") or at == 0):
                name = name[:at] + new + name[at + len(old) :]
        return name

    return rename


def _shaped(name, tensor):
    """With the dimensions that ours has: embeddings [1, ..., C], the patch embedding a convolution's."""
    if name in ("visual.cls_token", "visual.pos_embed", "visual.temporal_embed") and tensor.ndim < 3:
        return tensor.reshape(1, -1, tensor.shape[-1])
    if name == "visual.patch_embed.proj.weight" and tensor.ndim == 2:
        side = round((tensor.shape[1] / 3) ** 0.5)
        return tensor.unflatten(1, (3, side, side)) if 3 * side * side == tensor.shape[1] else tensor
    return tensor


def _fuse(visual):
    """Joins q, k and v, and both halves of a SwiGLU's first layer."""
    visual = dict(visual)
    for name in [n for n in visual if n.endswith(".attn.k_proj.bias")]:  # CLIP's attention, whose keys have a bias, too
        stem = name.removesuffix("k_proj.bias")
        biases = [f"{stem}{part}_proj.bias" for part in "qkv"]
        if all(bias in visual for bias in biases):
            visual[f"{stem}qkv.bias"] = torch.cat([visual.pop(bias) for bias in biases])
    visual = renamed(visual, _replacer(_TIMM))
    for fused, parts in _FUSED.items():
        for kind in ("weight", "bias"):
            for first in [n for n in visual if n.endswith(f".{parts[0]}.{kind}")]:
                stem = first.removesuffix(f"{parts[0]}.{kind}")
                whole = [f"{stem}{part}.{kind}" for part in parts]
                if all(n in visual for n in whole):
                    visual[f"{stem}{fused}.{kind}"] = torch.cat([visual.pop(n) for n in whole])
    for name in [n for n in visual if n.endswith(".attn.qkv.bias")]:  # EVA02's in one piece: its keys have none
        stem, bias = name.removesuffix("qkv.bias"), visual[name]
        if f"{stem}norm.weight" in visual and bias.ndim == 1 and not bias.chunk(3)[1].any():
            visual[f"{stem}q_bias"], _, visual[f"{stem}v_bias"] = visual.pop(name).chunk(3)
    return visual


def export_state(state: Mapping[str, Tensor], config: ModelConfig, layout: str) -> dict[str, Tensor]:
    """Our names to those of a layout: what `convert_state` takes back to the same bits.

    Args:
        state: name -> tensor, ours. Not changed. config: the model's. layout: of LAYOUTS.

    Returns:
        A new dict. A temporal embedding of zeros is left out where the layout has none; another stays under our name.

    Raises:
        ValueError: a layout that is none, or that has no names for this vision tower.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"to: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    towers = {"eva": ("eva02",), "timm": ("eva02", "clip"), "open_clip": ("eva02", "clip"), "avion": ("clip",)}
    towers["lavila"] = ("timesformer",)
    if config.tower not in towers.get(layout, (config.tower,)):
        raise ValueError(f"to: {layout} has no names for a vision tower of the kind {config.tower!r}")
    state = dict(state)
    if layout == "ours":
        return state
    temporal = state.get("visual.temporal_embed")
    if temporal is not None and not temporal.any() and (layout not in ("avion", "lavila") or temporal.shape[1] == 1):
        del state["visual.temporal_embed"]
    visual = {name: x for name, x in state.items() if name.startswith("visual.")}
    rest = {name: x for name, x in state.items() if name not in visual}
    if config.tower == "eva02":
        visual = _split(visual, layout)
        if layout == "open_clip":
            visual = renamed(visual, lambda name: f"visual.trunk.{name.removeprefix('visual.')}")
    elif layout == "lavila":
        visual["image_projection"] = visual.pop("visual.head.weight").mT
        visual = renamed(visual, _replacer((("visual.ln_pre.", "visual.norm_pre."),), back=True))
    elif layout != "timm":
        visual = {name: _flat(name, x) for name, x in visual.items()}
        visual = renamed(visual, _replacer(_OPENAI, back=True))
        visual["visual.proj"] = visual["visual.proj"].mT
        if layout == "avion":  # as its scripts train, with flash attention and the patch embedding as a linear layer
            visual = renamed(visual, _replacer(_AVION, back=True))
            visual["visual.conv1.weight"] = visual["visual.conv1.weight"].flatten(1)
    if layout == "timm":
        return renamed(visual, lambda name: name.removeprefix("visual."))
    if layout == "avion":
        rest = renamed(rest, lambda name: re.sub(r"^text\.", "textual.", name))
    elif config.tower != "eva02":
        rest = renamed(rest, lambda name: name.removeprefix("text."))
    return {**visual, **rest}


def _flat(name, tensor):
    """OpenAI's embeddings: without the dimensions of size 1."""
    if name == "visual.cls_token":
        return tensor.reshape(-1)
    return tensor[0] if name in ("visual.pos_embed", "visual.temporal_embed") else tensor


def _split(visual, layout):
    """q, k and v, and both halves of a SwiGLU's first layer, apart; EVA's names, or timm's."""
    apart: dict[str, Tensor] = {}
    for name, tensor in visual.items():
        for fused, parts in _FUSED.items():
            if (at := name.find(f".{fused}.")) >= 0:
                ends = [f".{part}.{name[at + len(fused) + 2 :]}" for part in parts]
                apart |= {name[:at] + end: x for end, x in zip(ends, tensor.chunk(len(parts)), strict=True)}
                break
        else:
            apart[name] = tensor
    return renamed(apart, _replacer(_EVA if layout == "eva" else _TIMM, back=True))
