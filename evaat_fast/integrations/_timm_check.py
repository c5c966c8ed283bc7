"""What `accelerate` asks before it changes a module of timm's: does ours compute the same in this timm?"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["compare", "kind"]

# By how much results may differ: root mean square of the difference over that of timm's. Measured on the models of
# tests/test_timm.py and test_timm_norms.py: at most 2e-7 in float32; 2e-5 in float16 and 0 in bfloat16 of attention, 5e-4 and
# 4e-3 of blocks and MLPs, which round once where timm rounds each step; without the biases of attention 0.14 and more.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Random = Callable[..., torch.Tensor]


def kind(module: nn.Module) -> tuple:
    """Equal for modules that compute the same from their weights."""
    settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, str)) and k != "training")
    stored = module.state_dict(keep_vars=True).items()
    weights = tuple(
        (name, x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else (name, repr(x)) for name, x in stored
    )
    return type(module), repr(module), settings, weights


def compare(module: nn.Module, ours: Any, tested: str) -> None:
    """Raises ValueError where `ours`, a subclass of the class of a module of timm's, gives other results than timm's."""
    name = f"timm's {type(module).__name__}"
    try:
        dtype, differences = _differences(module, ours)
    except Exception as error:  # whatever a timm of tomorrow raises is the reason
        raise ValueError(
            f"model: {name} cannot be run on a tiny input, to compare ours with it ({type(error).__name__}: {error}); "
            f"tested with timm {tested}"
        ) from error
    for case, difference in differences.items():
        if not difference <= _TOLERANCE.get(dtype, 1e-3):  # so that NaN is a difference
            raise ValueError(
                f"model: this timm's {type(module).__name__} computes something else than ours: {case} the results differ by "
                f"{difference:.1e} of their size in {str(dtype).removeprefix('torch.')}; tested with timm {tested}"
            )


def _differences(module: nn.Module, ours: Any) -> tuple[torch.dtype, dict[str, float]]:
    """The dtype, and root mean squares of our results less timm's, over those of timm's."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, device="cpu")  # noqa: E731
    block: Any = module if hasattr(module, "attn") else None
    # A block is compared around its attention and its MLP, which have their own comparison.
    twin: Any = _twin(module, random, {} if block is None else {block.attn: _Branch(), block.mlp: _Branch()})
    like, cases = (_block if block else _attention if hasattr(module, "head_dim") else _mlp)(twin, random)
    # An attention's forward itself, as some of its ways are timm's; that of the others may be timm's for so small an input.
    run = getattr(ours, "fused", ours.forward)
    theirs, twin.__class__, found = type(module), ours, {}
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        for case, (x, arguments) in cases.items():
            x = x.to(like.device, like.dtype)
            arguments = {k: v.to(like.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            expected = theirs.forward(twin, x, **arguments).double()
            found[case] = ((run(twin, x, **arguments) - expected).norm() / expected.norm()).item()
    return like.dtype, found


Cases = dict[str, tuple[torch.Tensor, dict[str, Any]]]


def _attention(twin: Any, random: Random) -> tuple[torch.Tensor, Cases]:
    """A weight, whose dtype and device inputs are to have, and inputs."""
    weight = (twin.q_proj if twin.qkv is None else twin.qkv).weight
    batch, cells = 2, 6
    tokens = twin.num_prefix_tokens + cells
    angles = random(cells, twin.head_dim // 2)
    # timm's layout: sines, then cosines, each angle's twice, side by side or in the other half.
    angles = angles.repeat(1, 2) if getattr(twin, "rotate_half", False) else angles.repeat_interleave(2, 1)
    rope = torch.cat((angles.sin(), angles.cos()), 1)
    mask = (random(tokens, tokens) > 0) | torch.eye(tokens, dtype=torch.bool, device="cpu")
    x = random(batch, tokens, weight.shape[1])
    # The mask goes another way than the other two.
    cases = {"with rope": dict(rope=rope), "without rope": {}, "with rope and a mask": dict(rope=rope, attn_mask=mask)}
    return weight, {case: (x, dict(is_causal=False, **arguments)) for case, arguments in cases.items()}


def _mlp(twin: Any, random: Random) -> tuple[torch.Tensor, Cases]:
    weight = next(twin.parameters())
    return weight, {"with random weights": (random(2, 6, weight.shape[1]), {})}


def _block(twin: Any, random: Random) -> tuple[torch.Tensor, Cases]:
    weight = twin.norm2.weight
    x, all_given = random(2, 6, len(weight)), dict(rope=random(1), attn_mask=random(1), is_causal=True)
    return weight, {"with x alone": (x, {}), "with all arguments": (x, all_given)}


class _Branch(nn.Module):
    """Some function of all that a block's attention is given, and of what its MLP is."""

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        for y in (rope, attn_mask):
            x = x if y is None else 2 * x.sin() + y.to(x.dtype)
        return x.sin() if is_causal else x.cos()


def _twin(module: nn.Module, random: Random, instead: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy with weights of its own: random, for those of a fresh model are partly zeros, which would hide a difference; with
    other modules `instead` of some of its own."""
    memo: dict[int, Any] = {id(old): new for old, new in instead.items()}
    replaced = {id(x) for old in instead for x in (*old.parameters(), *old.buffers())}
    for _, x in (*module.named_parameters(), *module.named_buffers()):
        if id(x) in replaced:
            continue
        value = random(*x.shape) / math.sqrt(x.shape[-1] if x.ndim > 1 else 1)
        value = value.to("cpu" if x.is_meta else x.device, x.dtype)
        memo[id(x)] = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
    return copy.deepcopy(module, memo).eval()
