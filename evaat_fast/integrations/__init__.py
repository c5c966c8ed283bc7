"""Our ops in other people's models.

from evaat_fast.integrations import timm, transformers
timm.accelerate(model)
transformers.register()
"""

from typing import TYPE_CHECKING

from evaat_fast import _lazy

__all__ = ["timm", "transformers"]


if TYPE_CHECKING:
    from evaat_fast.integrations import timm as timm
    from evaat_fast.integrations import transformers as transformers
else:
    __getattr__, __dir__ = _lazy.attach(__name__, {}, __all__)
