"""joint_attention in timm's models with rotary embeddings: EVA-02, ViT-RoPE, DINOv3, Perception Encoder.

model = timm.create_model("eva02_base_patch14_224")
accelerate(model)      # the same results, parameters and state dict; restore(model) undoes it

timm rotates queries and keys with slices, concatenations and five elementwise passes for each; here each is one fused pass, and
the rest is joint_attention. What it has not (a mask, causal order, dropout of scores) is left to torch's attention, and what
timm computes otherwise (frequencies that learn, attention that is not fused) to timm.
"""

import types

import torch
from torch.nn import functional as F

from evaat_fast.ops.attn.attn import attention_by_table
from evaat_fast.ops.rope3d.rope3d import rotate_by_table

_ATTENTIONS = ("EvaAttention", "AttentionRope")
# What timm's own forward passes read (1.0.31): one that reads more does something that ours does not know of.
_KNOWN = frozenset(
    "F apply_rot_embed_cat attn_dim attn_drop cat fused_attn gate getattr head_dim k_bias k_norm k_proj linear maybe_add_mask "
    "norm num_heads num_kv_groups num_kv_heads num_prefix_tokens p permute proj proj_drop q_bias q_norm q_proj qkv "
    "qkv_bias_separate repeat_interleave reshape resolve_self_attn_mask rotate_half scale scaled_dot_product_attention shape "
    "sigmoid softmax torch training transpose type_as unbind v_bias v_proj weight".split()
)


def accelerate(model):
    """Makes every rotary attention of a timm model use joint_attention.

    Args:
        model: a torch.nn.Module with timm's EvaAttention or AttentionRope in it. Changed in place; accelerating it twice is
            accelerating it once.

    Returns:
        model.

    Raises:
        TypeError: model is no module. ValueError: it has no such attention, or one of a timm that does more in it.
    """
    attentions = _attentions(model)
    for module in attentions:
        unknown = set(type(module).forward.__code__.co_names) - _KNOWN
        if unknown:
            raise ValueError(
                f"model: this timm's {type(module).__name__} does what is not known here: {', '.join(sorted(unknown))}"
            )
    for module in attentions:
        module.forward = types.MethodType(_forward, module)
    return model


def restore(model):
    """Undoes `accelerate`. Args, Returns, Raises: as it."""
    for module in _attentions(model):
        module.__dict__.pop("forward", None)
    return model


def _attentions(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [m for m in model.modules() if type(m).__name__ in _ATTENTIONS and type(m).__module__.startswith("timm.")]
    if not found:
        raise ValueError(f"model: expected timm's {' or '.join(_ATTENTIONS)} in it, found none in {type(model).__name__}")
    return found


def _forward(self, x, rope=None, attn_mask=None, is_causal=False):
    """timm's, with the rotation and the attention replaced."""
    table = None if rope is None else _table(self, rope)
    if not self.fused_attn or (rope is not None and table is None):
        others = {"is_causal": True} if is_causal else {}
        return type(self).forward(self, x, rope=rope, attn_mask=attn_mask, **others)
    gate = None if getattr(self, "gate", None) is None else self.gate(x).sigmoid()
    q, k, v = _heads(self, x)
    q, k = self.q_norm(q), self.k_norm(k)
    rotation = table, self.num_prefix_tokens, not getattr(self, "rotate_half", False)
    dropout = self.attn_drop.p if self.training else 0.0
    if attn_mask is None and not is_causal and dropout == 0.0:
        out = attention_by_table(q, k, v, *rotation)
    else:
        if table is not None:
            q, k = (rotate_by_table(x, *rotation).to(v.dtype) for x in (q, k))
        options = dict(attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, **options)
    out = self.norm(out.transpose(1, 2).flatten(2))
    return self.proj_drop(self.proj(out if gate is None else out * gate))


def _heads(self, x):
    """Queries, keys and values [B, H, N, D]."""
    split = lambda rows, heads: rows.unflatten(2, (heads, -1)).transpose(1, 2)  # noqa: E731
    if self.qkv is None:
        key_heads = getattr(self, "num_kv_heads", self.num_heads)
        return split(self.q_proj(x), self.num_heads), split(self.k_proj(x), key_heads), split(self.v_proj(x), key_heads)
    if getattr(self, "q_bias", None) is None:
        qkv = self.qkv(x)
    else:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = self.qkv(x) + bias if getattr(self, "qkv_bias_separate", False) else F.linear(x, self.qkv.weight, bias)
    return (x.transpose(1, 2) for x in qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2))


def _table(self, rope):
    """Cosines and sines of timm's `rope`, or None: it is learning, or has a shape that is not known here."""
    if not 2 <= rope.ndim <= 4 or (rope.requires_grad and torch.is_grad_enabled()):
        return None
    # [N, 2D] or, after patch dropout, [B, 1, N, 2D]; with frequencies per head [H, N, 2D] or [B, H, N, 2D].
    rope = rope.reshape(*[1] * (4 - rope.ndim), *rope.shape)
    if rope.shape[1] != 1 and {self.num_heads, getattr(self, "num_kv_heads", self.num_heads)} != {rope.shape[1]}:
        return None
    sin, cos = rope.detach().float().chunk(2, -1)
    D = cos.shape[-1]
    pairs = slice(0, D // 2) if getattr(self, "rotate_half", False) else slice(0, D, 2)
    return torch.stack((cos[..., pairs], sin[..., pairs]))
