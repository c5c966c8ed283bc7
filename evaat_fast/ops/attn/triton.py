"""joint_attention in Triton: its two passes as torch operators, and what autograd keeps between them."""

import torch
from torch.autograd.function import once_differentiable

from evaat_fast.ops._core.register import register
from evaat_fast.ops.rope3d.freqs import table_of
from evaat_fast.ops.rope3d.launch import empty, launch

_SETTINGS = (
    "Tensor? freqs, Tensor? positions, Tensor? k_positions, SymInt[] grid, SymInt prefix_tokens, bool interleaved, bool rope, "
    "Tensor? cu_seqlens, float scale"
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
    *_, rope, _, _, keep = arguments
    turned = (_output(q) if rope and keep else q.new_empty(0), empty(k) if rope else k.new_empty(0))
    return _output(q), q.new_empty(q.shape[:3], dtype=torch.float32), *turned


@register(
    f"attn_forward(Tensor q, Tensor k, Tensor v, {_SETTINGS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
@torch.no_grad()
def attn_forward(q, k, v, *arguments):
    """(output, log-sum-exps float32 [B, H, N], turned queries if keep, turned keys); what is not turned is empty."""
    from evaat_fast.kernels.attn import forward as kernels

    *rotation, cu, scale, keep = arguments
    prefix_tokens, interleaved = rotation[4:6]
    table, k_table = _tables(*rotation, q)
    out, lse, turned_q, turned_k = _fake_forward(q, k, v, *arguments)
    if table is not None:
        launch([k], [turned_k], k_table, prefix_tokens, interleaved, False, "triton")
    keys, kept = (k, None) if table is None else (turned_k, turned_q if keep else None)
    kernels.forward(q, keys, v, out, lse, kept, table, prefix_tokens, interleaved, scale, cu)
    return out, lse, turned_q, turned_k


def _fake_backward(grad, grad_lse, q, k, v, *others):
    return _output(q), _output(k), _output(v)


@register(
    f"attn_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS}, "
    "bool need_q, bool need_kv, bool one_pass) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
@torch.no_grad()
def attn_backward(grad, grad_lse, q, k, v, out, lse, *arguments):
    """The gradients of the queries, keys and values as they were before they were turned; q and k: turned. Those that are not
    needed are not written."""
    *rotation, cu, scale, need_q, need_kv, one_pass = arguments
    prefix_tokens, interleaved = rotation[4:6]
    grads = _fake_backward(grad, grad_lse, q, k, v)
    wanted = (grads[0] if need_q else None, *(grads[1:] if need_kv else (None, None)))
    launch_backward(
        q, k, v, out, grad, lse, grad_lse, wanted, _tables(*rotation, q), prefix_tokens, interleaved, scale, cu, one_pass
    )
    return grads


def launch_backward(q, k, v, out, grad, lse, grad_lse, grads, tables, prefix_tokens, interleaved, scale, cu, one_pass):
    """Writes the gradients that are not None; with one_pass, where all are wanted, in one pass that is not deterministic."""
    from evaat_fast.kernels.attn import backward as kernels

    B, H, N, D = q.shape
    sums = None
    if one_pass and all(x is not None for x in grads):
        sums = q.new_zeros((B * H, N, kernels.padded(D)), dtype=torch.float32)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    arguments = (q, k, v, out, grad, lse, grad_lse, torch.empty_like(lse), sums, grads, tables)
    kernels.backward(*arguments, prefix_tokens, interleaved, scale, cu)


def rows(x):
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


class _Attend(torch.autograd.Function):
    """Saves the turned queries and keys, the values, the output and its log-sum-exps: memory is linear in N."""

    @staticmethod
    def forward(ctx, q, k, v, one_pass, *settings):
        out, lse, turned_q, turned_k = attn_forward(q, k, v, *settings, True)
        freqs, positions, k_positions, *ctx.settings, rope, cu, ctx.scale = settings
        ctx.rope, ctx.one_pass, saved = rope, one_pass, (turned_q if rope else q, turned_k if rope else k, v, out, lse)
        ctx.save_for_backward(*saved, freqs, positions, k_positions, cu)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse, *rotation, cu = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        need_q, *need_kv = ctx.needs_input_grad[:3]
        arguments = (*rotation, *ctx.settings, ctx.rope, cu, ctx.scale, need_q, any(need_kv), ctx.one_pass)
        grads = attn_backward(rows(grad), grad_lse, q, k, v, out, lse, *arguments)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 10


def attend(q, k, v, rotation, cu, scale, one_pass):
    """(output, log-sum-exps) of checked tensors; rotation: freqs, positions, k_positions, grid, prefix_tokens, interleaved, and
    whether to rotate at all. cu: limits of the clips packed into the tokens, or None. one_pass: of the backward pass."""
    if scale < 0:
        q, scale = -q, -scale
    q, k, v = rows(q), rows(k), rows(v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # Dynamo takes no tensor twice.
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
        return _Attend.apply(q, k, v, one_pass, *rotation, cu, scale)
    return attn_forward(q, k, v, *rotation, cu, scale, False)[:2]
