"""Other people's CLIPs, transcribed from their code with their names: what our loading and our towers are compared with.

AVION (MIT, avion/models), LaViLa (MIT, lavila/models) and OpenAI's CLIP (MIT), without dropout, stochastic depth and options.
"""

import re
from collections import OrderedDict
from functools import partial

import torch
from einops import rearrange, repeat
from torch import nn

from evaat_fast.model import EVA02AT, create_model, get_config


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Residual(nn.Module):
    def __init__(self, width, heads, act, norm):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = norm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", act()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = norm(width)

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, act, norm):
        super().__init__()
        self.resblocks = nn.ModuleList(Residual(width, heads, act, norm) for _ in range(layers))

    def forward(self, x, mask=None):
        x = x.permute(1, 0, 2)
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)


class ViT(nn.Module):
    """AVION's vision tower; with one frame OpenAI's."""

    def __init__(self, size, patch, width, layers, heads, embed, frames, act, eps, projection):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=eps)
        self.frames, self.projection, places = frames, projection, (size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, width))
        if frames > 1:
            self.temporal_embedding = nn.Parameter(torch.randn(frames, width))
        self.ln_pre, self.ln_post = norm(width), norm(width)
        self.transformer = Transformer(width, layers, heads, act, norm)
        setattr(self, projection, nn.Parameter(torch.randn(width, embed)))

    def forward(self, x):  # [B, 3, T, H, W]
        B = len(x)
        x = self.conv1(x.transpose(1, 2).flatten(0, 1)).flatten(2).mT.reshape(B, -1, self.conv1.out_channels)
        x = torch.cat((self.class_embedding.expand(B, 1, -1), x), 1)
        place = self.positional_embedding[1:].repeat(self.frames, 1)
        if self.frames > 1:
            place = place + self.temporal_embedding.repeat_interleave(len(self.positional_embedding) - 1, 0)
        x = self.ln_pre(x + torch.cat((self.positional_embedding[:1], place)))
        return self.ln_post(self.transformer(x)[:, 0]) @ getattr(self, self.projection)


class Text(nn.Module):
    def __init__(self, context, vocabulary, width, layers, heads, embed, act):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.transformer = Transformer(width, layers, heads, act, nn.LayerNorm)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed))

    def forward(self, text):
        mask = torch.full((text.shape[1], text.shape[1]), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(text) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection


def attend(q, k, v):
    return torch.einsum("bid,bjd->bij", q, k).softmax(-1) @ v


class VarAttention(nn.Module):
    """Frozen in Time's divided attention, as LaViLa has it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, source, target, **dims):
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in self.qkv(x).chunk(3, -1))
        q = q * self.scale
        cls = attend(q[:, :1], k, v)
        qs, ks, vs = (rearrange(t[:, 1:], f"{source} -> {target}", **dims) for t in (q, k, v))
        count = len(qs) // len(k)
        ks, vs = (torch.cat((repeat(t[:, :1], "b () d -> (b r) () d", r=count), s), 1) for t, s in ((k, ks), (v, vs)))
        out = rearrange(attend(qs, ks, vs), f"{target} -> {source}", **dims)
        return self.proj(rearrange(torch.cat((cls, out), 1), "(b h) n d -> b n (h d)", h=self.heads))


class SpaceTimeBlock(nn.Module):
    def __init__(self, width, heads, norm):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = norm(width), norm(width), norm(width)
        self.attn, self.timeattn = VarAttention(width, heads), VarAttention(width, heads)
        layers = [("fc1", nn.Linear(width, 4 * width)), ("act", QuickGELU()), ("fc2", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, frames, places):
        time = x + self.timeattn(self.norm3(x), "b (f n) d", "(b n) f d", n=places)
        x = x + self.attn(self.norm1(time), "b (f n) d", "(b f) n d", f=frames)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch, bias=False)


class SpaceTime(nn.Module):
    def __init__(self, size, patch, width, layers, heads, frames):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.frames, self.places = frames, (size // patch) ** 2
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.places + 1, width))
        self.temporal_embed = nn.Parameter(torch.randn(1, frames, width))
        self.ln_pre, self.norm = nn.LayerNorm(width), norm(width)
        self.blocks = nn.ModuleList(SpaceTimeBlock(width, heads, norm) for _ in range(layers))

    def forward(self, x):
        B, proj = len(x), self.patch_embed.proj
        x = proj(x.transpose(1, 2).flatten(0, 1)).flatten(2).mT.reshape(B, -1, proj.out_channels)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), 1)
        place = self.pos_embed[:, 1:].repeat(1, self.frames, 1) + self.temporal_embed.repeat_interleave(self.places, 1)
        x = self.ln_pre(x + torch.cat((self.pos_embed[:, :1], place), 1))
        for block in self.blocks:
            x = block(x, self.frames, self.places)
        return self.norm(x)[:, 0]


SIZES = dict(size=48, patch=12, width=128, layers=2, heads=2)
TEXT = dict(context=20, vocabulary=90, width=64, layers=2, heads=1)
# The same in our words, so far as shapes do not say it.
OURS = dict(image_size=48, patch_size=12, vision_width=128, vision_layers=2, vision_heads=2, vision_mlp=512)
OURS |= dict(text_width=64, text_layers=2, text_heads=1, context_length=20, vocab_size=90, embed_dim=24)


class OpenAI(nn.Module):
    """OpenAI's CLIP, and open_clip's: the text tower's names have no prefix."""

    def __init__(self, quick=True):
        super().__init__()
        act = QuickGELU if quick else nn.GELU
        self.visual = ViT(**SIZES, embed=24, frames=1, act=act, eps=1e-5, projection="proj")
        text = Text(**TEXT, embed=24, act=act)
        self.transformer, self.token_embedding, self.ln_final = text.transformer, text.token_embedding, text.ln_final
        self.positional_embedding, self.text_projection = text.positional_embedding, text.text_projection
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, x):
        return self.visual(x)

    encode_text = Text.forward


class AVION(nn.Module):
    def __init__(self, frames=4):
        super().__init__()
        self.visual = ViT(**SIZES, embed=24, frames=frames, act=nn.GELU, eps=1e-6, projection="image_projection")
        self.textual = Text(**TEXT, embed=24, act=nn.GELU)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, x):
        return self.visual(x)

    def encode_text(self, text):
        return self.textual(text)


class LaViLa(OpenAI):
    def __init__(self, frames=4):
        super().__init__()
        self.visual = SpaceTime(**SIZES, frames=frames)
        self.image_projection = nn.Parameter(torch.randn(SIZES["width"], 24))

    def encode_image(self, x):
        return self.visual(x) @ self.image_projection


def flash(state):
    """AVION's names with flash attention and the patch embedding as a linear layer, as its scripts train."""
    names = {}
    for name, x in state.items():
        if name.startswith("visual.transformer."):
            for old, new in (("attn.in_proj_", "attn.Wqkv."), ("mlp.c_fc.", "mlp.fc1."), ("mlp.c_proj.", "mlp.fc2.")):
                name = name.replace(old, new)
        names[name] = x.flatten(1) if name == "visual.conv1.weight" else x
    return names


def shaken(model):
    """Every weight and bias random, of a size that keeps activations about 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            norm = re.search(r"(ln_|norm)\w*\.weight$", name)
            p.copy_(1 + 0.1 * noise if norm else noise * (p[0].numel() if p.ndim > 1 else 16) ** -0.5)
    return model.eval()


TINY = "eva02_at_tiny_patch16_64"
SMALL = dict(vision_layers=2, text_layers=1, vocab_size=100, context_length=20, num_frames=4)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def eva(**changes):
    """An EVA02-AT, every weight random."""
    return shaken(create_model(TINY, **{**SMALL, **changes}))


def ours(tower, **changes):
    """A small model with that vision tower, every weight random."""
    if tower == "eva02":
        return eva(**changes)
    config = get_config("clip_vit_base_patch16_224", **{**OURS, "num_frames": 4, "tower": tower, **changes})
    return shaken(EVA02AT(config))


def tokens():
    text = torch.randint(1, 88, (3, 20))
    for row, end in zip(text, (19, 7, 1), strict=True):
        row[end], row[end + 1 :] = 89, 0
    return text
