"""Packed clips of different lengths: their tokens' positions, and torch's attention within each."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def clip_positions(cu_seqlens, total, grid, positions, prefix_tokens):
    """float32 [total, 3]: the positions of all tokens, zero (no rotation) for the first prefix_tokens of each clip.

    grid: (T, Hp, Wp) of the longest clip, of which the others have the first frames; or None with positions [total, 3].
    """
    token = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    clip = torch.searchsorted(cu_seqlens, token, right=True) - 1
    cell = token - cu_seqlens[clip] - prefix_tokens
    if positions is None:
        _, height, width = grid
        rows = torch.stack((cell // (height * width), cell // width % height, cell % width), 1)
    else:
        rows = positions
    return torch.where((cell >= 0)[:, None], rows, 0).float()


def each_clip(attention, q, k, v, cu_seqlens):
    """`attention` of each clip by itself, q [1, H, total, D], joined. Waits for a GPU."""
    limits = cu_seqlens.tolist()
    outs = [attention(*(x[:, :, a:b] for x in (q, k, v))) for a, b in zip(limits, limits[1:], strict=False) if a < b]
    if not outs:
        return attention(q, k, v)
    if isinstance(outs[0], tuple):
        return tuple(torch.cat(x, 2) for x in zip(*outs, strict=True))
    return torch.cat(outs, 2)


def sdpa_of_clips(q, k, v, cu_seqlens, max_seqlen, scale):
    """Torch's attention over clips as a nested tensor, whose kernels for packed sequences it has on CUDA."""
    groups = q.shape[1] // k.shape[1]
    limits = dict(offsets=cu_seqlens.long(), min_seqlen=1, max_seqlen=max_seqlen)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x.squeeze(0).transpose(0, 1).contiguous(), **limits).transpose(1, 2)
        for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    )
    out = scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous().values().transpose(0, 1).unsqueeze(0)
