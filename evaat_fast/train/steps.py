"""One training step: the loss of a batch, its gradients, the update. Called eagerly, or replayed as a CUDA graph.

A step of a base model is some 1,700 kernels, which Python launches no faster than in 110 ms on an H200 and which take 77 there.
A graph is captured once for each shape of a batch, and replaying it launches them all at once.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from evaat_fast import ops
from evaat_fast.model import EVA02AT
from evaat_fast.train import caching, inputs
from evaat_fast.train.averaging import Average
from evaat_fast.train.config import Config
from evaat_fast.train.masters import Masters
from evaat_fast.train.optimizers import build_optimizer as build_optimizer
from evaat_fast.train.optimizers import fit_optimizer as fit_optimizer
from evaat_fast.train.optimizers import gradient_norm, set_lr
from evaat_fast.train.ranks import Ranks
from evaat_fast.train.shards import average_whole

MAX_LOGIT_SCALE = 100.0  # CLIP's bound on a learnable temperature, 1 / 0.01


class Steps:
    """steps(batch) trains once on a batch of `inputs.loader`, and returns its loss, a scalar that nobody has waited for.

    Args:
        masters: of an EVA02AT. optimizer: of `build_optimizer`. table: float32 [K, K], the relevancy between kinds.
        config: a Config. device: where the model is. ranks: the processes that share each batch; with several, the batch is
            this one's part, the loss is of all, and gradients are averaged by DistributedDataParallel, or by FSDP where
            `shards.shard` has shared the model out.
        average: of the weights, updated after each step.

    Attributes:
        updating: whether an update began that has not ended, as where it failed. count: of the calls that ended.
        norm: of the last step's gradient, a scalar on the device, before clipping.
        bad: a scalar on the device, 1 once a loss or a gradient was not finite, or a loss above `limit`: from that step on
            nothing is updated, so that the weights are those before it by the time the host hears of it.
    """

    def __init__(
        self,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        table: Tensor,
        config: Config,
        device: torch.device,
        ranks: Ranks | None = None,
        average: Average | None = None,
    ) -> None:
        self.masters, self.optimizer, self.config, self.device = masters, optimizer, config, device
        self.model, self.ranks, self.average = masters.model, ranks or Ranks(), average
        self.towers: torch.nn.Module = Towers(self.model)
        if self.ranks.group is not None and config.train.parallel == "ddp":
            # Checkpointed blocks run again in the backward pass, which DDP allows where the graph is always the same. Of
            # several passes it would average the first alone, as it takes the first it sees for a whole step.
            ddp, whole = torch.nn.parallel.DistributedDataParallel, not config.train.micro_batch
            # Its one buffer, the frequencies, is a constant that need not be sent before each step.
            new = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # of torch 2.13, the old name warns
            buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            self.towers = ddp(self.towers, process_group=self.ranks.group, static_graph=whole, **buffers)
        self.norm, self.updating, self.count = torch.zeros((), device=device), False, 0
        self.bad, self._limit = torch.zeros((), device=device), torch.full((), math.inf, device=device)
        setattr(optimizer, "found_inf", self.bad)  # noqa: B010, where GradScaler sets it, too, and optimisers look for it
        self.table = table.to(device)
        # A batch is copied to a GPU on a stream of its own, beside the step before it.
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[
            tuple, Any
        ] = {}  # by shapes: None after a first step, which is eager; then (graph, batch, loss, norm)
        if config.train.cuda_graph:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        set_lr(self.optimizer, lr)

    def set_limit(self, largest: float) -> None:
        """A loss above it is as bad as one that is not finite."""
        self._limit.fill_(largest)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        if not self.config.train.cuda_graph:
            loss = self._run(self._moved(batch))
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                loss = self._replay(self._moved(batch))
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.count += 1
        return loss

    def _replay(self, batch: dict[str, Tensor]) -> Tensor:
        shapes = tuple((name, x.shape) for name, x in sorted(batch.items()))
        if shapes not in self.graphs:  # kernels are compiled, tables made and moments allocated outside of graphs
            self.graphs[shapes] = None
            return self._run(batch)
        if self.graphs[shapes] is None:
            held = {name: x.clone() for name, x in batch.items()}  # which later batches are written to
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: the loader's, which pins memory, may go on meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                loss = self._run(held)
            self.graphs[shapes] = graph, held, loss, self.norm
        graph, held, loss, norm = self.graphs[shapes]
        for name, x in batch.items():
            held[name].copy_(x)
        graph.replay()
        self.norm = norm.clone()
        return loss.clone()

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the device, for the current stream. The copy waits for nothing that runs there."""
        if self.copies is None:
            return {name: x.to(self.device) for name, x in batch.items()}
        with torch.cuda.stream(self.copies):
            moved = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.copies)
        for x in moved.values():
            x.record_stream(reader)  # or the next batch could be given its memory while it is read
        return moved

    def _run(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.config.train.micro_batch:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._cached(batch)
        else:
            loss = batch_loss(self.model, batch, self.table, self.config, self.device, self.towers, self.ranks)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if self.ranks.group is not None and self.config.train.parallel == "fsdp":
            average_whole(self.masters.parameters, self.ranks)
        self.masters.take_gradients()
        self.norm = gradient_norm(self.masters.parameters, self.config.optim.clip_norm)
        if self.config.train.spike and self.ranks.group is not None:
            # All have the same loss to the last bit, as its parts are added up in one order; were it not so, ranks would part.
            loss = loss.detach().clone()
            torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.MAX, group=self.ranks.group)
        good = torch.isfinite(loss.detach()) & torch.isfinite(self.norm) & (loss.detach() <= self._limit)
        self.bad.copy_(torch.maximum(self.bad, 1 - good.to(self.bad.dtype)))
        self.updating = True
        self.optimizer.step()
        self.masters.give_weights()
        if self.config.loss.learnable_temperature:
            self.model.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if self.average is not None:
            self.average.update(self.bad)
        self.updating = False
        return loss.detach()

    def _cached(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch and its gradients, a few clips at a time."""

        def loss_of(embedded: caching.Embedded) -> Tensor:
            return embedded_loss(embedded, batch, self.table, self.config, self.ranks)

        def autocast() -> torch.autocast:
            return inputs.autocast(self.config, self.device, self.model)

        return caching.backward(self.towers, batch, self.config.train.micro_batch, loss_of, autocast)


def later(x: Tensor) -> Callable[[], float]:
    """A function that returns the number of a scalar, and waits for what was launched before this call alone. `x.item()` waits
    for all that was launched before it is called itself, so for the step after, and the GPU then waits for Python."""
    if not x.is_cuda:
        return x.item
    copy, done = x.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))

    def value() -> float:
        done.synchronize()
        return copy.item()

    return value


class Towers(torch.nn.Module):
    """Both towers of a model as one module, for what wraps modules: (video, text, patches) -> (their embeddings, the multiplier
    of the logits)."""

    def __init__(self, model: EVA02AT):
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, text: Tensor, patches: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        return model.encode_video(video, patches=patches), model.encode_text(text), model.logit_scale.exp()


def batch_loss(
    model: EVA02AT,
    batch: Mapping[str, Tensor],
    table: Tensor,
    config: Config,
    device: torch.device,
    towers: torch.nn.Module,
    ranks: Ranks,
) -> Tensor:
    """The loss of one batch, a scalar, the same on all ranks.

    Args:
        batch: this rank's part of it, on `device`. table: float32 [K, K], the relevancy between kinds. towers: `Towers` of the
            model, or what wraps them.
    """
    with inputs.autocast(config, device, model):
        embedded = towers(batch["video"], batch["text"], batch.get("patches"))
    return embedded_loss(embedded, batch, table, config, ranks)


def embedded_loss(
    embedded: caching.Embedded, batch: Mapping[str, Tensor], table: Tensor, config: Config, ranks: Ranks
) -> Tensor:
    """The loss of what `Towers` make of a batch; see `batch_loss`."""
    video, text, scale = embedded
    group: dict[str, Any] = {} if ranks.group is None else {"group": ranks.group, "grad_mode": "ddp"}
    if config.loss.name == "clip":
        video, text = (torch.nn.functional.normalize(x.to(scale.dtype), dim=-1) for x in (video, text))
        return ops.clip_loss(video, text, scale, **group)
    relevancy, loss = ops.IndexedRelevancy(table, batch["kind"], batch["text_kind"]), config.loss
    return ops.sms_loss(video, text, relevancy, margin=loss.margin, relaxation=loss.relaxation, rule=loss.rule, **group)
