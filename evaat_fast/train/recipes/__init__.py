"""The paper's training runs as configuration files, where each value has its source behind it.

config = recipes.load("egoclip-b", ["data.videos=videos", "train.out=runs/a"])
"""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from evaat_fast.train import config as configs
from evaat_fast.train.config import Config, ConfigError

__all__ = ["load", "path", "titles"]

_FOLDER = Path(__file__).parent


def titles() -> dict[str, str]:
    """Every recipe's name, and what it says of itself in its first line."""
    return {file.stem: file.read_text().partition("\n")[0].removeprefix("# ") for file in sorted(_FOLDER.glob("*.toml"))}


def path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    known = list(titles())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        guess = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"recipe: there is no {name!r}{guess} Known: {', '.join(known)}")
    return _FOLDER / f"{name}.toml"


def load(name: str, overrides: Iterable[str] = (), *, training: bool = True, base: str | os.PathLike[str] = ".") -> Config:
    """A recipe as a configuration. Its paths are relative to the current folder, and not to its file's.

    Args:
        name: of `titles`. overrides, training: as for `evaat_fast.train.config.load`. base: another folder for its paths.

    Raises:
        ConfigError: no such recipe, or as `evaat_fast.train.config.load`.
    """
    return configs.load(path(name), overrides, training=training, base=base)
