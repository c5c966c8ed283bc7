"""How long a training step takes on this machine, before there is anything to train on.

pace.step_seconds(config, torch.device("cpu"))      # 0.1
"""

import dataclasses
import time

import torch

from evaat_fast.train.config import Config
from evaat_fast.train.masters import Masters
from evaat_fast.train.setup import build_model
from evaat_fast.train.steps import Steps, build_optimizer, fit_optimizer

_STEPS = 10
_TOKENS = 12  # of a caption

__all__ = ["step_seconds"]


def step_seconds(config: Config, device: torch.device) -> float:
    """Of a step of the run, the fastest of a few, on clips of noise and with random weights: neither videos nor weights are
    looked for. What a clip's decoding takes beside it is not in it.

    Args:
        config: of the run. device: where it will train.

    Raises:
        ConfigError: a model that cannot be built. torch.OutOfMemoryError: the GPU has no room for it.
    """
    model = dataclasses.replace(config.model, pretrained="")
    fresh = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, init=""))
    trained = build_model(fresh).to(device).train()
    masters, size, shape = Masters(trained), config.train.batch_size, trained.config
    frames, rows, columns = shape.grid
    pixels, kinds = (rows * shape.patch_size, columns * shape.patch_size), torch.arange(size)
    batch = {
        "video": torch.randint(0, 256, (size, frames, *pixels, 3), dtype=torch.uint8),
        "text": torch.randint(1, shape.vocab_size, (size, _TOKENS)),
        "kind": kinds,
        "text_kind": kinds,
    }
    optimizer, times = build_optimizer(trained, fresh, masters), []
    fit_optimizer(optimizer, fresh, device)
    steps = Steps(masters, optimizer, torch.eye(size), fresh, device)
    for _ in range(_STEPS):
        begin = time.perf_counter()
        steps(batch).item()
        times.append(time.perf_counter() - begin)
    return min(times)
