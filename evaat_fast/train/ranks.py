"""The processes of a run: one alone, or as many as torchrun started, a GPU each.

    torchrun --nproc-per-node 4 -m evaat_fast train run.toml

`train.batch_size` is that of all of them together: a run's loss, order of clips and crops do not depend on how many there are.
"""

import contextlib
import datetime
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaat_fast.train.config import Config, ConfigError

_runs = itertools.count()  # that this process has connected for, as many as each of the others
_AFTER_SECONDS = 2.0  # that a process waits which another one ended, so that torchrun shows that one's error
_LOST_SECONDS = 25  # that a machine does not answer until its connections count as broken; with the next line under a minute
_MEET_SECONDS = 25.0  # that a process which failed waits for the others to notice; torchrun gives them 30


class OtherFailed(RuntimeError):
    """Another process of the run failed, and so this one ends."""


@dataclass(frozen=True)
class Ranks:
    """rank: of this process, from 0. world: how many there are. group: theirs, None for one process. store: where they meet
    again should the group break; None: nowhere. wires: of the group, its sockets' descriptors and inodes. again: whether the
    group is of such a meeting, and not the one that parts of tensors belong to."""

    rank: int = 0
    world: int = 1
    group: Any = None
    store: Any = None
    wires: tuple[tuple[int, int], ...] = ()
    again: bool = False

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
    if config.train.processes not in (0, world):
        raise ConfigError(
            f"train.processes: expected {config.train.processes}, as torchrun --nproc-per-node starts them, got {world}; "
            "0 takes any number"
        )
    if world == 1:
        yield Ranks()
        return
    if config.train.batch_size % world:
        raise ConfigError(f"train.batch_size: expected a multiple of the {world} processes, got {config.train.batch_size}")
    if config.train.cuda_graph:
        raise ConfigError("train.cuda_graph: one process only; several are not captured yet")
    # Beside NCCL gloo, for what is said of a step: over NCCL alone each step would wait for the GPU to hear it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives processes that are started again, with the addresses of those that are dead: PyTorch 135712.
        if environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and environ.get("LOCAL_WORLD_SIZE") != str(world):
            raise ConfigError(
                "torchrun --max-restarts: on several machines it needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                "environment, or processes that are started again look for those that are dead"
            )
    patience, before = datetime.timedelta(minutes=config.train.timeout), _sockets()
    store, rank, _ = next(torch.distributed.rendezvous("env://", timeout=patience))
    # So it does one run of a process that trains twice.
    again = f"start {environ.get('TORCHELASTIC_RESTART_COUNT', '0')} run {next(_runs)}"
    store, between = torch.distributed.PrefixStore(again, store), _sockets()
    torch.distributed.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    _watch(_sockets() - before)
    wires = tuple(_sockets() - between)
    try:
        yield Ranks(rank, world, torch.distributed.group.WORLD, torch.distributed.PrefixStore("failed", store), wires)
    finally:
        leave()


def leave() -> None:
    """Ends the connection between the processes. Gloo's threads let go of the last collective's tensors after it is done, and
    need Python's lock for it: one that still waits for the lock when the interpreter ends aborts the process."""
    time.sleep(0.1)  # without the lock
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def announce(ranks: Ranks, error: BaseException) -> str:
    """Tells the other processes that this one failed, unless another one has before, whose end is what this one met.

    Returns:
        What the other one said; "" where this one is the first, or nobody can know.
    """
    if ranks.store is None:
        return ""
    try:
        first = ranks.store.compare_set("first", "", f"process {ranks.rank} failed: {brief(error)}").decode()
    except Exception:  # the store went with its process
        return ""
    return "" if first.endswith(f" failed: {brief(error)}") else first  # each says itself what all met


@contextmanager
def ending_together(ranks: Ranks) -> Iterator[None]:
    """Where a process fails within it, the others, which meet its end in a collective, raise OtherFailed with its error."""
    try:
        yield
    except OtherFailed:
        time.sleep(_AFTER_SECONDS)
        raise
    except Exception as error:
        other = announce(ranks, error) if ranks.several else ""
        time.sleep(0.1)  # what was said last arrives
        _cut(ranks)
        if other:
            time.sleep(_AFTER_SECONDS)
            raise OtherFailed(other) from error
        raise


def brief(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]


def meet_again(ranks: Ranks, state: object, hurry: Callable[[], object]) -> Ranks | None:
    """After a process has failed, which breaks the group: a new one of all of them, over gloo, if all come within half a minute
    and all say the same of their state. What a collective left unfinished ends with an error, on GPUs too.

    Args:
        ranks: the processes, of whose group nothing works from now on. state: of this one, for JSON; None: it has none that
            could be kept. hurry: true where a signal came: torchrun, which kills soon.

    Returns:
        The new group, or None: somebody does not come, or has another state.
    """
    if ranks.store is None:
        return None
    names = [f"state {rank}" for rank in range(ranks.world)]
    with contextlib.suppress(Exception):
        ranks.store.set(names[ranks.rank], json.dumps(state))
        _break(ranks)  # only now: the others, who notice, find what was said
        end = time.monotonic() + _MEET_SECONDS
        while not ranks.store.check(names):
            if time.monotonic() > end or hurry():
                return None
            time.sleep(0.02)
        states = {ranks.store.get(name) for name in names}
        if state is None or len(states) > 1:
            return None
        store, wait = torch.distributed.PrefixStore("again", ranks.store), datetime.timedelta(seconds=_MEET_SECONDS)
        torch.distributed.init_process_group("gloo", timeout=wait, store=store, rank=ranks.rank, world_size=ranks.world)
        return Ranks(ranks.rank, ranks.world, torch.distributed.group.WORLD, again=True)
    return None


def _break(ranks: Ranks) -> None:
    """Ends the group without the others, who wait in it or will."""
    _cut(ranks)
    # NCCL's kernels wait, too. This ends them and forgets the group; the public ProcessGroup.abort() does only the first.
    abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)
    if abort is not None:
        abort()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _watch(wires: Iterable[tuple[int, int]]) -> None:
    """Has the kernel end connections to a machine that is gone without a word. Torch's store would wait for it as long as TCP
    sends again, a quarter of an hour, and gloo until its timeout. A process that is merely late stays: its kernel answers, and
    gloo's own thread goes on. One that is stopped, as by SIGSTOP, goes too where more was sent to it than its kernel holds."""
    for descriptor, _ in wires:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as wire:  # one of Unix has no such options
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # where nothing is under way
            for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", (_LOST_SECONDS - 10) // 5)):
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _LOST_SECONDS)  # where something is


def _cut(ranks: Ranks) -> None:
    """Shuts the sockets of gloo's, so that the others hear of it before this process is gone. None of torch's own ways does:
    abort() and shutdown() of a gloo group leave whoever waits in it waiting, here and there (torch 2.13), and
    destroy_process_group() closes it with its last reference, which DDP, FSDP's parameters and an error's traceback hold."""
    port = int(os.environ.get("MASTER_PORT", "0"))  # of the store, which is to stay
    for descriptor, inode in ranks.wires:
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                with socket.socket(fileno=os.dup(descriptor)) as wire:
                    if port not in (wire.getpeername()[1], wire.getsockname()[1]):
                        wire.shutdown(socket.SHUT_RDWR)


def _sockets() -> set[tuple[int, int]]:
    """Descriptors and inodes of this process's sockets; none where there is no /proc."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the listing's own, which is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(name), status.st_ino))
    return found


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
    """What the processes wish between two steps, 0 for nothing: each says its wish, goes on with what it has to do, and hears
    the largest of all. One process hears its own.

    Args:
        ranks: the processes. They call it equally often.
    """

    def __init__(self, ranks: Ranks):
        self._ranks, self._said, self._work = ranks, torch.zeros(1, dtype=torch.int64), None

    def say(self, wish: int) -> None:
        self._said = torch.full((1,), wish, dtype=torch.int64)  # on the CPU: over gloo, whatever computes
        if self._ranks.group is not None:
            group, largest = self._ranks.group, torch.distributed.ReduceOp.MAX
            self._work = torch.distributed.all_reduce(self._said, largest, group=group, async_op=True)

    def hear(self) -> int:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._said)
