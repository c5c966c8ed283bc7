"""A run's log on TensorBoard and on Weights & Biases, where they are installed and a configuration asks for them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaat_fast.train.config import Config
from evaat_fast.train.log import Board


class TensorBoard:
    """Scalars in the run's folder `tensorboard`: `tensorboard --logdir RUN`.

    Args:
        folder: of the run. step: how many steps of an earlier run stay; what it showed after them is hidden.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(event, values).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """The same on Weights & Biases. A run that is resumed goes on in the run that it was there.

    Args:
        project: its name there. folder: of the run. config: a Config, shown beside it. run: the run's own name, by which and
            its folder's path it is known there: it would not take the steps of one that replaces it.
    """

    def __init__(self, project: str, folder: Path, config: Config, run: str = "") -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        name = str(folder.resolve())
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=hashlib.sha256((name + run).encode()).hexdigest()[:16],
            resume="allow",
            dir=name,
            config=config.to_dict(),
        )

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        if numbers := _numbers(event, values):
            self._run.log(numbers, step=step)

    def flush(self) -> None:
        """Its own process has all, and outlives this one."""

    def close(self) -> None:
        self._run.finish()


def boards(config: Config, step: int = 0, run: str = "") -> list[Board]:
    """Those that config.train asks for, opened. step: how many steps of the run are done. run: its name."""
    folder, found = Path(config.train.out), list[Board]()
    if config.train.tensorboard:
        found.append(TensorBoard(folder, step))
    if config.train.wandb:
        found.append(WandB(config.train.wandb, folder, config, run))
    return found


def _numbers(event, values):
    section = {"step": "train", "epoch": "epoch", "eval": "eval"}.get(event)
    if section is None:
        return {}
    kept = {name: x for name, x in values.items() if isinstance(x, (int, float)) and name != "step"}
    return {f"{section}/{name}": x for name, x in kept.items()}
