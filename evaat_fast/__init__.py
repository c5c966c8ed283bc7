"""The EVA02-AT video-text system as fast kernels, a thin model and a trainer.

`evaat_fast.ops` needs only torch; everything else is imported when it is first used.
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "create_model": "evaat_fast.model",
    "create_model_and_transforms": "evaat_fast.factory",
    "list_models": "evaat_fast.model",
    "list_pretrained": "evaat_fast.model",
    "get_tokenizer": "evaat_fast.model",
}
_SUBMODULES = ("ops", "losses", "integrations", "model", "data", "eval", "factory", "train", "cli", "doctor", "kernels")

__all__ = [*_LAZY, *_SUBMODULES]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"evaat_fast.{name}")
    raise AttributeError(f"module 'evaat_fast' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
