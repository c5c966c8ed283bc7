"""The loss modules on two ranks, against one process: python losses_ranks.py FILE, which the ranks meet in."""

import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy

from evaat_fast import losses
from evaat_fast.losses import avion, lavila, open_clip
from evaat_fast.train.ranks import leave

SCALE = torch.tensor(4.0, dtype=torch.float64)


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 12, 8, dtype=torch.float64).unbind() + (torch.rand(12, dtype=torch.float64),)


def step(world, rank, video, text, weight, labels, matrix, **options):
    part = slice(rank * 6, rank * 6 + 6) if world > 1 else slice(None)
    columns, rows = labels
    results = []
    for make, arguments in (
        (losses.ClipLoss, lambda: (SCALE,)),
        (losses.MaxMarginRankingLoss, lambda: ()),
        (losses.SymmetricMultiSimilarityLoss, lambda: (weight[part], torch.cat((columns[part], rows[part])))),
    ):
        extra = {"matrix": matrix} if make is losses.SymmetricMultiSimilarityLoss else {}
        leaves = [x[part].clone().requires_grad_() for x in (video, text)]
        loss = make(rank=rank, world_size=world, **extra, **options)(*leaves, *arguments())["loss"]
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    return results


def local(rank, video, text):
    """Both directions of this rank's rows, and what reaches them as rows alone."""
    part = slice(rank * 6, rank * 6 + 6)
    leaves = [x[part].clone().requires_grad_() for x in (video, text)]
    labels = torch.arange(12)[part]
    loss = sum(cross_entropy(SCALE * a @ b.T, labels) for a, b in zip(leaves, (text, video), strict=True)) / 2
    return loss, torch.autograd.grad(loss, leaves)


def dictionaries(rank, video, text, weight):
    """LaViLa's: whoever is in the process group counts, and gradients are summed over it."""
    part = slice(rank * 6, rank * 6 + 6) if dist.is_initialized() else slice(None)
    world = 2 if dist.is_initialized() else 1
    labelled = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1])[part]
    results = []
    for criterion, arguments in (
        (lavila.CLIPLoss(use_vissl=True, local_loss=True, rank=rank, world_size=world), ()),
        (lavila.SSLCLIPLoss(rank=rank, world_size=world), (labelled,)),
        (lavila.MaxMarginRankingLoss(), ()),
        (lavila.AdaptiveMaxMarginRankingLoss(fix_norm=False), (weight[part],)),
    ):
        image, caption = leaves = [x[part].clone().requires_grad_() for x in (video, text)]
        result = criterion({"image_embed": image, "text_embed": caption, "logit_scale": SCALE}, *arguments)
        rest = [x.detach().double() for name, x in result.items() if name != "loss"]
        results.append((result["loss"].detach(), rest, torch.autograd.grad(result["loss"], leaves)))
    return results


def main(rank, path):
    warnings.simplefilter("error")
    video, text, weight = inputs()
    alone = dictionaries(rank, video, text, weight)
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    for (a, rest, grads), (b, others, whole) in zip(dictionaries(rank, video, text, weight), alone, strict=True):
        torch.testing.assert_close([a, *rest], [b, *others], rtol=1e-12, atol=0)
        for x, y in zip(grads, whole, strict=True):
            torch.testing.assert_close(x, 2 * y[rank * 6 : rank * 6 + 6], rtol=1e-11, atol=1e-14)
    labels, matrix = torch.randint(0, 20, (2, 12)).unbind(), torch.rand(20, 20, dtype=torch.float64)
    alone = step(1, 0, video, text, weight, labels, matrix)
    # Gathered with gradients, every rank has the whole loss, and gradients are summed over the ranks: world times one's own.
    for options, factor in (({"gather_with_grad": True}, 2), ({}, 1)):
        for (a, *grads), (b, *whole) in zip(step(2, rank, video, text, weight, labels, matrix, **options), alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
            for x, y in zip(grads, whole, strict=True):
                torch.testing.assert_close(x, factor * y[rank * 6 : rank * 6 + 6], rtol=1e-11, atol=1e-14)
    # Local losses average to the whole one. Without gradients of what was gathered they train their own rows alone.
    part = slice(rank * 6, rank * 6 + 6)
    for gather_with_grad in (True, False):
        options = dict(local_loss=True, gather_with_grad=gather_with_grad, cache_labels=True, rank=rank, world_size=2)
        for make, arguments in (
            (avion.ClipLoss, lambda v, t: (v, t, SCALE)),
            (lavila.CLIPLoss, lambda v, t: ({"image_embed": v, "text_embed": t, "logit_scale": SCALE},)),
            (open_clip.ClipLoss, lambda v, t: (v, t, SCALE, torch.tensor(-1.0), True)),
        ):
            leaves = [x[part].clone().requires_grad_() for x in (video, text)]
            criterion = make(**options)
            for _ in range(2):  # the second time with the labels that it kept
                loss = next(iter(criterion(*arguments(*leaves)).values()))
                grads = torch.autograd.grad(loss, leaves)
            want, rows = local(rank, video, text)
            torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
            wants = [2 * x[part] for x in alone[0][1:]] if gather_with_grad else rows
            torch.testing.assert_close(grads, tuple(wants), rtol=1e-11, atol=1e-14)
            dist.all_reduce(loss := loss.detach().clone())
            torch.testing.assert_close(loss / 2, alone[0][0], rtol=1e-12, atol=0)
    print("rank", rank, "agrees", flush=True)
    leave()


if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1],), 2)
