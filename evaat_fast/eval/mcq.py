"""EgoMCQ: which of five clips does a narration describe?

    mcq.report(mcq.scores(texts, clips), answers, types).metrics   # {"inter": ..., "intra": ...} in per cent

A question's `types` in egomcq.json is 1 where the wrong clips are of other videos, **inter**, and 2 where they are of the
same one, **intra**, the harder. EgoVLP, EgoVLPv2, LaViLa and HelpingHands print the two names swapped: a log that says
"Intra-video 90.9" means inter. Published tables have them right, inter first: 90 to 96 %, intra 57 to 66 %.

Ties go to the first of the equal clips, as in those code bases, whose argmax takes it; `report` counts the questions in which
the best score is tied, which a working model has next to none of.
Source: Lin et al., "Egocentric Video-Language Pretraining", NeurIPS 2022.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaat_fast.eval import checks
from evaat_fast.eval.result import Result

TYPES = {1: "inter", 2: "intra"}

__all__ = ["TYPES", "report", "scores"]


def scores(texts: Tensor, clips: Tensor, normalize: bool = True) -> Tensor:
    """The similarity of each question's text to each of its clips.

    Args:
        texts: [Q, E] embeddings. clips: [Q, choices, E].
        normalize: cosines, as EgoVLP and the paper. False multiplies what it is given: LaViLa leaves its clips'
            embeddings as long as they come, which changes which clip wins; `tasks` says so beside its numbers.

    Returns:
        float32 [Q, choices], float64 for float64 embeddings.

    Raises:
        ValueError: shapes that do not fit.
    """
    if texts.ndim != 2 or clips.ndim != 3 or texts.shape != (clips.shape[0], clips.shape[2]):
        raise ValueError(f"texts, clips: expected [Q, E] and [Q, choices, E], got {list(texts.shape)} and {list(clips.shape)}")
    if texts.dtype != torch.float64:
        texts, clips = texts.float(), clips.float()
    if normalize:
        texts, clips = F.normalize(texts, dim=-1), F.normalize(clips, dim=-1)
    return torch.einsum("qe,qce->qc", texts, clips.to(texts))


def report(sim: Tensor | np.ndarray, answers: Tensor | np.ndarray, types: Tensor | np.ndarray) -> Result:
    """Accuracy by type of question.

    Args:
        sim: [Q, choices] floating-point scores. answers: integers [Q], the right choices.
        types: integers [Q], 1 for inter and 2 for intra.

    Returns:
        A Result: "inter" and "intra" in per cent, nan with a note where there is no such question; counts
        "inter_questions", "intra_questions", and "tied", the questions whose best score several clips have.

    Raises:
        TypeError: sim is not floating point, or answers or types are not integers.
        ValueError: shapes that do not fit, a NaN in sim, an answer or a type that cannot be.
    """
    sim = checks.scores("sim", sim)
    answers, types = _integers("answers", answers, sim), _integers("types", types, sim)
    choices = sim.shape[1]
    for name, numbers, wrong, expected in (
        ("answers", answers, (answers < 0) | (answers >= choices), f"0 to {choices - 1}"),
        ("types", types, (types < 1) | (types > 2), "1 (inter) or 2 (intra)"),
    ):
        if wrong.any():
            raise ValueError(f"{name}: expected {expected}, got {int(numbers[wrong][0])}")
    best = sim.amax(1, keepdim=True)
    tied = (sim == best).sum(1) > 1
    # CUDA's argmax promises no order among equals; of the positions of the maximum, this is the first.
    position = torch.arange(choices, device=sim.device).expand_as(sim).masked_fill(sim != best, choices)
    right = position.amin(1) == answers
    metrics, counts, notes = {}, {"questions": len(sim)}, []
    for number, name in TYPES.items():
        mine = types == number
        counts[f"{name}_questions"] = total = int(mine.sum())
        metrics[name] = 100 * right[mine].double().mean().item() if total and choices > 1 else math.nan
        if choices == 1:
            notes.append(f"{name} is not defined: there is one clip to choose from")
        elif not total:
            notes.append(f"{name} is not defined: there is no question of type {number}")
    counts["tied"] = int(tied.sum())
    if choices > 1 and counts["tied"]:
        notes.append(f"in {counts['tied']} of {len(sim)} questions several clips have the best score; the first of them counts")
    return Result(metrics, counts, tuple(notes))


def _integers(name: str, x: Tensor | np.ndarray, sim: Tensor) -> Tensor:
    x = checks.dense(name, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {x.dtype}")
    if x.shape != (len(sim),):
        raise ValueError(f"{name}: expected [{len(sim)}], as many as sim has rows, got {list(x.shape)}")
    return x.to(sim.device)
