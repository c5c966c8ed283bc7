"""joint_attention in Triton: its two passes as torch operators, and what autograd keeps between them."""

import torch
from torch.autograd.function import once_differentiable

from evaat_fast._register import register
from evaat_fast.ops.freqs import table_of
from evaat_fast.ops.rope3d_launch import empty, launch

_ROPE = (
    "Tensor? freqs, Tensor? positions, Tensor? k_positions, SymInt[] grid, SymInt prefix_tokens, bool interleaved, bool rope"
)


def _output(x):
    """[B, H, N, D] in the memory of a contiguous [B, N, H, D]."""
    B, H, N, D = x.shape
    return x.new_empty((B, N, H, D)).transpose(1, 2)


def _tables(freqs, positions, k_positions, grid, prefix_tokens, interleaved, rope, q):
    """Of the queries and of the keys."""
    if not rope:
        return None, None
    settings = (grid, prefix_tokens, q.shape[3], q.device, "triton")
    table = table_of(freqs, positions, *settings)
    return table, table if k_positions is None else table_of(freqs, k_positions, *settings)


def _fake_forward(q, k, v, *arguments):
    *_, rope, _, keep = arguments
    turned = (_output(q) if rope and keep else q.new_empty(0), empty(k) if rope else k.new_empty(0))
    return _output(q), q.new_empty(q.shape[:3], dtype=torch.float32), *turned


@register(
    f"attn_forward(Tensor q, Tensor k, Tensor v, {_ROPE}, float scale, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
@torch.no_grad()
def attn_forward(q, k, v, *arguments):
    """(output, log-sum-exps float32 [B, H, N], turned queries if keep, turned keys); what is not turned is empty."""
    from evaat_fast.kernels import attn as kernels

    *rotation, scale, keep = arguments
    prefix_tokens, interleaved = rotation[4:6]
    table, k_table = _tables(*rotation, q)
    out, lse, turned_q, turned_k = _fake_forward(q, k, v, *arguments)
    if table is not None:
        launch([k], [turned_k], k_table, prefix_tokens, interleaved, False, "triton")
    keys, kept = (k, None) if table is None else (turned_k, turned_q if keep else None)
    kernels.forward(q, keys, v, out, lse, kept, table, prefix_tokens, interleaved, scale)
    return out, lse, turned_q, turned_k


def _fake_backward(grad, grad_lse, q, k, v, *others):
    return _output(q), _output(k), _output(v)


@register(
    f"attn_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ROPE}, float scale, "
    "bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
@torch.no_grad()
def attn_backward(grad, grad_lse, q, k, v, out, lse, *arguments):
    """The gradients of the queries, keys and values as they were before they were turned; q and k: turned. Those that are not
    needed are not written."""
    from evaat_fast.kernels import attn as kernels

    *rotation, scale, need_q, need_kv = arguments
    prefix_tokens, interleaved = rotation[4:6]
    grads = _fake_backward(grad, grad_lse, q, k, v)
    wanted = (grads[0] if need_q else None, *(grads[1:] if need_kv else (None, None)))
    tables = _tables(*rotation, q)
    scratch = torch.empty_like(lse)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    kernels.backward(q, k, v, out, grad, lse, grad_lse, scratch, wanted, tables, prefix_tokens, interleaved, scale)
    return grads


def _rows(x):
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


class _Attend(torch.autograd.Function):
    """Saves the turned queries and keys, the values, the output and its log-sum-exps: memory is linear in N."""

    @staticmethod
    def forward(ctx, q, k, v, *settings):
        out, lse, turned_q, turned_k = attn_forward(q, k, v, *settings, True)
        freqs, positions, k_positions, *ctx.settings, rope, ctx.scale = settings
        ctx.rope = rope
        ctx.save_for_backward(turned_q if rope else q, turned_k if rope else k, v, out, lse, freqs, positions, k_positions)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse, *rotation = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        need_q, *need_kv = ctx.needs_input_grad[:3]
        arguments = (*rotation, *ctx.settings, ctx.rope, ctx.scale, need_q, any(need_kv))
        grads = attn_backward(_rows(grad), grad_lse, q, k, v, out, lse, *arguments)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 8


def attend(q, k, v, rotation, scale):
    """(output, log-sum-exps) of checked tensors; rotation: freqs, positions, k_positions, grid, prefix_tokens, interleaved, and
    whether to rotate at all."""
    if scale < 0:
        q, scale = -q, -scale
    q, k, v = _rows(q), _rows(k), _rows(v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # Dynamo takes no tensor twice.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        return _Attend.apply(q, k, v, *rotation, scale)
    return attn_forward(q, k, v, *rotation, scale, False)[:2]
