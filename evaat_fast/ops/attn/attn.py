"""joint_attention: 3-D RoPE and softmax attention over all tokens of a clip.

`joint_attention` is rope3d followed by torch's scaled_dot_product_attention, on every device; `joint_attention_qkv_` is the
same on the packed output of the qkv projection, rotated in place. On Hopper a kernel in Gluon does both in one, by name one in
Triton.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.autocast import autocast_dtype
from evaat_fast.ops._core.tensor import check_device, is_transformed, keeps_numbers_elsewhere, kind, memory_of, packed_base
from evaat_fast.ops.attn.clips import each_clip, sdpa_of_clips
from evaat_fast.ops.attn.fused import FUSED, attend, attend_packed
from evaat_fast.ops.attn.layout import gradient_like
from evaat_fast.ops.attn.plan import AttentionPlan, needs_of_shape, plan
from evaat_fast.ops.attn.reference import attention_reference
from evaat_fast.ops.rope3d.rope3d import rotate_by_table
from evaat_fast.ops.rope3d.rotate import consume, rotate
from evaat_fast.ops.rope3d.rotation import Grid

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from evaat_fast.ops.rope3d.rope3d import Options

    class _BothOptions(Options, total=False):
        scale: float | None
        deterministic: bool

    class PackedOptions(_BothOptions, total=False):
        qkv_bias: Tensor | None

    class AttentionOptions(_BothOptions, total=False):
        grid: Grid
        k_positions: Tensor | None
        cu_seqlens: Tensor | None
        max_seqlen: int | None


@overload
def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: "Unpack[AttentionOptions]"
) -> Tensor: ...
@overload
def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: "Unpack[AttentionOptions]"
) -> tuple[Tensor, Tensor]: ...
def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid = None,
    freqs: Tensor | None = None,
    prefix_tokens: int = 1,
    positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    interleaved: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(R q (R k)^T * scale) v, non-causal, where R is the 3-D rotation of `rope3d` (arXiv 2506.14356, eq. 8-10).

    Args:
        q: [B, H, N, D]; k, v: [B, Hk, M, D] with H a multiple of Hk. One dtype, any strides. Never written to.
        grid, positions: as for `rope3d`; with neither there is no rotation. freqs, prefix_tokens, interleaved: likewise.
        k_positions: positions of the keys where they differ from those of the queries; needs `positions`.
        scale: factor of the scores, D**-0.5 by default.
        cu_seqlens: int32 [clips + 1], rising from 0 to the number of tokens: clips of different lengths, one after the other,
            each attending to itself. Then q is [total, H, D], k and v [total, Hk, D], positions [total, 3], grid that of the
            longest clip (the others have its first frames), and prefix_tokens lead each clip. Values are checked on the CPU; on
            CUDA limits that are none make the result NaN in Triton and Gluon.
        max_seqlen: at least the longest clip's tokens; spares SDPA on CUDA a wait.
        deterministic: the backward gives the same bits every time, as it always does on CPU and in Triton. On CUDA, where
            "gluon" does not serve, Triton then does, unless torch.use_deterministic_algorithms binds SDPA too.
        return_lse: also return the log-sum-exps of the scores, with a gradient. Where SDPA serves otherwise, it is Triton on
            CUDA and the reference elsewhere, which keeps all scores of a clip.
        backend: "auto", "gluon" (Hopper's heads of 64 and 128 in half precision, from 192 tokens on; by this name alone the
            gradients of 128, and packed clips of any lengths, of heads of 64), "sdpa", "triton" (head dims up to 128; slower
            than sdpa on an H200) or "reference".

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]; with return_lse also float32 [B, H, N] (float64 for float64). With
        cu_seqlens [total, H, D] and [H, total]. Under autocast q, k and v are cast first.

    Raises:
        ValueError, TypeError: a shape, dtype, device or grid that does not fit, naming the argument.
        RuntimeError: a backend that was asked for by name cannot serve the call.

    Source: EVA02-AT (arXiv 2506.14356), equations 8 to 10; FlashAttention-2 (arXiv 2307.08691).
    """
    packed_clips = cu_seqlens is not None
    _check(q, k, v, packed_clips)
    turns = grid is not None or positions is not None
    if turns or packed_clips:  # else nobody but torch, or Triton, reads their memory
        q, k, v = _readable(q, k, v)
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:  # first, so that rotation and scores see the same numbers
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rope = (grid, freqs, prefix_tokens, positions, interleaved)
    asked = (deterministic, return_lse, _is_transformed(q, k, v), _trains(q, k, v, freqs), backend)
    call = plan(q.shape, k.shape, q.dtype, q.device, rope, k_positions, scale, cu_seqlens, max_seqlen, *asked)
    if call.backend in FUSED and not (turns or packed_clips):
        q, k, v = _readable(q, k, v)
    if not packed_clips:
        return _attend(q, k, v, call, return_lse)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _attend(q, k, v, call, return_lse)
    out, lse = out if return_lse else (out, None)
    out = out.squeeze(0).transpose(0, 1)
    return out if lse is None else (out, lse.squeeze(0))


@overload
def joint_attention_qkv_(
    qkv: Tensor, num_heads: int, grid: Grid = None, *, return_lse: Literal[False] = False, **options: "Unpack[PackedOptions]"
) -> Tensor: ...
@overload
def joint_attention_qkv_(
    qkv: Tensor, num_heads: int, grid: Grid = None, *, return_lse: Literal[True], **options: "Unpack[PackedOptions]"
) -> tuple[Tensor, Tensor]: ...
def joint_attention_qkv_(
    qkv: Tensor,
    num_heads: int,
    grid: Grid = None,
    *,
    freqs: Tensor | None = None,
    prefix_tokens: int = 1,
    positions: Tensor | None = None,
    interleaved: bool = True,
    scale: float | None = None,
    qkv_bias: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`joint_attention` on the packed projection; consumes it.

    Args:
        qkv: [B, N, 3 * H * D], one tensor and no view (what torch.nn.Linear returns). Rotated in place: do not use it again,
            or the backward pass raises a RuntimeError, as soon as something else has a gradient for it.
        num_heads: H. The rest as for `joint_attention`.
        qkv_bias: [3 * H * D], the bias of the linear layer that made qkv, and in qkv already: given for its gradient alone, the
            column sums of qkv's, which "gluon" makes in float32 as it makes qkv's, where torch would pass over that once more.
            The layer then has none to learn: `F.linear(x, W, b.detach())`, and here `qkv_bias=b`. See `sums_bias`.

    Returns:
        [B, H, N, D], a view of a contiguous [B, N, H, D]: `.transpose(1, 2).flatten(2)` is free. With return_lse as
        `joint_attention`.

    Raises:
        as `joint_attention`; ValueError also if qkv is not contiguous, or requires a gradient and is a leaf or a partial view.

    Source: as `joint_attention`.
    """
    if not isinstance(qkv, Tensor) or not qkv.is_floating_point():
        raise TypeError(f"qkv: expected a floating-point tensor, got {kind(qkv)}")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads!r}")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(f"qkv: expected the shape [B, N, 3 * {num_heads} * D], got {list(qkv.shape)}")
    if qkv_bias is not None:
        _check_bias(qkv_bias, qkv)
    dtype = autocast_dtype(qkv.device.type)
    qkv = qkv.to(dtype) if dtype is not None and qkv.dtype != torch.float64 else qkv
    B, N, width = qkv.shape
    shape = torch.Size((B, num_heads, N, width // (3 * num_heads)))
    rope = (grid, freqs, prefix_tokens, positions, interleaved)
    given = (qkv,) if qkv_bias is None else (qkv, qkv_bias)
    asked = (deterministic, return_lse, _is_transformed(*given), _trains(*given, freqs), backend)
    call = plan(shape, shape, qkv.dtype, qkv.device, rope, None, scale, None, None, *asked)
    bias = qkv_bias if qkv_bias is not None and qkv_bias.requires_grad else None
    base = packed_base("joint_attention_qkv_", qkv, bias is not None) if call.rope else None
    # Dynamo takes no function that changes a view, as a linear layer's output may be, and returns more than that.
    in_place = call.rope and call.backend != "reference" and not call.rotation.learns() and not torch.compiler.is_compiling()
    packed = in_place and call.backend in FUSED and qkv.numel() and call.scale >= 0
    if bias is not None and not packed:
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype)
        base = None if base is None else qkv
    if not in_place:
        # unbind(2): its backward stacks the three gradients straight into the packed layout, one copy.
        q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))
        return _attend(q, k, v, call, return_lse)
    if packed:
        out, lse = attend_packed(qkv, base, num_heads, bias, call)
        return (out, lse) if return_lse else out
    return _attend(*consume(qkv, base, num_heads, call.rotation), call.without_rope(), return_lse)


def sums_bias(x: Tensor, width: int, num_heads: int) -> bool:
    """Whether `joint_attention_qkv_` of a projection to [B, N, 3 * width] of x, [B, N, C], makes qkv_bias's gradient as it
    passes by. Else the linear layer had better make it."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    dtype, needs = (
        autocast_dtype("cuda") or x.dtype,
        needs_of_shape(x.device, width // num_heads, x.shape[1], x.shape[1], torch.is_grad_enabled()),
    )
    return dispatch.pick("joint_attention", x.device, dtype, None, needs) == "gluon"


def _check_bias(qkv_bias, qkv):
    if not isinstance(qkv_bias, Tensor) or not qkv_bias.is_floating_point():
        raise TypeError(f"qkv_bias: expected a floating-point tensor, got {kind(qkv_bias)}")
    if qkv_bias.shape != qkv.shape[2:]:
        raise ValueError(f"qkv_bias: expected the shape [{qkv.shape[2]}] to go with qkv, got {list(qkv_bias.shape)}")
    check_device("qkv_bias", qkv_bias.device, qkv.device, "qkv's")


def _is_transformed(*tensors):
    if torch.compiler.is_compiling() or not tensors[0].is_cuda:  # elsewhere nobody asks
        return False
    return any(is_transformed(x) or keeps_numbers_elsewhere(type(x)) for x in tensors)


def _trains(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them is recorded."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _readable(*qkv):
    return (memory_of("joint_attention", name, x, rows=True) for name, x in zip("qkv", qkv, strict=True))


def _check(q, k, v, packed_clips):
    """q [B, H, N, D] and k, v [B, Hk, M, D], or with packed_clips [N, H, D] and [N, Hk, D]."""
    dims = "[total, H, D]" if packed_clips else "[B, H, N, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind(x)}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a {'nested' if x.is_nested else x.layout} one")
        if x.ndim != (3 if packed_clips else 4):
            raise ValueError(f"{name}: expected the shape {dims}, got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
    H, D, Hk = q.shape[1], q.shape[-1], k.shape[1]
    if D == 0:
        raise ValueError(f"q: expected a head dim of at least 1, got the shape {list(q.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[-1] != D or Hk == 0 or H % Hk:
        wanted = f"[{q.shape[0]}, a divisor of {H}, {D}]" if packed_clips else f"[{q.shape[0]}, a divisor of {H}, M, {D}]"
        raise ValueError(f"k: expected {wanted} to go with q {list(q.shape)}, got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {list(k.shape)}, got {list(v.shape)}")


def _attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionPlan, return_lse: bool) -> Any:
    """[B, H, N, D], or that and the log-sum-exps, of checked q, k and v whose memory can be read; B = 1 for packed clips."""
    fused = call.backend in FUSED and q.numel() and k.numel()
    if call.rope and (not fused or call.rotation.learns()):  # else the kernels turn within their passes
        # owned: nobody but the attention reads what is turned, so its gradients are turned back where they lie.
        if call.k_positions is None:
            q, k = rotate(q, k, call.rotation, owned=True)
        else:
            q, k = rotate(q, None, call.rotation, owned=True)[0], rotate(k, None, call.k_rotation(), owned=True)[0]
        call = call.without_rope()
    lse = None
    if fused:
        out, lse = attend(q, k, v, call)
        return (out, lse) if return_lse else out
    if call.backend == "reference" or return_lse:  # our kernels of empty tensors
        core = lambda q, k, v: attention_reference(q, k, v, call.scale, True)  # noqa: E731
        out, lse = core(q, k, v) if call.cu_seqlens is None else each_clip(core, q, k, v, call.cu_seqlens)
    elif call.cu_seqlens is not None:
        out = sdpa_of_clips(q, k, v, call.cu_seqlens, call.max_seqlen, call.scale)
    else:
        # A branch, since under torch.compile(dynamic=True) a comparison of sizes is no bool.
        grouped: Any = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
        out = gradient_like(scaled_dot_product_attention(q, k, v, scale=call.scale, **grouped))
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # free where the kernel already writes [B, N, H, D]
    return (out, lse) if return_lse else out


def attention_by_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, prefix_tokens: int, interleaved: bool) -> Tensor:
    """joint_attention by cosines and sines that somebody else made, for integrations: no gradient for the table.

    q [B, H, N, D], k and v [B, Hk, N, D] of any dtypes, v's is the result's. table: as `rotate_by_table`, or None.
    """
    if table is not None:
        q, k = (rotate_by_table(x, table, prefix_tokens, interleaved) for x in (q, k))
    return joint_attention(q.to(v.dtype), k.to(v.dtype), v)
