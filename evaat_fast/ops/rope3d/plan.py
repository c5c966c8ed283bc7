"""What the public functions of rope3d accept: every check of their arguments, and the errors."""

import reprlib

import torch

from evaat_fast.ops._core.tensor import memory_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_POSITIONS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32)


def wrong(name, expected, got):
    kind = TypeError if not isinstance(got, torch.Tensor) else ValueError
    shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, torch.Tensor) else reprlib.repr(got)
    return kind(f"{name}: expected {expected}, got {shown}")


def readable(**tensors):
    """The arguments in memory that a kernel can read; what is no tensor is left to `check`."""
    return [memory_of("rope3d", n, x) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()]


def flags(**values):
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    return values.values()


def writable(name, x):
    if isinstance(x, torch.Tensor) and memory_of("rope3d", name, x) is not x:
        raise ValueError(f"{name}: in place needs a tensor with memory of its own, got a lazily negated or zero one")


def check(q, k, grid, freqs, prefix_tokens, positions):
    """Every check of the arguments; returns the grid as a list, empty where positions are given."""
    for name, x in (("q", q), ("k", k)) if k is not None else (("q", q),):
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            raise wrong(name, "a tensor [B, H, N, D]", x)
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
    check_place(grid, prefix_tokens, positions)
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
    T, Hp, Wp = check_grid(grid)
    if N != prefix_tokens + T * Hp * Wp:
        raise ValueError(
            f"grid: {T} x {Hp} x {Wp} cells and prefix_tokens={prefix_tokens} make {prefix_tokens + T * Hp * Wp} "
            f"tokens, but q has N = {N}"
        )
    return [T, Hp, Wp]


def check_place(grid, prefix_tokens, positions):
    if not isinstance(prefix_tokens, (int, torch.SymInt)) or isinstance(prefix_tokens, bool) or prefix_tokens < 0:
        raise ValueError(f"prefix_tokens: expected an int >= 0, got {prefix_tokens!r}")
    if (grid is None) == (positions is None):
        raise ValueError(f"grid, positions: expected exactly one of the two, got {'neither' if grid is None else 'both'}")


def check_grid(grid):
    try:
        T, Hp, Wp = grid
    except (TypeError, ValueError):
        raise ValueError(f"grid: expected three positive ints (T, Hp, Wp), got {grid!r}") from None
    if not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 1 for n in (T, Hp, Wp)):
        raise ValueError(f"grid: expected three positive ints (T, Hp, Wp), got {grid!r}")
    return T, Hp, Wp


def share_memory(q, k):
    """Whether an element of q and one of k may lie at one address. Views of one packed tensor are told apart exactly."""
    if torch.compiler.is_compiling() or q.numel() == 0 or k.numel() == 0 or not torch._C._is_alias_of(q, k):
        return False
    reach = [sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) for x in (q, k)]
    apart = k.storage_offset() - q.storage_offset()
    if apart > reach[0] or -apart > reach[1]:
        return False
    steps = []
    for i in range(4):
        if q.shape[i] > 1 or k.shape[i] > 1:
            strides = {x.stride(i) for x in (q, k) if x.shape[i] > 1}
            if len(strides) > 1:
                return True
            steps.append((strides.pop(), q.shape[i], k.shape[i]))
    return _reachable(apart, sorted(steps, reverse=True))


def _reachable(apart, steps):
    """Whether sum(stride * (i_q - i_k)) = apart for some indices; steps: (stride, size in q, size in k), largest first."""
    if not steps:
        return apart == 0
    stride, q_size, k_size = steps[0]
    if stride == 0:
        return _reachable(apart, steps[1:])
    near = apart // stride
    return any(-k_size < d < q_size and _reachable(apart - d * stride, steps[1:]) for d in (near, near + 1))


def overlaps(x):
    """Whether two elements of x may lie at one address."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end = (size - 1) * stride + end
    return False
