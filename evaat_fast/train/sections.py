"""The sections and keys of a configuration, with their defaults, ranges and choices: `evaat_fast.train.config` reads them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from evaat_fast.data.choices import LABEL_COLUMNS, Corpus, Decoder, Frames, Positive, Sampler, Similarity


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
    """kind: the corpus, as `evaat-fast prepare` names them, "clips" for a table that it wrote, or "csv" for a folder of videos
    and one file of captions, as `evaat-fast init` makes it. annotations: the folder of the published files, what `prepare` made
    of them, or that one file. videos: the folder of videos, whole or in chunks. labels, test_share, split_seed, similarity are
    of "csv": the columns that hold classes, by name or by a pattern with *, of which relevancy is made; which share of the
    videos is tested where no column says so, 0 for none, drawn from split_seed and each path; and what clips are alike by,
    their "labels", or equal captions where there are none, or for "sms" a table of the captions' similarities to the
    "text-tower" that the run starts from. crop_scale: least
    share of the frame in a random training crop. jitter: draw each training frame within its segment of the clip, and not
    its middle; sampler: whose segments. positive: the text of a training clip, "own" or, for "ek100-mir", a "relevant" one
    drawn anew each time, as the SMS loss's authors do. decoder: "auto" takes the first that the doctor finds usable.
    sums: the folder of the videos' checksums, which `evaat-fast check --write-sums` fills: what was damaged since counts as
    unreadable. max_broken: the largest share of clips that may be missing or unreadable; training goes on without them.
    cache: keep every decoded clip in memory (a small corpus). workers: processes that decode, 0 for none."""

    kind: Corpus = "ek100-mir"
    annotations: str = key("", path=True)
    videos: str = key("", path=True)
    labels: list[str] = field(default_factory=lambda: list(LABEL_COLUMNS))
    test_share: float = key(0.1, least=0, most=0.9)
    split_seed: int = key(0, least=0, most=2**31 - 1)
    similarity: Similarity = "labels"
    crop_scale: float = key(0.5, above=0, most=1)
    jitter: bool = True
    sampler: Sampler = "avion"
    positive: Positive = "own"
    decoder: Decoder = "auto"
    sums: str = key("", path=True)
    max_broken: float = key(0.01, least=0, most=1)
    cache: bool = False
    workers: int = key(0, least=0, most=256)


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
    """name: "adamw", or "lamb" for large batches (arXiv 1904.00962). clip_norm: largest norm of the whole gradient, 0 for no
    limit. layer_decay: a block of either tower learns so much slower than the one behind it, as in BEiT and EVA; 1 for all
    alike."""

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = key(3e-5, above=0)
    weight_decay: float = key(0.01, least=0)
    beta1: float = key(0.9, least=0, most=0.9999)
    beta2: float = key(0.999, least=0, most=0.99999)
    eps: float = key(1e-8, above=0)
    clip_norm: float = key(0.0, least=0)
    layer_decay: float = key(1.0, above=0, most=1)


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
    kind (verb class and noun classes) in a batch, for InfoNCE, which would take a second one for a negative; "nouns" besides
    fills it with kinds of the same nouns, whose verbs are then what must be told apart. device:
    "auto" takes a GPU where there is one. precision: "auto" is bfloat16 autocast on CUDA, float32 on the CPU;
    "bfloat16-params" computes the same without casts, as it holds the weights of matrix products in bfloat16 and updates
    float32 masters of them. parallel: several processes hold all weights each ("ddp"), or share them out ("fsdp").
    processes: how many torchrun should start, an error where it is another number; 0 for any. timeout: minutes that one waits
    for the others, while they evaluate or write a checkpoint too, before it gives them up. save_as: one file, last.pt, or
    last.parts, a folder to which each process writes its own part. save_every: epochs; save_steps, save_minutes: in the midst
    of one, too, 0 for never. ema: decay of an average of the weights, which is then what is evaluated and loaded, 0 for none.
    micro_batch: clips of each process that are embedded at a time, 0 for all at once; the gradients are those of the whole
    batch, in less memory and a third more time. spike: stop at a loss so many times the largest of the 50 before it, 0 for
    never. tensorboard: show the log there, too; wandb: name of a project there. compile: torch.compile for the blocks of both
    towers, which costs a minute at the start. cuda_graph: on a GPU, replay a step as a CUDA graph, which spares the launches
    from Python; memory grows by one step's for each text length, of multiples of 16."""

    out: str = key("", path=True)
    init: str = key("", path=True)
    epochs: int = key(1, least=1)
    batch_size: int = key(64, least=2)
    distinct: bool | Literal["nouns"] = False
    seed: int = key(0, least=0, most=2**31 - 1)
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "bfloat16-params"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    processes: int = key(0, least=0)
    timeout: float = key(10.0, least=0.1, most=1440)
    save_as: Literal["file", "parts"] = "file"
    save_every: int = key(1, least=1)
    save_steps: int = key(0, least=0)
    save_minutes: float = key(10.0, least=0)
    ema: float = key(0.0, least=0, most=0.999999)
    micro_batch: int = key(0, least=0)
    spike: float = key(0.0, least=0)
    tensorboard: bool = False
    wandb: str = ""
    compile: bool = False
    cuda_graph: bool = False


@dataclass
class Eval:
    """every: evaluate after so many epochs, 0 for only after the last; on the test split of "ek100-mir" or "csv", the other
    corpora have tasks of their own, see `evaat-fast eval --task`. frames: what the model is shown of each clip."""

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


def default(spec: dataclasses.Field) -> Any:
    """What a key is where nothing says so."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def choices(spec: dataclasses.Field) -> tuple[str, ...]:
    """What a key can be, where it is one of a few words, or true, false or one of a few words; else nothing."""
    literals = [t for t in (spec.type, *get_args(spec.type)) if get_origin(t) is Literal]
    return get_args(literals[0]) if literals else ()
