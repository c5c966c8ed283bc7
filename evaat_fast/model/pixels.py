"""What the vision towers share: the check of a clip, pixels to tokens, and where tokens are."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from evaat_fast import ops
from evaat_fast.model import patches as dropout
from evaat_fast.model.configs import NORMS, ModelConfig
from evaat_fast.ops._core.autocast import autocast_dtype


def check_video(video: Tensor, config: ModelConfig, weight: Tensor) -> None:
    """Raises TypeError or ValueError unless `video` is a clip for a model of `config` whose patch embedding is `weight`."""
    if not isinstance(video, torch.Tensor):
        raise TypeError(f"video: expected a tensor, got {type(video).__name__}")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video: expected uint8 or floating point, got {video.dtype}")
    frames, (height, width) = config.num_frames, config.size
    if video.dtype == torch.uint8:
        form, expected, axis = f"uint8 [B, {frames}, {height}, {width}, 3]", (frames, height, width, 3), 1
    else:
        form, expected, axis = f"float [B, 3, {frames}, {height}, {width}]", (3, frames, height, width), 2
    if tuple(video.shape[1:]) != expected:
        hint = ""
        if video.ndim == 5 and video.shape[axis] != frames:
            hint = f"; for other clips create the model with num_frames={video.shape[axis]}"
        raise ValueError(f"video: expected {form}, got {list(video.shape)}{hint}")
    if video.device != weight.device:
        raise ValueError(f"video: expected a tensor on {weight.device} as the model, got {video.device}")
    if video.dtype not in (torch.uint8, weight.dtype) and autocast_dtype(weight.device.type) is None:
        raise TypeError(f"video: expected uint8 or {weight.dtype} as the model, got {video.dtype}")
    if torch.jit.is_tracing() and torch.is_grad_enabled() and weight.requires_grad:
        raise NotImplementedError(
            "torch.jit.trace keeps no gradients of our kernels: trace under torch.no_grad(), or torch.export"
        )


class PatchEmbed(nn.Module):
    """Pixels to tokens: a matrix product with the convolution's weight."""

    def __init__(self, width: int, patch: int, norm: str, bias: bool = True):
        super().__init__()
        self.patch = patch
        self.mean, self.std = NORMS[norm]
        # For the weight's shape and initialisation; its forward is not used.
        self.proj = nn.Conv2d(3, width, patch, patch, bias=bias)

    def forward(self, video: Tensor, patches: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3], or float [B, 3, T, H, W] already normalised, to [B, T*Hp*Wp, C], or of `patches` alone."""
        weight = self.proj.weight
        # That of the product, to which autocast would cast but float64: no wider copy of the video than it needs.
        dtype = weight.dtype if weight.dtype == torch.float64 else autocast_dtype(weight.device.type) or weight.dtype
        if video.dtype == torch.uint8:
            if dtype == torch.float64:
                rows = ops.patchify(video, self.patch, self.mean, self.std).double()
            else:
                rows = ops.patchify(video, self.patch, self.mean, self.std, dtype)
        else:
            rows = rearrange(video, "b c t (h p) (w q) -> b (t h w) (c p q)", p=self.patch, q=self.patch)
            rows = rows.to(dtype)
        rows = rows if patches is None else dropout.pick(rows, patches)
        return F.linear(rows, weight.flatten(1), self.proj.bias)


def places(spatial: Tensor, temporal: Tensor | None, frames: int) -> Tensor:
    """The learnable embedding of each patch of a clip, [1, T*Hp*Wp, C]: of its place, spatial [1, 1 + Hp*Wp, C] without the
    class token's row, and of its frame, temporal [1, T, C]."""
    if temporal is None:
        return spatial[:, 1:].repeat(1, frames, 1)
    return (spatial[:, 1:].unsqueeze(1) + temporal.unsqueeze(2)).flatten(1, 2)


def embed(tower: Any, video: Tensor, patches: Tensor | None) -> Tensor:
    """A clip's tokens with their learnable embeddings, the class token first, [B, 1 + N', C]. tower: a vision tower; video,
    patches: as it takes them, which are checked here."""
    check_video(video, tower.config, tower.patch_embed.proj.weight)
    if patches is not None:
        dropout.check_patches(patches, len(video), tower.config.grid, video.device)
    x = tower.patch_embed(video, patches)
    of_places = places(tower.pos_embed, tower.temporal_embed, tower.config.num_frames)
    cls = (tower.cls_token + tower.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    x = x + (of_places if patches is None else F.embedding(patches, of_places[0]))
    return torch.cat((cls.to(x.dtype), x), 1)
