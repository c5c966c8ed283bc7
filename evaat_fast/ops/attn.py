"""joint_attention: 3-D RoPE and softmax attention over all tokens of a clip.

`joint_attention` is rope3d followed by torch's scaled_dot_product_attention, on every device; `joint_attention_qkv_` is the
same on the packed output of the qkv projection, rotated in place. By name a Triton kernel does both in one.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import _dispatch
from evaat_fast._check import memory_of, number
from evaat_fast.ops.attn_triton import attend
from evaat_fast.ops.rope3d import rope3d, rope3d_qkv_
from evaat_fast.ops.rope3d_check import check, flags, readable

_MOST_HEAD_DIM = 128  # of evaat_fast.kernels.attn


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


def _attend(q, k, v, scale, backend, return_lse, rotation=_NO_ROTATION):
    lse = None
    if backend == "triton" and q.numel() and k.numel():
        q, k, v = (memory_of("joint_attention", name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        out, lse = attend(q, k, v, rotation, scale)
        return (out, lse) if return_lse else out
    if backend == "reference" or return_lse:
        out, lse = attention_reference(q, k, v, scale, True)
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
        cu_seqlens, max_seqlen: part of the contract, not built yet.
        deterministic: the backward gives the same bits every time. True on CPU and in Triton always; not built yet for SDPA on
            CUDA.
        return_lse: also return the log-sum-exps of the scores; in Triton and the reference.
        backend: "auto", "sdpa", "triton" (head dims up to 128; not yet run on a GPU) or "reference".

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]; with return_lse also float32 [B, H, N] (float64 for float64). Under
        autocast q, k and v are cast first.

    Raises:
        ValueError, TypeError: a shape, dtype, device or grid that does not fit, naming the argument.
        NotImplementedError: an option that is not built yet.
    """
    if cu_seqlens is not None or max_seqlen is not None:
        raise _dispatch.not_built("joint_attention(cu_seqlens=...)", "pad the clips, or call it once per clip")
    _check_qkv(q, k, v)
    q, k, v = _autocast(q, k, v)
    backend = _pick(q, backend, return_lse, deterministic)
    scale = _scale(scale, q.shape[-1])
    if backend == "triton" and q.numel() and k.numel() and _fuses(grid, positions, freqs):
        rotation = _rotation(q, k, grid, freqs, prefix_tokens, positions, k_positions, interleaved)
        return _attend(q, k, v, scale, backend, return_lse, rotation)
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
    return _attend(q, k, v, scale, backend, return_lse)


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
        [B, H, N, D], a view of a contiguous [B, N, H, D]: `.transpose(1, 2).flatten(2)` is free. With return_lse as
        `joint_attention`.
    """
    if not isinstance(qkv, torch.Tensor) or not qkv.is_floating_point():
        raise TypeError(f"qkv: expected a floating-point tensor, got {getattr(qkv, 'dtype', type(qkv).__name__)}")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads!r}")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(f"qkv: expected the shape [B, N, 3 * {num_heads} * D], got {list(qkv.shape)}")
    (qkv,) = _autocast(qkv)
    backend = _pick(qkv, backend, return_lse, deterministic, qkv.shape[2] // (3 * num_heads))
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
    return _attend(q, k, v, _scale(scale, q.shape[-1]), backend, return_lse)


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


def _pick(x, backend, return_lse, deterministic, head_dim=None):
    backend = _dispatch.pick("joint_attention", x, backend)
    head_dim = x.shape[-1] if head_dim is None else head_dim
    if backend == "triton" and head_dim > _MOST_HEAD_DIM:
        raise _dispatch.BackendError(f"joint_attention: triton takes head dims up to {_MOST_HEAD_DIM}, not {head_dim}")
    if return_lse and backend == "sdpa":
        detail = 'torch\'s attention does not return it on every device; backend="triton" and "reference" do'
        raise _dispatch.not_built("joint_attention(return_lse=True)", detail)
    if deterministic and backend == "sdpa" and x.is_cuda:
        raise _dispatch.not_built(
            "joint_attention(deterministic=True) on CUDA", "torch.use_deterministic_algorithms governs SDPA"
        )
    return backend


def _fuses(grid, positions, freqs):
    """Whether the attention kernel can rotate: it computes no gradient of the frequencies."""
    learned = any(x is not None and getattr(x, "requires_grad", False) for x in (freqs, positions))
    return (grid is not None or positions is not None) and not (learned and torch.is_grad_enabled())


def _rotation(q, k, grid, freqs, prefix_tokens, positions, k_positions, interleaved):
    """What `attend` takes, with the checks of `rope3d`."""
    q, k, freqs, positions = readable(q=q, k=k, freqs=freqs, positions=positions)
    interleaved, _ = flags(interleaved=interleaved, inverse=False)
    if k_positions is not None:
        if positions is None or grid is not None:
            raise ValueError("k_positions: expected together with positions, and without grid")
        try:
            (k_positions,) = readable(positions=k_positions)
            check(k, None, None, freqs, prefix_tokens, k_positions)
        except (TypeError, ValueError) as error:
            raise type(error)(f"k_{error}" if str(error).startswith("positions:") else str(error)) from None
    grid = check(q, k if k_positions is None else None, grid, freqs, prefix_tokens, positions)
    return freqs, positions, k_positions, grid, prefix_tokens, interleaved, True


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
