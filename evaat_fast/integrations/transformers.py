"""joint_attention as an attention implementation of transformers.

register()
model = AutoModel.from_pretrained("facebook/vjepa2-vitl-fpc64-256", attn_implementation="evaat_fast")

transformers' models rotate queries and keys themselves, so this is the attention alone. It has no mask, no causal order and no
dropout: a model that asks for one gets an error, not another attention. Where one tower of several asks, the implementation can
be chosen for each: attn_implementation={"vision_config": "evaat_fast", "text_config": "sdpa"}.
"""

from evaat_fast.ops.attn.attn import joint_attention


def register(name="evaat_fast"):
    """Makes `name` an attention implementation that transformers' models accept (transformers 4.48 and later).

    Args:
        name: what `attn_implementation` is to be. Registering twice is registering once.

    Raises:
        ImportError: transformers is not installed, or older. TypeError: name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {name!r}")
    from transformers import AttentionInterface

    AttentionInterface.register(name, attention)
    try:
        from transformers import AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:  # before 4.53 every implementation was given the model's mask
        return
    # Without masks of its own an implementation is given none, and padding would be attended to in silence.
    AttentionMaskInterface.register(name, sdpa_mask)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """What transformers calls: query [B, H, N, D], key and value [B, Hk, M, D] to ([B, N, H, D], None).

    Raises:
        ValueError: a mask, causal order, dropout, or an option that changes the scores is asked for.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = {
        "an attention mask": attention_mask is not None,
        "causal order": causal and query.shape[2] > 1,
        "attention dropout": dropout != 0.0,
        **{name: options.get(name) is not None for name in ("softcap", "position_bias", "sliding_window", "s_aux", "cache")},
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f'{type(module).__name__}: evaat_fast\'s attention has no such option: {what}; use attn_implementation="sdpa"'
            )
    return joint_attention(query, key, value, scale=scaling).transpose(1, 2), None
