"""How alike captions are to the text tower that a run starts from: graded labels for clips that have no classes.

    table = similarity.labels(config, data, out, device, model=model)      # float32 [kinds of clips, captions]

It is data.similarity = "text-tower". The tower is frozen: labels are those of the weights at the start (train.init or
model.pretrained) however far the run goes. The captions' embeddings lie beside the run in similarity.npz, with hashes of the
captions and of the tower, so that a run that goes on has the same labels.

A cosine is not a relevancy: in a tower's space all captions lie in a narrow cone, and two that have nothing in common have a
cosine far above 0. So the labels are the cosines above the level that only a tenth of the pairs reach,
(cosine - level) / (1 - level), clipped to 0..1: about as many pairs get a label above 0 as EK-100's classes give, a ninth,
which is what the loss's margin and relaxation were found with. Equal captions get 1.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaat_fast._files import write_atomically
from evaat_fast.data.plain import PlainClips
from evaat_fast.model import EVA02AT
from evaat_fast.train import embedding
from evaat_fast.train.config import Config
from evaat_fast.train.ranks import Ranks
from evaat_fast.train.setup import build_model

FILE = "similarity.npz"
SHARE = 0.1  # of the pairs of different captions get a label above 0
_SAMPLED = 1000  # captions whose pairs decide the level

__all__ = ["FILE", "SHARE", "graded", "labels"]


def labels(
    config: Config,
    data: PlainClips,
    out: Path,
    device: torch.device,
    ranks: Ranks | None = None,
    model: EVA02AT | None = None,
) -> Tensor:
    """float32 [V, C]: the labels of kinds of clips and captions; of a clip with several captions the largest.

    Args:
        config: of the run. data: its training clips, of similarity="text-tower". out: the run's folder. device: where to embed.
        ranks: the processes; the first embeds, and every one must call.
        model: with the weights that the run starts from, on `device`; None for a run that goes on: the file will do.

    Raises:
        ValueError: more captions than a table holds. FileNotFoundError: the file is gone, and so are the weights.
    """
    data.check_size()
    ranks, path = ranks or Ranks(), out / FILE
    said = hashlib.sha256("\0".join(data.captions).encode()).hexdigest()
    if ranks.main:
        kept = _kept(path, said, None if model is None else _hash(model))
        if kept is None:
            model = build_model(config).to(device) if model is None else model
            training = model.training
            found = torch.cat(list(embedding.of_texts(model.eval(), data.captions, config, device)))
            model.train(training)
            arrays = {"embeddings": found.numpy(), "captions_sha256": np.array(said), "text_sha256": np.array(_hash(model))}
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    ranks.gather(None)
    kept = _kept(path, said, None)
    assert kept is not None  # the first process wrote it, in a folder that all see
    return of_kinds(graded(kept), data.own)


def graded(embeddings: Tensor) -> Tensor:
    """float32 [C, C]: the labels between captions of normalised embeddings [C, E], symmetric, 1 on the diagonal."""
    count = len(embeddings)
    cosine = embeddings.float() @ embeddings.float().T
    chosen = torch.linspace(0, count - 1, min(count, _SAMPLED)).long()
    apart = cosine[chosen][:, chosen][torch.triu(torch.ones(len(chosen), len(chosen)), 1).bool()]
    level = float(apart.quantile(1 - SHARE)) if len(apart) else 0.0
    if level >= 1 - 1e-4:  # of a tower that says the same of all
        return torch.eye(count)
    table = cosine.sub_(level).div_(1 - level).clamp_(0, 1)
    table = (table + table.T) / 2
    table.fill_diagonal_(1)
    return table


def of_kinds(table: Tensor, own: Sequence[Sequence[int]]) -> Tensor:
    """[V, C] of [C, C]: for each kind of clip the largest of its captions' rows."""
    if all(len(numbers) == 1 for numbers in own):
        return table[[numbers[0] for numbers in own]]
    return torch.stack([table[list(numbers)].amax(0) for numbers in own])


def _hash(model: EVA02AT) -> str:
    digest = hashlib.sha256()
    for name, x in model.text.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(path: Path, captions: str, tower: str | None) -> Tensor | None:
    """The embeddings of a file, if they are of these captions and this tower; None: of any."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if str(found["captions_sha256"]) != captions or tower not in (None, str(found["text_sha256"])):
                return None
            return torch.from_numpy(found["embeddings"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
