"""Training: a TOML file, one loop, checkpoints that resume; and the demo.

    from evaat_fast.train import load, train
    result = train(load("run.toml", ["optim.lr=1e-4"]))

The commands `evaat-fast train`, `eval` and `demo` are thin wrappers of `train`, `evaluation.evaluate` and `demo.run`.
"""

import importlib

_LAZY = {"Config": "config", "ConfigError": "config", "load": "config", "train": "trainer", "Diverged": "trainer"}
_SUBMODULES = (
    "checkpoint",
    "config",
    "demo",
    "evaluation",
    "inputs",
    "log",
    "packages",
    "report",
    "sampler",
    "schedules",
    "trainer",
)

__all__ = [*_LAZY, *_SUBMODULES]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f"evaat_fast.train.{_LAZY[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"evaat_fast.train.{name}")
    raise AttributeError(f"module 'evaat_fast.train' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
