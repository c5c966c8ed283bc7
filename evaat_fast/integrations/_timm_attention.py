"""timm's attention modules with joint_attention in them: subclasses that add nothing but their forward.

A module of timm becomes one by an exchange of its class, so parameters, state dict, hooks, copies and replicas stay what they
were. Pickles of whole models name these classes, so their names and this module's are here to stay.
"""

import types

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch.nn import functional as F

from evaat_fast.ops.attn.attn import attention_by_table
from evaat_fast.ops.attn.layout import gradient_like
from evaat_fast.ops.rope3d.rope3d import rotate_by_table

__all__ = ["JointAttentionRope", "JointEvaAttention", "rotary_attention"]


def _forward(self, x, rope: torch.Tensor | None = None, attn_mask: torch.Tensor | None = None, is_causal: bool = False):  # type: ignore[no-untyped-def]
    """timm's, with the rotation and the attention replaced. TorchScript compiles the first branch alone: timm's own."""
    if torch.jit.is_scripting():
        return self._theirs(x, rope, attn_mask, is_causal)
    else:
        return _joint(self, x, rope, attn_mask, is_causal)


def _joint(self, x, rope, attn_mask, is_causal):
    # A trace is to be loaded where evaat_fast is not. timm's attention that is not fused is there to be looked into.
    if torch.jit.is_tracing() or not self.fused_attn:
        return self._theirs(x, rope, attn_mask, is_causal)
    gate = None if getattr(self, "gate", None) is None else self.gate(x).sigmoid()
    q, k, v = _heads(self, x)
    out = rotary_attention(
        self.q_norm(q),
        self.k_norm(k),
        v,
        rope,
        attn_mask,
        self.num_prefix_tokens,
        not getattr(self, "rotate_half", False),
        self.attn_drop.p if self.training else 0.0,
        is_causal,
    )
    out = self.norm(out.transpose(1, 2).flatten(2))
    return self.proj_drop(self.proj(out if gate is None else out * gate))


def _heads(self, x):
    """Queries, keys and values [B, H, N, D]."""
    if self.qkv is None:
        q = self.q_proj(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key_heads = getattr(self, "num_kv_heads", self.num_heads)
        k, v = (project(x).unflatten(2, (key_heads, -1)).transpose(1, 2) for project in (self.k_proj, self.v_proj))
        return q, k, v
    if getattr(self, "q_bias", None) is None:
        qkv = self.qkv(x)
    else:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
    # Unpacked by name: torch.fx can trace that, and no loop over what it stands in for.
    q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@torch.fx.wrap
def rotary_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    prefix_tokens: int,
    interleaved: bool,
    dropout: float,
    is_causal: bool,
) -> torch.Tensor:
    """Attention with timm's rotary embedding: one node of a graph that torch.fx traces.

    Args:
        q: [B, H, N, D]. k, v: [B, Hk, N, D] with H a multiple of Hk.
        rope: timm's sines and cosines [N - prefix_tokens, 2D], with [B, 1] or [H] or [B, H] before them, or None.
        attn_mask, dropout, is_causal: of torch's scaled_dot_product_attention, which serves where one is asked for.
        prefix_tokens: leading tokens that are not rotated.
        interleaved: pairs are channels (2c, 2c + 1); False: (c, c + D/2).

    Returns:
        [B, H, N, D] of v's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit each other.

    Source: AttentionRope and EvaAttention of timm.
    """
    if torch.jit.is_scripting():  # what torch.fx traced can be scripted too, then with timm's rotation
        if rope is not None:
            q = _timm_rotation(q, rope, prefix_tokens, interleaved).type_as(v)
            k = _timm_rotation(k, rope, prefix_tokens, interleaved).type_as(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, enable_gqa=q.shape[1] != k.shape[1])
    else:
        return _attend(q, k, v, rope, attn_mask, prefix_tokens, interleaved, dropout, is_causal)


def _attend(q, k, v, rope, attn_mask, prefix_tokens, interleaved, dropout, is_causal):
    table = None if rope is None else _table(rope, q.shape[1], k.shape[1], interleaved)
    if rope is not None and table is None:
        q, k = (_timm_rotation(x, rope, prefix_tokens, interleaved).type_as(v) for x in (q, k))
    if attn_mask is None and not is_causal and dropout == 0.0:
        return attention_by_table(q, k, v, table, prefix_tokens, interleaved)
    if table is not None:
        q, k = (rotate_by_table(x, table, prefix_tokens, interleaved).to(v.dtype) for x in (q, k))
    groups = q.shape[1] != k.shape[1]
    return gradient_like(F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, enable_gqa=groups))


def _table(rope, heads, key_heads, interleaved):
    """Cosines and sines of timm's `rope` for `rotate_by_table`, or None: it is learning, or has a shape not known here."""
    if not 2 <= rope.ndim <= 4 or (rope.requires_grad and torch.is_grad_enabled()):
        return None
    # [N, 2D] or, after patch dropout, [B, 1, N, 2D]; with frequencies per head [H, N, 2D] or [B, H, N, 2D].
    rope = rope.reshape(*[1] * (4 - rope.ndim), *rope.shape)
    if rope.shape[1] != 1 and {heads, key_heads} != {rope.shape[1]}:
        return None
    sin, cos = rope.detach().float().chunk(2, -1)
    D = cos.shape[-1]
    pairs = slice(0, D, 2) if interleaved else slice(0, D // 2)
    return torch.stack((cos[..., pairs], sin[..., pairs]))


def _timm_rotation(x: torch.Tensor, rope: torch.Tensor, prefix_tokens: int, interleaved: bool) -> torch.Tensor:
    rotated = apply_rot_embed_cat(x[:, :, prefix_tokens:], rope, half=not interleaved)
    return torch.cat((x[:, :, :prefix_tokens], rotated), 2)


def named(name: str, function: types.FunctionType) -> types.FunctionType:
    """The function under another name, by which TorchScript compiles it beside a method of the first."""
    copy = types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__ = function.__annotations__
    return copy


class JointEvaAttention(EvaAttention):
    """timm's EvaAttention by joint_attention."""

    _theirs = named("_theirs", EvaAttention.forward)
    forward = _forward


class JointAttentionRope(AttentionRope):
    """timm's AttentionRope by joint_attention."""

    _theirs = named("_theirs", AttentionRope.forward)
    forward = _forward


JOINT: dict[type[torch.nn.Module], type[torch.nn.Module]] = {EvaAttention: JointEvaAttention, AttentionRope: JointAttentionRope}
