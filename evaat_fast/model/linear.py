"""Linear layers whose bias learns elsewhere: in the norm that reads their output.

    bias = open_bias(layer, "add_norm", x)
    normed, stream = ops.add_norm(product(layer, x, bias), stream, norm.weight, norm.bias, x_bias=bias)

The gradient of a bias is the column sums of its output's gradient, for which torch passes over that once more. Where the output
goes into `ops.add_norm` or `ops.swiglu_norm`, their backward kernel has it in registers. What the layer computes is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaat_fast.ops._core.register import traced
from evaat_fast.ops._core.tensor import is_transformed
from evaat_fast.ops.norm.norm import sums_columns

# A private name, hence the getattr: without it no bias is taken.
_has_global_hook = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is its weight, so that a product may read that; adapters and quantised layers must be called."""
    return getattr(type(linear), "forward", None) is nn.Linear.forward


def open_bias(linear: nn.Module, op: str, x: Tensor, *around: nn.Module) -> Tensor | None:
    """The bias of a layer whose output `op` ("add_norm" or "swiglu_norm") reads, if it had better learn there: a kernel serves
    on x's device, and the layer need not be called. x: what the layer is given, or of the same dtype and device. around:
    modules that end between the layer and the op; one with hooks, as FSDP's, may take its parameters back then."""
    if not torch.is_grad_enabled() or not sums_columns(op, x) or not is_plain(linear):
        return None
    weight, bias = linear.weight, linear.bias
    if not isinstance(bias, Tensor) or not bias.requires_grad or not isinstance(weight, Tensor):
        return None
    if traced(type(x), type(weight), type(bias)) or is_transformed(bias):
        return None
    return bias if all(map(_stands_alone, (linear, *around))) else None


def _stands_alone(module):
    """Whether a call of a module is its class's forward and nothing else."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return not (_has_global_hook() or "forward" in vars(module) or module._compiled_call_impl is not None)


def product(linear: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """linear(x); with the layer's bias, if that is to learn elsewhere."""
    if bias is None:
        return linear(x)
    assert isinstance(linear.weight, Tensor)
    return F.linear(x, linear.weight, bias.detach())
