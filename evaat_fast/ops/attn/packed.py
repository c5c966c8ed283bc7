"""joint_attention_qkv_: the packed projection is rotated where it lies, and its gradient written once, packed."""

import torch
from torch.autograd.function import once_differentiable

from evaat_fast.ops._core.register import register
from evaat_fast.ops.attn.triton import launch_backward, rows
from evaat_fast.ops.rope3d.freqs import table_of
from evaat_fast.ops.rope3d.launch import launch
from evaat_fast.ops.rope3d.rope3d import packed_base, rotate_qkv_, rotate_to_qkv, split_heads


def _used_again():
    return RuntimeError("qkv: was used again after joint_attention_qkv_, which consumes it; clone it before")


class _Rotate(torch.autograd.Function):
    """In place. Its gradient comes from `_Split`, which has turned it back already and left it in `grads`: held there, autograd
    cannot add another reader's to it unnoticed."""

    @staticmethod
    def forward(ctx, qkv, grads, shape, num_heads, *settings):
        ctx.mark_dirty(qkv)
        ctx.grads = grads
        rotate_qkv_(qkv.view(shape), num_heads, *settings)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if not ctx.grads or ctx.grads.pop().data_ptr() != grad.data_ptr():
            raise _used_again()
        return grad, *[None] * 10


class _Split(torch.autograd.Function):
    """[B, N, 3*H*D], rotated, to its q, k and v [B, H, N, D]; the gradients are turned back on their way into one tensor."""

    @staticmethod
    def forward(ctx, qkv, grads, num_heads, *settings):
        freqs, positions, *ctx.settings = settings
        ctx.grads = grads
        ctx.save_for_backward(freqs, positions)
        return split_heads(qkv, num_heads).chunk(3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grid, prefix_tokens, interleaved, inverse, backend = ctx.settings
        settings = (*ctx.saved_tensors, grid, prefix_tokens, interleaved, not inverse, backend)
        ctx.grads[:] = [rotate_to_qkv(*grads, *settings)]
        return ctx.grads[0], *[None] * 9


def rotated_heads(qkv, num_heads, settings):
    """q, k and v [B, H, N, D], views of the checked projection [B, N, 3*H*D], whose q and k are rotated in place."""
    if not (torch.is_grad_enabled() and qkv.requires_grad):
        rotate_qkv_(qkv, num_heads, *settings)
        return split_heads(qkv, num_heads).chunk(3, 1)
    grads = []
    base = _Rotate.apply(packed_base(qkv), grads, qkv.shape, num_heads, *settings)
    return _Split.apply(base.view(qkv.shape), grads, num_heads, *settings)


_SETTINGS = "Tensor? freqs, Tensor? positions, SymInt[] grid, SymInt prefix_tokens, bool interleaved, float scale"


def _fake_forward(qkv, num_heads, *others):
    B, N, width = qkv.shape
    out = qkv.new_empty((B, N, num_heads, width // (3 * num_heads))).transpose(1, 2)
    return out, qkv.new_empty((B, num_heads, N), dtype=torch.float32)


@register(
    f"attn_qkv_forward_(Tensor(a!) qkv, SymInt num_heads, {_SETTINGS}, bool keep) -> (Tensor, Tensor)",
    _fake_forward,
)
@torch.no_grad()
def attn_qkv_forward_(qkv, num_heads, freqs, positions, grid, prefix_tokens, interleaved, scale, keep):
    """(output, log-sum-exps float32 [B, H, N]) in Triton; the keys are turned where they lie, with keep also the queries."""
    from evaat_fast.kernels.attn import forward as kernels

    q, k, v = split_heads(qkv, num_heads).chunk(3, 1)
    table = table_of(freqs, positions, grid, prefix_tokens, q.shape[3], q.device, "triton")
    out, lse = _fake_forward(qkv, num_heads)
    launch([k], [k], table, prefix_tokens, interleaved, False, "triton")
    kernels.forward(q, k, v, out, lse, q if keep else None, table, prefix_tokens, interleaved, scale, None)
    if not qkv.is_inference():
        torch.autograd.graph.increment_version(qkv)
    return out, lse


@register(
    f"attn_qkv_backward(Tensor grad, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, SymInt num_heads, {_SETTINGS}, "
    "bool one_pass) -> Tensor",
    lambda grad, grad_lse, qkv, *others: qkv.new_empty(qkv.shape),
)
@torch.no_grad()
def attn_qkv_backward(
    grad, grad_lse, qkv, out, lse, num_heads, freqs, positions, grid, prefix_tokens, interleaved, scale, one_pass
):
    """The gradient of the projection as it was before its queries and keys were turned."""
    of_qkv = qkv.new_empty(qkv.shape)
    q, k, v = split_heads(qkv, num_heads).chunk(3, 1)
    table = table_of(freqs, positions, grid, prefix_tokens, q.shape[3], q.device, "triton")
    grads, tables = split_heads(of_qkv, num_heads).chunk(3, 1), (table, table)
    launch_backward(q, k, v, out, grad, lse, grad_lse, grads, tables, prefix_tokens, interleaved, scale, None, one_pass)
    return of_qkv


class _AttendPacked(torch.autograd.Function):
    """Saves the projection as it has become, the output and its log-sum-exps: of queries and keys there is one copy."""

    @staticmethod
    def forward(ctx, base, shape, num_heads, one_pass, *settings):
        ctx.mark_dirty(base)
        ctx.set_materialize_grads(False)
        out, lse = attn_qkv_forward_(base.view(shape), num_heads, *settings, True)
        freqs, positions, *ctx.settings = settings
        ctx.shape, ctx.num_heads, ctx.one_pass = shape, num_heads, one_pass
        ctx.save_for_backward(base, out, lse, freqs, positions)
        return base, out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, others, grad, grad_lse):
        if others is not None:
            raise _used_again()
        base, out, lse, *tensors = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else rows(grad)
        settings = (ctx.num_heads, *tensors, *ctx.settings, ctx.one_pass)
        of_qkv = attn_qkv_backward(grad, grad_lse, base.view(ctx.shape), out, lse, *settings)
        return of_qkv.view(base.shape), *[None] * 9


def attend_packed(qkv, num_heads, settings, scale, one_pass):
    """(output, log-sum-exps) of a checked projection [B, N, 3*H*D], in Triton; settings: of the rotation; scale >= 0."""
    freqs, positions, grid, prefix_tokens, interleaved, *_ = settings
    settings = (freqs, positions, grid, prefix_tokens, interleaved, scale)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _AttendPacked.apply(packed_base(qkv), qkv.shape, num_heads, one_pass, *settings)[1:]
    return attn_qkv_forward_(qkv, num_heads, *settings, False)
