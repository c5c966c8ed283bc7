"""Training: a TOML file, one loop, checkpoints that resume; and the demo.

    from evaat_fast.train import load, train
    result = train(load("run.toml", ["optim.lr=1e-4"]))

The commands `evaat-fast train`, `eval`, `features` and `demo` are thin wrappers of `train`, `outcome.run`, `features.write` and
`demo.run`.
"""

from typing import TYPE_CHECKING

from evaat_fast import _lazy

_LAZY = {
    "Config": "config",
    "ConfigError": "config",
    "load": "config",
    "train": "trainer",
    "Diverged": "loop",
    "Stopped": "stop",
}
_SUBMODULES = (
    "averaging",
    "begin",
    "boards",
    "caching",
    "checkpoint",
    "config",
    "demo",
    "embedding",
    "evaluation",
    "features",
    "inputs",
    "lamb",
    "log",
    "loop",
    "masters",
    "meter",
    "optimizers",
    "outcome",
    "pace",
    "packages",
    "ranks",
    "recipes",
    "report",
    "sampler",
    "schedules",
    "sections",
    "shards",
    "setup",
    "similarity",
    "steps",
    "stop",
    "tasks",
    "trainer",
)

__all__ = [*_LAZY, *_SUBMODULES]


if TYPE_CHECKING:
    from evaat_fast.train import averaging as averaging
    from evaat_fast.train import begin as begin
    from evaat_fast.train import boards as boards
    from evaat_fast.train import caching as caching
    from evaat_fast.train import checkpoint as checkpoint
    from evaat_fast.train import config as config
    from evaat_fast.train import demo as demo
    from evaat_fast.train import embedding as embedding
    from evaat_fast.train import evaluation as evaluation
    from evaat_fast.train import features as features
    from evaat_fast.train import inputs as inputs
    from evaat_fast.train import lamb as lamb
    from evaat_fast.train import log as log
    from evaat_fast.train import loop as loop
    from evaat_fast.train import masters as masters
    from evaat_fast.train import meter as meter
    from evaat_fast.train import optimizers as optimizers
    from evaat_fast.train import outcome as outcome
    from evaat_fast.train import pace as pace
    from evaat_fast.train import packages as packages
    from evaat_fast.train import ranks as ranks
    from evaat_fast.train import recipes as recipes
    from evaat_fast.train import report as report
    from evaat_fast.train import sampler as sampler
    from evaat_fast.train import schedules as schedules
    from evaat_fast.train import sections as sections
    from evaat_fast.train import setup as setup
    from evaat_fast.train import shards as shards
    from evaat_fast.train import similarity as similarity
    from evaat_fast.train import steps as steps
    from evaat_fast.train import stop as stop
    from evaat_fast.train import tasks as tasks
    from evaat_fast.train import trainer as trainer
    from evaat_fast.train.config import Config as Config
    from evaat_fast.train.config import ConfigError as ConfigError
    from evaat_fast.train.config import load as load
    from evaat_fast.train.loop import Diverged as Diverged
    from evaat_fast.train.stop import Stopped as Stopped
    from evaat_fast.train.trainer import train as train
else:
    __getattr__, __dir__ = _lazy.attach(__name__, _LAZY, _SUBMODULES)
