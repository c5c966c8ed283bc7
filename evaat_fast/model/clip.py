"""EVA02-AT: a vision tower, a text tower, one embedding space."""

import importlib
import inspect
import math
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaat_fast.model.configs import ModelConfig
from evaat_fast.model.recompute import Mode, check_mode
from evaat_fast.model.text import TextTransformer
from evaat_fast.model.vision import VisionTransformer
from evaat_fast.model.vit import ClipVisionTransformer

_VARIANTS = 32  # of what is compiled of a block


class Embeddings(TypedDict):
    """What a forward pass returns; an embedding is None where its input was left out."""

    image_embed: Tensor | None
    text_embed: Tensor | None
    logit_scale: Tensor


class EVA02AT(nn.Module):
    """The video-text model of EVA02-AT (arXiv 2506.14356).

    Args:
        config: a ModelConfig.

    `visual` and `text` are the towers, `logit_scale` the logarithm of the inverse temperature (learnable; the paper
    keeps it fixed: `model.logit_scale.requires_grad_(False)`). The vision tower may also be one of CLIP's (`config.tower`).
    """

    visual: VisionTransformer | ClipVisionTransformer

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config) if config.tower == "eva02" else ClipVisionTransformer(config)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    def encode_video(self, video: Tensor, normalize: bool = False, patches: Tensor | None = None) -> Tensor:
        """Embeds clips.

        Args:
            video: uint8 [B, T, H, W, 3], normalised inside with the configuration's `norm`; or float [B, 3, T, H, W]
                in the model's dtype (any under autocast), already normalised.
            normalize: True for unit length.
            patches: int64 [B, N'] of `evaat_fast.model.draw_patches`: the patches that each clip keeps, for patch dropout in
                training. None: all.

        Returns:
            [B, E].

        Raises:
            TypeError, ValueError: a dtype, device or shape that does not fit the model, naming what was expected.
        """
        features = self.visual(video, patches)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeds captions.

        Args:
            text: int64 or int32 token ids [B, L], L at most 77, from `get_tokenizer()`.
            normalize: True for unit length.

        Returns:
            [B, E].

        Raises:
            TypeError, ValueError: a dtype, device or shape that does not fit the model, naming what was expected.
        """
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, video: Tensor | None = None, text: Tensor | None = None, patches: Tensor | None = None) -> Embeddings:
        """Both embeddings, for a contrastive loss. patches: as for `encode_video`.

        Returns:
            dict(image_embed, text_embed, logit_scale): unit embeddings [B, E], None for an input left out, and the
            multiplier of the logits, already exponentiated.
        """
        return {
            "image_embed": None if video is None else self.encode_video(video, normalize=True, patches=patches),
            "text_embed": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }

    def set_grad_checkpointing(self, enable: Mode = True) -> None:
        """What each block keeps for its backward pass: True, only its input; "selective", all but what is cheap to compute
        again, as `evaat_fast.model.recompute` counts it; False, everything.

        Raises:
            ValueError: another value.
        """
        check_mode(enable)
        self.visual.grad_checkpointing = enable
        self.text.transformer.grad_checkpointing = enable

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile for each block of both towers, in place; names and the state dict stay. Blocks of a kind share what
        is compiled (the first, those between, the last of the vision tower), once for training and once for evaluation, so
        the wait is that of a few blocks, not of the model. A second number of clips compiles them for any, and a single clip
        once more: a vision block is compiled 18 times in all, and by itself Dynamo would stop after 8.

        Args:
            options: of torch.compile.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options = {"recompile_limit": _VARIANTS, **options}
        else:  # an older torch, which has one limit for all
            config: Any = importlib.import_module("torch._dynamo.config")
            config.recompile_limit = max(config.recompile_limit, _VARIANTS)
        for block in (*self.visual.blocks, *self.text.transformer.resblocks):
            block.compile(**options)

    @property
    def matrix_dtype(self) -> torch.dtype:
        """Of the weights of matrix products."""
        return self.text.text_projection.dtype

    @torch.no_grad()
    def hold_matrices(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Rounds the weights and biases of matrix products to `dtype`, in place: the towers then need no autocast. What meets
        the float32 stream stays as it is: norms, embeddings, the temperature. A bfloat16 table of tokens would cost a step of
        training more bytes than it saves: few of its rows are read, and all of it would be rounded anew.

        Args:
            dtype: bfloat16 as a rule, or float16.

        Returns:
            The parameters that were rounded, by name, as they were: masters for an optimiser.

        Raises:
            TypeError: another dtype.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype!r}")
        exact, kept = {}, self.meets_stream()
        for name, parameter in self.named_parameters():
            if name not in kept and parameter.dtype != dtype:
                exact[name], parameter.data = parameter.data, parameter.data.to(dtype)
        return exact

    def meets_stream(self) -> set[str]:
        """Names of the parameters that meet the stream and are none of a matrix product: see `hold_matrices`."""
        kept = self.no_weight_decay() | {"logit_scale", "text.token_embedding.weight", "visual.freqs"}
        for place, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                kept |= {f"{place}.{name}" for name, _ in module.named_parameters()}
        return kept

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings that weight decay should leave alone, besides vectors and scalars."""
        temporal = {"visual.temporal_embed"} if self.config.temporal_embed else set()
        return {"visual.cls_token", "visual.pos_embed", "text.positional_embedding"} | temporal
