"""A pairwise loss over the ranks of a process group: what travels between them, and nothing else that calls torch.distributed.

Each of W ranks has n of the N = W n pairs. It reads its n videos against all N captions once, 6 n N E operations with both
gradients where one process needs 6 N N E (8 for the contrastive losses, whose two sweeps multiply twice). Captions and what is
known of each pair are gathered before the panels; what is left of each caption's column is summed over the ranks after them.

Bytes of one step, b being the bytes of a number of the computation, 4 or 8, and f those of a feature:

all-gather      1024 W, what each rank was called with; 8 W or 16 W, the loss and the gradient of the scale
                N E b, unit captions (clip_loss: N E f, captions); where panels are products of raw rows (Triton; bfloat16 on a
                CPU that multiplies it, from n W = 1024 on) N E f each of raw captions and, for gradients of videos, unit ones
                3 N b, norms and own cosines, but for clip_loss (Triton: 3 N b, of ego_nce_loss 2 N b; N b of clip_loss)
                N b, own relevancies; 8 N each index, verb or class id, or the bits of classes
reduce-scatter  N E b, gradients of captions; 4 N, sums of slopes (max-margin)
all-reduce      16 N, totals of columns, and as much of their positives where there are several (contrastive)

With `reduction="none"` forward and backward pass are a step each, without gradients and without the loss: 8 N more to
reduce-scatter, losses of columns (max-margin), and N b or 8 N to gather, what each pair counts. Over a ring a rank sends
(W - 1) / W of what is gathered or scattered, and twice that of what is all-reduced. Without gradients none are communicated.
The reference gathers both features and all labels, and every rank computes the whole matrix.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops.pairwise.check import no_autocast
from evaat_fast.ops.pairwise.reference import wide

BYTES = 1024  # in which a rank says what it was called with


class Ranks:
    """The ranks of a group of W > 1, seen from one. in_order: pairs stand in the order of the ranks; else this rank's are the
    first, so that kernels find its rows where they find its columns, and the others follow around the circle."""

    def __init__(self, group: Any, W: int, rank: int):
        import torch.distributed as dist

        self.group, self.W, self.rank, self.in_order = group, W, rank, False
        self._dist: Any = dist
        # torch 2.13 deprecates the second name for the first.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def _gathered(self, x):
        x = x.detach().contiguous()
        flat = x.new_empty((self.W * x.numel(),))
        self._all_gather(flat, x.view(-1), group=self.group)
        return flat.view(self.W, *x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of every rank as [N, ...]."""
        parts = self._gathered(x)
        return (parts if self.in_order or self.rank == 0 else parts.roll(-self.rank, 0)).flatten(0, 1)

    def vectors(self, x: Tensor) -> Tensor:
        """[k, n] of every rank as [k, N]."""
        return self.gather(x.T).T.contiguous()

    def scatter(self, x: Tensor) -> Tensor:
        """[N, ...], a part of every rank, as the sum of the parts of this rank's [n, ...]."""
        x = x.unflatten(0, (self.W, -1))
        x = (x if self.rank == 0 else x.roll(self.rank, 0)).contiguous()
        own = torch.empty_like(x[0])
        self._reduce_scatter(own.view(-1), x.view(-1), group=self.group)
        return own

    def total(self, *numbers: Tensor) -> list[Tensor]:
        """Sums over the ranks, in float64 and in one order, so that they have the same bits everywhere."""
        sums = self._gathered(torch.stack([x.detach().double() for x in numbers])).sum(0)
        return [y.to(x.dtype) for x, y in zip(numbers, sums.unbind(), strict=True)]

    def log_sum_exp(self, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(largest, sum of exp(x - largest)) of each column over all ranks, from each rank's own, -inf and 0 where it has none;
        both in the order that `gather` gives."""
        most, whole = self._around(largest, 1), self._around(sums, 1)
        mine = most.clone()
        self._dist.all_reduce(most, op=self._dist.ReduceOp.MAX, group=self.group)
        whole *= (mine - torch.where(most == -torch.inf, 0.0, most)).exp()
        self._dist.all_reduce(whole, group=self.group)
        return self._around(most, -1), self._around(whole, -1)

    def _around(self, x, direction):
        """[..., N], from this rank's order to that of the ranks, or back: -1."""
        return x.roll(direction * self.rank * (x.shape[-1] // self.W), -1).contiguous()

    def columns(self, x: Tensor) -> Tensor:
        """[..., N] in the order of the ranks, in the order that `gather` gives."""
        return x if self.in_order else self._around(x, -1)

    def agree(self, said: dict[str, object], error: Exception | None) -> None:
        """A ValueError on every rank unless all say the same and none has an error, which is raised where it is."""
        lines = [f"{name}: {_brief(x)}" for name, x in said.items()]
        lines += [] if error is None else [f"error: {type(error).__name__}: {error}".replace("\n", " ")]
        text = "\n".join(lines).encode()[:BYTES]
        # Where the group has a CPU backend, nobody waits for a GPU.
        on_cpu = "cpu" in str(self._dist.get_backend_config(self.group))
        mine = torch.frombuffer(bytearray(text.ljust(BYTES, b"\0")), dtype=torch.uint8).to("cpu" if on_cpu else "cuda")
        every = self._gathered(mine).cpu()
        if error is None and bool((every == every[0]).all()):
            return
        texts = [bytes(x.tolist()).rstrip(b"\0").decode(errors="replace") for x in every]
        calls = [dict(line.partition(": ")[::2] for line in x.split("\n")) for x in texts]
        for name in list(dict.fromkeys(name for call in calls for name in call if name != "error")):
            values = {rank: call[name] for rank, call in enumerate(calls) if name in call}
            first = next(iter(values))
            other = next((rank for rank, x in values.items() if x != values[first]), None)
            if other is not None:
                what = f"got {values[first]} on rank {first} and {values[other]} on rank {other}"
                one = f"{name} of one dtype and shape" if name in ("video", "text") else f"the same {name}"
                raise ValueError(f"group: expected {one} on every rank, {what}")
        if error is not None:
            raise error
        failed = next(rank for rank, call in enumerate(calls) if "error" in call)
        raise ValueError(f"group: rank {failed} cannot take part: {calls[failed]['error']}")


@dataclass(frozen=True)
class Batch:
    """N pairs, or n of them, a rank's own."""

    N: int
    device: torch.device
    ranks: Ranks | None

    @property
    def n(self) -> int:
        return self.N if self.ranks is None else self.N // self.ranks.W

    @property
    def first(self) -> int:
        """The number of this rank's first pair."""
        return 0 if self.ranks is None else self.ranks.rank * self.n


def eager(function: Callable) -> Callable:
    """The function, which no compiler is to see: torch.compile breaks its graph there, and is refused with fullgraph=True."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise NotImplementedError("group: the losses run eagerly over a group; leave them out of what torch.compile sees")
    return _outside(function) if "torch._dynamo" in sys.modules else function  # whose import takes two seconds


@functools.cache
def _outside(function):
    return torch.compiler.disable(function)


def across(group: object) -> Ranks | None:
    """The ranks of a group, None of a group of one."""
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup that this process is in, got {type(group).__name__}")
    W = group.size()
    return None if W == 1 else Ranks(group, W, group.rank())


def _brief(x):
    """What an argument is, as far as it must be the same on every rank."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if x is None or isinstance(x, (bool, int, float, str, list)) or is_dataclass(x):
        return str(x)[:200].replace("\n", " ")
    table, bits = getattr(x, "table", None), getattr(x, "classes", None)
    return type(x).__name__ + ("" if table is None else f" of {list(table.shape)}") + ("" if bits is None else f" of {bits}")


class Across:
    """A step over ranks in an operator's place. The gradients are those that add up over the ranks to the whole loss's, or, for
    grad_mode "ddp", whose mean does: of features, this rank's rows of one process's, times W; of the scale, which all ranks
    share, one process's over W, so that their sum is the true one, or itself, so that their mean is."""

    def __init__(self, body: Callable, ranks: Ranks, mean: bool):
        self.body, self.ranks, self.mean = body, ranks, mean

    def at(self, traced: bool) -> Callable:
        return self.run

    def run(self, *arguments: Any) -> tuple:
        loss, video, text, *scale = self.body(*arguments, ranks=self.ranks)
        for x in (video, text) if self.mean else ():
            x *= self.ranks.W
        for x in () if self.mean else scale:
            x /= self.ranks.W
        return loss, video, text, *scale


def reference_step(reference: Callable, *arguments: Any, ranks: Ranks) -> tuple:
    """As a step: the specification, which every rank computes of all features, and this rank's part of its gradients."""
    *inputs, weight, settings = arguments
    n, needs = len(inputs[0]), settings.work.needs()[: len(inputs)]
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    with torch.enable_grad(), no_autocast(inputs[0].device.type):
        leaves = [(ranks.gather(x).to(wide(x.dtype)) if x.ndim else x.detach()).requires_grad_() for x in inputs]
        loss = reference(*leaves, *settings.known())
        total = loss if weight is None else (loss * ranks.gather(weight)).sum()
        grads = torch.autograd.grad(total, leaves, materialize_grads=True) if any(needs) else [x.detach() for x in leaves]
    parts = (g[own].contiguous() if g.ndim else g.clone() for g in grads)
    loss = loss.detach()
    return (loss[own].clone() if settings.work.each else ranks.total(loss)[0] / ranks.W if weight is None else loss, *parts)
