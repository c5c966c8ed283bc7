"""rope3d in timm's models with rotary embeddings: EVA-02, ViT-RoPE, DINOv3, Perception Encoder.

model = timm.create_model("eva02_base_patch14_224")
accelerate(model)      # the same results, parameters and state dict; restore(model) undoes it

timm rotates queries and keys with slices, concatenations and five elementwise passes for each; here each is one fused pass. The
attention modules are not rewritten: a hook takes `rope` from their call, and hooks on q_norm and k_norm, which timm calls right
before it would rotate, do the rotation.
"""

import torch

from evaat_fast.ops.rope3d import rotate_by_table

_ATTENTIONS = ("EvaAttention", "AttentionRope")
_HANDLES = "_evaat_fast_hooks"


def accelerate(model):
    """Makes every rotary attention of a timm model use rope3d.

    Args:
        model: a torch.nn.Module with timm's EvaAttention or AttentionRope in it. Changed in place; accelerating it twice is
            accelerating it once.

    Returns:
        model.

    Raises:
        TypeError: model is no module. ValueError: it has no such attention.
    """
    for module in _attentions(model):
        if not hasattr(module, _HANDLES):
            setattr(module, _HANDLES, _Rotation(module).handles)
    return model


def restore(model):
    """Undoes `accelerate`. Args, Returns, Raises: as it."""
    for module in _attentions(model):
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
    return model


def _attentions(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [m for m in model.modules() if type(m).__name__ in _ATTENTIONS and type(m).__module__.startswith("timm.")]
    if not found:
        raise ValueError(f"model: expected timm's {' or '.join(_ATTENTIONS)} in it, found none in {type(model).__name__}")
    return found


class _Rotation:
    """The hooks of one attention module, and the table of the call that is under way."""

    def __init__(self, module):
        self.table = None
        self.handles = (
            module.register_forward_pre_hook(self.take, with_kwargs=True),
            module.q_norm.register_forward_hook(self.rotate),
            module.k_norm.register_forward_hook(self.rotate),
            module.register_forward_hook(self.drop, always_call=True),
        )
        self.prefix, self.interleaved = module.num_prefix_tokens, not getattr(module, "rotate_half", False)
        self.heads = {module.num_heads, getattr(module, "num_kv_heads", module.num_heads)}

    def take(self, module, args, kwargs):
        """Takes `rope` out of the call, unless it is learning or has a shape that is not timm's."""
        rope = kwargs.get("rope", args[1] if len(args) > 1 else None)
        if rope is None or not 2 <= rope.ndim <= 4 or (rope.requires_grad and torch.is_grad_enabled()):
            return None
        # [N, 2D] or, after patch dropout, [B, 1, N, 2D]; with frequencies per head [H, N, 2D] or [B, H, N, 2D].
        rope = rope.reshape(*[1] * (4 - rope.ndim), *rope.shape)
        if rope.shape[1] != 1 and self.heads != {rope.shape[1]}:
            return None
        sin, cos = rope.detach().float().chunk(2, -1)
        D = cos.shape[-1]
        pairs = slice(0, D, 2) if self.interleaved else slice(0, D // 2)
        self.table = torch.stack((cos[..., pairs], sin[..., pairs]))
        if len(args) > 1:
            return (args[0], None, *args[2:]), kwargs
        return args, {**kwargs, "rope": None}

    def rotate(self, module, args, x):
        if self.table is None:
            return None
        return rotate_by_table(x, self.table, self.prefix, self.interleaved).to(args[0].dtype)

    def drop(self, *call):
        self.table = None
