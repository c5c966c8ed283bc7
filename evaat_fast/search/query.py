"""What is asked for: words that add and subtract, and moments to be like."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evaat_fast.data.readers.text import seconds, short

MOST = 64  # texts of a query, each of which the text tower reads

__all__ = ["MOST", "Like", "Term", "parse_like", "parse_query", "spoken"]


@dataclass(frozen=True)
class Term:
    """A text, and whether it adds (1) or takes away (-1)."""

    text: str
    sign: int


@dataclass(frozen=True)
class Like:
    """A moment. file: a path. time: seconds."""

    file: str
    time: float


def parse_query(query: str) -> list[Term]:
    """Texts between " + " and " - ", signs with spaces around them; the first may have one, too.

    "push left + a red block - a hand" is three terms; "t-shirt" and "C++" are one word each.

    Raises:
        ValueError: no text, nothing between two signs, or more than MOST texts.
    """
    if not isinstance(query, str):
        raise TypeError(f"query: expected text, got {type(query).__name__}")
    parts = re.split(r"(?:^|(?<=\s))([+-])(?=\s|$)", query.strip())
    if len(parts) > 1 and not parts[0].strip():
        parts = parts[1:]
    else:
        parts = ["+", *parts]
    terms = [Term(text.strip(), 1 if sign == "+" else -1) for sign, text in zip(parts[::2], parts[1::2], strict=True)]
    if not all(term.text for term in terms):
        raise ValueError(f"query: expected text, and some between two signs, got {short(query)}")
    if len(terms) > MOST:
        raise ValueError(f"query: expected at most {MOST} texts, got {len(terms):,} between its signs")
    return terms


def parse_like(text: str) -> Like:
    """FILE@SECONDS, FILE@MM:SS or FILE@HH:MM:SS.

    Raises:
        ValueError: anything else.
    """
    file, at, time = text.rpartition("@")
    if not at or not file:
        raise ValueError(f"like: expected FILE@SECONDS, as video.mp4@12.5 or video.mp4@01:02, got {text!r}")
    found = seconds(time)
    if found is None or found < 0:
        raise ValueError(f"like: expected a time after the last @, as in video.mp4@12.5 or video.mp4@01:02, got {time!r}")
    return Like(file, found)


def spoken(terms: Sequence[Term], likes: Sequence[Like]) -> str:
    """A query in one line."""
    said = "".join(f" {'-' if term.sign < 0 else '+'} {term.text}" for term in terms).removeprefix(" + ").strip()
    return " + ".join([*([said] if said else []), *(f"like {like.file}@{like.time:g}" for like in likes)])
