"""joint_attention as an attention implementation of transformers.

register()
model = AutoModel.from_pretrained("facebook/vjepa2-vitl-fpc64-256", attn_implementation="evaat_fast")

transformers' models rotate queries and keys themselves, so this is the attention alone. It has no mask, no causal order and no
dropout: a model that asks for one gets an error, not another attention. Where one tower of several asks, the implementation can
be chosen for each: attn_implementation={"vision_config": "evaat_fast", "text_config": "sdpa"}.

A model holds the name, not this function: its copies and its pickles load wherever `register` has been called.
"""

from typing import Any

from torch import Tensor, nn

from evaat_fast.ops.attn.attn import joint_attention

__all__ = ["attention", "register"]


def register(name: str = "evaat_fast") -> None:
    """Makes `name` an attention implementation that transformers' models accept (transformers 4.51 and later).

    Args:
        name: what `attn_implementation` is to be. Registering twice is registering once.

    Returns:
        None.

    Raises:
        ImportError: transformers is not installed, or older.
        TypeError: name is no string.

    Source: transformers.AttentionInterface (https://github.com/huggingface/transformers).
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


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls.

    Args:
        module: the model's attention; its `is_causal` holds where the argument is None.
        query: [B, H, N, D]. key, value: [B, Hk, M, D] with H a multiple of Hk.
        attention_mask, dropout, is_causal: to be none, zero and false.
        scaling: factor of the scores, D**-0.5 by default.
        options: what else transformers passes; what would change the scores is to be None.

    Returns:
        ([B, N, H, D], None): the result, and no weights.

    Raises:
        ValueError: a mask, causal order, dropout, or an option that changes the scores is asked for; also as `joint_attention`.

    Source: sdpa_attention_forward of transformers.
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
