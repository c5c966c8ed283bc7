"""joint_attention: 3-D RoPE and softmax attention over all tokens of a clip.

`joint_attention` is rope3d followed by torch's scaled_dot_product_attention, on every device; `joint_attention_qkv_` is the
same on the packed output of the qkv projection, rotated in place.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import _dispatch
from evaat_fast._check import number
from evaat_fast.ops.rope3d import rope3d, rope3d_qkv_


def attention_reference(q, k, v, scale):
    """The specification: softmax(q k^T * scale) v, in float32 (float64 for float64), rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]  # each key head serves `groups` query heads
    k, v = (x.to(wide).repeat_interleave(groups, 1) for x in (k, v))
    weights = (q.to(wide) @ k.transpose(-1, -2) * scale).softmax(-1)
    return (weights @ v).to(q.dtype)


def _attend(q, k, v, scale, backend):
    if backend == "reference":
        out = attention_reference(q, k, v, scale)
    else:
        out = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # free where the kernel already writes [B, N, H, D]


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
        cu_seqlens, max_seqlen, return_lse: part of the contract, not built yet.
        deterministic: the backward gives the same bits every time. True on CPU always; not built yet on CUDA.
        backend: "auto", "sdpa" or "reference".

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]. Under autocast q, k and v are cast first.

    Raises:
        ValueError, TypeError: a shape, dtype, device or grid that does not fit, naming the argument.
        NotImplementedError: an option that is not built yet.
    """
    _refuse(cu_seqlens, max_seqlen, return_lse, deterministic, q)
    _check_qkv(q, k, v)
    q, k, v = _autocast(q, k, v)
    backend = _dispatch.pick("joint_attention", q, backend)
    rotation = dict(freqs=freqs, prefix_tokens=prefix_tokens, interleaved=interleaved, backend=_rope_backend(backend))
    if k_positions is not None:
        if positions is None or grid is not None:
            raise ValueError("k_positions: expected together with positions, and without grid")
        q = rope3d(q, positions=positions, **rotation)
        try:
            k = rope3d(k, positions=k_positions, **rotation)
        except (TypeError, ValueError) as error:
            raise type(error)(f"k_{error}" if str(error).startswith("positions:") else str(error)) from None
    elif grid is not None or positions is not None:
        q, k = rope3d(q, k, grid, positions=positions, **rotation)
    elif freqs is not None:
        raise ValueError("freqs: given, but neither grid nor positions is")
    return _attend(q, k, v, _scale(scale, q.shape[-1]), backend)


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
        qkv: [B, N, 3 * H * D], one tensor and no view (what torch.nn.Linear returns). Rotated in place: do not use it again.
        num_heads: H. The rest as for `joint_attention`.

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]: `.transpose(1, 2).flatten(2)` is free.
    """
    _refuse(None, None, return_lse, deterministic, qkv)
    if not isinstance(qkv, torch.Tensor) or not qkv.is_floating_point():
        raise TypeError(f"qkv: expected a floating-point tensor, got {getattr(qkv, 'dtype', type(qkv).__name__)}")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads!r}")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(f"qkv: expected the shape [B, N, 3 * {num_heads} * D], got {list(qkv.shape)}")
    (qkv,) = _autocast(qkv)
    backend = _dispatch.pick("joint_attention", qkv, backend)
    if grid is not None or positions is not None:
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
    elif freqs is not None:
        raise ValueError("freqs: given, but neither grid nor positions is")
    # unbind(2): its backward stacks the three gradients straight into the packed layout, one copy.
    q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))
    return _attend(q, k, v, _scale(scale, q.shape[-1]), backend)


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


def _refuse(cu_seqlens, max_seqlen, return_lse, deterministic, x):
    if cu_seqlens is not None or max_seqlen is not None:
        raise _dispatch.not_built("joint_attention(cu_seqlens=...)", "pad the clips, or call it once per clip")
    if return_lse:
        raise _dispatch.not_built("joint_attention(return_lse=True)", "torch's attention does not return it on every device")
    if deterministic and getattr(x, "is_cuda", False):
        raise _dispatch.not_built(
            "joint_attention(deterministic=True) on CUDA", "torch.use_deterministic_algorithms governs SDPA"
        )


def _check_qkv(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a {'nested' if x.is_nested else x.layout} one")
        if x.ndim != 4:
            raise ValueError(f"{name}: expected the shape [B, H, N, D], got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
    B, H, _, D = q.shape
    if D == 0:
        raise ValueError(f"q: expected a head dim of at least 1, got the shape {list(q.shape)}")
    if k.shape[0] != B or k.shape[3] != D or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(f"k: expected [{B}, a divisor of {H}, M, {D}] to go with q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {list(k.shape)}, got {list(v.shape)}")
