"""joint_attention by kernels that turn within their passes, in Gluon or Triton: the two passes as torch operators, and what
autograd keeps between them."""

import torch
from torch import Tensor

from evaat_fast.ops._core.register import once_differentiable, register, traced
from evaat_fast.ops._core.tensor import contiguous_rows
from evaat_fast.ops.attn.plan import AttentionPlan
from evaat_fast.ops.rope3d.rotate import empty, turn, used_again
from evaat_fast.ops.rope3d.table import table_of

FUSED = ("gluon", "triton")  # backends


def _output(x):
    """[B, H, N, D] in the memory of a contiguous [B, N, H, D]."""
    B, H, N, D = x.shape
    return x.new_empty((B, N, H, D)).transpose(1, 2)


def _tables(q, call):
    """Of the queries and of the keys."""
    if not call.rope:
        return None, None
    table = table_of(call.rotation, q.shape[3], q.device)
    return table, table if call.k_positions is None else table_of(call.k_rotation(), q.shape[3], q.device)


def _forward_fake(q, k, v, keep, call):
    turned = (_output(q) if call.rope and keep else q.new_empty(0), empty(k) if call.rope else k.new_empty(0))
    return _output(q), q.new_empty(q.shape[:3], dtype=torch.float32), *turned


@register(
    "attn_forward(Tensor q, Tensor k, Tensor v, bool keep, {settings}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    AttentionPlan,
)
@torch.no_grad()
def attn_forward(q: Tensor, k: Tensor, v: Tensor, keep: bool, call: AttentionPlan) -> tuple[Tensor, ...]:
    """(output, log-sum-exps float32 [B, H, N], turned queries if keep, turned keys); what is not turned is empty."""
    out, lse, turned_q, turned_k = _forward_fake(q, k, v, keep, call)
    _launch_forward(q, k, v, out, lse, turned_q if keep and call.rope else None, turned_k, call)
    return out, lse, turned_q, turned_k


def _launch_forward(q, k, v, out, lse, turned_q, turned_k, call):
    """turned_q: None not to keep them."""
    from evaat_fast.kernels.attn import forward

    (table, k_table), rotation = _tables(q, call), (call.rotation.prefix_tokens, call.rotation.interleaved)
    if call.rope and call.backend == "gluon":  # by the faster kernel, which is CUDA C++ where it is built
        turn([k], [turned_k], call.k_rotation())
    elif call.rope:
        from evaat_fast.kernels.rope3d.rotate import rotate

        rotate([k], [turned_k], k_table, *rotation, False)
    k = turned_k if call.rope else k
    if call.backend == "gluon" and call.cu_seqlens is not None:
        from evaat_fast.kernels.attn import sm90_clips

        q, k, v = (x if sm90_clips.serves(x) else _output(x).copy_(x) for x in (q, k, v))
        return sm90_clips.forward(q, k, v, out, lse, turned_q, table, call.scale, call.cu_seqlens)
    if call.backend == "gluon":
        from evaat_fast.kernels.attn import sm90

        if sm90.serves(q, k, v):
            return sm90.forward(q, k, v, out, lse, turned_q, table, rotation[0], call.scale)
    forward.forward(q, k, v, out, lse, turned_q, table, *rotation, call.scale, call.cu_seqlens)


def _backward_fake(q, k, v, *others):
    return _output(q), _output(k), _output(v)


@register(
    "attn_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad, Tensor? grad_lse, bool need_q, "
    "bool need_kv, {settings}) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    AttentionPlan,
)
@torch.no_grad()
def attn_backward(q, k, v, out, lse, grad, grad_lse, need_q, need_kv, call):
    """dQ, dK and dV of queries and keys as they were before they were turned; q and k: turned. What is not needed is not
    written."""
    dq, dk, dv = _backward_fake(q, k, v)
    wanted = (dq if need_q else None, dk if need_kv else None, dv if need_kv else None)
    _launch_backward(q, k, v, out, lse, grad, grad_lse, wanted, None, call)
    return dq, dk, dv


def _launch_backward(q, k, v, out, lse, grad, grad_lse, grads, columns, call):
    """Writes the gradients that are not None; whether it wrote their column sums to `columns`, too."""
    from evaat_fast.kernels.attn import backward

    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    tables, (prefix, interleaved) = _tables(q, call), (call.rotation.prefix_tokens, call.rotation.interleaved)
    if call.backend == "gluon" and all(x is not None for x in grads):
        from evaat_fast.kernels.attn import sm90, sm90_backward, sm90_clips, sm90_wide

        if call.cu_seqlens is not None and call.scale > sm90_backward.LEAST_SCALE:
            q, k, v, out, grad = (x if sm90_clips.serves(x) else _output(x).copy_(x) for x in (q, k, v, out, grad))
            how = (tables, call.scale, call.cu_seqlens, call.deterministic)
            sm90_clips.backward(q, k, v, out, grad, lse, grad_lse, grads, *how)
            return True
        wide = q.shape[3] == sm90_wide.SHAPE["D"]
        unpacked = call.cu_seqlens is None and sm90.serves(q, k, v)
        if unpacked and call.scale > sm90_backward.LEAST_SCALE and not (wide and call.deterministic):
            grad = grad if sm90.serves(grad) else _output(grad).copy_(grad)
            how = (columns, tables, prefix, call.scale)
            if wide:
                sm90_wide.backward(q, k, v, out, grad, lse, grad_lse, grads, *how)
            else:
                sm90_backward.backward(q, k, v, out, grad, lse, grad_lse, grads, *how, call.deterministic)
            return True
    delta, rest = torch.empty_like(lse), (prefix, interleaved, call.scale, call.cu_seqlens)
    backward.backward(q, k, v, out, grad, lse, grad_lse, delta, grads, tables, *rest)
    return False


class _Attend(torch.autograd.Function):
    """Saves the turned queries and keys, the values, the output and its log-sum-exps: memory is linear in N."""

    @staticmethod
    def forward(ctx, q, k, v, freqs, positions, k_positions, cu_seqlens, bare):
        call = bare.of(freqs, positions, k_positions, cu_seqlens)
        out, lse, turned_q, turned_k = attn_forward.at(traced(type(q)))(q, k, v, True, call)
        q, k = (turned_q, turned_k) if call.rope else (q, k)
        ctx.save_for_backward(q, k, v, out, lse, freqs, positions, k_positions, cu_seqlens)
        ctx.bare = bare
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        grad = torch.zeros_like(out) if grad is None else contiguous_rows(grad)
        needs, call = (need_q, need_k or need_v), ctx.bare.of(*tensors)
        dq, dk, dv = attn_backward.at(traced(type(grad)))(q, k, v, out, lse, grad, grad_lse, *needs, call)
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, *[None] * 5


def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionPlan) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exps) of checked tensors with contiguous last dimensions."""
    if call.scale < 0:
        q, call = -q, call.of_scale(-call.scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # Dynamo takes no tensor twice.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        return _Attend.apply(q, k, v, *call.tensors(), call.bare())
    return attn_forward.at(traced(type(q)))(q, k, v, False, call)[:2]


def _parts(qkv, num_heads):
    """q, k and v [B, H, N, D], views of a projection [B, N, 3*H*D]."""
    return qkv.view(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)


def _packed_fake(qkv, num_heads, keep, call):
    B, N, width = qkv.shape
    out = qkv.new_empty((B, N, num_heads, width // (3 * num_heads))).transpose(1, 2)
    return out, qkv.new_empty((B, num_heads, N), dtype=torch.float32)


@register(
    "attn_qkv_forward_(Tensor(a!) qkv, SymInt num_heads, bool keep, {settings}) -> (Tensor, Tensor)",
    _packed_fake,
    AttentionPlan,
)
@torch.no_grad()
def attn_qkv_forward_(qkv: Tensor, num_heads: int, keep: bool, call: AttentionPlan) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exps float32 [B, H, N]); the keys are turned where they lie, with keep also the queries."""
    q, k, v = _parts(qkv, num_heads)
    out, lse = _packed_fake(qkv, num_heads, keep, call)
    _launch_forward(q, k, v, out, lse, q if keep else None, k, call)
    if not qkv.is_inference():
        torch.autograd.graph.increment_version(qkv)
    return out, lse


def _packed_backward_fake(qkv, out, lse, grad, grad_lse, num_heads, with_bias, call):
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[2] if with_bias else 0, dtype=torch.float32)


@register(
    "attn_qkv_backward(Tensor qkv, Tensor out, Tensor lse, Tensor grad, Tensor? grad_lse, SymInt num_heads, bool with_bias, "
    "{settings}) -> (Tensor, Tensor)",
    _packed_backward_fake,
    AttentionPlan,
)
@torch.no_grad()
def attn_qkv_backward(qkv, out, lse, grad, grad_lse, num_heads, with_bias, call):
    """(the gradient of the projection as it was before its queries and keys were turned, with_bias: its column sums in float32,
    else nothing)."""
    (B, N, width), dqkv = qkv.shape, qkv.new_empty(qkv.shape)
    columns = lse.new_empty((B * -(-N // 64), width)) if with_bias else None
    q, k, v = _parts(qkv, num_heads)
    summed = _launch_backward(q, k, v, out, lse, grad, grad_lse, _parts(dqkv, num_heads), columns, call)
    if columns is None:
        return dqkv, lse.new_empty(0)
    return dqkv, columns.sum(0) if summed else dqkv.sum((0, 1), dtype=torch.float32)


class _AttendPacked(torch.autograd.Function):
    """Saves the projection as it has become, the output and its log-sum-exps: of queries and keys there is one copy."""

    @staticmethod
    def forward(ctx, base, shape, num_heads, freqs, positions, bias, bare):
        ctx.mark_dirty(base)
        ctx.set_materialize_grads(False)
        call = bare.of(freqs, positions, None, None)
        out, lse = attn_qkv_forward_.at(traced(type(base)))(base.view(shape), num_heads, True, call)
        ctx.shape, ctx.num_heads, ctx.bare, ctx.bias = shape, num_heads, bare, None if bias is None else bias.dtype
        ctx.save_for_backward(base, out, lse, freqs, positions)
        return base, out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, others, grad, grad_lse):
        if others is not None:
            raise used_again()
        base, out, lse, freqs, positions = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else contiguous_rows(grad)
        call, through = ctx.bare.of(freqs, positions, None, None), traced(type(grad))
        settings = (ctx.num_heads, ctx.needs_input_grad[5], call)
        dqkv, dbias = attn_qkv_backward.at(through)(base.view(ctx.shape), out, lse, grad, grad_lse, *settings)
        return dqkv.view(base.shape), *[None] * 4, dbias.to(ctx.bias) if ctx.needs_input_grad[5] else None, None


def attend_packed(
    qkv: Tensor, base: Tensor | None, num_heads: int, bias: Tensor | None, call: AttentionPlan
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exps) of a checked projection [B, N, 3*H*D], which is consumed; scale >= 0. base: as for `consume`.
    bias: what gets the column sums of the projection's gradient."""
    if base is None:
        return attn_qkv_forward_.at(traced(type(qkv)))(qkv, num_heads, False, call)
    freqs, positions, *_ = call.tensors()
    return _AttendPacked.apply(base, qkv.shape, num_heads, freqs, positions, bias, call.bare())[1:]
