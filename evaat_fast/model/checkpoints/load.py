"""A state dict into a model, strictly: what does not fit is an error with a table of it."""

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from evaat_fast.model.checkpoints.files import Stored, read
from evaat_fast.model.checkpoints.fit import inflate
from evaat_fast.model.checkpoints.layouts import CONSTANTS, convert_state, implied, layout_of, unwrap
from evaat_fast.model.configs import ModelConfig, of_stored, unknown

if TYPE_CHECKING:
    from evaat_fast.model.clip import EVA02AT

_log = logging.getLogger("evaat_fast")

_HEADS = ("visual.head.weight", "visual.head.bias", "text.text_projection")
# Fields that may differ between a file and a model: what is resized, and where training begins.
_FREE = {"num_frames", "image_size", "context_length", "temperature"}


@dataclass(frozen=True)
class Row:
    """A tensor that did not simply go to its place. name: ours. what: "missing", "unexpected", "of another shape"; or, of what
    fits after all, "resized" or "left fresh". file, model: shapes, () of a scalar, None where there is none."""

    name: str
    what: str
    file: tuple[int, ...] | None = None
    model: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Report:
    """What became of a file's tensors. source: the file. layout: whose names it has. loaded: how many fit. rows: the others.
    `str(report)` is a table, in which the blocks of a tower share a line."""

    source: str
    layout: str
    loaded: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded} tensors fit; layout: {self.layout}"]
        groups: dict[tuple, int] = {}
        for row in self.rows:
            shapes = ["-" if shape is None else str(list(shape)) for shape in (row.file, row.model)]
            key = re.sub(r"\.\d+\.", ".*.", row.name), row.what, *shapes
            groups[key] = groups.get(key, 0) + 1
        table = [("tensor", "", "in the file", "in the model")]
        table += [(f"{name} x {n}" if n > 1 else name, *rest) for (name, *rest), n in groups.items()]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        if groups:
            lines += [
                "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
            ]
        return "\n".join(lines)

    def __getitem__(self, what: str) -> list[str]:
        """The names of the rows that say `what`."""
        return [row.name for row in self.rows if row.what == what]


def load_checkpoint(
    model: "EVA02AT", path: str | os.PathLike[str], *, part: Literal["all", "visual"] = "all", fresh_heads: bool = False
) -> Report:
    """Loads a file of weights into `model`.

    Args:
        model: an EVA02AT.
        path: as for `evaat_fast.model.checkpoints.read`, in any layout that `convert_state` knows.
        part: "all", or "visual" for files that hold the vision tower alone, such as timm's.
        fresh_heads: True: projections to another embedding space, and the temperature that belongs to them, are left
            as they are.

    Returns:
        A Report.

    Raises:
        ValueError: names missing, left over or of another shape (a table says which), a configuration stored in the file that
            does not fit the model's, or `part` is neither. FileNotFoundError: no such file.
    """
    if part not in ("all", "visual"):
        raise ValueError(f"part: expected 'all' or 'visual', got {part!r}")
    stored = read(path)
    if stored.config is not None:
        check_config(stored.config, model.config, path, fresh_heads)
    elif (norm := said(stored).get("norm", model.config.norm)) != model.config.norm:
        # Not an error: whoever trained with their code and without the typo knows better.
        _log.warning("%s: files of this layout were trained with norm=%r, the model has %r", path, norm, model.config.norm)
    return load_stored(model, stored, part=part, fresh_heads=fresh_heads)


def load_stored(
    model: "EVA02AT", stored: Stored, *, part: Literal["all", "visual"] = "all", fresh_heads: bool = False
) -> Report:
    """`load_checkpoint` of what was read."""
    grid = None if stored.config is None else of_stored(stored.config, stored.source).grid[1:]
    return load_state(model, stored.state, part=part, fresh_heads=fresh_heads, source=stored.source, grid=grid)


def load_state(
    model: "EVA02AT",
    state: Mapping[str, Tensor],
    *,
    part: Literal["all", "visual"] = "all",
    fresh_heads: bool = False,
    source: str = "state dict",
    grid: tuple[int, int] | None = None,
) -> Report:
    """`load_checkpoint` from a dict of tensors. grid: as for `inflate`."""
    odd = [f"{k} {x.dtype}" for k, x in unwrap(state).items() if not x.is_floating_point() and not CONSTANTS.search(k)]
    odd += [f"{k} {x.layout} on {x.device}" for k, x in state.items() if x.layout is not torch.strided or x.is_meta]
    if odd:
        raise ValueError(f"checkpoint: {source}: expected dense floating-point weights, got {_some(odd)}")
    layout, own = layout_of(state), model.state_dict()
    try:
        found = convert_state(state)
        state = inflate(found, model.config, grid)
    except (RuntimeError, TypeError) as error:  # parts to be joined or resized that do not go together
        raise ValueError(f"checkpoint: {source} does not fit the model: {str(error).splitlines()[0]}") from None
    if part == "visual":
        own = {k: v for k, v in own.items() if k.startswith("visual.")}
        state = {k: v for k, v in state.items() if k.startswith("visual.")}
    rows = [
        Row(name, "resized", tuple(found[name].shape) if name in found else None, tuple(x.shape))
        for name, x in state.items()
        if name not in found or x.shape != found[name].shape
    ]
    fresh = _fresh(model, own, state, fresh_heads, source)
    rows += [Row(name, "left fresh", _shape(found, name), _shape(own, name)) for name in fresh]
    state.update({name: own[name] for name in fresh})
    if "logit_scale" in state and "logit_scale" in own and state["logit_scale"].numel() == 1:  # some store it as [1]
        state["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)
    wrong = [Row(name, "missing", None, _shape(own, name)) for name in sorted(own.keys() - state.keys())]
    wrong += [Row(name, "unexpected", _shape(state, name)) for name in sorted(state.keys() - own.keys())]
    wrong += [
        Row(name, "of another shape", _shape(state, name), _shape(own, name))
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        fit = sum(name in own and x.shape == own[name].shape for name, x in state.items()) - len(fresh)
        raise ValueError(_problem(Report(source, layout, fit, tuple(wrong)), model.config))
    model.load_state_dict(state, strict=part == "all")
    report = Report(source, layout, len(state) - len(fresh), tuple(rows))
    _log.info("%s", report)
    return report


def _fresh(model, own, state, fresh_heads, source):
    """The names of what is left as the model has it."""
    fresh = []
    if fresh_heads and any(k in own and (k not in state or state[k].shape != own[k].shape) for k in _HEADS):
        fresh = [*(k for k in _HEADS if k in own), *(["logit_scale"] if "logit_scale" in own else [])]
        _log.warning("%s: another embedding space than %d: left fresh: %s", source, model.config.embed_dim, ", ".join(fresh))
    over_time = [name for name in own if re.search(r"^visual\.blocks\.\d+\.(timeattn|norm3)\.", name)]
    if over_time and not any(name in state for name in over_time):  # weights of pictures, as LaViLa begins with
        _log.warning("%s: no attention over time: that of %d blocks is left fresh", source, model.config.vision_layers)
        fresh += over_time
    return fresh


def _shape(tensors, name):
    return tuple(tensors[name].shape) if name in tensors else None


def _problem(report: Report, config: ModelConfig) -> str:
    """What is wrong in a line, then the table."""
    problems = []
    for what in ("missing", "unexpected"):
        if names := report[what]:
            problems.append(f"{len(names)} {what}: {_some(names)}")
    shapes = [f"{r.name} {list(r.file or ())} for {list(r.model or ())}" for r in report.rows if r.what == "of another shape"]
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {_some(shapes)}")
    missing = report["missing"]
    if missing and not report["unexpected"] and all(k.startswith("text.") or k == "logit_scale" for k in missing):
        problems.append("the file holds the vision tower alone: load it with load_checkpoint(model, path, part='visual')")
    kind = _kind(report, config)
    if kind:
        problems.append(kind)
    return f"checkpoint: {report.source} does not fit the model; {'; '.join(problems)}\n{report}"


def _kind(report, config):
    """Which other model the names are of, where they say so."""
    names = " ".join(report["unexpected"])
    if ".timeattn." in names and config.tower == "clip":
        return "the file has attention over time and space apart, as lavila_tsf_base_patch16_224 has"
    if config.tower == "eva02" and "visual.norm_pre." in names:
        return "the file is of a CLIP, as clip_vit_base_patch16_224, avion_vit_... and lavila_tsf_... are"
    if config.tower != "eva02" and ".attn.q_bias" in names:
        return "the file is of an EVA02 tower, as eva02_at_base_patch16_224 has"
    return ""


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_config(
    stored: Mapping[str, Any], config: ModelConfig, source: str | os.PathLike[str], fresh_heads: bool = False
) -> None:
    """Raises ValueError unless weights stored with the configuration `stored` (a dict) mean the same under `config`; with
    `fresh_heads` embeddings may be of another width."""
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    for name, ours in dataclasses.asdict(config).items():
        theirs = stored.get(name, defaults[name])  # fields are younger than some files
        if theirs is dataclasses.MISSING or name in _FREE or (name == "embed_dim" and fresh_heads):
            continue
        if type(theirs) is not type(ours) or theirs != ours:
            hint = "; load_checkpoint(..., fresh_heads=True) leaves the projections fresh" if name == "embed_dim" else ""
            raise ValueError(f"checkpoint: {source} was made with {name}={theirs!r}, the model has {ours!r}{hint}")


def config_of(stored: Stored, overrides: Mapping[str, Any]) -> ModelConfig:
    """The configuration of the model that a file is of: as it is stored, else as its shapes and names say.

    Args:
        stored: of `read`. overrides: fields to set otherwise.

    Raises:
        ValueError: overrides that the weights do not allow, or weights that leave a field open; it says which.
    """
    if stored.config is not None:
        config = dataclasses.replace(of_stored(stored.config, stored.source), **_known(overrides))
        check_config(stored.config, config, stored.source)
        # A damaged file could ask for a model that no memory holds.
        if (there := _blocks(convert_state(stored.state), "visual.blocks")) != config.vision_layers:
            raise ValueError(f"checkpoint: {stored.source} says vision_layers={config.vision_layers}, and has {there} blocks")
        return config
    return _guess(stored, _known(overrides))


def said(stored: Stored) -> dict[str, Any]:
    """The fields of a ModelConfig that a file without a configuration says all the same."""
    return implied(layout_of(stored.state)) | stored.hints


def _known(overrides: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in overrides:
        if name not in names:
            raise ValueError(f"overrides: {unknown(name, names)}")
    return dict(overrides)


def _guess(stored: Stored, overrides: dict[str, Any]) -> ModelConfig:
    """Heads have 64 channels, as all CLIPs of these sizes have."""
    state = convert_state(stored.state)
    needed = ["visual.patch_embed.proj.weight", "visual.pos_embed", "visual.blocks.0.mlp.fc1.weight", "visual.head.weight"]
    needed += ["text.positional_embedding", "text.token_embedding.weight"]
    if lost := [name for name in needed if name not in state]:
        raise ValueError(
            f"checkpoint: {stored.source} does not say what model it is of: it has no configuration, and no {', '.join(lost)}; "
            "create the model by name, and load_checkpoint(model, path)"
        )
    odd = [f"{n} {list(state[n].shape)}" for n, axes in zip(needed, (4, 3, 2, 2, 2, 2), strict=True) if state[n].ndim != axes]
    if odd:
        raise ValueError(f"checkpoint: {stored.source} does not say what model it is of, by shapes such as {', '.join(odd)}")
    patch, places, fc1, head, words, table = (state[name] for name in needed)
    tower = (
        "timesformer" if "visual.blocks.0.norm3.weight" in state else "clip" if "visual.norm_pre.weight" in state else "eva02"
    )
    side = round((places.shape[1] - 1) ** 0.5)
    if side * side != places.shape[1] - 1 and "image_size" not in overrides:
        raise ValueError(
            f"image_size: {stored.source} has {places.shape[1] - 1} places, no square: give image_size=(height, width)"
        )
    found: dict[str, Any] = dict(
        image_size=side * patch.shape[-1] or patch.shape[-1],
        patch_size=patch.shape[-1],
        vision_width=patch.shape[0],
        vision_layers=_blocks(state, "visual.blocks"),
        vision_heads=max(patch.shape[0] // 64, 1),
        vision_mlp=fc1.shape[0] // 2 if tower == "eva02" else fc1.shape[0],
        text_width=words.shape[1],
        text_layers=max(_blocks(state, "text.transformer.resblocks"), 1),
        text_heads=max(words.shape[1] // 64, 1),
        embed_dim=head.shape[0],
        num_frames=state["visual.temporal_embed"].shape[1] if "visual.temporal_embed" in state else 1,
        context_length=len(words),
        vocab_size=len(table),
        tower=tower,
        **({} if tower == "eva02" else {"vision_eps": 1e-5}),
    )
    found |= said(stored) | overrides
    if tower != "eva02" and "activation" not in found:
        raise ValueError(
            f"activation: {stored.source} does not say which GELU its weights are of: give activation='quick_gelu' (OpenAI's) "
            "or 'gelu' (open_clip's own)"
        )
    return ModelConfig(**found)


def _blocks(state: Iterable[str], place: str) -> int:
    """How many blocks there are, whatever their numbers."""
    start = f"{place}."
    return len({name[len(start) :].partition(".")[0] for name in state if name.startswith(start)})
