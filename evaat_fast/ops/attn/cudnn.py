"""cuDNN's gradients of attention, of an output and log-sum-exps that a kernel of ours has written.

torch 2.11 keeps cuDNN's graphs by the shapes and strides of q, k and v and by the dropout, and builds in the strides of the
output and of the dO that came first. A dropout of -0.0 is none, and has graphs of its own: of our output's strides, which dO is
given.
"""

import functools

import torch
from torch import Tensor

from evaat_fast.ops.attn.layout import with_strides


def gradients(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
    """dQ, dK and dV, [B, H, N, D] each, in the memory order of q, k and v. out: a view of a contiguous [B, N, H, D]. lse:
    float32 [B, H, N], natural logarithms."""
    ndim, seed = _of_this_torch(q.device)
    stats = lse.view(lse.shape + (1,) * (ndim - 3))
    whole, sizes = (None, None, None), (q.shape[2], k.shape[2])  # neither bias nor packed clips
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        with_strides(grad, out.stride()), q, k, v, out, stats, seed, seed, *whole, *sizes, -0.0, False, scale=scale
    )


@functools.cache
def _of_this_torch(device):
    """(dimensions of the log-sum-exps of torch's operators, which differ by its version; a seed that is not read)."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    stats = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    return stats.ndim, torch.empty(0, dtype=torch.int64, device=device)
