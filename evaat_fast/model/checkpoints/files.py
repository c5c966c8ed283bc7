"""Files of weights, read without running anything that they say, and written all at once."""

import argparse
import dataclasses
import json
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evaat_fast import _parts
from evaat_fast._files import damage, write_atomically

if TYPE_CHECKING:
    from evaat_fast.model.clip import EVA02AT

_log = logging.getLogger("evaat_fast")

# Under which a state dict lies, the first that holds one. Averaged weights are what others evaluate.
_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "averaged_model", "state_dict", "model", "module")
# Of a folder. Each may also be in shards, with the index `NAME.index.json`.
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_RUN = ("last.pt", "last.parts")  # of a run, which has one of them, or for a moment both
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_METADATA = "evaat_fast.model_config"  # of a .safetensors file: the configuration as JSON


def _harmless() -> list[Any]:
    """What AVION's and LaViLa's files hold besides tensors: the arguments of a script and numpy's scalars. Making one runs
    nothing; every other class stays refused."""
    scalar: Any = (getattr(np, "_core", None) or np.core).multiarray.scalar
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    # numpy 2 has moved it, and a file has the name of its own time.
    return [argparse.Namespace, np.dtype, *kinds, *((scalar, f"numpy.{part}.multiarray.scalar") for part in ("core", "_core"))]


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    state: name -> tensor, in the names of whoever wrote it. config: our configuration as a dict, None where there is none.
    hints: fields of a ModelConfig that are said otherwise: `activation` by an open_clip_config.json beside it, `norm` by the
        arguments of AVION's script in it. source: the path.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    hints: dict[str, Any]
    source: str


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """`read`, of which (state, config)."""
    stored = read(path)
    return stored.state, stored.config


def read(path: str | os.PathLike[str]) -> Stored:
    """The tensors and the configuration stored in a file.

    Args:
        path: a .safetensors file, or a torch file: a state dict, alone or under a key such as "state_dict", "model" or
            "model_ema". Of a pickle only tensors, plain data, argparse.Namespace and numpy's scalars are made. Or the index of
            a file in shards; or a folder: of a Hugging Face repository, as it lies in that library's cache or elsewhere, of a
            run, or of the parts that its processes wrote.

    Returns:
        A Stored.

    Raises:
        FileNotFoundError: no such file, or a shard is missing. ValueError: no state dict in it. ImportError: safetensors is
            needed and missing.
    """
    path = Path(path)
    path = path if not path.is_dir() or _parts.is_parts(path) else _inside(path)
    if _parts.is_parts(path):
        # An optimiser's moments are twice the weights.
        return Stored(*_taken(_parts.read(path, lambda name: not name.startswith("/optimizer/")), path), str(path))
    of_hub = path.name.removesuffix(".index.json") in HUB_FILES
    beside = _open_clip_hints(path.with_name(_OPEN_CLIP_CONFIG)) if of_hub else {}
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {str(path)!r}")
    reader = _read_shards if path.suffix == ".json" else _read_safetensors if path.suffix == ".safetensors" else _read_torch
    state, config, hints = reader(path)
    return Stored(state, config, beside | hints, str(path))


_Content = tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]  # the first three fields of a Stored


def _inside(folder: Path) -> Path:
    """The weights of a folder."""
    tried = folder
    if (folder / "snapshots").is_dir():  # a repository in the cache: revisions, and which of them is main
        main = folder / "refs" / "main"
        revision = folder / "snapshots" / main.read_text().strip() if main.is_file() else None
        found = [revision] if revision and revision.is_dir() else sorted((folder / "snapshots").iterdir())
        if not found:
            raise FileNotFoundError(f"checkpoint: {str(folder)!r} is a repository in the cache without a snapshot")
        tried = found[-1]
    for name in HUB_FILES:
        for candidate in (tried / name, tried / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    places = [(_parts.standing(tried / name) or tried) / ".metadata" if "parts" in name else tried / name for name in _RUN]
    times = {name: place.stat().st_mtime_ns for name, place in zip(_RUN, places, strict=True) if place.is_file()}
    if times:
        return tried / max(times, key=lambda name: times[name])
    if _parts.is_parts(tried / _RUN[1]):
        return tried / _RUN[1]  # damaged
    raise FileNotFoundError(f"checkpoint: none of {', '.join((*HUB_FILES, *_RUN))} is in the folder {str(tried)!r}")


def _open_clip_hints(path: Path) -> dict[str, Any]:
    """Which activation open_clip's description of a model says, where there is one."""
    try:
        described = json.loads(path.read_text())["model_cfg"]
        return {"activation": "quick_gelu" if described.get("quick_gelu") else "gelu"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_shards(index: Path) -> _Content:
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
        if any(Path(name).name != name or Path(name).suffix == ".json" for name in names):
            raise ValueError("a shard is no file of weights beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {str(index)!r} is not an index of shards: {error}") from None
    state: dict[str, Tensor] = {}
    config = None
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"checkpoint: the shard {name!r} is missing beside {str(index)!r}, of {len(names)} shards")
        part = read(index.parent / name)
        state, config = {**state, **part.state}, config or part.config
    if lost := sorted(places.keys() - state.keys()):
        raise ValueError(f"checkpoint: {str(index)!r} names {len(lost)} tensors that no shard holds, the first: {lost[0]}")
    return state, config, {}


def _read_safetensors(path: Path) -> _Content:
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading .safetensors files needs safetensors: pip install safetensors") from None
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get(_METADATA, "null"))
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"checkpoint: {str(path)!r} is not a .safetensors file that can be read: {error}") from None
    return state, config if isinstance(config, dict) else None, {}


def _read_torch(path: Path) -> _Content:
    if _is_program(path):
        raise ValueError(
            f"checkpoint: {str(path)!r} is a TorchScript program, as OpenAI's downloads are, and is not run: save the state "
            "dict of the model that it makes"
        )
    try:
        with torch.serialization.safe_globals(_harmless()):
            # Mapped, where the format allows it: an optimiser's moments beside the weights are not read then.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds for a file that is none of its own
        if found := damage(path):
            raise ValueError(f"checkpoint: {str(path)!r} {found}: copy it again") from error
        # Not torch's own message: it recommends to load the file unsafely.
        raise ValueError(
            f"checkpoint: {str(path)!r} is not a file of weights that torch can read safely ({_why(path, error)})"
        ) from error
    return _taken(content, path)


def _taken(content: Any, path: Path) -> _Content:
    """The state dict of what a file held, and what it says of its model."""
    found = content if isinstance(content, dict) else {}
    config, style = found.get("model_config"), getattr(found.get("args"), "norm_style", None)
    for _ in range(8):  # a pickle may hold itself
        if not isinstance(content, dict) or _is_state(content):
            break
        key = next((k for k in _KEYS if isinstance(content.get(k), dict) and content[k]), None)
        if key is None:
            raise ValueError(f"checkpoint: no state dict in {str(path)!r}, only the keys {sorted(map(str, content))}")
        _log.info("%s: the weights under %r", path, key)
        content = content[key]
    if not _is_state(content):
        raise ValueError(f"checkpoint: expected a state dict in {str(path)!r}, got {type(content).__name__}")
    return content, config if isinstance(config, dict) else None, {"norm": "timm"} if style == "timm" else {}


def _is_state(content):
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )


def _is_program(path):
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _why(path, error):
    """A few words on why torch refuses a file."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        refused = []
    if refused:
        return f"it asks for {', '.join(sorted(refused))}, which is not plain data"
    return type(error).__name__


def save_checkpoint(model: "EVA02AT", path: str | os.PathLike[str], **extra: Any) -> None:
    """Writes the weights and the configuration, so that a reader sees the old file or the new one and never half of
    one.

    Args:
        model: an EVA02AT. path: the file to write, .safetensors or another name for torch's format. extra: what else to store,
            in torch's format alone: tensors, numbers, strings, lists and dicts of them.

    Raises:
        ValueError: extra for a .safetensors file. ImportError: safetensors is needed and missing.
    """
    write(path, model.state_dict(), dataclasses.asdict(model.config), extra)


def write(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`save_checkpoint` of a state dict and a configuration as a dict; None stores none."""
    put: Callable[[Any], object]
    if Path(path).suffix == ".safetensors":
        if extra:
            raise ValueError(f"extra: a .safetensors file holds tensors alone, got {', '.join(extra)}")
        try:
            from safetensors.torch import save
        except ImportError:
            raise ImportError("writing .safetensors files needs safetensors: pip install safetensors") from None
        # Copies, as tensors of one file may not share memory.
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in state.items()}
        metadata = {"format": "pt"} | ({} if config is None else {_METADATA: json.dumps(dict(config))})

        def put(file):
            file.write(save(tensors, metadata))

    else:
        content = {"state_dict": dict(state), **({} if config is None else {"model_config": dict(config)}), **(extra or {})}

        def put(file):
            torch.save(content, file)

    write_atomically(path, put)


def download(repo: str) -> str:
    """The weights of a Hugging Face repository as a local file: of the library's cache, where they are in it.

    Raises:
        ImportError: huggingface_hub is missing. RuntimeError: not reachable, or no known file of weights in it.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError("pretrained='hf-hub:...' needs huggingface_hub: pip install huggingface_hub safetensors") from None
    reason: Exception | str = ""
    for name in HUB_FILES:
        try:
            return hf_hub_download(repo, name)
        except LocalEntryNotFoundError as error:
            reason = error
            break
        except EntryNotFoundError:
            reason = f"it has none of {', '.join(HUB_FILES)}"
        except Exception as error:  # the hub's client, its transport and the disk each have errors of their own
            reason = error
            break
    raise RuntimeError(
        f"pretrained: could not download {repo!r} from the Hugging Face hub ({_first(reason)}). Without a network: download "
        f"the file elsewhere, https://huggingface.co/{repo}/resolve/main/{HUB_FILES[0]} or {HUB_FILES[1]}, and pass its path"
    )


def _first(reason: Exception | str) -> str:
    """The first line of a client's error, which may have many."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]
