"""What an evaluation returns: numbers, how many queries they are of, and what a reader must know of them."""

from dataclasses import dataclass, field

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """Metrics with what there is to say of them.

    Args:
        metrics: per cents by name; nan for one that says nothing of the similarities, and a note says why.
        counts: of queries, candidates and what was left out.
        notes: sentences for whoever reads the numbers.
    """

    metrics: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
