"""What torch.utils.flop_counter counts for the attention operators: 4 and 10 B H N M D, the rotation not counted."""

import importlib.abc
import importlib.util
import sys

import torch

_COUNTER = "torch.utils.flop_counter"


def _products(q, k, cu_seqlens):
    """Multiplications of one product over all pairs of a query and a key."""
    B, H, N, D = q.shape
    if cu_seqlens is None:
        return B * H * N * k.shape[2] * D
    return H * D * int(cu_seqlens.diff().long().square().sum())


def _forward(q, k, v, *settings, out_val=None):
    return 4 * _products(q, k, settings[7])


def _backward(grad, grad_lse, q, k, v, out, lse, *settings, out_val=None):
    return 10 * _products(q, k, settings[7])


def _packed(times):
    return lambda qkv, num_heads, *settings, out_val=None: times * qkv.shape[0] * qkv.shape[1] ** 2 * qkv.shape[2] // 3


def register(counter):
    """Gives the formulas to the module torch.utils.flop_counter."""
    ops = torch.ops.evaat_fast
    backward = _packed(10)
    for op, formula in (
        (ops.attn_forward, _forward),
        (ops.attn_backward, _backward),
        (ops.attn_qkv_forward_, _packed(4)),
        (ops.attn_qkv_backward, lambda grad, grad_lse, qkv, out, lse, *rest, out_val=None: backward(qkv, *rest)),
    ):
        counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """That module imports Triton, 0.2 s for everybody: the formulas wait until somebody else imports it."""

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), register(module))
        return spec


def register_when_imported():
    if _COUNTER in sys.modules:
        register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
