"""The specification of joint_attention, after the rotation."""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core.autocast import without_autocast


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool = False) -> Any:
    """softmax(q k^T * scale) v, in float32 (float64 for float64), rounded once; with return_lse also the logarithms of the
    softmax's denominators, [B, H, N], not rounded."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]  # each key head serves `groups` query heads
    k, v = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v))
    with without_autocast(q.device.type):
        scores = q.to(wide) @ k.transpose(-1, -2) * scale
        out = (scores.softmax(-1) @ v).to(q.dtype)
        return (out, scores.logsumexp(-1)) if return_lse else out
