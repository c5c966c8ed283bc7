"""The configuration of `evaat-fast eval` and `features`: a file's, or the one that a run's checkpoint holds."""

import argparse
import json
import os
from pathlib import Path

from evaat_fast.train import trainer
from evaat_fast.train.config import Config, ConfigError, load, of
from evaat_fast.train.outcome import run_of

# What a task's files may be taken for: the kind of data in whose folders they lie.
_SAME = {"ek100-mir": ("ek100-mir",), "charades-ego": ("charades-ego",), "egomcq": ()}


def of_task(arguments: argparse.Namespace) -> Config:
    """For arguments.task: config, checkpoint, annotations, videos, overrides and task are read.

    Raises:
        ConfigError: no configuration, a mistake in it, or one whose data are another task's.
    """
    config = _config(arguments)
    kinds, given = _SAME[arguments.task], bool(arguments.annotations)
    if config.data.kind not in kinds and not given:
        raise ConfigError(
            f"--task {arguments.task}: the configuration's data are {config.data.kind!r}; give the task's own files by "
            "--annotations and --videos"
        )
    if arguments.task == "ek100-mir":
        config.data.kind = "ek100-mir"
    return config


def of_features(arguments: argparse.Namespace) -> Config:
    """The same without a task.

    Raises:
        ConfigError: several checkpoints, no configuration, or a mistake in it.
    """
    if len(arguments.checkpoint) > 1:
        raise ConfigError("--checkpoint: features are of one model; give it once")
    return _config(arguments)


def _config(arguments: argparse.Namespace) -> Config:
    places = {"annotations": arguments.annotations, "videos": arguments.videos}
    overrides = [f"data.{name}={json.dumps(os.path.abspath(path))}" for name, path in places.items() if path]
    overrides = [*arguments.overrides, *overrides]
    if arguments.config:
        config = load(arguments.config, overrides, training=False)
    for path in arguments.checkpoint:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--checkpoint: there is no file {path!r}")
    if not arguments.config:
        stored = run_of(arguments.checkpoint[0]).get("config")
        if not stored:
            raise ConfigError(f"CONFIG.toml: {arguments.checkpoint[0]!r} is of no run, and does not say how clips are read")
        # Of a run on another machine neither matters here.
        stored = {section: dict(values) for section, values in stored.items()}
        stored["train"] = {**stored["train"], "device": "auto"}
        config = of(stored, arguments.checkpoint[0], overrides, training=False)
    return config


def check_file(path: str, name: str) -> None:
    """Proves that a file can be written to.

    Raises:
        ConfigError: it cannot.
    """
    trainer.check_folder(Path(path).parent, name)
    if Path(path).is_dir():
        raise ConfigError(f"{name}: {path!r} is a folder; expected a file to write")
