"""The processes of a run: one alone, or as many as torchrun started, a GPU each.

    torchrun --nproc-per-node 4 -m evaat_fast train run.toml

`train.batch_size` is that of all of them together: a run's loss, order of clips and crops do not depend on how many there are.
"""

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaat_fast.train.config import Config, ConfigError

# A rank that failed is heard of at the next collective, or after this long: gathering the embeddings of a test set included.
_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """rank: of this process, from 0. world: how many there are. group: theirs, None for one process."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, rows: list[int]) -> list[int]:
        """This process's part of a batch: as many consecutive ones as each of the others has."""
        part = len(rows) // self.world
        return rows[self.rank * part : (self.rank + 1) * part]

    def gather(self, part: Any) -> list[Any]:
        """What each process has, in order; for results, not for training."""
        if self.group is None:
            return [part]
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, part, group=self.group)
        return parts


@contextmanager
def started(config: Config, device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, connected until the block ends.

    Raises:
        ConfigError: a batch that they cannot share evenly, or what several processes cannot do yet.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if config.train.batch_size % world:
        raise ConfigError(f"train.batch_size: expected a multiple of the {world} processes, got {config.train.batch_size}")
    if config.train.cuda_graph:
        raise ConfigError("train.cuda_graph: one process only; several are not captured yet")
    # Beside NCCL gloo, for what is said of a step: over NCCL alone each step would wait for the GPU to hear it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield Ranks(torch.distributed.get_rank(), world, torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


def interleaved(count: int, ranks: Ranks) -> range:
    """Which of `count` items this process takes, every world-th: their sizes differ by one at most."""
    return range(ranks.rank, count, ranks.world)


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """What `interleaved` items became, from all processes, in the items' order: [count, ...]."""
    count = sum(map(len, parts))
    whole = parts[0].new_empty((count, *parts[0].shape[1:]))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
