"""What torch.utils.flop_counter counts for the attention operators: 4 and 10 B H N M D, the rotation not counted."""

import torch


def _products(times):
    """`times` multiplications for every channel of every pair of a query and a key."""

    def count(q, k, *settings, out_val=None):
        *_, cu_seqlens, _max_seqlen, _scale, _backend, _deterministic = settings  # in AttentionPlan's order of fields
        (B, H, N, D), M = q.shape, k.shape[2]
        return times * H * D * (B * N * M if cu_seqlens is None else int(cu_seqlens.diff().long().square().sum()))

    return count


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
        ops.attn_forward: _products(4),
        ops.attn_backward: _products(10),
        ops.attn_qkv_forward_: _packed(4),
        ops.attn_qkv_backward: _packed(10),
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(formula)
