"""timm and open_clip for the tests, or the reason why not."""

import importlib
import sys

import pytest
import torch

_LIBRARIES = []


def peer(name):
    """Imports timm or open_clip; skips the test where it is not installed.

    Both import torchvision, which fails to import beside a torch that it was not built for (there is no CPU build for
    some). The models need none of its operators, so two that it looks up at import are declared then.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
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
