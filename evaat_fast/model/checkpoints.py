"""Weights in and out: our own files, and EVA02-CLIP in the formats of EVA, timm and open_clip.

    load_checkpoint(model, "EVA02_CLIP_B_psz16_s8B.pt", fresh_heads=True)     # image weights, inflated to clips
    save_checkpoint(model, "model.pt")

Loading is strict: a name or shape that does not fit is an error that lists it. What may differ and is converted: the
number of frames, the size of the patch grid, and, for CLIP weights, the width of the embedding space (its two
projections then start fresh, as EVA02-AT's do).
"""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evaat_fast.model.configs import ModelConfig

if TYPE_CHECKING:
    from evaat_fast.model.clip import EVA02AT

_log = logging.getLogger("evaat_fast")

# EVA's names -> timm's, which are ours but for the fused projections.
_RENAMES = (
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.attn\.q_proj\.bias$", ".attn.q_bias"),
    (r"\.attn\.v_proj\.bias$", ".attn.v_bias"),
)
# Constants that other implementations store: rotary tables, masks.
_CONSTANTS = re.compile(r"(^|\.)(rope\.[^.]+|attn_mask|k_bias)$")
_FUSED = {"attn.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp.fc1": ("mlp.fc1_g", "mlp.fc1_x")}
_HEADS = ("visual.head.weight", "visual.head.bias", "text.text_projection")


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors and the configuration stored in a file.

    Args:
        path: a .safetensors file, or a torch file that `weights_only=True` accepts: a state dict, alone or under one
            of the keys "state_dict", "model", "module", "model_ema".

    Returns:
        (state, config): name -> tensor, and the stored configuration as a dict, None where there is none.

    Raises:
        FileNotFoundError: no such file. ValueError: no state dict in it. ImportError: safetensors is needed and
            missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError("reading .safetensors files needs safetensors: pip install safetensors") from None
        try:
            return load_file(path), None
        except Exception as error:  # safetensors has an error of its own
            raise ValueError(f"checkpoint: {str(path)!r} is not a .safetensors file that can be read: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is none of its own
        # Not torch's own message: it recommends to load the file unsafely.
        raise ValueError(
            f"checkpoint: {str(path)!r} is not a file of weights that torch can read safely ({type(error).__name__})"
        ) from error
    config = content.get("model_config") if isinstance(content, dict) else None
    while isinstance(content, dict) and not _is_state(content):
        inner = next((content[k] for k in ("model_ema", "state_dict", "model", "module") if k in content), None)
        if inner is None:
            raise ValueError(f"checkpoint: no state dict in {str(path)!r}, only the keys {sorted(map(str, content))}")
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: expected a state dict in {str(path)!r}, got {type(content).__name__}")
    return content, config if isinstance(config, dict) else None


def _is_state(content):
    return bool(content) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any of the known formats to our names: EVA's, timm's (the vision tower alone), open_clip's, our own.

    Args:
        state: name -> tensor. Not changed.

    Returns:
        A new dict. Names that are not recognised stay, so that loading reports them.
    """
    for prefix in ("module.", "_orig_mod."):
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    if "pos_embed" in state and "cls_token" in state:
        state = {f"visual.{k}": v for k, v in state.items()}
    converted = {}
    for name, tensor in state.items():
        if _CONSTANTS.search(name):
            continue
        name = re.sub(r"^visual\.trunk\.", "visual.", name)
        if name.startswith("visual."):
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    for fused, parts in _FUSED.items():
        for kind in ("weight", "bias"):
            for first in [k for k in converted if k.startswith("visual.") and k.endswith(f"{parts[0]}.{kind}")]:
                stem = first.removesuffix(f"{parts[0]}.{kind}")
                names = [f"{stem}{part}.{kind}" for part in parts]
                if all(n in converted for n in names):
                    converted[f"{stem}{fused}.{kind}"] = torch.cat([converted.pop(n) for n in names])
    return converted


def inflate(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Fits the positional embeddings of `state` to a clip: frames by linear interpolation (no temporal embedding:
    zeros), the patch grid by bicubic interpolation.

    Args:
        state: name -> tensor, our names. Not changed.
        config: the ModelConfig to fit.

    Returns:
        A new dict.
    """
    state = dict(state)
    spatial, temporal = state.get("visual.pos_embed"), state.get("visual.temporal_embed")
    if spatial is None or spatial.ndim != 3:
        return state
    frames, rows, columns = config.grid
    if temporal is None:
        state["visual.temporal_embed"] = spatial.new_zeros(1, frames, spatial.shape[2])
    elif temporal.ndim == 3 and temporal.shape[1] != frames:
        resized = F.interpolate(temporal.float().mT, frames, mode="linear", align_corners=False)
        state["visual.temporal_embed"] = resized.mT.to(temporal.dtype)
        _log.info("temporal_embed interpolated from %d to %d frames", temporal.shape[1], frames)
    side = round(max(spatial.shape[1] - 1, 0) ** 0.5)
    if side * side == spatial.shape[1] - 1 and (side, side) != (rows, columns):
        grid = spatial[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
        state["visual.pos_embed"] = torch.cat((spatial[:, :1], grid.flatten(2).mT.to(spatial.dtype)), 1)
        _log.info("pos_embed interpolated from %d x %d to %d x %d patches", side, side, rows, columns)
    return state


def load_checkpoint(
    model: "EVA02AT", path: str | os.PathLike[str], *, part: Literal["all", "visual"] = "all", fresh_heads: bool = False
) -> None:
    """Loads a file of weights into `model`.

    Args:
        model: an EVA02AT.
        path: as for `read_checkpoint`, in any format that `convert_state` knows.
        part: "all", or "visual" for files that hold the vision tower alone, such as timm's.
        fresh_heads: True: projections to another embedding space, and the temperature that belongs to them, are left
            as they are.

    Raises:
        ValueError: names missing, left over or of another shape (all listed), a configuration stored in the file that
            does not fit the model's, or `part` is neither. FileNotFoundError: no such file.
    """
    if part not in ("all", "visual"):
        raise ValueError(f"part: expected 'all' or 'visual', got {part!r}")
    state, stored = read_checkpoint(path)
    if stored is not None:
        check_config(stored, model.config, path)
    load_state(model, state, part=part, fresh_heads=fresh_heads, source=str(path))


def load_state(
    model: "EVA02AT",
    state: Mapping[str, Tensor],
    *,
    part: Literal["all", "visual"] = "all",
    fresh_heads: bool = False,
    source: str = "state dict",
) -> None:
    """`load_checkpoint` from a dict of tensors."""
    odd = [f"{k} {x.dtype}" for k, x in state.items() if not x.is_floating_point() and not _CONSTANTS.search(k)]
    odd += [f"{k} {x.layout} on {x.device}" for k, x in state.items() if x.layout is not torch.strided or x.is_meta]
    if odd:
        raise ValueError(f"checkpoint: {source}: expected dense floating-point weights, got {_some(odd)}")
    try:
        state = inflate(convert_state(state), model.config)
    except (RuntimeError, TypeError) as error:  # parts to be joined or resized that do not go together
        raise ValueError(f"checkpoint: {source} does not fit the model: {str(error).splitlines()[0]}") from None
    own = model.state_dict()
    if part == "visual":
        own = {k: v for k, v in own.items() if k.startswith("visual.")}
        state = {k: v for k, v in state.items() if k.startswith("visual.")}
    if fresh_heads:
        fresh = [k for k in _HEADS if k in own and (k not in state or state[k].shape != own[k].shape)]
        if fresh:
            left = [*(k for k in _HEADS if k in own), *(["logit_scale"] if "logit_scale" in own else [])]
            _log.warning("%s: another embedding space than %d: left fresh: %s", source, model.config.embed_dim, ", ".join(left))
            state.update({k: own[k] for k in left})
    if "logit_scale" in state and "logit_scale" in own and state["logit_scale"].numel() == 1:  # some store it as [1]
        state["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)
    problems = []
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            problems.append(f"{len(names)} {what}: {_some(names)}")
    if missing and all(k.startswith("text.") or k == "logit_scale" for k in missing) and not unexpected:
        problems.append("the file holds the vision tower alone: load it with load_checkpoint(model, path, part='visual')")
    if problems:
        raise ValueError(f"checkpoint: {source} does not fit the model; " + "; ".join(problems))
    model.load_state_dict(state, strict=part == "all")


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_config(stored: Mapping[str, Any], config: ModelConfig, source: str | os.PathLike[str]) -> None:
    """Raises ValueError unless weights stored with the configuration `stored` (a dict) mean the same under `config`."""
    free = {"num_frames", "image_size", "temperature"}
    for name, ours in dataclasses.asdict(config).items():
        if name in stored and name not in free and (type(stored[name]) is not type(ours) or stored[name] != ours):
            raise ValueError(f"checkpoint: {source} was made with {name}={stored[name]!r}, the model has {ours!r}")


def save_checkpoint(model: "EVA02AT", path: str | os.PathLike[str], **extra: Any) -> None:
    """Writes the weights and the configuration, so that a reader sees the old file or the new one and never half of
    one.

    Args:
        model: an EVA02AT. path: the file to write. extra: what else to store: tensors, numbers, strings, lists and
            dicts of them.
    """
    path = Path(path)
    content = {"state_dict": model.state_dict(), "model_config": dataclasses.asdict(model.config), **extra}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def download(repo: str) -> str:
    """The weights of a Hugging Face repository as a local file.

    Raises:
        ImportError: huggingface_hub is missing. RuntimeError: not reachable, or no known file of weights in it.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError("pretrained='hf-hub:...' needs huggingface_hub: pip install huggingface_hub safetensors") from None
    reason: Exception | str = ""
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    for name in names:
        try:
            return hf_hub_download(repo, name)
        except LocalEntryNotFoundError as error:
            reason = error
            break
        except EntryNotFoundError:
            reason = f"it has none of {', '.join(names)}"
        except Exception as error:  # the hub's client, its transport and the disk each have errors of their own
            reason = error
            break
    raise RuntimeError(
        f"pretrained: could not download {repo!r} from the Hugging Face hub ({reason}). Without a network: download "
        "the file elsewhere and pass its path"
    )
