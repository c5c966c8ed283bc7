"""Moments of one's own videos by text: an index of a folder, and what is found in it.

    index = Index.create("videos/.evaat-index", "run/last.pt")       # once; later Index.open("videos")
    print(index.add("videos"))                                       # what is new or changed
    print(index.search("push the red block left - a hand", k=5))     # score, time and file of five moments

`store` is the folder on the disk, `scan` looks for videos, `windows` makes clips of them, `by_shot` clips between the cuts that
`shots` finds, `embedder` is the model, `build` brings them together, `query` and `moments` are what is asked and found, `graph`
leads to it among tens of millions; `page`, `cut` and `server` show it, and `measure` says how much of it is right.
"""

from typing import TYPE_CHECKING

from evaat_fast import _lazy

_LAZY = {"Index": "index", "Like": "query", "Moments": "moments", "find": "index"}
_SUBMODULES = (
    "build",
    "by_shot",
    "cut",
    "embedder",
    "graph",
    "index",
    "measure",
    "moments",
    "page",
    "query",
    "scan",
    "server",
    "shots",
    "store",
    "vectors",
    "windows",
)

PORT = 8765  # of the page

__all__ = ["PORT", *_LAZY, *_SUBMODULES]


if TYPE_CHECKING:
    from evaat_fast.search import build as build
    from evaat_fast.search import by_shot as by_shot
    from evaat_fast.search import cut as cut
    from evaat_fast.search import embedder as embedder
    from evaat_fast.search import graph as graph
    from evaat_fast.search import index as index
    from evaat_fast.search import measure as measure
    from evaat_fast.search import moments as moments
    from evaat_fast.search import page as page
    from evaat_fast.search import query as query
    from evaat_fast.search import scan as scan
    from evaat_fast.search import server as server
    from evaat_fast.search import shots as shots
    from evaat_fast.search import store as store
    from evaat_fast.search import vectors as vectors
    from evaat_fast.search import windows as windows
    from evaat_fast.search.index import Index as Index
    from evaat_fast.search.index import find as find
    from evaat_fast.search.moments import Moments as Moments
    from evaat_fast.search.query import Like as Like
else:
    __getattr__, __dir__ = _lazy.attach(__name__, _LAZY, _SUBMODULES)
