"""What a training run is: a TOML file read into dataclasses, every key checked.

    config = load("run.toml", ["optim.lr=1e-4", "train.epochs=3"])

An unknown key, a value of the wrong type or out of range is a ConfigError that names the file and the key, and for an
unknown key the nearest that exists. Paths in a file are relative to that file; paths given by `--set` are relative to
the current folder.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import reprlib
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from evaat_fast.data.choices import LABELLED, Corpus, Decoder, Frames, Positive, Sampler


class ConfigError(ValueError):
    """A mistake in a configuration. The message names its source and the key."""


def key(
    default: Any, *, least: float | None = None, above: float | None = None, most: float | None = None, path: bool = False
) -> Any:
    """A dataclass field with its range: least <= value <= most, above < value; or a path. Choices are a Literal."""
    return field(default=default, metadata=dict(least=least, above=above, most=most, path=path))


@dataclass
class Model:
    """name: of `evaat_fast.list_models()`. num_frames: T, 0 for the model's own. pretrained: as for `create_model`,
    "" for none. overrides: fields of ModelConfig. grad_checkpointing: true keeps only each block's input for the backward
    pass, "selective" all but what is cheap to compute again. patch_dropout: which share of its patches a training clip is shown
    without."""

    name: str = "eva02_at_base_patch16_224"
    num_frames: int = key(0, least=0, most=4096)
    pretrained: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    grad_checkpointing: bool | Literal["selective"] = False
    patch_dropout: float = key(0.0, least=0, most=0.99)


@dataclass
class Data:
    """kind: the corpus, as `evaat-fast prepare` names them, or "clips" for a table that it wrote. annotations: the folder of
    the published files, or what `prepare` made of them. videos: the folder of videos, whole or in chunks. crop_scale: least
    share of the frame in a random training crop. jitter: draw each training frame within its segment of the clip, and not
    its middle; sampler: whose segments. positive: the text of a training clip, "own" or, for "ek100-mir", a "relevant" one
    drawn anew each time, as the SMS loss's authors do. decoder: "auto" takes the first that the doctor finds usable.
    max_broken: the largest share of clips that may be missing or unreadable; training goes on without them.
    cache: keep every decoded clip in memory (a small corpus). workers: processes that decode, 0 for none."""

    kind: Corpus = "ek100-mir"
    annotations: str = key("", path=True)
    videos: str = key("", path=True)
    crop_scale: float = key(0.5, above=0, most=1)
    jitter: bool = True
    sampler: Sampler = "avion"
    positive: Positive = "own"
    decoder: Decoder = "auto"
    max_broken: float = key(0.01, least=0, most=1)
    cache: bool = False
    workers: int = key(0, least=0)


@dataclass
class Loss:
    """name: "clip" (InfoNCE) or "sms". temperature, learnable_temperature: of "clip". margin, relaxation, rule: of
    "sms"."""

    name: Literal["clip", "sms"] = "clip"
    temperature: float = key(0.05, above=0)
    learnable_temperature: bool = False
    margin: float = key(0.6, least=0)
    relaxation: float = key(0.1, least=0)
    rule: Literal["code", "paper", "charades"] = "code"


@dataclass
class Optim:
    """AdamW. clip_norm: largest norm of the whole gradient, 0 for no limit."""

    lr: float = key(3e-5, above=0)
    weight_decay: float = key(0.01, least=0)
    beta1: float = key(0.9, least=0, most=0.9999)
    beta2: float = key(0.999, least=0, most=0.99999)
    eps: float = key(1e-8, above=0)
    clip_norm: float = key(0.0, least=0)


@dataclass
class Schedule:
    """A linear warm-up that begins at start_lr, to optim.lr after warmup_epochs; then "cosine" to end_lr, or
    "constant"."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = key(1.0, least=0)
    start_lr: float = key(0.0, least=0)
    end_lr: float = key(0.0, least=0)


@dataclass
class Train:
    """out: folder of the run. init: a checkpoint whose weights the run starts from. distinct: at most one clip of a
    kind (verb class and noun classes) in a batch, for InfoNCE, which would take a second one for a negative. device:
    "auto" takes a GPU where there is one. precision: "auto" is bfloat16 autocast on CUDA, float32 on the CPU;
    "bfloat16-params" computes the same without casts, as it holds the weights of matrix products in bfloat16 and updates
    float32 masters of them.
    save_every: epochs. compile: torch.compile for the blocks of both towers, which costs a minute at the start.
    cuda_graph: on a GPU, replay a step as a CUDA graph, which spares the launches from Python; memory grows by one
    step's for each text length, of multiples of 16."""

    out: str = key("", path=True)
    init: str = key("", path=True)
    epochs: int = key(1, least=1)
    batch_size: int = key(64, least=2)
    distinct: bool = False
    seed: int = key(0, least=0, most=2**31 - 1)
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "bfloat16-params"] = "auto"
    processes: int = key(1, least=1)
    save_every: int = key(1, least=1)
    compile: bool = False
    cuda_graph: bool = False


@dataclass
class Eval:
    """every: evaluate after so many epochs, 0 for only after the last; on the test split of "ek100-mir", the other corpora
    have tasks of their own, see `evaat-fast eval --task`. frames: what the model is shown of each clip."""

    every: int = key(0, least=0)
    batch_size: int = key(64, least=1)
    frames: Frames = "ordered"


@dataclass
class Config:
    """A run. Every section and every key has a default but data.annotations, data.videos and train.out."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a table"}
SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}
KEYS = {f"{s}.{f.name}": f for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


def kind(spec: dataclasses.Field) -> type:
    """The plain type of a key's values."""
    if get_origin(spec.type) is Literal:
        return str
    if choices(spec):
        return bool
    found = get_origin(spec.type) or spec.type
    assert isinstance(found, type)
    return found


def choices(spec: dataclasses.Field) -> tuple[str, ...]:
    """What a key can be, where it is one of a few words, or true, false or one of a few words; else nothing."""
    literals = [t for t in (spec.type, *get_args(spec.type)) if get_origin(t) is Literal]
    return get_args(literals[0]) if literals else ()


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
        content = _toml().loads(path.read_text(encoding="utf-8"))
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
        ConfigError: no "=", or a value that is neither TOML nor a bare word for a string.
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
        word = name not in KEYS or kind(KEYS[name]) is str or value in choices(KEYS[name])
        if value and word and not set(value) & set("\"'\n"):
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
    if not section:
        near, known = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.4), "section"
        near = [k for k in KEYS if k.split(".")[1] == name] or near
    else:
        known = "key"
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.75)
        elsewhere = [k for k in KEYS if k.split(".")[1] == leaf]
        own = difflib.get_close_matches(leaf, [k.split(".")[1] for k in KEYS if k.startswith(f"{section}.")], n=1)
        near = elsewhere or [f"{section}.{leaf}" for leaf in own] or near
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
    if not (named or isinstance(value, wanted)) or (isinstance(value, bool) and wanted is not bool):
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
    if config.train.processes > 1:
        raise ConfigError(f"{source}: train.processes: training on several GPUs is not built yet; set it to 1")
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
    if training and config.train.init and config.model.pretrained:
        raise ConfigError(f"{source}: train.init: give either this or model.pretrained, not both")
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
