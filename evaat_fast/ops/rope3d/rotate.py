"""rope3d as torch operators, and what autograd keeps between its two passes.

A rotation's transpose is its inverse, so the backward pass turns gradients back and needs the positions alone; where
frequencies learn, it reads what was turned, too.
"""

from typing import Any

import torch
from torch import Tensor

from evaat_fast.ops._core.register import once_differentiable, register, traced
from evaat_fast.ops._core.tensor import contiguous_rows, is_transformed, overlaps
from evaat_fast.ops.rope3d import native, reference
from evaat_fast.ops.rope3d.rotation import Rotation
from evaat_fast.ops.rope3d.table import rows_of, table_of


def empty(x: Tensor) -> Tensor:
    """For the turned x [B, H, N, D]: contiguous, or in the memory order [B, N, H, D] where x lies in that order."""
    B, H, N, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, N, H, D)).transpose(1, 2)
    return x.new_empty((B, H, N, D))


def turn(xs: list[Tensor], outs: list[Tensor], rotation: Rotation) -> None:
    """Writes the turned xs, one or two of [B, H, N, D], to outs, which may be the same tensors; a third x, of as many heads as
    the second, is copied."""
    if xs[0].numel() == 0 and all(x.numel() == 0 for x in xs):
        return
    if len(xs) == 3 and rotation.backend not in ("triton", "cuda"):  # which copy it in the same launch
        outs[2].copy_(xs[2])
        xs, outs = xs[:2], outs[:2]
    table = rotation.table
    if table is None:
        wide = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
        table = table_of(rotation, xs[0].shape[3], xs[0].device, wide)
    if rotation.backend == "triton":
        from evaat_fast.kernels.rope3d.rotate import rotate

        rotate(xs, outs, table, rotation.prefix_tokens, rotation.interleaved, rotation.inverse)
    elif rotation.backend == "reference":
        cos, sin = table[0], -table[1] if rotation.inverse else table[1]
        for x, out in zip(xs, outs, strict=True):
            out.copy_(reference.turn(x, cos, sin, rotation.prefix_tokens, rotation.interleaved))
    else:
        native.turn(xs, outs, table, rotation)


@register("rope3d(Tensor[] x, {settings}) -> Tensor[]", lambda xs, rotation: [empty(x) for x in xs], Rotation)
def rope3d_op(xs: list[Tensor], rotation: Rotation) -> list[Tensor]:
    outs = [empty(x) for x in xs]
    turn(xs, outs, rotation)
    return outs


@register("rope3d_(Tensor(a!)[] x, {settings}) -> ()", lambda xs, rotation: None, Rotation)
def rope3d_op_(xs: list[Tensor], rotation: Rotation) -> None:
    turn(xs, xs, rotation)
    for x in xs:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _freqs_fake(grads, xs, rotation):
    return [empty(g) for g in grads], rotation.freqs.new_empty(rotation.freqs.shape)


@register("rope3d_freqs(Tensor[] grad, Tensor[] x, {settings}) -> (Tensor[], Tensor)", _freqs_fake, Rotation)
def rope3d_freqs_op(grads: list[Tensor], xs: list[Tensor], rotation: Rotation) -> tuple[list[Tensor], Tensor]:
    """The turned grads and, where xs are what the forward pass turned the other way, the gradient of the frequencies."""
    outs = [empty(g) for g in grads]
    return outs, _freqs_gradient(grads, outs, xs, rotation)


def _freqs_gradient(grads, outs, xs, rotation):
    freqs, device = rotation.freqs, xs[0].device
    if rotation.prefix_tokens == xs[0].shape[2] or all(x.numel() == 0 for x in xs):
        for out, grad in zip(outs, grads, strict=True):
            out.copy_(grad)
        return torch.zeros_like(freqs)
    table, rows = table_of(rotation, xs[0].shape[3], device, torch.float64), rows_of(rotation, device)
    if rotation.backend == "triton":
        from evaat_fast.kernels.rope3d.freqs import programs, rotate_with_freqs

        heads, _, pairs = table.shape[2:]
        partial = xs[0].new_empty((*programs(grads, heads > 1), 3, pairs), dtype=torch.float64)
        rotate_with_freqs(grads, outs, xs, partial, table, rows, rotation.prefix_tokens, rotation.interleaved, rotation.inverse)
        partial = partial.view(partial.shape[0], -1, heads, 3, pairs)
    else:
        partial = native.turn_with_freqs(grads, outs, xs, table, rows, rotation)
    # The kernels sum the slopes of the angles of the forward pass, which turned by -angle where this one turns by it.
    total = partial.sum((0, 1), dtype=torch.float64)
    return (total if rotation.inverse else -total).float().view(freqs.shape)


def rotate(q: Tensor, k: Tensor | None, rotation: Rotation, owned: bool = False) -> tuple[Tensor, Any]:
    """The turned q and k of a checked call; owned: the gradients of what is returned have no other reader, so the backward pass
    turns them where they lie."""
    if rotation.backend == "reference":
        options = dict(freqs=rotation.freqs, prefix_tokens=rotation.prefix_tokens, positions=rotation.positions)
        options |= dict(interleaved=rotation.interleaved, inverse=rotation.inverse)
        out = reference.rope3d_reference(q, k, rotation.grid or None, **options)
        return (out, None) if k is None else out
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad) or rotation.learns()):
        k = q.view_as(q) if k is q else k  # Dynamo takes no tensor twice
        given = (q, k, rotation.freqs, rotation.positions, rotation.table, rotation.bare(), owned)
        plain = torch.compiler.is_compiling() or not is_transformed()
        out = _Rotate.apply(*given) if plain else _RotateTransformed.apply(*given)
    else:
        out = rope3d_op.at(traced(type(q)))([q] if k is None else [q, k], rotation)
    return out[0], out[1] if k is not None else None


def rotate_(xs: list[Tensor], rotation: Rotation) -> None:
    """Turns the xs of a checked call in place, without a gradient."""
    if torch.jit.is_tracing():  # which loses an operator that changes a list's elements
        for x, out in zip(xs, rope3d_op.at(True)(xs, rotation), strict=True):
            x.copy_(out)
    else:
        rope3d_op_.at(traced(type(xs[0])))(xs, rotation)


class _Turned(torch.autograd.Function):
    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        freqs, positions, table, *saved = ctx.saved_tensors
        back = ctx.bare.of(freqs, positions, table).back()
        given = [i for i, g in enumerate(grads) if g is not None]
        rows, of_freqs = [contiguous_rows(grads[i]) for i in given], None
        through = traced(*map(type, rows))
        if rows and ctx.needs_input_grad[2]:
            rows, of_freqs = rope3d_freqs_op.at(through)(rows, [saved[i] for i in given], back)
        elif rows and ctx.owned and not torch.compiler.is_compiling() and not any(map(overlaps, rows)):
            rope3d_op_.at(through)(rows, back)
        elif rows:
            rows = rope3d_op.at(through)(rows, back)
        turned = dict(zip(given, rows, strict=True))
        return turned.get(0), turned.get(1), of_freqs, *[None] * 4


def _keep(ctx, q, k, freqs, positions, table, bare, owned):
    ctx.bare, ctx.owned = bare, owned
    saved = (q, k) if freqs is not None and freqs.requires_grad else (None, None)
    ctx.save_for_backward(freqs, positions, table, *saved)
    ctx.set_materialize_grads(False)


def _turned(q, k, freqs, positions, table, bare, owned):
    return tuple(rope3d_op.at(traced(type(q)))([q] if k is None else [q, k], bare.of(freqs, positions, table)))


class _Rotate(_Turned):
    """With ctx, as torch takes 10 us to call one that has a setup_context."""

    @staticmethod
    def forward(ctx, *given):
        _keep(ctx, *given)
        return _turned(*given)


class _RotateTransformed(_Turned):
    """Of the kind that torch.func's transforms take, of something else."""

    @staticmethod
    def forward(*given):
        return _turned(*given)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep(ctx, *inputs)


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """[B, N, 3*H*D] -> a view [B, 3*H, N, D] of it."""
    B, N, width = qkv.shape
    return qkv.view(B, N, 3 * num_heads, width // (3 * num_heads)).transpose(1, 2)


@register("rope3d_qkv_(Tensor(a!) qkv, SymInt num_heads, {settings}) -> ()", lambda *arguments: None, Rotation)
def rope3d_qkv_op_(qkv: Tensor, num_heads: int, rotation: Rotation) -> None:
    q, k, _ = split_heads(qkv, num_heads).chunk(3, 1)
    rope3d_op_.body([q, k], rotation)


def _packed(q, k, v, rotation):
    B, H, N, D = q.shape
    return q.new_empty((B, N, 3 * H * D))


@register("rope3d_qkv(Tensor q, Tensor k, Tensor v, {settings}) -> Tensor", _packed, Rotation)
def rope3d_qkv_op(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
    """[B, N, 3*H*D] of the turned q and k and of v, [B, H, N, D] each."""
    out = _packed(q, k, v, rotation)
    turn([contiguous_rows(x) for x in (q, k, v)], list(split_heads(out, q.shape[1]).chunk(3, 1)), rotation)
    return out


@register(
    "rope3d_qkv_freqs(Tensor grad, Tensor x, SymInt num_heads, {settings}) -> (Tensor, Tensor)",
    lambda grad, x, num_heads, rotation: (grad.new_empty(grad.shape), rotation.freqs.new_empty(rotation.freqs.shape)),
    Rotation,
)
def rope3d_qkv_freqs_op(grad: Tensor, x: Tensor, num_heads: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
    out = grad.new_empty(grad.shape)
    dq, dk, dv = split_heads(grad, num_heads).chunk(3, 1)
    new_q, new_k, new_v = split_heads(out, num_heads).chunk(3, 1)
    new_v.copy_(dv)
    q, k = x.unflatten(2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return out, _freqs_gradient([dq, dk], [new_q, new_k], [q, k], rotation)


def rotate_packed_(qkv: Tensor, base: Tensor | None, num_heads: int, rotation: Rotation) -> Tensor:
    """qkv [B, N, 3*H*D] of a checked call, its q and k turned in place. base: as `packed_base` gives it."""
    if base is None:
        rope3d_qkv_op_.at(traced(type(qkv)))(qkv, num_heads, rotation)
        return qkv
    saved, learns = None, rotation.learns()
    if learns and rotation.backend == "reference":
        q, k, v = split_heads(qkv.clone(), num_heads).chunk(3, 1)
        return qkv.copy_(torch.cat((*rotate(q, k, rotation), v), 1).transpose(1, 2).flatten(2))
    if learns:
        # What is left in place is rounded: in bfloat16 that would put 0.2 % of noise into the gradient of freqs.
        saved = qkv.detach()[..., : qkv.shape[2] // 3 * 2].clone()
    out = _RotatePacked.apply(base, saved, rotation.freqs, rotation.positions, qkv.shape, num_heads, rotation.bare())
    return out if base is qkv else out.view(qkv.shape)


class _RotatePacked(torch.autograd.Function):
    """In place forward; the backward pass writes a new gradient, since the one it is given may have other readers."""

    @staticmethod
    def forward(ctx, base, saved, freqs, positions, shape, num_heads, bare):
        ctx.shape, ctx.num_heads, ctx.bare = shape, num_heads, bare
        ctx.mark_dirty(base)
        ctx.save_for_backward(saved, freqs, positions)
        qkv = base.view(shape)
        rope3d_qkv_op_.at(traced(type(qkv)))(qkv, num_heads, bare.of(freqs, positions))
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, freqs, positions = ctx.saved_tensors
        back, through = ctx.bare.of(freqs, positions).back(), traced(type(grad))
        packed, of_freqs = grad.contiguous().view(ctx.shape), None
        if ctx.needs_input_grad[2]:
            turned, of_freqs = rope3d_qkv_freqs_op.at(through)(packed, saved, ctx.num_heads, back)
        else:
            turned = rope3d_qkv_op.at(through)(*split_heads(packed, ctx.num_heads).chunk(3, 1), back)
        return turned.view(grad.shape), None, of_freqs, None, None, None, None


def consume(qkv: Tensor, base: Tensor | None, num_heads: int, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, H, N, D], views of the checked projection [B, N, 3*H*D], whose q and k are turned in place. Nothing else
    may read it: a gradient for it by another way is an error of the backward pass. base: as for `rotate_packed_`."""
    if base is None:
        q, k, v = split_heads(rotate_packed_(qkv, None, num_heads, rotation), num_heads).chunk(3, 1)
        return q, k, v
    return _Consume.apply(base, rotation.freqs, rotation.positions, rotation.table, qkv.shape, num_heads, rotation.bare())[1:]


class _Consume(torch.autograd.Function):
    """The gradients of the three parts are turned back on their way into one packed tensor."""

    @staticmethod
    def forward(ctx, base, freqs, positions, table, shape, num_heads, bare):
        ctx.mark_dirty(base)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(freqs, positions, table)
        ctx.bare, ctx.base_shape = bare, base.shape
        qkv = base.detach().view(shape)
        rope3d_qkv_op_.at(traced(type(qkv)))(qkv, num_heads, bare.of(freqs, positions, table))
        return base, *split_heads(qkv, num_heads).chunk(3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, others, *grads):
        if others is not None:
            raise used_again()
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return (None,) * 7
        dq, dk, dv = (torch.zeros_like(given) if g is None else g for g in grads)
        dqkv = rope3d_qkv_op.at(traced(type(dq)))(dq, dk, dv, ctx.bare.of(*ctx.saved_tensors).back())
        return dqkv.view(ctx.base_shape), *[None] * 6


def used_again() -> RuntimeError:
    return RuntimeError("qkv: was used again after joint_attention_qkv_, which consumes it; clone it before")
