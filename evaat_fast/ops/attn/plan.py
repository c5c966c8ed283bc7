"""What joint_attention and its packed form accept: every check of their arguments, and the errors."""

import torch

from evaat_fast.ops._core import dispatch as _dispatch
from evaat_fast.ops.rope3d.plan import check, check_grid, check_place, flags, readable

TRITON = ("triton", "triton_onepass")
_MOST_HEAD_DIM = 128  # of evaat_fast.kernels.attn.forward


def check_qkv(q, k, v, packed_clips):
    """q [B, H, N, D] and k, v [B, Hk, M, D], or with packed_clips [N, H, D] and [N, Hk, D]."""
    dims = "[total, H, D]" if packed_clips else "[B, H, N, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
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


def check_clips(cu_seqlens, max_seqlen, total, device):
    """The limits of packed clips; their values on the CPU only, as reading them from a GPU would wait for it."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen: given without cu_seqlens")
        return
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {got}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected the shape [clips + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected q's device {device}, got {cu_seqlens.device}")
    if max_seqlen is not None and (not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool)):
        raise TypeError(f"max_seqlen: expected an int, got {max_seqlen!r}")
    if torch.compiler.is_compiling() or type(cu_seqlens) is not torch.Tensor or not cu_seqlens.is_cpu:
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (lengths < 0).any():
        shown = cu_seqlens.tolist() if len(cu_seqlens) <= 8 else [*cu_seqlens[:4].tolist(), "...", int(cu_seqlens[-1])]
        raise ValueError(f"cu_seqlens: expected to rise from 0 to q's {total} tokens, got {shown}")
    if max_seqlen is not None and len(lengths) and lengths.max() > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest clip, {int(lengths.max())}, got {max_seqlen}")


def check_clip_positions(q, cu_seqlens, grid, freqs, prefix_tokens, positions, k_positions):
    """Of packed clips q [total, H, D]; the rest is checked with the positions that are made of these."""
    check_place(grid, prefix_tokens, positions)
    if grid is None:
        check(q.transpose(0, 1)[None], None, None, freqs, 0, positions)
        if k_positions is not None:
            of_keys(lambda: check(q.transpose(0, 1)[None], None, None, freqs, 0, k_positions))
        return
    T, Hp, Wp = check_grid(grid)
    if torch.compiler.is_compiling() or type(cu_seqlens) is not torch.Tensor or not cu_seqlens.is_cpu:
        return
    longest = max(cu_seqlens.diff().tolist(), default=0)
    if longest > prefix_tokens + T * Hp * Wp:
        raise ValueError(
            f"grid: {T} x {Hp} x {Wp} cells and prefix_tokens={prefix_tokens} make {prefix_tokens + T * Hp * Wp} tokens, "
            f"but the longest clip has {longest}"
        )


def check_rotation(q, k, grid, freqs, prefix_tokens, positions, k_positions, interleaved):
    """What the attention operators take, with the checks of `rope3d`."""
    q, k, freqs, positions = readable(q=q, k=k, freqs=freqs, positions=positions)
    interleaved, _ = flags(interleaved=interleaved, inverse=False)
    if k_positions is not None:
        (k_positions,) = of_keys(lambda: readable(positions=k_positions))
        of_keys(lambda: check(k, None, None, freqs, prefix_tokens, k_positions))
    grid = check(q, k if k_positions is None else None, grid, freqs, prefix_tokens, positions)
    return freqs, positions, k_positions, grid, prefix_tokens, interleaved, True


def of_keys(function):
    """function(), whose errors about positions are about k_positions."""
    try:
        return function()
    except (TypeError, ValueError) as error:
        raise type(error)(f"k_{error}" if str(error).startswith("positions:") else str(error)) from None


def check_packed(qkv, num_heads):
    if not isinstance(qkv, torch.Tensor) or not qkv.is_floating_point():
        raise TypeError(f"qkv: expected a floating-point tensor, got {getattr(qkv, 'dtype', type(qkv).__name__)}")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise ValueError(f"num_heads: expected a positive int, got {num_heads!r}")
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] == 0:
        raise ValueError(f"qkv: expected the shape [B, N, 3 * {num_heads} * D], got {list(qkv.shape)}")


def pick(x, backend, return_lse, deterministic, head_dim):
    """The backend, if it can do what is asked."""
    # Torch's attention on CUDA is deterministic where torch is told to be, not call by call.
    loose = deterministic and x.is_cuda and not torch.are_deterministic_algorithms_enabled()
    auto, backend = _dispatch.is_auto("joint_attention", backend), _dispatch.pick("joint_attention", x, backend)
    if auto and backend == "sdpa" and (return_lse or loose):
        # For these there is no fast attention that Triton's would have to beat first.
        fits = (
            x.is_cuda and head_dim <= _MOST_HEAD_DIM and _dispatch.unusable("joint_attention", "triton", True, x.dtype) is None
        )
        return "triton" if fits else "reference"
    if backend in TRITON and head_dim > _MOST_HEAD_DIM:
        raise _dispatch.BackendError(f"joint_attention: {backend} takes head dims up to {_MOST_HEAD_DIM}, not {head_dim}")
    if return_lse and backend == "sdpa":
        raise _dispatch.BackendError("joint_attention: sdpa returns no log-sum-exps; triton and the reference do")
    if deterministic and backend == "triton_onepass":
        raise ValueError("deterministic: expected False for backend 'triton_onepass', whose sums have no fixed order, got True")
    if loose and backend == "sdpa":
        raise _dispatch.BackendError(
            "joint_attention: on CUDA sdpa is deterministic only under torch.use_deterministic_algorithms(True)"
        )
    return backend
