"""From file to file: anybody's weights to ours, and ours to anybody's."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaat_fast.model.checkpoints.files import read, write
from evaat_fast.model.checkpoints.layouts import convert_state, export_state, layout_of
from evaat_fast.model.checkpoints.load import config_of
from evaat_fast.model.configs import ModelConfig


@dataclass(frozen=True)
class Converted:
    """What `convert` did. source, target: the files. layout: whose names the source had. to: those of the target. tensors: how
    many were written. config: what model they are of."""

    source: str
    target: str
    layout: str
    to: str
    tensors: int
    config: ModelConfig

    def __str__(self) -> str:
        config = self.config
        model = f"{config.tower}, {config.vision_width} wide, {config.vision_layers} blocks, {config.num_frames} frame"
        model += "s" * (config.num_frames > 1)
        size = " x ".join(map(str, config.size))
        said = f"{self.target}: {self.tensors} tensors, layout {self.to} (from {self.layout})"
        return f"{said}\nmodel: {model} of {size} pixels, embeddings of {config.embed_dim}, norm {config.norm!r}"


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], to: str = "ours", **overrides: Any) -> Converted:
    """Writes a file of weights in other names. Nothing is resized or rounded.

    Args:
        source: as for `evaat_fast.model.checkpoints.read`. target: the file to write; .safetensors, or another name for torch's
            format, in which avion's and lavila's lie under "state_dict" with names that begin with "module.".
        to: of LAYOUTS. overrides: fields of ModelConfig that the source leaves open, such as activation="quick_gelu".

    Returns:
        A Converted. The target stores the configuration, with its `norm`, whatever its names are; `evaat_fast.load` reads it.

    Raises:
        ValueError: no such layout, or one that has no names for these weights, or weights that are no model's.
        FileNotFoundError: no such file. ImportError: safetensors is needed and missing.
    """
    stored = read(source)
    config = config_of(stored, overrides)
    state = export_state(convert_state(stored.state), config, to)
    if to in ("avion", "lavila") and Path(target).suffix != ".safetensors":
        state = {f"module.{name}": x for name, x in state.items()}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write(target, state, dataclasses.asdict(config))
    return Converted(str(source), str(target), layout_of(stored.state), to, len(state), config)
