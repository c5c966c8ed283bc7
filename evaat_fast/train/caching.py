"""Exact gradient caching: a contrastive batch of any size in the memory of a few of its clips.

The loss needs all embeddings of a batch, but not what the towers kept to make them. So the batch is embedded part by part
without gradients, the loss of all embeddings gives the gradient of each, and each part is embedded once more and that gradient
sent back through it. The gradients of all parts add up to those of the whole batch, in exact arithmetic; a third more work, as
with full activation checkpointing. Source: Gao et al., arXiv 2101.06983.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

Embedded = tuple[Tensor, Tensor, Tensor]  # video, text, the multiplier of the logits


def parts(batch: Mapping[str, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(video, text, patches or None) of up to `size` clips at a time, in order."""
    patches = batch.get("patches")
    for first in range(0, len(batch["video"]), size):
        cut = slice(first, first + size)
        yield batch["video"][cut], batch["text"][cut], None if patches is None else patches[cut]


def backward(
    towers: nn.Module,
    batch: Mapping[str, Tensor],
    size: int,
    loss_of: Callable[[Embedded], Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> Tensor:
    """What `loss_of(towers(all)).backward()` does, with `size` clips at a time in the towers.

    Args:
        towers: `steps.Towers`, or DistributedDataParallel of them, which then averages gradients once, after the last part.
            They must draw nothing at random, or a part would be embedded differently the second time.
        batch: of `inputs.loader`, on the device. size: at least 1. loss_of: the loss of (video, text, multiplier).
        autocast: makes the context that the towers run in, anew each time: casts that it keeps from the pass without gradients
            would carry none in the next.

    Returns:
        The loss, detached.
    """
    wrapped = towers if isinstance(towers, nn.parallel.DistributedDataParallel) else None
    inner: nn.Module = towers if wrapped is None else wrapped.module
    with torch.no_grad():
        found = []
        for part in parts(batch, size):
            with autocast():
                found.append(inner(*part))
    video, text = (torch.cat([f[i] for f in found]).requires_grad_() for i in range(2))
    scale = found[0][2].detach().requires_grad_()
    del found
    loss = loss_of((video, text, scale))
    loss.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (video, text, scale)]
    starts = range(0, len(video), size)
    for start, part in zip(starts, parts(batch, size), strict=True):
        last = start == starts[-1]
        silent = contextlib.nullcontext() if wrapped is None or last else wrapped.no_sync()
        with silent:
            with autocast():
                embedded = towers(*part)
            sent = [embedded[0], embedded[1]], [g[start : start + size] for g in gradients[:2]]
            if last and embedded[2].requires_grad:  # the multiplier is one for all parts
                sent[0].append(embedded[2])
                sent[1].append(gradients[2])
            torch.autograd.backward(*sent)
    return loss.detach()
