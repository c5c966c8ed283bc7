"""What torch.utils.flop_counter counts for the attention operators: 4 and 10 B H N M D, the rotation not counted."""

import torch


def _products(q, k, cu_seqlens):
    """Multiplications of one product over all pairs of a query and a key."""
    B, H, N, D = q.shape
    if cu_seqlens is None:
        return B * H * N * k.shape[2] * D
    return H * D * int(cu_seqlens.diff().long().square().sum())


def _limits(settings):
    """cu_seqlens among an operator's flat settings, in AttentionPlan's order of fields."""
    *_, cu_seqlens, _, _, _, _ = settings
    return cu_seqlens


def _forward(q, k, v, *settings, out_val=None):
    return 4 * _products(q, k, _limits(settings))


def _backward(q, k, *settings, out_val=None):
    return 10 * _products(q, k, _limits(settings))


def _packed(times):
    return lambda qkv, *settings, out_val=None: times * qkv.shape[0] * qkv.shape[1] ** 2 * qkv.shape[2] // 3


def register_flop_formulas() -> None:
    """Lets torch.utils.flop_counter.FlopCounterMode count the attention operators: 4 and 10 B H N M D for the two passes, the
    rotation not counted. Call it before the mode is made; a second call changes nothing.

    Not done at import, as that module of torch imports Triton, 0.2 s for everybody.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.evaat_fast
    formulas = {
        ops.attn_forward: _forward,
        ops.attn_backward: _backward,
        ops.attn_qkv_forward_: _packed(4),
        ops.attn_qkv_backward: _packed(10),
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
