"""The EVA02-AT video-text system as fast kernels, a thin model and a trainer.

`evaat_fast.ops` needs only torch; everything else is imported when it is first used.
"""

from typing import TYPE_CHECKING

from evaat_fast import _lazy

__version__ = "0.1.0"

_LAZY = {
    "create_model": "model",
    "create_model_and_transforms": "factory",
    "list_models": "model",
    "list_pretrained": "model",
    "load": "factory",
    "get_tokenizer": "model",
}
_SUBMODULES = (
    "ops",
    "losses",
    "integrations",
    "model",
    "data",
    "eval",
    "factory",
    "train",
    "search",
    "cli",
    "doctor",
    "kernels",
)

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
    from evaat_fast import search as search
    from evaat_fast import train as train
    from evaat_fast.factory import create_model_and_transforms as create_model_and_transforms
    from evaat_fast.factory import load as load
    from evaat_fast.model import create_model as create_model
    from evaat_fast.model import get_tokenizer as get_tokenizer
    from evaat_fast.model import list_models as list_models
    from evaat_fast.model import list_pretrained as list_pretrained
else:
    __getattr__, __dir__ = _lazy.attach(__name__, _LAZY, _SUBMODULES)
