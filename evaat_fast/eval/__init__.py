"""The official metrics: `mir` for EPIC-Kitchens-100 multi-instance retrieval."""

from evaat_fast.eval import mir

__all__ = ["mir"]
