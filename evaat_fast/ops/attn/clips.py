"""Packed clips of different lengths: their tokens' positions, and torch's attention within each."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast.ops._core.register import once_differentiable, register, traced
from evaat_fast.ops.rope3d.rotate import empty


def clip_positions(
    cu_seqlens: Tensor, total: int, grid: Sequence[int] | None, positions: Tensor | None, prefix_tokens: int
) -> Tensor:
    """float32 [total, 3]: the positions of all tokens, zero (no rotation) for the first prefix_tokens of each clip.

    grid: (T, Hp, Wp) of the longest clip, of which the others have the first frames; or None with positions [total, 3].
    """
    token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    clip = torch.searchsorted(cu_seqlens, token, right=True) - 1
    cell = token - cu_seqlens[clip] - prefix_tokens
    rows: Any = positions
    if grid is not None:
        _, height, width = grid
        rows = torch.stack((cell // (height * width), cell // width % height, cell % width), 1)
    return torch.where((cell >= 0)[:, None], rows, 0).float()


def each_clip(attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Any:
    """`attention` of each clip by itself, q [1, H, total, D], joined. Waits for a GPU."""
    outs = [attention(*(x[:, :, n] for x in (q, k, v))) for n in _slices(cu_seqlens)]
    if not outs:
        return attention(q, k, v)
    if isinstance(outs[0], tuple):
        return tuple(torch.cat(x, 2) for x in zip(*outs, strict=True))
    return torch.cat(outs, 2)


def _slices(cu_seqlens):
    limits = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(limits, limits[1:], strict=False) if a < b]


def _lse(q):
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@register(
    "attn_clips_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> (Tensor, Tensor)",
    lambda q, k, v, *others: (empty(q), _lse(q)),
)
def _clips_forward(q, k, v, cu_seqlens, scale):
    out, lse = empty(q), _lse(q)
    for n in _slices(cu_seqlens):
        mine = (x[:, :, n] for x in (q, k, v))
        out[:, :, n], lse[:, :, n] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*mine, scale=scale)
    return out, lse


@register(
    "attn_clips_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, float scale) -> "
    "(Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *others: (empty(q), empty(k), empty(v)),
)
def _clips_backward(grad, q, k, v, out, lse, cu_seqlens, scale):
    grads = empty(q), empty(k), empty(v)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for n in _slices(cu_seqlens):
        mine = (x[:, :, n] for x in (grad, q, k, v, out, lse))
        for to, x in zip(grads, backward(*mine, 0.0, False, scale=scale), strict=True):
            to[:, :, n] = x
    return grads


class _OfClips(torch.autograd.Function):
    """Torch's attention of each clip on the CPU, q [1, H, total, D]. Autograd's slices would write a whole gradient each."""

    @staticmethod
    def forward(q, k, v, cu_seqlens, scale):
        return _clips_forward.at(traced(type(q)))(q, k, v, cu_seqlens, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        backward = _clips_backward.at(traced(type(grad)))
        return *backward(grad, q, k, v, out, lse, cu_seqlens, ctx.scale), None, None


def sdpa_of_clips(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, scale: float) -> Tensor:
    """Torch's attention within each clip, q [1, H, total, D], as fast as the device has it."""
    if q.is_cuda:
        return nested_sdpa(q, k, v, cu_seqlens, max_seqlen, scale)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if q.is_cpu:
        return _OfClips.apply(q, k, v, cu_seqlens, scale)[0]
    return each_clip(functools.partial(scaled_dot_product_attention, scale=scale), q, k, v, cu_seqlens)


def nested_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, scale: float) -> Tensor:
    """Torch's attention over clips as a nested tensor, whose kernels for packed sequences it has on CUDA."""
    groups = q.shape[1] // k.shape[1]
    limits: dict[str, Any] = dict(offsets=cu_seqlens.long(), min_seqlen=1, max_seqlen=max_seqlen)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x.squeeze(0).transpose(0, 1).contiguous(), **limits).transpose(1, 2)
        for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    )
    out = scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous().values().transpose(0, 1).unsqueeze(0)
