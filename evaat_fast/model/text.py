"""The text tower: CLIP's causal transformer, read at the end-of-text token.

Parameter names are CLIP's. Source: CLIP (arXiv 2103.00020), with its quick GELU; EVA-CLIP (arXiv 2303.15389), with the exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaat_fast import ops
from evaat_fast.model.configs import ModelConfig
from evaat_fast.model.linear import open_bias, product
from evaat_fast.model.recompute import Mode, again
from evaat_fast.ops.attn.layout import gradient_like

EPS = 1e-5  # CLIP's layer norms


class Attention(nn.Module):
    """Causal self-attention with CLIP's parameter names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, L, C] -> the same. bias: of `out_proj`, if it learns elsewhere."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = gradient_like(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return product(self.out_proj, out.transpose(1, 2).flatten(2), bias)

    def left(self, x: Tensor) -> Tensor | None:
        """The bias of `out_proj`, if it may learn in the norm behind this, which is given x."""
        return open_bias(self.out_proj, "add_norm", x, self)


def gelu(x: Tensor, quick: bool) -> Tensor:
    """The exact GELU, or x * sigmoid(1.702 x) of OpenAI's weights."""
    return x * torch.sigmoid(1.702 * x) if quick else F.gelu(x)


class MLP(nn.Module):
    def __init__(self, width: int, quick: bool = False):
        super().__init__()
        self.quick = quick
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, left: Tensor | None = None) -> Tensor:
        """[..., C] -> the same. left: c_proj's bias, if it learns elsewhere."""
        return self.narrow(self.c_fc(x), left)

    def narrow(self, x: Tensor, left: Tensor | None) -> Tensor:
        """What follows on c_fc."""
        return product(self.c_proj, gelu(x, self.quick), left)


class Block(nn.Module):
    """Pre-norm: attention, then MLP. Stream and open branch go from block to block as in the vision tower."""

    def __init__(self, width: int, heads: int, quick: bool = False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, EPS)
        self.mlp = MLP(width, quick)

    def forward(
        self,
        branch: Tensor,
        stream: Tensor | None,
        selective: bool = False,
        given: Tensor | None = None,
        left: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """given, left: as of the vision tower's blocks."""
        matrix = self.attn.in_proj_weight.dtype  # the first branch is the embeddings' sum, float32 whatever the matrices are
        x, stream = ops.add_norm(branch, stream, self.ln_1.weight, self.ln_1.bias, EPS, dtype=matrix, x_bias=given)
        bias = self.attn.left(x) if type(self.attn) is Attention else None
        branch = self.attn(x) if bias is None else self.attn(x, bias)
        if selective:
            hidden, stream = again(self.widen, branch, stream, bias)
            return again(self.mlp.narrow, hidden, left), stream
        x, stream = ops.add_norm(branch, stream, self.ln_2.weight, self.ln_2.bias, EPS, x_bias=bias)
        return self.mlp(x) if left is None else self.mlp(x, left), stream

    def left(self, x: Tensor) -> Tensor | None:
        """c_proj's bias, if it may learn behind the block, which is given x."""
        return open_bias(self.mlp.c_proj, "add_norm", x, self, self.mlp) if type(self.mlp) is MLP else None

    def widen(self, branch: Tensor, stream: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """c_fc's output and the new stream."""
        x, stream = ops.add_norm(branch, stream, self.ln_2.weight, self.ln_2.bias, EPS, x_bias=bias)
        return self.mlp.c_fc(x), stream


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, quick: bool = False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick) for _ in range(layers))
        self.grad_checkpointing: Mode = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, C] to (branch, stream), whose sum is the last block's output."""
        stream, mode = None, self.grad_checkpointing if torch.is_grad_enabled() else False
        given: Tensor | None = None
        for block in self.resblocks:
            left = block.left(x) if type(block) is Block and block is not self.resblocks[-1] else None
            arguments = x, stream, mode == "selective", given, left
            x, stream = again(block, *arguments) if mode and mode != "selective" else block(*arguments)
            given = left
        assert stream is not None  # there is a block
        return x, stream


def trim(tokens: Tensor) -> Tensor:
    """Cuts the columns behind the last end-of-text token of a batch.

    Attention is causal and the tower is read at end-of-text, so the embeddings stay the same; captions of ten tokens
    then cost ten columns and not 77. `encode_text` does it for tokens on the CPU; call it before moving tokens to a
    GPU, where it would have to wait for the device.

    Args:
        tokens: integer [B, L].

    Returns:
        [B, L'], a view; L' >= 1.
    """
    if tokens.numel() == 0:
        return tokens
    return tokens[:, : int(tokens.argmax(-1).max()) + 1]


class TextTransformer(nn.Module):
    """Tokens to their embedding.

    Args:
        config: a ModelConfig.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.context_length, width))
        quick = config.activation == "quick_gelu"
        self.transformer = Transformer(width, config.text_layers, config.text_heads, quick)
        self.ln_final = nn.LayerNorm(width, EPS)
        self.text_projection = nn.Parameter(torch.zeros(width, config.embed_dim))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """CLIP's initialisation."""
        width, layers = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def check(self, tokens: Tensor) -> None:
        """Raises TypeError or ValueError unless `tokens` are token ids for this model."""
        if not isinstance(tokens, torch.Tensor) or tokens.dtype not in (torch.int32, torch.int64):
            got = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise TypeError(f"text: expected int64 or int32 token ids (evaat_fast.get_tokenizer makes them), got {got}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.context_length:
            raise ValueError(f"text: expected [B, {self.config.context_length}] or shorter, got {list(tokens.shape)}")
        if tokens.device != self.token_embedding.weight.device:
            expected = self.token_embedding.weight.device
            raise ValueError(f"text: expected a tensor on {expected} as the model, got {tokens.device}")

    def _check_range(self, tokens):
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"text: expected token ids from 0 to {self.config.vocab_size - 1}, got {low if low < 0 else high}")

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 or int32 [B, L], L <= 77, to [B, E].

        Raises:
            TypeError, ValueError: a dtype, device or shape that does not fit, or (on the CPU) an id outside the
                vocabulary.
        """
        self.check(tokens)
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            self._check_range(tokens)
            tokens = trim(tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        end = torch.arange(len(x), device=x.device), tokens.argmax(-1)  # end-of-text has the highest id
        branch, stream = (part[end] for part in self.transformer(x))
        x, _ = ops.add_norm(branch, stream, self.ln_final.weight, self.ln_final.bias, EPS)
        return x @ self.text_projection
