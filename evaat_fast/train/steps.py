"""One training step: the loss of a batch, its gradients, the update. Called eagerly, or replayed as a CUDA graph.

A step of a base model is some 1,700 kernels, which Python launches no faster than in 110 ms on an H200 and which take 77 there.
A graph is captured once for each shape of a batch, and replaying it launches them all at once.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from evaat_fast import ops
from evaat_fast.model import EVA02AT
from evaat_fast.train import inputs
from evaat_fast.train.config import Config
from evaat_fast.train.masters import Masters
from evaat_fast.train.ranks import Ranks

MAX_LOGIT_SCALE = 100.0  # CLIP's bound on a learnable temperature, 1 / 0.01


class Steps:
    """steps(batch) trains once on a batch of `inputs.loader`, and returns its loss, a scalar that nobody has waited for.

    Args:
        masters: of an EVA02AT. optimizer: of `build_optimizer`. table: float32 [K, K], the relevancy between kinds.
        config: a Config. device: where the model is. ranks: the processes that share each batch; with several, the batch is
            this one's part, the loss is of all, and gradients are averaged by DistributedDataParallel.
    """

    def __init__(
        self,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        table: Tensor,
        config: Config,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.masters, self.optimizer, self.config, self.device = masters, optimizer, config, device
        self.model, self.ranks = masters.model, ranks or Ranks()
        self.towers: torch.nn.Module = Towers(self.model)
        if self.ranks.group is not None:
            # Checkpointed blocks run again in the backward pass, which DDP allows where the graph is always the same.
            ddp = torch.nn.parallel.DistributedDataParallel
            self.towers = ddp(self.towers, process_group=self.ranks.group, static_graph=True)
        self.table = table.to(device)
        # A batch is copied to a GPU on a stream of its own, beside the step before it.
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graphs: dict[tuple, Any] = {}  # by shapes: None after a first step, which is eager; then (graph, batch, loss)
        if config.train.cuda_graph:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # a graph reads it there
            else:
                group["lr"] = lr

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        if not self.config.train.cuda_graph:
            return self._run(self._moved(batch))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            loss = self._replay(self._moved(batch))
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
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
            self.graphs[shapes] = graph, held, loss
        graph, held, loss = self.graphs[shapes]
        for name, x in batch.items():
            held[name].copy_(x)
        graph.replay()
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
        loss = batch_loss(self.model, batch, self.table, self.config, self.device, self.towers, self.ranks)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.masters.take_gradients()
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.masters.parameters.values(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.masters.give_weights()
        if self.config.loss.learnable_temperature:
            self.model.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        return loss.detach()


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
        video, text, scale = towers(batch["video"], batch["text"], batch.get("patches"))
    group: dict[str, Any] = {} if ranks.group is None else {"group": ranks.group, "grad_mode": "ddp"}
    if config.loss.name == "clip":
        video, text = (torch.nn.functional.normalize(x.to(scale.dtype), dim=-1) for x in (video, text))
        return ops.clip_loss(video, text, scale, **group)
    relevancy, loss = ops.IndexedRelevancy(table, batch["kind"], batch["text_kind"]), config.loss
    return ops.sms_loss(video, text, relevancy, margin=loss.margin, relaxation=loss.relaxation, rule=loss.rule, **group)


def build_optimizer(model: EVA02AT, config: Config, masters: Masters | None = None) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only: not on vectors, scalars and the positional embeddings. It updates the
    masters of what the model holds in a lower precision."""
    spared = model.no_weight_decay()
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in (masters or Masters(model)).parameters.items():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and name not in spared].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.optim.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.optim.lr,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        fused=True,
    )


def fit_optimizer(optimizer: torch.optim.Optimizer, config: Config, device: torch.device) -> None:
    """Lets a graph read the learning rate from memory, or nobody: a checkpoint's optimizer may be of the other kind."""
    for group in optimizer.param_groups:
        group["capturable"] = config.train.cuda_graph
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if config.train.cuda_graph else rate
