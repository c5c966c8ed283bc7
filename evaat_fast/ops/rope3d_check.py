"""What the public functions of rope3d accept: every check of their arguments, and the errors."""

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_POSITIONS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32)


def wrong(name, expected, got):
    kind = TypeError if not isinstance(got, torch.Tensor) else ValueError
    shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
    return kind(f"{name}: expected {expected}, got {shown}")


def check(q, k, grid, freqs, prefix_tokens, positions):
    """Every check of the arguments; returns the grid as a list, empty where positions are given."""
    for name, x in (("q", q), ("k", k)) if k is not None else (("q", q),):
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            raise wrong(name, "a tensor [B, H, N, D]", x)
        if _is_batched(x):
            raise NotImplementedError(f"{name}: rope3d has no vmap rule; put the batch into dimension 0")
    if q.dtype not in _FLOATS:
        raise TypeError(f"q: expected float32, bfloat16, float16 or float64, got {q.dtype}")
    B, Hq, N, D = q.shape
    if D % 2 or not 2 <= D <= 256:
        raise ValueError(f"q: expected an even head dim from 2 to 256, got {D}")
    if k is not None:
        if k.dtype != q.dtype:
            raise TypeError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
        if k.device != q.device:
            raise ValueError(f"k: expected q's device {q.device}, got {k.device}")
        if k.shape[0] != B or k.shape[2] != N or k.shape[3] != D:
            raise ValueError(f"k: expected the shape [{B}, Hk, {N}, {D}], got {list(k.shape)}")
    if not isinstance(prefix_tokens, (int, torch.SymInt)) or isinstance(prefix_tokens, bool) or prefix_tokens < 0:
        raise ValueError(f"prefix_tokens: expected an int >= 0, got {prefix_tokens!r}")
    if (grid is None) == (positions is None):
        raise ValueError(f"grid, positions: expected exactly one of the two, got {'neither' if grid is None else 'both'}")
    if freqs is None:
        if D % 4:
            raise ValueError(f"freqs: the default, joint_freqs, needs a head dim that is a multiple of 4, got {D}")
    else:
        if not isinstance(freqs, torch.Tensor) or freqs.dtype != torch.float32:
            got = freqs.dtype if isinstance(freqs, torch.Tensor) else type(freqs).__name__
            raise TypeError(f"freqs: expected a float32 tensor, got {got}")
        if freqs.shape != (3, D // 2) and freqs.shape != (Hq, 3, D // 2):
            raise ValueError(f"freqs: expected the shape [3, {D // 2}] or [{Hq}, 3, {D // 2}], got {list(freqs.shape)}")
        if freqs.ndim == 3 and k is not None and k.shape[1] != Hq:
            raise ValueError(f"k: expected {Hq} heads, as freqs are per head, got {k.shape[1]}")
        if freqs.device != q.device:
            raise ValueError(f"freqs: expected q's device {q.device}, got {freqs.device}")
    if positions is not None:
        if not isinstance(positions, torch.Tensor) or positions.dtype not in _POSITIONS:
            got = positions.dtype if isinstance(positions, torch.Tensor) else type(positions).__name__
            raise TypeError(f"positions: expected a tensor of integers or float32, got {got}")
        if positions.shape != (N, 3) and positions.shape != (B, N, 3):
            raise ValueError(f"positions: expected the shape [{N}, 3] or [{B}, {N}, 3], got {list(positions.shape)}")
        if positions.device != q.device:
            raise ValueError(f"positions: expected q's device {q.device}, got {positions.device}")
        if prefix_tokens > N:
            raise ValueError(f"prefix_tokens: expected at most N = {N}, got {prefix_tokens}")
        return []
    try:
        T, Hp, Wp = grid
    except (TypeError, ValueError):
        raise ValueError(f"grid: expected three positive ints (T, Hp, Wp), got {grid!r}") from None
    if not all(isinstance(n, (int, torch.SymInt)) and n >= 1 for n in (T, Hp, Wp)):
        raise ValueError(f"grid: expected three positive ints (T, Hp, Wp), got {grid!r}")
    if N != prefix_tokens + T * Hp * Wp:
        raise ValueError(
            f"grid: {T} x {Hp} x {Wp} cells and prefix_tokens={prefix_tokens} make {prefix_tokens + T * Hp * Wp} "
            f"tokens, but q has N = {N}"
        )
    return [T, Hp, Wp]


# A private name, hence the getattr: without it a batched tensor fails further down, with a less clear error.
_is_batched = getattr(torch._C._functorch, "is_batchedtensor", lambda x: False)


def same_memory(q, k):
    if torch.compiler.is_compiling():
        return False
    return q.storage_offset() == k.storage_offset() and q.numel() > 0 and torch._C._is_alias_of(q, k)


def overlaps(x):
    """Whether two elements of x may lie at one address."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end = (size - 1) * stride + end
    return False
