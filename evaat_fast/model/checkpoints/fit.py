"""What depends on the number of frames, the size of pictures or the length of texts, resized; in float32 whatever the file's
dtype, so that a half-precision file is rounded once less."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from evaat_fast.model.configs import ModelConfig

FRAMES, PLACES, WORDS = "visual.temporal_embed", "visual.pos_embed", "text.positional_embedding"


def inflate(state: Mapping[str, Tensor], config: ModelConfig, grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Fits the positional embeddings of `state` to a model.

    Frames by linear interpolation, as AVION and LaViLa have it (no temporal embedding: zeros); the patch grid by bicubic
    interpolation; texts: a longer context by linear interpolation, of a shorter one the first positions, so that a caption that
    fits keeps its embedding.

    Args:
        state: name -> tensor, our names. Not changed.
        config: the ModelConfig to fit.
        grid: (Hp, Wp) of the state, where it is known; None takes it for a square, where it has that many places.

    Returns:
        A new dict.
    """
    state = dict(state)
    _, rows, columns = config.grid
    spatial, temporal, words = state.get(PLACES), state.get(FRAMES), state.get(WORDS)
    if config.temporal_embed and temporal is None and spatial is not None and spatial.ndim == 3:
        state[FRAMES] = spatial.new_zeros(1, config.num_frames, spatial.shape[2])
    elif temporal is not None and temporal.ndim == 3 and temporal.shape[1] != config.num_frames:
        state[FRAMES] = F.interpolate(_wide(temporal).mT, config.num_frames, mode="linear", align_corners=False).mT
    if spatial is not None and spatial.ndim == 3 and (found := _grid(spatial, grid)) not in (None, (rows, columns)):
        places = _wide(spatial)[:, 1:].unflatten(1, found).permute(0, 3, 1, 2)
        places = F.interpolate(places, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
        state[PLACES] = torch.cat((_wide(spatial)[:, :1], places.flatten(2).mT), 1)
    if words is not None and words.ndim == 2 and 0 < len(words) != config.context_length:
        length = config.context_length
        longer = F.interpolate(_wide(words).mT[None], length, mode="linear", align_corners=False)[0].mT
        state[WORDS] = words[:length] if length < len(words) else longer
    return state


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grid(spatial, grid):
    """(Hp, Wp) of an embedding [1, 1 + Hp*Wp, C], or None."""
    count = max(spatial.shape[1] - 1, 0)
    if grid is not None:
        return grid if grid[0] * grid[1] == count else None
    side = math.isqrt(count)
    return (side, side) if count and side * side == count else None
