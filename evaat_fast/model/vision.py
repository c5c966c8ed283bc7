"""The vision tower of EVA02-AT: EVA-02 blocks in which all patches of a clip attend to each other.

One class token, learnable spatial and temporal embeddings, and the joint rotary embedding of (t, h, w). With one
frame it is the vision tower of EVA02-CLIP. Source: EVA02-AT (arXiv 2506.14356), section 3; EVA-02 (arXiv 2303.11331).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaat_fast import ops
from evaat_fast.model import patches as dropout
from evaat_fast.model.configs import ModelConfig
from evaat_fast.model.linear import is_plain, open_bias, product
from evaat_fast.model.pixels import PatchEmbed, embed
from evaat_fast.model.recompute import Mode, again
from evaat_fast.ops.attn.attn import sums_bias
from evaat_fast.ops.rope3d.table import hold_constant

EPS = 1e-6  # EVA-02's layer norms, unlike CLIP's text
Grid = tuple[int, int, int]


class Attention(nn.Module):
    """Joint space-time attention with a layer norm before the output projection (sub-LN); queries and values have a
    bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, EPS)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        freqs: Tensor,
        positions: Any = None,
        selective: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:
        """[B, 1 + T*Hp*Wp, C] -> the same. positions: of tokens [B, 1 + N', C], where they are not all of a grid. bias: of
        `proj`, if it learns elsewhere."""
        # Joined in each call: two small launches. A single parameter would take one, to keep the key's part of its gradient
        # at zero (a key's bias does not cancel under rotation), and change the names that checkpoints and optimizers know.
        of_qkv, learns = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)), None
        if is_plain(self.qkv):
            learns = of_qkv if of_qkv.requires_grad and sums_bias(x, len(self.q_bias), self.heads) else None
            qkv = F.linear(x, self.qkv.weight, of_qkv if learns is None else of_qkv.detach())
        else:
            qkv = self.qkv(x) + of_qkv
        cells = None if positions is not None else grid
        out = ops.joint_attention_qkv_(qkv, self.heads, cells, freqs=freqs, positions=positions, qkv_bias=learns)
        return again(self.project, out, bias) if selective else self.project(out, bias)

    def forward_class(self, x: Tensor, grid: Grid, freqs: Tensor, positions: Any = None, bias: Tensor | None = None) -> Tensor:
        """[B, 1 + T*Hp*Wp, C] -> [B, 1, C]: the class token's row of `forward`, without computing the others."""
        width, kv_bias = x.shape[2], torch.cat((torch.zeros_like(self.v_bias), self.v_bias))
        if is_plain(self.qkv):
            q_weight, kv_weight = self.qkv.weight.split((width, 2 * width))
            kv, q = F.linear(x, kv_weight, kv_bias), F.linear(x[:, :1], q_weight, self.q_bias)
        else:
            q, kv = self.qkv(x).split((width, 2 * width), 2)
            q, kv = q[:, :1] + self.q_bias, kv + kv_bias
        k, v = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
        # The class token itself is not rotated.
        k = ops.rope3d(k, grid=None if positions is not None else grid, freqs=freqs, positions=positions)
        return self.project(ops.joint_attention(q, k, v), bias)

    def left(self, x: Tensor) -> Tensor | None:
        """The bias of `proj`, if it may learn in the norm behind this, which is given x."""
        return open_bias(self.proj, "add_norm", x, self)

    def project(self, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """What attention returned, [B, H, N, D], to [B, N, C]."""
        return product(self.proj, _norm(out.transpose(1, 2).flatten(2), self.norm), bias)


class SwiGLU(nn.Module):
    """silu(gate) * value, normalised (sub-LN), projected. `fc1` holds the gate's rows, then the value's."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.norm = nn.LayerNorm(hidden, EPS)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, left: Tensor | None = None) -> Tensor:
        """[..., C] -> the same. left: fc2's bias, if it learns elsewhere."""
        return self.narrow(*self.widen(x), left)

    def widen(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """fc1's output, and its bias if that learns in what follows."""
        bias = open_bias(self.fc1, "swiglu_norm", x)
        return product(self.fc1, x, bias), bias

    def narrow(self, x: Tensor, bias: Tensor | None, left: Tensor | None) -> Tensor:
        """What follows on fc1."""
        return product(self.fc2, ops.swiglu_norm(x, self.norm.weight, self.norm.bias, EPS, x_bias=bias), left)


class Block(nn.Module):
    """Pre-norm: attention, then SwiGLU. What a branch returns is added to the stream where the next norm reads both, so a
    block hands on its stream and the branch that is not in it yet."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = SwiGLU(width, hidden)

    def forward(
        self,
        branch: Tensor,
        stream: Tensor | None,
        grid: Grid,
        freqs: Tensor,
        class_only: bool = False,
        positions: Any = None,
        selective: bool = False,
        given: Tensor | None = None,
        left: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """branch [B, N, C] and stream, whose sum (or branch alone) is the block's input, to those of its output; with
        `class_only` of its first row, [B, 1, C]. The stream is float32 from the first sum on (float64 in float64).
        positions: of the tokens, where they are not all of the grid. selective: recompute what is cheap, see
        `evaat_fast.model.recompute`. given: the bias in branch, if it learns here; left: fc2's, if it
        learns behind the block."""
        # The first branch of a tower is a stream, float32 whatever its matrices are. Of the bias: a quantised matrix has none.
        matrix = self.attn.q_bias.dtype
        x, stream = ops.add_norm(branch, stream, self.norm1.weight, self.norm1.bias, EPS, dtype=matrix, x_bias=given)
        bias = self.attn.left(x) if type(self.attn) is Attention else None
        biases = {} if bias is None else {"bias": bias}
        if class_only:
            branch, stream = self.attn.forward_class(x, grid, freqs, positions, **biases), stream[:, :1]
        else:
            branch = self.attn(x, grid, freqs, positions, selective, **biases)
        if selective and not class_only:
            hidden, bias, stream = again(self.widen, branch, stream, bias)
            return again(self.mlp.narrow, hidden, bias, left), stream
        x, stream = ops.add_norm(branch, stream, self.norm2.weight, self.norm2.bias, EPS, x_bias=bias)
        return self.mlp(x) if left is None else self.mlp(x, left), stream

    def left(self, x: Tensor) -> Tensor | None:
        """fc2's bias, if it may learn behind the block, which is given x."""
        return open_bias(self.mlp.fc2, "add_norm", x, self, self.mlp) if type(self.mlp) is SwiGLU else None

    def widen(self, branch: Tensor, stream: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """fc1's output and its bias, as the MLP has them, and the new stream."""
        x, stream = ops.add_norm(branch, stream, self.norm2.weight, self.norm2.bias, EPS, x_bias=bias)
        return *self.mlp.widen(x), stream


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return ops.add_norm(x, None, norm.weight, norm.bias, EPS)[0]


class VisionTransformer(nn.Module):
    """A clip to its embedding.

    Args:
        config: a ModelConfig.
    """

    freqs: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.vision_width
        frames, rows, columns = config.grid
        self.temporal_embed: nn.Parameter | None
        self.patch_embed = PatchEmbed(width, config.patch_size, config.norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, frames, width)) if config.temporal_embed else None
        self.blocks = nn.ModuleList(Block(width, config.vision_heads, config.vision_mlp) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, config.embed_dim)
        self.register_buffer("freqs", self._make_freqs().to(self.cls_token.device), persistent=False)
        self.grad_checkpointing: Mode = False
        self.init_parameters()

    def _make_freqs(self) -> Tensor:
        """float32 [3, D/2] on the CPU, whatever torch's default device is."""
        config, (_, rows, columns) = self.config, self.config.grid
        channels, scale = config.vision_width // config.vision_heads, (1.0, config.rope_grid / rows, config.rope_grid / columns)
        with torch.device("cpu"):
            if config.rope == "joint":
                return ops.joint_freqs(channels, config.rope_theta, scale)
            if config.rope == "spatial":
                return ops.spatial_freqs(channels, config.rope_theta, scale[1:])
            time = 2 * (channels // 8)
            height = 2 * ((channels - time) // 4)
            return ops.split_freqs(channels, (time, height, channels - time - height), config.rope_theta, scale)

    def _load_from_state_dict(self, *arguments, **keywords):
        """With `assign=True` a model made on the meta device gets its weights, and its frequencies, which no file holds."""
        super()._load_from_state_dict(*arguments, **keywords)
        if self.freqs.is_meta and not self.cls_token.is_meta:
            self.freqs = self._make_freqs().to(self.cls_token.device)

    def _apply(self, fn, recurse=True):
        """`.bfloat16()`, `.to(...)` and `.to_empty()` move the frequencies but never round or lose them: they stay
        float32, and where nothing moves the tensor that they were, whose tables are kept."""
        kept = self.freqs
        values = self._make_freqs() if kept.is_meta else kept.detach()
        super()._apply(fn, recurse)
        device = self.freqs.device
        if isinstance(self.freqs, nn.Parameter):
            self.freqs.data = values.to(device)
        else:
            self.freqs = kept if kept.device == device else values.to(device)
        return self

    @torch.no_grad()
    def init_parameters(self) -> None:
        """EVA-02's initialisation; the head's is CLIP's, as it starts fresh in EVA02-AT."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.cls_token, self.pos_embed, self.temporal_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        for depth, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            block.attn.proj.weight /= math.sqrt(2.0 * depth)
            block.mlp.fc2.weight /= math.sqrt(2.0 * depth)
        nn.init.normal_(self.head.weight, std=self.config.vision_width**-0.5)

    def forward(self, video: Tensor, patches: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3], or float [B, 3, T, H, W] already normalised, to [B, E].

        patches: int64 [B, N'], which patches of each clip are shown (`evaat_fast.model.draw_patches`); None: all.

        Raises:
            TypeError, ValueError: a dtype, device or shape that does not fit the model.
        """
        x = embed(self, video, patches)
        if not torch.compiler.is_compiling():
            hold_constant(self.freqs)
        positions = None if patches is None else dropout.place(patches, self.config.grid, self.freqs, x.dtype)
        stream, mode = None, self.grad_checkpointing if torch.is_grad_enabled() else False
        given: Tensor | None = None
        for block in self.blocks:
            last = block is self.blocks[-1]
            left = block.left(x) if type(block) is Block and not last else None
            # Only the class token leaves the tower, so the last block computes only that row, with the same result. By
            # count of multiplications this saves a quarter of the tiny model and 7 % of the base model at 4 frames.
            arguments = (x, stream, self.config.grid, self.freqs, last, positions, mode == "selective", given, left)
            x, stream = again(block, *arguments) if mode and mode != "selective" else block(*arguments)
            given = left
        assert stream is not None  # there is a block
        return self.head(ops.add_norm(x[:, 0], stream[:, 0], self.norm.weight, self.norm.bias, EPS)[0])
