"""The benchmarks as a model meets them: clips and texts to embed, and what is measured of their similarities.

| task | clips | texts | measured |
|---|---|---|---|
| ek100-mir | the test split's | its captions | `mir`, `recall` |
| egomcq | all candidates, each once | the questions' narrations | `mcq` |
| charades-ego | whole test videos | the 157 class names | `charades` |
| retrieval | the test split's, of one's own file of captions | its captions | `recall`, and `mir` with label columns |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evaat_fast.data import corpora
from evaat_fast.data.dataset import ClipDataset
from evaat_fast.data.transforms import eval_transform
from evaat_fast.eval import Result, charades, mcq, paper, tricks
from evaat_fast.train import embedding, evaluation, inputs
from evaat_fast.train.config import Config, ConfigError

Scores = Literal["cosine", "lavila"]
SCORES = ("cosine", "lavila")
TASKS = (*paper.TASKS, "retrieval")
RETRIEVAL = ("ek100-mir", "retrieval")


@dataclass(frozen=True)
class Options:
    """How a task is evaluated. scores: "cosine", or "lavila": EgoMCQ by clips' embeddings as long as they come, Charades-Ego
    by a softmax over classes. prompt: what a class name is put into. tricks: of `eval.tricks.TRICKS`. temperature: of the
    dual softmax. partial: go on without the clips that cannot be read."""

    scores: Scores = "cosine"
    prompt: str = "{}"
    tricks: tuple[str, ...] = ()
    temperature: float = 0.05
    partial: bool = False

    @property
    def missing(self) -> Literal["raise", "broken"]:
        """What `ClipDataset` is to make of missing videos."""
        return "broken" if self.partial else "raise"


@dataclass(frozen=True)
class Task:
    """name: of TASKS. data: the clips. texts: what is embedded besides. compare: of embeddings of clips and texts makes
    similarities. judge: of similarities and of which clips were read, bool [clips], makes a Result. normalize: whether
    embeddings are of length 1. protocol: what `paper.differences` takes."""

    name: str
    data: ClipDataset
    texts: Sequence[str]
    compare: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Tensor, Tensor], Result]
    normalize: bool = True
    protocol: dict[str, Any] = field(default_factory=dict)


def open_task(name: str, config: Config, options: Options) -> Task:
    """A task on the files of config.data.

    Raises:
        ConfigError: options that the task does not have. FileNotFoundError, ValueError: files that are missing or cannot be
            read; with options.partial missing videos are not among them.
    """
    if name not in TASKS:
        raise ConfigError(f"--task: expected one of {', '.join(TASKS)}, got {name!r}")
    if unknown := [trick for trick in options.tricks if trick not in tricks.TRICKS]:
        raise ConfigError(f"--trick: expected one of {', '.join(tricks.TRICKS)}, got {unknown[0]!r}")
    if "dual-softmax" in options.tricks and name not in RETRIEVAL:
        raise ConfigError(f"--trick: the dual softmax is of retrieval, ek100-mir; {name} has no such thing")
    if options.scores not in SCORES or (options.scores != "cosine" and name in RETRIEVAL):
        raise ConfigError(f"--scores: expected cosine, or lavila for egomcq and charades-ego, got {options.scores!r}")
    if options.prompt.count("{}") != 1 or (options.prompt != "{}" and name != "charades-ego"):
        raise ConfigError(f"--prompt: expected a text with one {{}}, and for charades-ego only, got {options.prompt!r}")
    if name in RETRIEVAL:
        task = _retrieval(name, config, options)
    else:
        task = (_egomcq if name == "egomcq" else _charades)(config, options)
    if "three-crops" in options.tricks:
        task.data.transform = embedding.ThreeCrops(eval_transform(inputs.model_config(config).image_size))
    return task


def kind_of(name: str) -> str:
    """The data.kind whose own task this is; of EgoMCQ its own name, which is none."""
    return "csv" if name == "retrieval" else name


def _retrieval(name: str, config: Config, options: Options) -> Task:
    data = inputs.test_split(config, options.missing)
    if config.data.kind != kind_of(name):
        raise ConfigError(f"--task: {name} is of data.kind = {kind_of(name)!r}, got {config.data.kind!r}")

    def judge(sim: Tensor, kept: Tensor) -> Result:
        if "dual-softmax" in options.tricks:
            sim = sim.clone()
            sim[kept] = tricks.dual_softmax(sim[kept], options.temperature)
        return evaluation.report(sim, data, kept)

    protocol = {"captions": "own narration by narration_id" if name == "ek100-mir" else "each once"}
    if "dual-softmax" in options.tricks:
        protocol["dual_softmax_temperature"] = str(options.temperature)
    return Task(name, data, data.captions, embedding.similarity, judge, protocol=protocol)


def _egomcq(config: Config, options: Options) -> Task:
    questions = corpora.read_questions(config.data.annotations)
    data = ClipDataset(questions.clips, config.data.videos, **inputs.of_evaluation(config, options.missing))
    choices, normalize = torch.from_numpy(np.asarray(questions.choices)), options.scores == "cosine"
    # Questions share texts, and clips.
    number = {text: i for i, text in enumerate(dict.fromkeys(questions.texts))}
    asked = torch.tensor([number[text] for text in questions.texts])

    def compare(clips: Tensor, texts: Tensor) -> Tensor:
        return mcq.scores(texts[asked], clips[choices], normalize)

    def judge(sim: Tensor, kept: Tensor) -> Result:
        whole = kept[choices].all(1)
        left = int((~whole).sum())
        if left == len(whole):
            raise ValueError("there is no question of which all clips could be read")
        result = mcq.report(sim[whole], questions.answers[whole.numpy()], questions.types[whole.numpy()])
        return replace(result, counts={**result.counts, "questions_left_out": left}) if left else result

    scores = "cosine" if normalize else "products with clips as long as they come (LaViLa)"
    return Task("egomcq", data, list(number), compare, judge, normalize, {"scores": scores})


def _charades(config: Config, options: Options) -> Task:
    table, names = corpora.read_actions(config.data.annotations)
    data = ClipDataset(table, config.data.videos, **inputs.of_evaluation(config, options.missing))
    labels = torch.zeros(len(table), len(names), dtype=torch.bool)
    for row, classes in zip(labels, table.column("labels"), strict=True):
        row[torch.from_numpy(np.array(classes, np.int64))] = True
    softmax = options.scores == "lavila"

    def judge(sim: Tensor, kept: Tensor) -> Result:
        return charades.report(sim[kept], labels[kept], softmax)

    protocol = {"scores": "softmax over classes (LaViLa, fine-tuned)" if softmax else "cosine", "prompt": options.prompt}
    texts = [options.prompt.replace("{}", name) for name in names]
    return Task("charades-ego", data, texts, embedding.similarity, judge, protocol=protocol)
