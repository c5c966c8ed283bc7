"""The benchmarks' official metrics, on tensors alone.

mir: EPIC-Kitchens-100 multi-instance retrieval. recall: Recall@k and median rank beside it. mcq: EgoMCQ. charades:
Charades-Ego. tricks: what raises numbers without a better model, by name. Each has a `report`, a Result of metrics,
counts and notes.
"""

from evaat_fast.eval import charades, mcq, mir, recall, tricks
from evaat_fast.eval.result import Result

__all__ = ["Result", "charades", "mcq", "mir", "recall", "tricks"]
