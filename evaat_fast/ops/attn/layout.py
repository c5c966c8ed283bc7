"""What keeps the gradients of torch's scaled_dot_product_attention right on CUDA.

The cuDNN backward of torch 2.11 keeps a graph for the shapes and strides of q, k and v, with the strides of the first dO that
came with them built in. A dO with others is read as if it had those: the gradients are wrong by more than their size, and
nothing says so (an H200, cuDNN 9.19; later versions of torch copy such a dO). A model never meets it, as its dO always lies the
same; a compiled step beside an eager one does.
"""

import torch
from torch import Tensor

from evaat_fast.ops._core.register import traced
from evaat_fast.ops._core.tensor import is_transformed


class _LikeOut(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(out):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.strides = inputs[0].stride()

    @staticmethod
    def backward(ctx, dO):
        return with_strides(dO, ctx.strides)


def with_strides(dO: Tensor, strides: tuple[int, ...]) -> Tensor:
    """dO, or a copy of it with these strides and at 16 bytes."""
    aligned = torch.compiler.is_compiling() or dO.data_ptr() % 16 == 0
    if dO.stride() == strides and aligned:
        return dO
    return dO.new_empty_strided(dO.shape, strides).copy_(dO)


def gradient_like(out: Tensor) -> Tensor:
    """What torch's attention returned, whose gradient on CUDA will reach it with out's own strides."""
    if not (out.is_cuda and out.requires_grad):
        return out
    if traced(type(out)) or is_transformed(out):
        return _LikeOut.apply(out)
    strides = out.stride()
    # 3 us, where a function of autograd takes 15. What follows may have no gradient for it.
    out.register_hook(lambda dO: None if dO is None else with_strides(dO, strides))
    return out
