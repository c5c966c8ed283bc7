"""What a training run is: a TOML file read into dataclasses, every key checked.

    config = load("run.toml", ["optim.lr=1e-4", "train.epochs=3"])

An unknown key, a value of the wrong type or out of range is a ConfigError that names the file and the key, and for an
unknown key the nearest that exists. Paths in a file are relative to that file; paths given by `--set` are relative to
the current folder.
"""

import copy
import dataclasses
import difflib
import importlib
import json
import math
import os
import reprlib
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from evaat_fast.data.choices import LABELLED
from evaat_fast.train.sections import KEYS, SECTIONS, Config, choices, kind

__all__ = [
    "KEYS",
    "Config",
    "ConfigError",
    "absolute",
    "check",
    "load",
    "of",
    "parse_override",
    "template",
    "toml_value",
    "with_values",
]

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a table",
    list: "a list of strings",
}


class ConfigError(ValueError):
    """A mistake in a configuration. The message names its source and the key."""


def _expected(spec):
    return " or ".join((_NAMES[kind(spec)], *(choices(spec) if kind(spec) is bool else ())))


def load(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    training: bool = True,
    base: str | os.PathLike[str] | None = None,
) -> Config:
    """Reads a configuration.

    Args:
        path: a TOML file. overrides: strings "section.key=value", the value in TOML (a bare word will do for a string).
        training: False where `train.out` is not needed.
        base: the folder that paths in the file are relative to, instead of the file's own.

    Returns:
        A Config.

    Raises:
        ConfigError: anything wrong with the file, a key or a value.
    """
    path = Path(path)
    try:
        content = _toml().loads(path.read_text(encoding="utf-8-sig"))  # Notepad writes a mark
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {str(path)!r}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return of(content, str(path), overrides, training=training, base=path.parent if base is None else Path(base))


def of(
    content: Mapping[str, Any],
    source: str,
    overrides: Iterable[str] = (),
    *,
    training: bool = True,
    base: Path = Path(),  # noqa: B008
) -> Config:
    """A configuration from the sections of one, as a TOML file or a checkpoint has them.

    Args:
        content: {section: {key: value}}. source: what to call it in messages. overrides, training, base: as for `load`.

    Raises:
        ConfigError: as `load`.
    """
    config = Config()
    for section, values in content.items():
        if section not in SECTIONS:
            raise ConfigError(f"{source}: {_unknown(section)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {section}: expected a table [{section}], got {values!r}")
        for name, value in values.items():
            _set(config, f"{section}.{name}", value, source, base)
    for text in overrides:
        name, value = parse_override(text)
        _set(config, name, value, "--set", Path())
    check(config, source, training=training)
    return config


def template() -> str:
    """A TOML file of every key with its default, and what the sections' docstrings say of them."""
    lines = ["# Every key with its default. data.annotations, data.videos and train.out have none."]
    for name, section in SECTIONS.items():
        lines += [
            "",
            f"[{name}]",
            *textwrap.wrap(" ".join(section.__doc__.split()), 110, initial_indent="# ", subsequent_indent="# "),
        ]
        for f in dataclasses.fields(section):
            value = getattr(section(), f.name)
            note = " | ".join((*["false", "true"] * (kind(f) is bool), *choices(f)) if choices(f) else ())
            lines.append(f"{f.name} = {toml_value(value)}" + (f"   # {note}" if note else ""))
    return "\n".join(lines)


def absolute(config: Config, names: Iterable[str] = KEYS) -> Config:
    """A copy of the configuration in which those of the keys that are paths are absolute."""
    config = copy.deepcopy(config)
    for name in names:
        section, leaf = name.split(".")
        value = getattr(getattr(config, section), leaf)
        if KEYS[name].metadata.get("path") and value:
            setattr(getattr(config, section), leaf, str(Path(value).resolve()))
    return config


def toml_value(value: object) -> str:
    """A value of a configuration as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value)


def with_values(text: str, config: Config, names: Iterable[str]) -> str:
    """The text of a configuration file with the values that `config` has for the keys `names`; all else is kept."""
    lines = text.split("\n")
    for name in names:
        section, leaf = name.split(".")
        line = f"{leaf} = {toml_value(getattr(getattr(config, section), leaf))}"
        start = lines.index(f"[{section}]") + 1
        end = next((i for i in range(start, len(lines)) if lines[i].startswith("[")), len(lines))
        place = next((i for i in range(start, end) if lines[i].partition("=")[0].strip() == leaf), None)
        lines[place or start : (place or start) + (place is not None)] = [line]
    return "\n".join(lines)


def parse_override(text: str) -> tuple[str, Any]:
    """ "a.b=1" -> ("a.b", 1).

    Raises:
        ConfigError: no "=", or a value that is neither TOML nor a bare word, or nothing, for a string.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name or "\n" in text:
        raise ConfigError(f"--set {text!r}: expected section.key=value")
    try:
        parsed = _toml().loads(f"value = {value}")
        if list(parsed) != ["value"]:
            raise ValueError
        return name, parsed["value"]
    except ValueError:
        string = name in KEYS and kind(KEYS[name]) is str
        word = name not in KEYS or string or value in choices(KEYS[name])
        if (value or string) and word and not set(value) & set("\"'\n"):
            return name, value
        wanted = f"{_expected(KEYS[name])}, got {value!r}" if name in KEYS else f"a TOML value, got {value!r}"
        raise ConfigError(f"--set {name}: expected {wanted}") from None


def _toml() -> ModuleType:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("reading TOML on Python 3.10 needs tomli: pip install 'evaat-fast[train]'")


def _unknown(name):
    """That there is no such key or section, and the nearest that is."""
    section, _, leaf = name.rpartition(".")
    if name in SECTIONS:
        keys = [f"{name}.{f.name}" for f in dataclasses.fields(SECTIONS[name])]
        return f"{name}: expected section.key, as {keys[0]}: it is a section, of {', '.join(keys)}"
    if not section:
        near, known = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.4), "section"
        near = [k for k in KEYS if k.split(".")[1] == name] or near
    else:
        known = "key"
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.75)
        elsewhere = [k for k in KEYS if k.split(".")[1] == leaf]
        own = difflib.get_close_matches(leaf, [k.split(".")[1] for k in KEYS if k.startswith(f"{section}.")], n=1)
        near = elsewhere or [f"{section}.{leaf}" for leaf in own] or near
        leaves = {k.split(".")[1]: k for k in KEYS}
        near = near or [leaves[x] for x in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
        if section in SECTIONS and not near:
            all_keys = ", ".join(f.name for f in dataclasses.fields(SECTIONS[section]))
            return f"{name}: there is no such key; [{section}] has {all_keys}"
        near = near or difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
    return f"{name}: there is no such {known}" + (f"; did you mean {near[0]!r}?" if near else "")


def _set(config: Config, name: str, value: Any, source: str, base: Path) -> None:
    if name.startswith("model.overrides."):
        config.model.overrides[name.removeprefix("model.overrides.")] = value
        return
    if name not in KEYS:
        raise ConfigError(f"{source}: {_unknown(name)}")
    wanted: Any = kind(KEYS[name])
    if wanted is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    named = wanted is bool and isinstance(value, str) and value in choices(KEYS[name])
    strings = not isinstance(value, list) or all(isinstance(item, str) for item in value)
    if not (named or (isinstance(value, wanted) and strings)) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{source}: {name}: expected {_expected(KEYS[name])}, got {reprlib.repr(value)}")
    if KEYS[name].metadata.get("path") and value:
        if "\0" in value:
            raise ConfigError(f"{source}: {name}: expected a path, got {value!r}")
        value = str(base / Path(value).expanduser())
    section, leaf = name.split(".")
    setattr(getattr(config, section), leaf, value)


def check(config: Config, source: str = "config", *, training: bool = True) -> None:
    """Raises ConfigError unless every value is in range and the values fit together."""
    for name, spec in KEYS.items():
        section, leaf = name.split(".")
        value, limits = getattr(getattr(config, section), leaf), spec.metadata
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{source}: {name}: expected a finite number, got {value!r}")
        for limit, holds, text in (
            ("least", lambda v, x: v >= x, "of at least"),
            ("above", lambda v, x: v > x, "above"),
            ("most", lambda v, x: v <= x, "of at most"),
        ):
            bound = limits.get(limit)
            if bound is not None and not holds(value, bound):
                raise ConfigError(f"{source}: {name}: expected a value {text} {bound}, got {value!r}")
        known = choices(spec)
        if known and value not in known and not isinstance(value, bool):
            near = difflib.get_close_matches(value, known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: {name}: expected one of {', '.join(known)}, got {value!r}{guess}")
    needed = ["data.annotations", "data.videos"] + ["train.out"] * training
    for name in needed:
        section, leaf = name.split(".")
        if not getattr(getattr(config, section), leaf):
            raise ConfigError(f"{source}: {name}: a path is required")
    if training and config.schedule.warmup_epochs > config.train.epochs:
        raise ConfigError(
            f"{source}: schedule.warmup_epochs: expected at most train.epochs={config.train.epochs}, "
            f"got {config.schedule.warmup_epochs}"
        )
    if config.data.positive == "relevant" and config.data.kind != "ek100-mir":
        raise ConfigError(
            f"{source}: data.positive: only 'ek100-mir' has relevant captions, got data.kind = {config.data.kind!r}"
        )
    if training and config.loss.name == "sms" and config.data.kind not in LABELLED:
        raise ConfigError(f"{source}: loss.name: 'sms' needs labels, and data.kind = {config.data.kind!r} has none; use 'clip'")
    if config.data.similarity != "labels":
        if config.data.kind != "csv":
            raise ConfigError(f"{source}: data.similarity: only 'csv' has it, got data.kind = {config.data.kind!r}")
        if training and config.loss.name != "sms":
            raise ConfigError(f"{source}: data.similarity: only loss.name = 'sms' reads it, got {config.loss.name!r}")
        if training and not (config.train.init or config.model.pretrained):
            raise ConfigError(
                f"{source}: data.similarity: 'text-tower' is that of the weights that the run starts from: set train.init or "
                "model.pretrained"
            )
    if training and config.train.init and config.model.pretrained:
        raise ConfigError(f"{source}: train.init: give either this or model.pretrained, not both")
    if 0 < config.train.spike <= 1:
        raise ConfigError(f"{source}: train.spike: expected 0, for never, or a value above 1, got {config.train.spike!r}")
    if config.train.micro_batch and config.train.cuda_graph:
        raise ConfigError(f"{source}: train.micro_batch: not with train.cuda_graph, which replays a step of one piece")
    if config.optim.name == "lamb" and config.train.cuda_graph:
        raise ConfigError(f"{source}: optim.name: 'lamb' cannot be replayed with train.cuda_graph; use 'adamw'")
    for name in ("start_lr", "end_lr"):
        if getattr(config.schedule, name) > config.optim.lr:
            raise ConfigError(
                f"{source}: schedule.{name}: expected at most optim.lr={config.optim.lr}, got {getattr(config.schedule, name)}"
            )
    _check_model(config.model, source)


def _check_model(model, source):
    from evaat_fast.model.configs import get_config

    overrides = dict(model.overrides)
    for name in ("name", "num_frames", "temperature"):
        if name in overrides:
            place = "loss.temperature" if name == "temperature" else f"model.{name}"
            raise ConfigError(f"{source}: model.overrides.{name}: set {place} instead")
    if model.num_frames:
        overrides["num_frames"] = model.num_frames
    try:
        get_config(model.name, **overrides)
    except (ValueError, TypeError) as error:
        text = str(error)
        where = "model.name" if text.startswith("name: ") else "model"
        raise ConfigError(f"{source}: {where}: {text.removeprefix('name: ')}") from None
