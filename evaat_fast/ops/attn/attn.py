"""joint_attention: 3-D RoPE and softmax attention over all tokens of a clip.

`joint_attention` is rope3d followed by torch's scaled_dot_product_attention, on every device; `joint_attention_qkv_` is the
same on the packed output of the qkv projection, rotated in place. By name a Triton kernel does both in one.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast.ops._core.tensor import memory_of, number
from evaat_fast.ops.attn.clips import clip_positions, each_clip, sdpa_of_clips
from evaat_fast.ops.attn.flops import register_when_imported
from evaat_fast.ops.attn.packed import attend_packed, rotated_heads
from evaat_fast.ops.attn.plan import (
    TRITON,
    check_clip_positions,
    check_clips,
    check_packed,
    check_qkv,
    check_rotation,
    of_keys,
    pick,
)
from evaat_fast.ops.attn.triton import attend
from evaat_fast.ops.rope3d.rope3d import packed_settings, rope3d_qkv_, rotate_by_table, turned

register_when_imported()


def attention_reference(q, k, v, scale, return_lse=False):
    """The specification: softmax(q k^T * scale) v, in float32 (float64 for float64), rounded once; with return_lse also the
    logarithms of the softmax's denominators, [B, H, N], not rounded."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]  # each key head serves `groups` query heads
    k, v = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    out = (scores.softmax(-1) @ v).to(q.dtype)
    return (out, scores.logsumexp(-1)) if return_lse else out


_NO_ROTATION = (None, None, None, [], 0, True, False)


def _attend(q, k, v, scale, backend, return_lse, rotation=_NO_ROTATION, cu_seqlens=None, max_seqlen=None):
    """The attention of a backend: [B, H, N, D], or that and the log-sum-exps."""
    lse = None
    if backend in TRITON and q.numel() and k.numel():
        q, k, v = (memory_of("joint_attention", name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        out, lse = attend(q, k, v, rotation, cu_seqlens, scale, backend == TRITON[1])
        return (out, lse) if return_lse else out
    if backend == "reference" or return_lse:
        core = lambda *x: attention_reference(*x, scale, True)  # noqa: E731
        out, lse = core(q, k, v) if cu_seqlens is None else each_clip(core, q, k, v, cu_seqlens)
    elif cu_seqlens is not None:
        out = sdpa_of_clips(q, k, v, cu_seqlens, max_seqlen, scale)
    else:
        out = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # free where the kernel already writes [B, N, H, D]
    return (out, lse) if return_lse else out


def joint_attention(
    q,
    k,
    v,
    *,
    grid=None,
    freqs=None,
    prefix_tokens=1,
    positions=None,
    k_positions=None,
    interleaved=True,
    scale=None,
    cu_seqlens=None,
    max_seqlen=None,
    deterministic=False,
    return_lse=False,
    backend=None,
):
    """softmax(R q (R k)^T * scale) v, non-causal, where R is the 3-D rotation of `rope3d` (arXiv 2506.14356, eq. 8-10).

    Args:
        q: [B, H, N, D]; k, v: [B, Hk, M, D] with H a multiple of Hk. One dtype, any strides. Never written to.
        grid, positions: as for `rope3d`; with neither there is no rotation. freqs, prefix_tokens, interleaved: likewise.
        k_positions: positions of the keys where they differ from those of the queries; needs `positions`.
        scale: factor of the scores, D**-0.5 by default.
        cu_seqlens: int32 [clips + 1], rising from 0 to the number of tokens: clips of different lengths, one after the other,
            each attending to itself. Then q is [total, H, D], k and v [total, Hk, D], positions [total, 3], grid that of the
            longest clip (the others have its first frames), and prefix_tokens lead each clip. Values are checked on the CPU; on
            CUDA limits that are none make the result NaN in Triton.
        max_seqlen: at least the longest clip's tokens; spares SDPA on CUDA a wait.
        deterministic: the backward gives the same bits every time, as it always does on CPU and in Triton. On CUDA then Triton
            serves, unless torch.use_deterministic_algorithms binds SDPA too.
        return_lse: also return the log-sum-exps of the scores, with a gradient. Where SDPA serves otherwise, it is Triton on
            CUDA and the reference elsewhere, which keeps all scores of a clip.
        backend: "auto", "sdpa", "triton" (head dims up to 128; not yet run on a GPU), "triton_onepass" (the same with a
            backward pass that adds up dQ in no fixed order) or "reference".

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]; with return_lse also float32 [B, H, N] (float64 for float64). With
        cu_seqlens [total, H, D] and [H, total]. Under autocast q, k and v are cast first.

    Raises:
        ValueError, TypeError: a shape, dtype, device or grid that does not fit, naming the argument.
        RuntimeError: a backend that was asked for by name cannot serve the call.
    """
    check_qkv(q, k, v, cu_seqlens is not None)
    q, k, v = _autocast(q, k, v)
    check_clips(cu_seqlens, max_seqlen, q.shape[0], q.device)
    if grid is None and positions is None and freqs is not None:
        raise ValueError("freqs: given, but neither grid nor positions is")
    if k_positions is not None and (positions is None or grid is not None):
        raise ValueError("k_positions: expected together with positions, and without grid")
    backend = pick(q, backend, return_lse, deterministic, q.shape[-1])
    rotation = grid, freqs, prefix_tokens, positions, k_positions, interleaved
    if cu_seqlens is None:
        return _joint(q, k, v, *rotation, _scale(scale, q.shape[-1]), None, None, return_lse, backend)
    rotation = _in_clips(cu_seqlens, q, *rotation)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _joint(q, k, v, *rotation, _scale(scale, q.shape[-1]), cu_seqlens, max_seqlen, return_lse, backend)
    out, lse = out if return_lse else (out, None)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def _in_clips(cu_seqlens, q, grid, freqs, prefix_tokens, positions, k_positions, interleaved):
    """The rotation of packed clips, as one of all their tokens."""
    if grid is None and positions is None:
        return grid, freqs, prefix_tokens, positions, k_positions, interleaved
    check_clip_positions(q, cu_seqlens, grid, freqs, prefix_tokens, positions, k_positions)
    rows = lambda x: clip_positions(cu_seqlens, q.shape[0], grid, x, prefix_tokens)  # noqa: E731
    return None, freqs, 0, rows(positions), None if k_positions is None else rows(k_positions), interleaved


def _joint(
    q, k, v, grid, freqs, prefix_tokens, positions, k_positions, interleaved, scale, cu_seqlens, max_seqlen, return_lse, backend
):
    """Rotation and attention of checked q, k and v [B, H, N, D], with B = 1 for packed clips."""
    clips = cu_seqlens, max_seqlen
    if grid is None and positions is None:
        return _attend(q, k, v, scale, backend, return_lse, _NO_ROTATION, *clips)
    if backend in TRITON and q.numel() and k.numel() and _fuses(positions, freqs):
        rotation = check_rotation(q, k, grid, freqs, prefix_tokens, positions, k_positions, interleaved)
        return _attend(q, k, v, scale, backend, return_lse, rotation, *clips)
    # owned: nobody but the attention reads what is turned, so its gradients are turned back where they lie.
    rest = dict(interleaved=interleaved, inverse=False, backend=_rope_backend(backend), owned=True)
    if k_positions is None:
        q, k = turned(q, k, grid, freqs, prefix_tokens, positions, **rest)
    else:
        q = turned(q, None, None, freqs, prefix_tokens, positions, **rest)
        k = of_keys(lambda: turned(k, None, None, freqs, prefix_tokens, k_positions, **rest))
    return _attend(q, k, v, scale, backend, return_lse, _NO_ROTATION, *clips)


def attention_by_table(q, k, v, table, prefix_tokens, interleaved):
    """joint_attention by cosines and sines that somebody else made, for integrations: no gradient for the table.

    q [B, H, N, D], k and v [B, Hk, N, D] of any dtypes, v's is the result's. table: as `rotate_by_table`, or None.
    """
    if table is not None:
        q, k = (rotate_by_table(x, table, prefix_tokens, interleaved) for x in (q, k))
    return joint_attention(q.to(v.dtype), k.to(v.dtype), v)


def joint_attention_qkv_(
    qkv,
    num_heads,
    grid=None,
    *,
    freqs=None,
    prefix_tokens=1,
    positions=None,
    interleaved=True,
    scale=None,
    deterministic=False,
    return_lse=False,
    backend=None,
):
    """`joint_attention` on the packed projection; consumes it.

    Args:
        qkv: [B, N, 3 * H * D], one tensor and no view (what torch.nn.Linear returns). Rotated in place: do not use it again,
            or the backward pass raises a RuntimeError, as soon as something else has a gradient for it.
        num_heads: H. The rest as for `joint_attention`.

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]: `.transpose(1, 2).flatten(2)` is free. With return_lse as
        `joint_attention`.
    """
    check_packed(qkv, num_heads)
    (qkv,) = _autocast(qkv)
    head_dim = qkv.shape[2] // (3 * num_heads)
    backend, scale = pick(qkv, backend, return_lse, deterministic, head_dim), _scale(scale, head_dim)
    if grid is None and positions is None:
        if freqs is not None:
            raise ValueError("freqs: given, but neither grid nor positions is")
        return _attend(*_unbind(qkv, num_heads), scale, backend, return_lse)
    rotation = grid, freqs, prefix_tokens, positions, interleaved
    compiling = torch.compiler.is_compiling()
    if not _fuses(positions, freqs) or backend == "reference" or (compiling and backend not in TRITON):
        qkv = rope3d_qkv_(
            qkv,
            num_heads,
            grid,
            freqs=freqs,
            prefix_tokens=prefix_tokens,
            positions=positions,
            interleaved=interleaved,
            backend=_rope_backend(backend),
        )
        return _attend(*_unbind(qkv, num_heads), scale, backend, return_lse)
    settings = packed_settings(qkv, num_heads, *rotation, False, None)
    if compiling:
        # Dynamo takes no function that changes a view, as a linear layer's output may be, and returns more than that.
        q, k, v = _unbind(qkv, num_heads)
        rotation = grid, freqs, prefix_tokens, positions, None, interleaved
        return _joint(q, k, v, *rotation, scale, None, None, return_lse, backend)
    if backend in TRITON and qkv.numel() and scale >= 0:
        out, lse = attend_packed(qkv, num_heads, settings, scale, backend == TRITON[1])
        return (out, lse) if return_lse else out
    return _attend(*rotated_heads(qkv, num_heads, settings), scale, backend, return_lse)


def _unbind(qkv, num_heads):
    # unbind(2): its backward stacks the three gradients straight into the packed layout, one copy.
    return (x.transpose(1, 2) for x in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))


def _rope_backend(backend):
    return "reference" if backend == "reference" else None


def _scale(scale, head_dim):
    return head_dim**-0.5 if scale is None else number("scale", scale)


def _autocast(*tensors):
    """Autocast casts attention's inputs before the rotation, so that rotation and scores see the same numbers."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)
    return tensors


def _fuses(positions, freqs):
    """Whether rotation and attention may be one: no gradient is wanted of the frequencies or the positions."""
    learned = any(x is not None and getattr(x, "requires_grad", False) for x in (freqs, positions))
    return not (learned and torch.is_grad_enabled())
