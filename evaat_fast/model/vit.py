"""CLIP's vision tower for clips: attention over all patches, as in AVION, or over time and then over space, as in LaViLa.

One class token, learnable spatial and temporal embeddings, a norm before the blocks, no rotary embedding. With one frame "clip"
is the vision tower of CLIP. Names are timm's, as those of the EVA02 tower. Source: CLIP (arXiv 2103.00020); AVION (arXiv
2309.16669); LaViLa (arXiv 2212.04501), with the attention of Frozen in Time (arXiv 2104.00650).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaat_fast import ops
from evaat_fast.model.configs import ModelConfig
from evaat_fast.model.linear import open_bias, product
from evaat_fast.model.pixels import PatchEmbed, embed
from evaat_fast.model.recompute import Mode, again
from evaat_fast.model.text import gelu
from evaat_fast.ops.attn.layout import gradient_like

LAVILA_EPS = 1e-5  # of the norm before the blocks in LaViLa, whose other norms have 1e-6


class Attention(nn.Module):
    """Self-attention in which the class token and all patches meet."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, N, D] of x [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, class_only: bool = False, bias: Tensor | None = None) -> Tensor:
        """[B, N, C] -> the same, or with `class_only` its first row, [B, 1, C]. bias: of `proj`, if it learns elsewhere."""
        q, k, v = self.split(x)
        out = F.scaled_dot_product_attention(q[:, :, :1] if class_only else q, k, v)
        return self.project(gradient_like(out), bias)

    def left(self, x: Tensor) -> Tensor | None:
        """The bias of `proj`, if it may learn in the norm behind this, which is given x."""
        return open_bias(self.proj, "add_norm", x, self)

    def project(self, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """What attention returned, [B, H, N, D], to [B, N, C]."""
        return product(self.proj, out.transpose(1, 2).flatten(2), bias)


class DividedAttention(Attention):
    """Self-attention in which a patch meets the class token and the patches of its frame, or of its place in all frames; the
    class token meets all."""

    def __init__(self, width: int, heads: int, frames: int, time: bool):
        super().__init__(width, heads)
        self.frames, self.time = frames, time

    def forward(self, x: Tensor, class_only: bool = False, bias: Tensor | None = None) -> Tensor:
        """[B, 1 + T*Hp*Wp, C] -> the same, as `Attention`."""
        q, k, v = self.split(x)
        of_class = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        if class_only:
            return self.project(of_class, bias)
        queries, keys, values = (self._groups(part) for part in (q, k, v))
        keys, values = (
            torch.cat((whole[:, None, :, :1].expand_as(part[:, :, :, :1]), part), 3) for whole, part in ((k, keys), (v, values))
        )
        out = F.scaled_dot_product_attention(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
        out = out.unflatten(0, (-1, queries.shape[1]))
        out = out.permute(0, 2, 3, 1, 4) if self.time else out.transpose(1, 2)  # [B, H, T, Hp*Wp, D]
        return self.project(torch.cat((of_class, out.flatten(2, 3)), 2), bias)

    def _groups(self, x):
        """[B, H, 1 + T*Hp*Wp, D] -> the patches of each group, [B, groups, H, patches, D]."""
        x = x[:, :, 1:].unflatten(2, (self.frames, -1))  # [B, H, T, Hp*Wp, D]
        return x.permute(0, 3, 1, 2, 4) if self.time else x.transpose(1, 2)


def _attend(attention: nn.Module, x: Tensor, class_only: bool = False) -> tuple[Tensor, Tensor | None]:
    """attention(x), and the bias in it that is to learn in the norm behind it."""
    bias = attention.left(x) if type(attention) in (Attention, DividedAttention) else None  # type: ignore[operator]
    return attention(x, class_only) if bias is None else attention(x, class_only, bias), bias


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, quick: bool):
        super().__init__()
        self.quick = quick
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, left: Tensor | None = None) -> Tensor:
        """[..., C] -> the same. left: fc2's bias, if it learns elsewhere."""
        return self.narrow(self.fc1(x), left)

    def narrow(self, x: Tensor, left: Tensor | None) -> Tensor:
        """What follows on fc1."""
        return product(self.fc2, gelu(x, self.quick), left)


class Block(nn.Module):
    """Pre-norm: attention, then MLP; in a divided block, attention over time before that. Stream and open branch go from block
    to block as in the EVA02 tower."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, heads, self.eps = config.vision_width, config.vision_heads, config.vision_eps
        divided = config.tower == "timesformer"
        self.norm1 = nn.LayerNorm(width, self.eps)
        self.attn = DividedAttention(width, heads, config.num_frames, False) if divided else Attention(width, heads)
        self.timeattn = DividedAttention(width, heads, config.num_frames, True) if divided else None
        self.norm2 = nn.LayerNorm(width, self.eps)
        self.mlp = MLP(width, config.vision_mlp, config.activation == "quick_gelu")
        self.norm3 = nn.LayerNorm(width, self.eps) if divided else None

    def forward(
        self,
        branch: Tensor,
        stream: Tensor | None,
        class_only: bool = False,
        selective: bool = False,
        given: Tensor | None = None,
        left: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """branch [B, N, C] and stream, whose sum (or branch alone) is the block's input, to those of its output; with
        `class_only` of its first row, [B, 1, C]. given, left: as of the EVA02 tower's blocks."""
        # The first branch of a tower is a stream, float32 whatever its matrices are; a quantised one has no dtype.
        matrix = getattr(self.attn.proj.weight, "dtype", torch.float32)
        if self.timeattn is None or self.norm3 is None:
            x, stream = self._norm(branch, stream, self.norm1, matrix, given)
        else:
            x, stream = self._norm(branch, stream, self.norm3, matrix, given)
            # What time adds is seen by the attention over space, and is in its input alone: the stream goes on without it.
            branch, bias = _attend(self.timeattn, x)
            x = self._norm(branch, stream, self.norm1, matrix, bias)[0]
        branch, bias = _attend(self.attn, x, class_only)
        stream = stream[:, :1] if class_only else stream
        if selective and not class_only:
            hidden, stream = again(self.widen, branch, stream, bias)
            return again(self.mlp.narrow, hidden, left), stream
        x, stream = self._norm(branch, stream, self.norm2, bias=bias)
        return self.mlp(x) if left is None else self.mlp(x, left), stream

    def left(self, x: Tensor) -> Tensor | None:
        """fc2's bias, if it may learn behind the block, which is given x."""
        return open_bias(self.mlp.fc2, "add_norm", x, self, self.mlp) if type(self.mlp) is MLP else None

    def widen(self, branch: Tensor, stream: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """fc1's output and the new stream."""
        x, stream = self._norm(branch, stream, self.norm2, bias=bias)
        return self.mlp.fc1(x), stream

    def _norm(
        self,
        branch: Tensor,
        stream: Tensor | None,
        norm: nn.LayerNorm,
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return ops.add_norm(branch, stream, norm.weight, norm.bias, self.eps, dtype=dtype, x_bias=bias)


class ClipVisionTransformer(nn.Module):
    """A clip to its embedding.

    Args:
        config: a ModelConfig whose tower is "clip" or "timesformer".
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, self.eps = config.vision_width, config.vision_eps
        frames, rows, columns = config.grid
        self.patch_embed = PatchEmbed(width, config.patch_size, config.norm, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, frames, width)) if config.temporal_embed else None
        self.norm_pre = nn.LayerNorm(width, LAVILA_EPS if config.tower == "timesformer" else self.eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width, self.eps)
        self.head = nn.Linear(width, config.embed_dim, bias=False)
        self.grad_checkpointing: Mode = False
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """AVION's initialisation: a temporal embedding of zeros. Attention over time begins as LaViLa's, adding nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.normal_(embedding, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.timeattn is not None:
                nn.init.zeros_(block.timeattn.qkv.weight)
                nn.init.ones_(block.timeattn.proj.weight)  # or queries, keys and values would have no gradient
        nn.init.normal_(self.head.weight, std=self.config.vision_width**-0.5)

    def forward(self, video: Tensor, patches: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3], or float [B, 3, T, H, W] already normalised, to [B, E].

        patches: int64 [B, N'], which patches of each clip are shown (`evaat_fast.model.draw_patches`); None: all.

        Raises:
            TypeError, ValueError: a dtype, device or shape that does not fit the model, or patches for attention that is
                divided by frames.
        """
        if patches is not None and self.config.tower == "timesformer":
            raise ValueError("patches: attention over time needs all of them; expected None for tower='timesformer'")
        x = embed(self, video, patches)
        x = ops.add_norm(x, None, self.norm_pre.weight, self.norm_pre.bias, self.norm_pre.eps)[0]
        stream, mode = None, self.grad_checkpointing if torch.is_grad_enabled() else False
        given: Tensor | None = None
        for block in self.blocks:
            last = block is self.blocks[-1]
            left = block.left(x) if type(block) is Block and not last else None
            arguments: tuple[Any, ...] = (x, stream, last, mode == "selective", given, left)
            x, stream = again(block, *arguments) if mode and mode != "selective" else block(*arguments)
            given = left
        assert stream is not None  # there is a block
        return self.head(ops.add_norm(x[:, 0], stream[:, 0], self.norm.weight, self.norm.bias, self.eps)[0])
