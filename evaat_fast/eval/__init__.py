"""The benchmarks' official metrics, on tensors alone.

mir: EPIC-Kitchens-100 multi-instance retrieval. recall: Recall@k and median rank beside it. mcq: EgoMCQ. charades:
Charades-Ego. tricks: what raises numbers without a better model, by name. paper: the published numbers. Each metric has a
`report`, a Result of metrics, counts and notes.
"""

from evaat_fast.eval import charades, mcq, mir, paper, recall, tricks
from evaat_fast.eval.result import Result

__all__ = ["Result", "charades", "mcq", "mir", "paper", "recall", "tricks"]
