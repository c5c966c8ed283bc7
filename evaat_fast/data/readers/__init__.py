"""The published files of the benchmarks and one's own, each read into a `ClipTable` by a function of its own module.

| module | reads |
|---|---|
| ek100 | EPIC-Kitchens-100 retrieval: CSVs, captions, relevancy pickles |
| ek100_clips | EPIC-Kitchens-100 cut into clips, as on the Hugging Face hub |
| egoclip | EgoVLP's egoclip.csv |
| egoclip_plus | LaViLa's pickles |
| egomcq | EgoVLP's egomcq.json |
| charades | Charades-Ego: CSVs, classes, the clip lists of LaViLa and EgoVLP |
| plain | a folder of videos and one file of captions |

Whatever is wrong with a file is a ValueError of one line that names the file, the line or row, the column, what was expected
and what came. Of millions of rows a few may be left out, which is counted and said.
"""

from typing import TYPE_CHECKING

from evaat_fast import _lazy

_SUBMODULES = (
    "charades",
    "egoclip",
    "egoclip_plus",
    "egomcq",
    "ek100",
    "ek100_clips",
    "large",
    "pickled_arrays",
    "pickles",
    "plain",
    "text",
)

__all__ = [*_SUBMODULES]


if TYPE_CHECKING:
    from evaat_fast.data.readers import charades as charades
    from evaat_fast.data.readers import egoclip as egoclip
    from evaat_fast.data.readers import egoclip_plus as egoclip_plus
    from evaat_fast.data.readers import egomcq as egomcq
    from evaat_fast.data.readers import ek100 as ek100
    from evaat_fast.data.readers import ek100_clips as ek100_clips
    from evaat_fast.data.readers import large as large
    from evaat_fast.data.readers import pickled_arrays as pickled_arrays
    from evaat_fast.data.readers import pickles as pickles
    from evaat_fast.data.readers import plain as plain
    from evaat_fast.data.readers import text as text
else:
    __getattr__, __dir__ = _lazy.attach(__name__, {}, _SUBMODULES)
