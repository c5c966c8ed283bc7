"""rope3d: rotary embedding of queries and keys at space-time positions, each read and written once.

q, k = rope3d(q, k, grid=(4, 14, 14))            # new tensors, with gradients
rope3d_(q, k, grid=(4, 14, 14))                  # in place, for inference
qkv = rope3d_qkv_(linear(x), 12, (4, 14, 14))    # training in place, on the linear layer's own output
"""

import torch
from torch.autograd.function import once_differentiable

from evaat_fast import _dispatch
from evaat_fast._register import register
from evaat_fast.ops.freqs import cos_sin, joint_freqs, spatial_freqs, split_freqs, table_of

__all__ = ["joint_freqs", "rope3d", "rope3d_", "rope3d_qkv_", "rope3d_reference", "spatial_freqs", "split_freqs"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_POSITIONS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32)


def rope3d_reference(q, k=None, grid=None, *, freqs=None, prefix_tokens=1, positions=None, interleaved=True, inverse=False):
    """The specification: (x, y) -> (x cos a - y sin a, y cos a + x sin a) with a = position . freqs[:, pair]."""
    cos, sin = cos_sin(freqs, positions, grid, prefix_tokens, q.shape[-1], q.device)
    if inverse:
        sin = -sin
    rotated = tuple(_rotate_reference(x, cos, sin, prefix_tokens, interleaved) for x in (q, k) if x is not None)
    return rotated if k is not None else rotated[0]


def _rotate_reference(x, cos, sin, prefix_tokens, interleaved):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    rows = x[:, :, prefix_tokens:].to(wide)
    a, b = (rows[..., 0::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    rows = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((x[:, :, :prefix_tokens], rows.to(x.dtype)), 2)


def _empty(x):
    """For the rotated x [B, H, N, D]: contiguous, or in the memory order [B, N, H, D] where x lies in that order."""
    B, H, N, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, N, H, D)).transpose(1, 2)
    return x.new_empty((B, H, N, D))


def _launch(xs, outs, table, prefix_tokens, interleaved, inverse, backend):
    """Writes the rotated xs, one or two of [B, H, N, D], to outs, which may be the same tensors."""
    if xs[0].numel() == 0:
        return
    if backend == "reference":
        cos, sin = table
        for x, out in zip(xs, outs, strict=True):
            first = prefix_tokens if out is x else 0
            rotated = _rotate_reference(x, cos, -sin if inverse else sin, prefix_tokens, interleaved)
            out[:, :, first:] = rotated[:, :, first:]
    elif backend == "triton":
        from evaat_fast.kernels.rope3d import rotate

        rotate(xs, outs, table, prefix_tokens, interleaved, inverse)
    else:
        from evaat_fast import _cpu

        B, _, N, D = xs[0].shape
        tensors = [
            (x.data_ptr(), out.data_ptr(), x.shape[1], *x.stride()[:3], *out.stride()[:3])
            for x, out in zip(xs, outs, strict=True)
        ]
        cos, stride_b, stride_h = table.data_ptr(), *_shared(table)
        _cpu.rope3d(
            _dispatch.DTYPE_CODE[xs[0].dtype],
            tensors,
            cos,
            cos + 4 * table.stride(0),
            stride_b,
            stride_h,
            B,
            N,
            D,
            prefix_tokens,
            interleaved,
            inverse,
            torch.get_num_threads(),
        )


def _shared(table):
    """Strides of a table's clips and heads, 0 where there is one for all."""
    return tuple(table.stride(i) if table.shape[i] > 1 else 0 for i in (1, 2))


_SETTINGS = "Tensor? freqs, Tensor? positions, SymInt[] grid, SymInt prefix_tokens, bool interleaved, bool inverse, str backend"


@register(f"rope3d(Tensor[] x, {_SETTINGS}) -> Tensor[]", lambda xs, *settings: [_empty(x) for x in xs])
def _rotate(xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    table = table_of(freqs, positions, grid, prefix_tokens, xs[0].shape[3], xs[0].device)
    outs = [_empty(x) for x in xs]
    _launch(xs, outs, table, prefix_tokens, interleaved, inverse, backend)
    return outs


@register(f"rope3d_(Tensor(a!)[] x, {_SETTINGS}) -> ()", lambda *arguments: None)
def _rotate_(xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    table = table_of(freqs, positions, grid, prefix_tokens, xs[0].shape[3], xs[0].device)
    _launch(xs, xs, table, prefix_tokens, interleaved, inverse, backend)
    for x in xs:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _split(qkv, num_heads):
    """[B, N, 3*H*D] -> a view [B, 3*H, N, D] of it."""
    B, N, width = qkv.shape
    return qkv.view(B, N, 3 * num_heads, width // (3 * num_heads)).transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """A rotation's transpose is its inverse, so the backward pass needs the positions only."""

    @staticmethod
    def forward(q, k, *settings):
        return tuple(_rotate([q] if k is None else [q, k], *settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, freqs, positions, *ctx.settings = inputs
        ctx.save_for_backward(freqs, positions)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        freqs, positions = ctx.saved_tensors
        grid, prefix_tokens, interleaved, inverse, backend = ctx.settings
        rows = [_rows(g) for g in grads if g is not None]
        if rows:
            rows = _rotate(rows, freqs, positions, grid, prefix_tokens, interleaved, not inverse, backend)
        rows = iter(rows)
        grads = [None if g is None else next(rows) for g in grads] + [None] * (2 - len(grads))
        return *grads, *[None] * 7


def _rows(x):
    return x if x.stride(3) == 1 else x.contiguous()


@register(f"rope3d_qkv_(Tensor(a!) qkv, SymInt num_heads, {_SETTINGS}) -> ()", lambda qkv, num_heads, *settings: None)
def _rotate_qkv_(qkv, num_heads, *settings):
    q, k, _ = _split(qkv, num_heads).chunk(3, 1)
    _rotate_([q, k], *settings)


@register(
    f"rope3d_qkv(Tensor qkv, SymInt num_heads, {_SETTINGS}) -> Tensor",
    lambda qkv, num_heads, *settings: qkv.new_empty(qkv.shape),
)
def _rotate_qkv(qkv, num_heads, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    out = qkv.new_empty(qkv.shape)
    q, k, v = _split(qkv, num_heads).chunk(3, 1)
    new_q, new_k, new_v = _split(out, num_heads).chunk(3, 1)
    table = table_of(freqs, positions, grid, prefix_tokens, q.shape[3], q.device)
    _launch([q, k], [new_q, new_k], table, prefix_tokens, interleaved, inverse, backend)
    new_v.copy_(v)
    return out


class _RotateQKV(torch.autograd.Function):
    """In place forward; the backward pass writes a new gradient, since the one it is given may have other readers."""

    @staticmethod
    def forward(qkv, shape, num_heads, *settings):
        _rotate_qkv_(qkv.view(shape), num_heads, *settings)
        return qkv

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, ctx.shape, ctx.num_heads, freqs, positions, *ctx.settings = inputs
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(freqs, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        freqs, positions = ctx.saved_tensors
        grid, prefix_tokens, interleaved, inverse, backend = ctx.settings
        settings = (freqs, positions, grid, prefix_tokens, interleaved, not inverse, backend)
        rotated = _rotate_qkv(grad.contiguous().view(ctx.shape), ctx.num_heads, *settings)
        return rotated.view(grad.shape), *[None] * 9


def rope3d(q, k=None, grid=None, *, freqs=None, prefix_tokens=1, positions=None, interleaved=True, inverse=False, backend=None):
    """Rotates queries and keys by their tokens' positions in space and time.

    Each channel pair (x, y) of a token at position p becomes (x cos a - y sin a, y cos a + x sin a) with
    a = p . freqs[:, pair], computed in float32 (float64 for float64) and rounded once. The inputs are never written to.

    Args:
        q: [B, Hq, N, D] float32, bfloat16, float16 or (reference only) float64; D even, 2 to 256. Any strides: with a
            contiguous last dimension it is read in place, so views of a packed qkv cost no copy.
        k: [B, Hk, N, D] of q's dtype and device, or None. Hk may differ from Hq.
        grid: (T, Hp, Wp); the tokens after the prefix are its cells in row-major order, N = prefix_tokens + T*Hp*Wp.
        freqs: float32 [3, D/2], or [Hq, 3, D/2] per head (then Hk = Hq); None: `joint_freqs(D)`. A gradient for freqs
            is computed by the reference only, which "auto" then chooses.
        prefix_tokens: number of leading tokens that are not rotated (the class token).
        positions: [N, 3] or [B, N, 3], integers or float32, instead of grid; the prefix tokens' rows are ignored.
        interleaved: pairs are channels (2c, 2c + 1), as in EVA-02; False: (c, c + D/2), as in GPT-NeoX.
        inverse: rotates by the opposite angles.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        q alone if k is None, else (q, k): new tensors, contiguous, or in the memory order [B, N, H, D] where the input
        lies in that order (the reference's are always contiguous).

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.
        NotImplementedError: freqs requires a gradient and another backend than the reference was asked for; vmap.

    Source: EVA02-AT (arXiv 2506.14356), section 3.2; RoFormer (arXiv 2104.09864).
    """
    grid = _check(q, k, grid, freqs, prefix_tokens, positions)
    backend = _backend(q, freqs, backend)
    if backend == "reference":
        grid = grid or None
        options = dict(freqs=freqs, prefix_tokens=prefix_tokens, positions=positions, interleaved=interleaved)
        return rope3d_reference(q, k, grid, **options, inverse=inverse)
    q, k = _rows(q), k if k is None else _rows(k)
    settings = (freqs, positions, grid, prefix_tokens, interleaved, inverse, backend)
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        out = _Rotate.apply(q, k, *settings)
    else:
        out = _rotate([q] if k is None else [q, k], *settings)
    return out[0] if k is None else (out[0], out[1])


def rope3d_(
    q, k=None, grid=None, *, freqs=None, prefix_tokens=1, positions=None, interleaved=True, inverse=False, backend=None
):
    """`rope3d` in place, for q and k that need no gradient; prefix tokens are not touched.

    Args:
        as `rope3d`; q and k must have a contiguous last dimension and no two elements at one address.

    Returns:
        q, or (q, k): the tensors given.

    Raises:
        as `rope3d`; ValueError also if q, k or freqs requires a gradient, or if memory overlaps.
    """
    grid = _check(q, k, grid, freqs, prefix_tokens, positions)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("freqs", freqs)):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name}: requires a gradient, and rope3d_ computes none; use rope3d_qkv_ (in place on the packed "
                    "tensor), rope3d, or torch.no_grad()"
                )
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.stride(3) != 1:
            raise ValueError(f"{name}: in place needs a contiguous last dimension, got strides {list(x.stride())}")
        if x is not None and _overlaps(x):
            raise ValueError(f"{name}: in place needs memory of its own for every element, got strides {list(x.stride())}")
    if k is not None and (k is q or _same_memory(q, k)):
        raise ValueError("k: shares its memory with q, so that in place it would be rotated twice")
    settings = (freqs, positions, grid, prefix_tokens, interleaved, inverse, _backend(q, freqs, backend))
    _rotate_([q] if k is None else [q, k], *settings)
    return q if k is None else (q, k)


def rope3d_qkv_(
    qkv,
    num_heads,
    grid=None,
    *,
    freqs=None,
    prefix_tokens=1,
    positions=None,
    interleaved=True,
    inverse=False,
    backend=None,
):
    """Rotates the queries and keys of a packed projection in place, also in training.

    A linear layer's backward pass does not need its output, so nothing is kept twice, and autograd sees one in-place
    operation. Use the tensor that is returned.

    Args:
        qkv: contiguous [B, N, 3 * num_heads * D], columns in the order (q, k, v), (head), (channel). Where a gradient
            flows it must be a linear layer's own output: no leaf, and no view of a part of another tensor.
        num_heads: H, of q and k alike.
        others: as `rope3d`.

    Returns:
        qkv, its q and k parts rotated. (Where autograd sees qkv as a reshape, as `torch.nn.Linear` with a bias returns
        it, a new reshape of the same memory.)

    Raises:
        as `rope3d`; ValueError also if qkv is not contiguous, or requires a gradient and is a leaf or a partial view.
    """
    if not isinstance(qkv, torch.Tensor) or qkv.ndim != 3:
        raise _wrong("qkv", "a tensor [B, N, 3 * num_heads * D]", qkv)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"num_heads: expected a positive int such that 3 * num_heads divides {qkv.shape[2]}, got {num_heads!r}"
        )
    if not qkv.is_contiguous():
        raise ValueError(f"qkv: expected a contiguous tensor, got strides {list(qkv.stride())}")
    q = _split(qkv.detach(), num_heads)[:, :num_heads]
    grid = _check(q, None, grid, freqs, prefix_tokens, positions)
    settings = (freqs, positions, grid, prefix_tokens, interleaved, inverse, _backend(q, freqs, backend))
    if not torch.is_grad_enabled() or not (qkv.requires_grad or (freqs is not None and freqs.requires_grad)):
        _rotate_qkv_(qkv, num_heads, *settings)
        return qkv
    if qkv.is_leaf and qkv.requires_grad:
        raise ValueError("qkv: a leaf that requires a gradient cannot be changed in place; use rope3d")
    if freqs is not None and freqs.requires_grad:
        q, k, v = _split(qkv.clone(), num_heads).chunk(3, 1)
        options = dict(freqs=freqs, prefix_tokens=prefix_tokens, positions=positions, interleaved=interleaved)
        q, k = rope3d_reference(q, k, grid or None, **options, inverse=inverse)
        return qkv.copy_(torch.cat((q, k, v), 1).transpose(1, 2).flatten(2))
    if torch.compiler.is_compiling() or not qkv._is_view():
        return _RotateQKV.apply(qkv, qkv.shape, num_heads, *settings)
    base = qkv._base
    if base.numel() != qkv.numel() or not base.is_contiguous():
        raise ValueError(
            f"qkv: is a view of a part of a tensor {list(base.shape)}, for which autograd would copy whole gradients; "
            "pass the linear layer's own output, or use rope3d"
        )
    # Changing the base replaces one node of the graph; changing the view would copy the gradient three times.
    return _RotateQKV.apply(base, qkv.shape, num_heads, *settings).view(qkv.shape)


def _wrong(name, expected, got):
    kind = TypeError if not isinstance(got, torch.Tensor) else ValueError
    shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
    return kind(f"{name}: expected {expected}, got {shown}")


def _check(q, k, grid, freqs, prefix_tokens, positions):
    """Every check of the arguments; returns the grid as a list, empty where positions are given."""
    for name, x in (("q", q), ("k", k)) if k is not None else (("q", q),):
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            raise _wrong(name, "a tensor [B, H, N, D]", x)
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


def _backend(q, freqs, backend):
    """The backend that serves the call; only the reference computes a gradient for freqs."""
    chosen = _dispatch.pick("rope3d", q, backend)
    if chosen == "cpu" and not q.is_cpu:
        raise RuntimeError(f"rope3d: backend 'cpu' was asked for but cannot serve this call: q is on {q.device}")
    if chosen != "reference" and freqs is not None and freqs.requires_grad and torch.is_grad_enabled():
        if backend not in (None, "auto") or (backend is None and _dispatch._DEFAULT.get("rope3d")):
            raise _dispatch.not_built(
                f"rope3d: the gradient of freqs on backend {chosen!r}", 'use backend="reference" or "auto"'
            )
        return "reference"
    return chosen


def _same_memory(q, k):
    if torch.compiler.is_compiling():
        return False
    return q.storage_offset() == k.storage_offset() and q.numel() > 0 and torch._C._is_alias_of(q, k)


def _overlaps(x):
    """Whether two elements of x may lie at one address."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end = (size - 1) * stride + end
    return False
