"""The losses as modules, with the names, arguments and results of other repositories: change one import line.

    from evaat_fast.losses.avion import SymmetricMultiSimiliarityLoss      # was: from avion.losses.losses import ...

`avion.py`: AVION's and SMS-Loss's; `lavila.py`: LaViLa's, of the model's outputs; `egovlp.py`: EgoVLP's, of similarities;
`open_clip.py`: open_clip's ClipLoss. Of the names that two of them have, this package itself has AVION's. One implementation is
under all: `_contrast.py` and `_max_margin.py`, which call `evaat_fast.ops`, over `_gather.py`.

What differs from theirs: no [N, N] matrix is built (but by EgoVLP's, which are given one, and of a local loss, [n, N]); a batch
of one pair gives 0 where theirs is NaN; the loss has the features' precision, float32 or float64, also under autocast or where
the weights are float64; a row whose norm is below 1e-8 gets no gradient where theirs is divided by 1e-8; one rank needs no
process group; horovod is not supported.
"""

from evaat_fast.losses import avion as avion
from evaat_fast.losses import egovlp as egovlp
from evaat_fast.losses import lavila as lavila
from evaat_fast.losses import open_clip as open_clip
from evaat_fast.losses.avion import (
    AdaptiveMaxMarginRankingLoss,
    ClipLoss,
    MaxMarginRankingLoss,
    SymmetricMultiSimilarityLoss,
    SymmetricMultiSimiliarityLoss,
)
from evaat_fast.losses.egovlp import EgoNCE

__all__ = [
    "AdaptiveMaxMarginRankingLoss",
    "ClipLoss",
    "EgoNCE",
    "MaxMarginRankingLoss",
    "SymmetricMultiSimilarityLoss",
    "SymmetricMultiSimiliarityLoss",
]
