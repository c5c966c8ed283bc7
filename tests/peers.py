"""timm, open_clip and transformers for the tests and the benchmarks, or the reason why not."""

import importlib
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

_LIBRARIES = []


def load(name):
    """Imports timm, open_clip, transformers or a module of theirs.

    They import torchvision, which fails to import beside a torch that it was not built for (there is no CPU build for
    some). What is compared needs none of its operators, so two that it looks up at import are declared then.

    Raises:
        ImportError: it is not installed.
    """
    # transformers looks for a package `kernels`, as which the source folder must not be taken.
    path, sys.path = sys.path, [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    try:
        return _load(name)
    finally:
        sys.path = path


def _load(name):
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare()
    return importlib.import_module(name)


def _declare():
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)  # it takes its definitions along when it is collected


def peer(name):
    """As `load`, but skips the test where it is not installed, except in CI, which installs [peers]."""
    import pytest

    try:
        return load(name)
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name} is not installed (make test, or pip install -e '.[peers]', does it): {error}")
