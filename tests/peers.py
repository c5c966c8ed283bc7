"""timm and open_clip for the tests and the benchmarks, or the reason why not."""

import importlib
import sys

import torch

_LIBRARIES = []


def load(name):
    """Imports timm, open_clip or a module of theirs.

    Both import torchvision, which fails to import beside a torch that it was not built for (there is no CPU build for
    some). What is compared needs none of its operators, so two that it looks up at import are declared then.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm", "open_clip")]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # it takes its definitions along when it is collected
    return importlib.import_module(name)


def peer(name):
    """As `load`, but skips the test where it is not installed."""
    import pytest

    try:
        return load(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
