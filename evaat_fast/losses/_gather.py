"""Features of every rank, as the originals gather them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evaat_fast.ops._core.autocast import autocast_dtype


class Gathers(nn.Module):
    """What AVION's and open_clip's losses share."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False; gather with torch.distributed")
        self.local_loss, self.gather_with_grad, self.rank, self.world_size = local_loss, gather_with_grad, rank, world_size
        self.use_horovod = use_horovod

    def gather(self, x: Tensor, own: bool = True) -> Tensor:
        """x of all ranks in their order. With gather_with_grad gradients are summed over the ranks, else they are this rank's
        alone, or none without `own`."""
        if self.world_size == 1:
            return x
        if self.gather_with_grad:
            return _summing(x, self.rank, self.world_size)
        parts = _parts(x, self.world_size)
        if own:
            parts[self.rank] = x
        return torch.cat(parts)


def gather_from_all(x: Tensor) -> Tensor:
    """x of all ranks of the default process group, gradients summed over them; x itself without a group of several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _summing(x, dist.get_rank(), dist.get_world_size())
    return x


def _parts(x, world_size):
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size)]
    dist.all_gather(parts, x.detach().contiguous())
    return parts


def _summing(x, rank, world_size):
    return _Gather.apply(x, rank, world_size) if x.requires_grad else torch.cat(_parts(x, world_size))


class _Gather(torch.autograd.Function):
    # As torch.distributed.nn.all_gather, which torch 2.13 deprecates for private functions.

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.mine = slice(rank * len(x), (rank + 1) * len(x))
        return torch.cat(_parts(x, world_size))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.mine], None, None


def check_tensor(name: str, x: object, *shape: int | str) -> None:
    """TypeError or ValueError unless x is a tensor of this shape, of which a name may be any number, everywhere the same."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    sizes = dict(zip(shape, x.shape, strict=False))
    if x.ndim != len(shape) or any(m != (sizes[n] if isinstance(n, str) else n) for n, m in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name}: expected the shape [{', '.join(map(str, shape))}], got {list(x.shape)}")


def alike(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Both, features of as many pairs; under autocast in the wider dtype, as the originals' products take any two. Raises
    TypeError, ValueError: others."""
    check_tensor("image features", images, "N", "E")
    check_tensor("text features", texts, *images.shape)
    if images.dtype != texts.dtype and autocast_dtype(images.device.type) is not None:
        dtype = torch.promote_types(images.dtype, texts.dtype)
        return images.to(dtype), texts.to(dtype)
    return images, texts
