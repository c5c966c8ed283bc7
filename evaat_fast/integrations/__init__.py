"""Our ops in other people's models.

from evaat_fast.integrations import timm, transformers
timm.accelerate(model)
transformers.register()
"""

import importlib
from types import ModuleType

__all__ = ["timm", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"evaat_fast.integrations.{name}")
    raise AttributeError(f"module 'evaat_fast.integrations' has no attribute {name!r}")
