"""The processes of a run: one alone, or as many as torchrun started, a GPU each.

    torchrun --nproc-per-node 4 -m evaat_fast train run.toml

`train.batch_size` is that of all of them together: a run's loss, order of clips and crops do not depend on how many there are.
"""

import datetime
import os
import time
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
    def several(self) -> bool:
        return self.group is not None

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
    environ = os.environ
    world = int(environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if config.train.batch_size % world:
        raise ConfigError(f"train.batch_size: expected a multiple of the {world} processes, got {config.train.batch_size}")
    if config.train.cuda_graph:
        raise ConfigError("train.cuda_graph: one process only; several are not captured yet")
    # Beside NCCL gloo, for what is said of a step: over NCCL alone each step would wait for the GPU to hear it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    found: dict[str, Any] = {}
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives processes that are started again, with the addresses of those that are dead: PyTorch 135712.
        if environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and environ.get("LOCAL_WORLD_SIZE") != str(world):
            raise ConfigError(
                "torchrun --max-restarts: on several machines it needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                "environment, or processes that are started again look for those that are dead"
            )
        store, rank, _ = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))
        prefix = f"start {environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        found = dict(store=torch.distributed.PrefixStore(prefix, store), rank=rank, world_size=world)
    torch.distributed.init_process_group(backend, timeout=_TIMEOUT, **found)
    try:
        yield Ranks(torch.distributed.get_rank(), world, torch.distributed.group.WORLD)
    finally:
        leave()


def leave() -> None:
    """Ends the connection between the processes. Gloo's threads let go of the last collective's tensors after it is done, and
    need Python's lock for it: one that still waits for the lock when the interpreter ends aborts the process."""
    time.sleep(0.1)  # without the lock
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


class Wishes:
    """What the processes wish after a step, 0 for nothing: each says its wish and learns the largest of all, of the step
    before, so that nobody waits for another. `wishes(1)`; one process learns its own at once.

    Args:
        ranks: the processes. They call it equally often.
    """

    def __init__(self, ranks: Ranks):
        self._ranks, self._said, self._work = ranks, torch.zeros(1, dtype=torch.int64), None

    def __call__(self, wish: int) -> int:
        if self._ranks.group is None:
            return wish
        heard = self.last()
        self._said = torch.full((1,), wish, dtype=torch.int64)  # on the CPU: over gloo, whatever computes
        group, largest = self._ranks.group, torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._said, largest, group=group, async_op=True)
        return heard

    def last(self) -> int:
        """What was said last and is not known yet, by all processes together."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._said)
