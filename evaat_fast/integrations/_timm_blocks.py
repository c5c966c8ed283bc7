"""timm's EVA blocks and gated MLPs with add_norm and swiglu_norm in them: subclasses, as those of `_timm_attention`.

Between its matrix products a block waits for memory, so bytes decide where ours serves. M rows, D channels, H hidden ones.

EvaBlock, its first sum and norm2, bytes a number: of a float32 x under autocast timm moves 10 for the sum, 8 for the norm and 6
for each product that casts the norm, ours 12 in all; in float32 20 against 16. Of a bfloat16 x both move 10, and ours 6 more to
give its float32 sum x's dtype: there timm's stays.

SwiGLU, numbers: timm moves 2 M H for silu, 3 M H for the product, 2 M H for the norm, ours 3 M H in all. It wants gates and
values side by side: to lay two outputs so would cost 4 M H, the weights 4 D H (their gradients are two views), and one product
in place of two reads x once and has no two gradients of x to add. The least that is saved is 2 M H, forward and without a norm,
and autocast rounds the weights after they were laid out in float32, which is twice as wide. So ours serves from M = 4 D on.
Until the backward pass it keeps the 2 D H weights, but neither silu nor the product, 2 M H.

GluMlp: its fc1 lays them so already. With the gate last the halves would have to change places: there timm's stays.
"""

from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from evaat_fast.integrations._timm_attention import JOINT, named
from evaat_fast.ops._core.autocast import autocast_dtype
from evaat_fast.ops._core.tensor import keeps_numbers_elsewhere
from evaat_fast.ops.norm.norm import add_norm, sums_columns, swiglu_norm

__all__ = ["FUSED", "FusedEvaBlock", "FusedGluMlp", "FusedSwiGLU"]

_ROWS_PER_CHANNEL = 4  # from which on SwiGLU's weights are laid side by side
# A private name, hence the getattr: without it no call is ours.
_has_global_hook = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)


class FusedEvaBlock(EvaBlock):
    """timm's EvaBlock with the first sum in norm2. Under autocast its MLP is given autocast's dtype, to which it would cast."""

    _theirs = named("_theirs", EvaBlock.forward)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if torch.jit.is_scripting():
            return self._theirs(x, rope, attn_mask, is_causal)
        else:
            is_ours = _is_ours(x, self.norm2) and x.dtype == torch.float32 and FusedEvaBlock.fits(self)
            return (self.fused if is_ours else self._theirs)(x, rope, attn_mask, is_causal)

    def fits(self) -> bool:
        """Whether `fused` computes what timm does: norm2 is what add_norm computes, and branches cast what they are given."""
        return type(self.attn) in _ATTENTIONS and type(self.mlp) in _MLPS and _is_layer_norm(self.norm2)

    def fused(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The block, whatever the call. add_norm's sum is float32, which is x's dtype where `forward` comes here."""
        branch = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        branch = self.drop_path1(branch if self.gamma_1 is None else self.gamma_1 * branch)
        normed, total = add_norm(branch, x, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        branch = self.mlp(normed)
        return total + self.drop_path2(branch if self.gamma_2 is None else self.gamma_2 * branch)


class FusedSwiGLU(SwiGLU):
    """timm's SwiGLU, EVA-02's with its inner norm, by swiglu_norm and one product for gate and value."""

    _theirs = named("_theirs", SwiGLU.forward)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._theirs(x)
        else:
            is_ours = _is_ours(x, self.fc1_g, self.fc1_x, self.act, self.drop1, self.norm) and FusedSwiGLU.fits(self)
            pays = is_ours and x.numel() >= _ROWS_PER_CHANNEL * x.shape[-1] ** 2
            return (self.fused if pays and not _drops(self) else self._theirs)(x)

    def fits(self) -> bool:
        """Whether `fused` computes what timm does in eval()."""
        gate, value = self.fc1_g, self.fc1_x
        linear = _is_plain(gate, nn.Linear) and _is_plain(value, nn.Linear) and (gate.bias is None) == (value.bias is None)
        return linear and _are_bare(gate.weight, gate.bias, value.weight, value.bias) and _has_our_inside(self)

    def fused(self, x: Tensor) -> Tensor:
        """The MLP, whatever the call, without dropout inside."""
        gate, value = self.fc1_g, self.fc1_x
        bias = None if gate.bias is None else torch.cat((gate.bias, value.bias))
        weight = torch.cat((gate.weight, value.weight))
        if bias is None or not bias.requires_grad or not sums_columns("swiglu_norm", x):
            return _rest(self, F.linear(x, weight, bias))
        return _rest(self, F.linear(x, weight, bias.detach()), bias)


class FusedGluMlp(GluMlp):
    """timm's GluMlp as EVA has it, gates first and SiLU, by swiglu_norm."""

    _theirs = named("_theirs", GluMlp.forward)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._theirs(x)
        else:
            is_ours = _is_ours(x, self.act, self.drop1, self.norm) and FusedGluMlp.fits(self) and not _drops(self)
            return (self.fused if is_ours else self._theirs)(x)

    def fits(self) -> bool:
        """Whether `fused` computes what timm does in eval()."""
        return not self.gate_last and self.chunk_dim == -1 and _has_our_inside(self)

    def fused(self, x: Tensor) -> Tensor:
        """The MLP, whatever the call, without dropout inside."""
        return _rest(self, self.fc1(x))


def _is_ours(x: Any, *passed_over: nn.Module) -> bool:
    """Whether a call is one that kernels serve, or one that is no slower by plain torch, and no hook is passed over with the
    modules that are not called."""
    # A trace is to be loaded where evaat_fast is not; torch.fx is to find the nodes of timm's modules; a compiler fuses timm's
    # passes itself.
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy):
        return False
    hooks = ((m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks) for m in passed_over)
    if _has_global_hook() or any(map(any, hooks)):
        return False
    # Elsewhere the ops are the reference: in float32 timm's very passes, below it wider ones.
    return x.dtype != torch.float64 if x.is_cuda else x.dtype == torch.float32 and autocast_dtype(x.device.type) is None


def _is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether its class, one of these, says what a module computes."""
    return type(module) in classes and "forward" not in vars(module)


def _are_bare(*weights: Tensor | None) -> bool:
    """Whether none is a wrapper (distributed, quantized), which may know other operators than ours."""
    return not any(keeps_numbers_elsewhere(type(w)) for w in weights)


def _is_layer_norm(norm: Any) -> bool:
    """Over the last dimension, with a weight. timm's fast norm is another under autocast."""
    if not _is_plain(norm, nn.LayerNorm, LayerNorm) or getattr(norm, "_fast_norm", False):
        return False
    return len(norm.normalized_shape) == 1 and norm.weight is not None and _are_bare(norm.weight, norm.bias)


def _has_our_inside(mlp: Any) -> bool:
    norm = _is_plain(mlp.norm, nn.Identity) or _is_layer_norm(mlp.norm)
    return norm and _is_plain(mlp.act, nn.SiLU) and _is_plain(mlp.drop1, nn.Dropout)


def _drops(mlp: Any) -> bool:
    return mlp.drop1.training and mlp.drop1.p > 0


def _rest(mlp: Any, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """An MLP's result of gates and values side by side. x_bias: theirs, if it learns here."""
    norm = mlp.norm
    if isinstance(norm, nn.Identity):
        x = swiglu_norm(x, None, None, x_bias=x_bias)
    else:
        x = swiglu_norm(x, norm.weight, norm.bias, norm.eps, x_bias=x_bias)
    return mlp.drop2(mlp.fc2(x))


# Theirs and ours: what a block holds may have been exchanged.
_ATTENTIONS = frozenset((*JOINT, *JOINT.values()))
_MLPS = frozenset((Mlp, GluMlp, SwiGLU, FusedGluMlp, FusedSwiGLU))
FUSED: dict[type[nn.Module], Any] = {EvaBlock: FusedEvaBlock, SwiGLU: FusedSwiGLU, GluMlp: FusedGluMlp}
