"""rope3d: rotary embedding of queries and keys at space-time positions, each read and written once.

q, k = rope3d(q, k, grid=(4, 14, 14))            # new tensors, with gradients
rope3d_(q, k, grid=(4, 14, 14))                  # in place, for inference
qkv = rope3d_qkv_(linear(x), 12, (4, 14, 14))    # training in place, on the linear layer's own output
"""

import torch
from torch.autograd.function import once_differentiable

from evaat_fast.ops._core import dispatch as _dispatch
from evaat_fast.ops._core.register import register
from evaat_fast.ops.rope3d.freqs import cos_sin, joint_freqs, rows_of, spatial_freqs, split_freqs, table_of
from evaat_fast.ops.rope3d.launch import empty, launch, launch_freqs
from evaat_fast.ops.rope3d.plan import check, flags, overlaps, readable, share_memory, writable, wrong

__all__ = ["joint_freqs", "rope3d", "rope3d_", "rope3d_qkv_", "rope3d_reference", "spatial_freqs", "split_freqs"]


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


def _launch(xs, outs, table, prefix_tokens, interleaved, inverse, backend):
    """Writes the rotated xs, one or two of [B, H, N, D], to outs, which may be the same tensors."""
    if backend != "reference":
        return launch(xs, outs, table, prefix_tokens, interleaved, inverse, backend)
    cos, sin = table
    for x, out in zip(xs, outs, strict=True):
        first = prefix_tokens if out is x else 0
        out[:, :, first:] = _rotate_reference(x, cos, -sin if inverse else sin, prefix_tokens, interleaved)[:, :, first:]


_SETTINGS = "Tensor? freqs, Tensor? positions, SymInt[] grid, SymInt prefix_tokens, bool interleaved, bool inverse, str backend"


@register(f"rope3d(Tensor[] x, {_SETTINGS}) -> Tensor[]", lambda xs, *settings: [empty(x) for x in xs])
def _rotate(xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    table = table_of(freqs, positions, grid, prefix_tokens, xs[0].shape[3], xs[0].device, backend)
    outs = [empty(x) for x in xs]
    _launch(xs, outs, table, prefix_tokens, interleaved, inverse, backend)
    return outs


@register(f"rope3d_(Tensor(a!)[] x, {_SETTINGS}) -> ()", lambda *arguments: None)
def _rotate_(xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    table = table_of(freqs, positions, grid, prefix_tokens, xs[0].shape[3], xs[0].device, backend)
    _launch(xs, xs, table, prefix_tokens, interleaved, inverse, backend)
    for x in xs:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _freqs_fake(grads, xs, freqs, *settings):
    return [empty(g) for g in grads], freqs.new_empty(freqs.shape)


@register(f"rope3d_freqs(Tensor[] grad, Tensor[] x, {_SETTINGS}) -> (Tensor[], Tensor)", _freqs_fake)
def _rotate_freqs(grads, xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    outs = [empty(g) for g in grads]
    return outs, _freqs_gradient(grads, outs, xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend)


def _freqs_gradient(grads, outs, xs, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    if prefix_tokens == xs[0].shape[2] or all(x.numel() == 0 for x in xs):
        for out, grad in zip(outs, grads, strict=True):
            out.copy_(grad)
        return torch.zeros_like(freqs)
    table = table_of(freqs, positions, grid, prefix_tokens, xs[0].shape[3], xs[0].device, backend, torch.float64)
    rows = rows_of(positions, grid, prefix_tokens, xs[0].device)
    return launch_freqs(grads, outs, xs, table, rows, prefix_tokens, interleaved, inverse, backend).view(freqs.shape)


def split_heads(qkv, num_heads):
    """[B, N, 3*H*D] -> a view [B, 3*H, N, D] of it."""
    B, N, width = qkv.shape
    return qkv.view(B, N, 3 * num_heads, width // (3 * num_heads)).transpose(1, 2)


class _Rotate(torch.autograd.Function):
    """A rotation's transpose is its inverse: only the gradient of freqs needs more than the positions."""

    @staticmethod
    def forward(q, k, *settings):
        *settings, _ = settings
        return tuple(_rotate([q] if k is None else [q, k], *settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, freqs, positions, *ctx.settings, ctx.owned = inputs
        saved = (q, k) if freqs is not None and freqs.requires_grad else (None, None)
        ctx.save_for_backward(freqs, positions, *saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        freqs, positions, *saved = ctx.saved_tensors
        grid, prefix_tokens, interleaved, inverse, backend = ctx.settings
        settings = (freqs, positions, grid, prefix_tokens, interleaved, not inverse, backend)
        given = [i for i, g in enumerate(grads) if g is not None]
        rows, of_freqs = [_rows(grads[i]) for i in given], None
        if rows and ctx.needs_input_grad[2]:
            rows, of_freqs = _rotate_freqs(rows, [saved[i] for i in given], *settings)
        elif rows and ctx.owned and not torch.compiler.is_compiling() and not any(map(overlaps, rows)):
            _rotate_(rows, *settings)
        elif rows:
            rows = _rotate(rows, *settings)
        rows = dict(zip(given, rows, strict=True))
        return rows.get(0), rows.get(1), of_freqs, *[None] * 7


def _rows(x):
    return x if x.stride(3) == 1 else x.contiguous()


@register(f"rope3d_qkv_(Tensor(a!) qkv, SymInt num_heads, {_SETTINGS}) -> ()", lambda qkv, num_heads, *settings: None)
def rotate_qkv_(qkv, num_heads, *settings):
    q, k, _ = split_heads(qkv, num_heads).chunk(3, 1)
    _rotate_([q, k], *settings)


def _packed(q, *others):
    B, H, N, D = q.shape
    return q.new_empty((B, N, 3 * H * D))


@register(f"rope3d_qkv(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> Tensor", _packed)
def rotate_to_qkv(q, k, v, freqs, positions, grid, prefix_tokens, interleaved, inverse, backend):
    """[B, N, 3*H*D] of the rotated q and k and of v, [B, H, N, D] each."""
    out = _packed(q)
    new_q, new_k, new_v = split_heads(out, q.shape[1]).chunk(3, 1)
    table = table_of(freqs, positions, grid, prefix_tokens, q.shape[3], q.device, backend)
    _launch([_rows(q), _rows(k)], [new_q, new_k], table, prefix_tokens, interleaved, inverse, backend)
    new_v.copy_(v)
    return out


@register(
    f"rope3d_qkv_freqs(Tensor grad, Tensor x, SymInt num_heads, {_SETTINGS}) -> (Tensor, Tensor)",
    lambda grad, x, num_heads, freqs, *settings: (grad.new_empty(grad.shape), freqs.new_empty(freqs.shape)),
)
def _rotate_qkv_freqs(grad, x, num_heads, *settings):
    out = grad.new_empty(grad.shape)
    dq, dk, dv = split_heads(grad, num_heads).chunk(3, 1)
    new_q, new_k, new_v = split_heads(out, num_heads).chunk(3, 1)
    new_v.copy_(dv)
    q, k = x.unflatten(2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return out, _freqs_gradient([dq, dk], [new_q, new_k], [q, k], *settings)


class _RotateQKV(torch.autograd.Function):
    """In place forward; the backward pass writes a new gradient, since the one it is given may have other readers."""

    @staticmethod
    def forward(qkv, saved, shape, num_heads, *settings):
        rotate_qkv_(qkv.view(shape), num_heads, *settings)
        return qkv

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, saved, ctx.shape, ctx.num_heads, freqs, positions, *ctx.settings = inputs
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(freqs, positions, saved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        freqs, positions, saved = ctx.saved_tensors
        grid, prefix_tokens, interleaved, inverse, backend = ctx.settings
        settings = (freqs, positions, grid, prefix_tokens, interleaved, not inverse, backend)
        packed, of_freqs = grad.contiguous().view(ctx.shape), None
        if ctx.needs_input_grad[4]:
            rotated, of_freqs = _rotate_qkv_freqs(packed, saved, ctx.num_heads, *settings)
        else:
            rotated = rotate_to_qkv(*split_heads(packed, ctx.num_heads).chunk(3, 1), *settings)
        return rotated.view(grad.shape), None, None, None, of_freqs, *[None] * 6


@register(
    "rope3d_table(Tensor x, Tensor table, SymInt prefix_tokens, bool interleaved, bool inverse, str backend) -> Tensor",
    lambda x, *settings: empty(x),
)
def _rotate_table(x, table, *settings):
    out = empty(x)
    _launch([x], [out], table, *settings)
    return out


class _RotateByTable(torch.autograd.Function):
    @staticmethod
    def forward(x, table, *settings):
        prefix_tokens, interleaved, backend = settings
        return _rotate_table(x, table, prefix_tokens, interleaved, False, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, table, *ctx.settings = inputs
        ctx.save_for_backward(table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        prefix_tokens, interleaved, backend = ctx.settings
        return _rotate_table(_rows(grad), *ctx.saved_tensors, prefix_tokens, interleaved, True, backend), None, None, None, None


def rotate_by_table(x, table, prefix_tokens, interleaved):
    """rope3d by cosines and sines that somebody else made, for integrations: no check, and no gradient for the table.

    x: [B, H, N, D]. table: float32 [2, 1 or B, 1 or H, N - prefix_tokens, D/2], contiguous: cosines, then sines.
    """
    backend = _dispatch.pick("rope3d", x)
    if backend == "reference":
        return _rotate_reference(x, *table, prefix_tokens, interleaved)
    return _RotateByTable.apply(_rows(x), table, prefix_tokens, interleaved, backend)


def rope3d(q, k=None, grid=None, *, freqs=None, prefix_tokens=1, positions=None, interleaved=True, inverse=False, backend=None):
    """Rotates queries and keys by their tokens' positions in space and time.

    Each channel pair (x, y) of a token at position p becomes (x cos a - y sin a, y cos a + x sin a) with
    a = p . freqs[:, pair], computed in float32 (float64 for float64) and rounded once. The inputs are never written to.

    Args:
        q: [B, Hq, N, D] float32, bfloat16, float16 or (reference only) float64; D even, 2 to 256. Any strides: with a
            contiguous last dimension it is read in place, so views of a packed qkv cost no copy.
        k: [B, Hk, N, D] of q's dtype and device, or None. Hk may differ from Hq.
        grid: (T, Hp, Wp); the tokens after the prefix are its cells in row-major order, N = prefix_tokens + T*Hp*Wp.
        freqs: float32 [3, D/2], or [Hq, 3, D/2] per head (then Hk = Hq); None: `joint_freqs(D)`. Learnable: where freqs
            requires a gradient, the backward pass sums it in the same order on every run.
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
        NotImplementedError: vmap.

    Source: EVA02-AT (arXiv 2506.14356), section 3.2; RoFormer (arXiv 2104.09864).
    """
    return turned(q, k, grid, freqs, prefix_tokens, positions, interleaved, inverse, backend, False)


def turned(q, k, grid, freqs, prefix_tokens, positions, interleaved, inverse, backend, owned):
    """`rope3d`; owned: the gradients of what is returned have no other reader, so the backward pass turns them in place."""
    q, k, freqs, positions = readable(q=q, k=k, freqs=freqs, positions=positions)
    interleaved, inverse = flags(interleaved=interleaved, inverse=inverse)
    grid = check(q, k, grid, freqs, prefix_tokens, positions)
    backend = _backend(q, positions, backend)
    if backend == "reference":
        grid = grid or None
        options = dict(freqs=freqs, prefix_tokens=prefix_tokens, positions=positions, interleaved=interleaved)
        return rope3d_reference(q, k, grid, **options, inverse=inverse)
    q, k = _rows(q), k if k is None else _rows(k)
    settings = (freqs, positions, grid, prefix_tokens, interleaved, inverse, backend)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, freqs)):
        # Dynamo takes no tensor twice.
        out = _Rotate.apply(q, q.view_as(q) if k is q else k, *settings, owned)
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
    writable("q", q), writable("k", k)
    freqs, positions = readable(freqs=freqs, positions=positions)
    interleaved, inverse = flags(interleaved=interleaved, inverse=inverse)
    grid = check(q, k, grid, freqs, prefix_tokens, positions)
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
        if x is not None and overlaps(x):
            raise ValueError(f"{name}: in place needs memory of its own for every element, got strides {list(x.stride())}")
    if k is not None and (k is q or share_memory(q, k)):
        raise ValueError("k: shares its memory with q, so that in place it would be rotated twice")
    settings = (freqs, positions, grid, prefix_tokens, interleaved, inverse, _backend(q, positions, backend))
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
    operation. Use the tensor that is returned. Where freqs requires a gradient, a copy of q and k is kept for it.

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
    settings = packed_settings(qkv, num_heads, grid, freqs, prefix_tokens, positions, interleaved, inverse, backend)
    freqs, positions, grid, *_, backend = settings
    if not torch.is_grad_enabled() or not (qkv.requires_grad or (freqs is not None and freqs.requires_grad)):
        rotate_qkv_(qkv, num_heads, *settings)
        return qkv
    base = packed_base(qkv)
    saved = None
    if freqs is not None and freqs.requires_grad:
        if backend == "reference":
            q, k, v = split_heads(qkv.clone(), num_heads).chunk(3, 1)
            options = dict(freqs=freqs, prefix_tokens=prefix_tokens, positions=positions, interleaved=interleaved)
            q, k = rope3d_reference(q, k, grid or None, **options, inverse=inverse)
            return qkv.copy_(torch.cat((q, k, v), 1).transpose(1, 2).flatten(2))
        # What is left in place is rounded: in bfloat16 that would put 0.2 % of noise into the gradient of freqs.
        saved = qkv.detach()[..., : qkv.shape[2] // 3 * 2].clone()
    out = _RotateQKV.apply(base, saved, qkv.shape, num_heads, *settings)
    return out if base is qkv else out.view(qkv.shape)


def packed_settings(qkv, num_heads, grid, freqs, prefix_tokens, positions, interleaved, inverse, backend):
    """The checks of `rope3d_qkv_`: the settings that the operators take."""
    if not isinstance(qkv, torch.Tensor) or qkv.ndim != 3:
        raise wrong("qkv", "a tensor [B, N, 3 * num_heads * D]", qkv)
    writable("qkv", qkv)
    freqs, positions = readable(freqs=freqs, positions=positions)
    interleaved, inverse = flags(interleaved=interleaved, inverse=inverse)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"num_heads: expected a positive int such that 3 * num_heads divides {qkv.shape[2]}, got {num_heads!r}"
        )
    if not qkv.is_contiguous():
        raise ValueError(f"qkv: expected a contiguous tensor, got strides {list(qkv.stride())}")
    q = split_heads(qkv.detach(), num_heads)[:, :num_heads]
    grid = check(q, None, grid, freqs, prefix_tokens, positions)
    return freqs, positions, grid, prefix_tokens, interleaved, inverse, _backend(q, positions, backend)


def packed_base(qkv):
    """What autograd is to see changed in place: qkv, or the tensor that it is a reshape of. Changing that replaces one node of
    the graph; changing the view would copy the gradient three times.

    Raises:
        ValueError: qkv is a leaf that requires a gradient, or a view of a part of another tensor.
    """
    if qkv.is_leaf and qkv.requires_grad:
        raise ValueError("qkv: a leaf that requires a gradient cannot be changed in place; use rope3d")
    if torch.compiler.is_compiling() or not qkv._is_view():
        return qkv
    base = qkv._base
    if base.numel() != qkv.numel() or not base.is_contiguous():
        raise ValueError(
            f"qkv: is a view of a part of a tensor {list(base.shape)}, for which autograd would copy whole gradients; "
            "pass the linear layer's own output, or use rope3d"
        )
    return base


def _backend(q, positions, backend):
    chosen = _dispatch.pick("rope3d", q, backend)
    if chosen != "reference" and positions is not None and positions.requires_grad and torch.is_grad_enabled():
        raise ValueError('positions: requires a gradient, which only backend="reference" computes; pass it detached')
    return chosen
