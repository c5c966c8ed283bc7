"""The EVA02-AT video-text system as fast kernels, a thin model and a trainer.

`evaat_fast.ops` needs only torch; everything else is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:  # the same names for type checkers, which would take every name for one that __getattr__ finds
    import evaat_fast.kernels as kernels  # noqa: F401
    from evaat_fast import cli as cli
    from evaat_fast import data as data
    from evaat_fast import doctor as doctor
    from evaat_fast import eval as eval
    from evaat_fast import factory as factory
    from evaat_fast import integrations as integrations
    from evaat_fast import losses as losses
    from evaat_fast import model as model
    from evaat_fast import ops as ops
    from evaat_fast import train as train
    from evaat_fast.factory import create_model_and_transforms as create_model_and_transforms
    from evaat_fast.model import create_model as create_model
    from evaat_fast.model import get_tokenizer as get_tokenizer
    from evaat_fast.model import list_models as list_models
    from evaat_fast.model import list_pretrained as list_pretrained
else:

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        if name in _SUBMODULES:
            return importlib.import_module(f"evaat_fast.{name}")
        raise AttributeError(f"module 'evaat_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
