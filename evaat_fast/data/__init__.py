"""Video clips with their narrations: decoding, sampling, crops, EPIC-Kitchens-100, and a corpus made on the spot.

corpus = kitchen.generate("toy-kitchen")
train = EK100(corpus.annotations, corpus.videos, "train", num_frames=8, transform=train_transform(64))
"""

import importlib

_LAZY = {"EK100": "ek100", "train_transform": "transforms", "eval_transform": "transforms", "read_clip": "video"}
_SUBMODULES = ("cache", "ek100", "ek100_files", "kitchen", "kitchen_render", "transforms", "video")

__all__ = [*_LAZY, *_SUBMODULES]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f"evaat_fast.data.{_LAZY[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"evaat_fast.data.{name}")
    raise AttributeError(f"module 'evaat_fast.data' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
