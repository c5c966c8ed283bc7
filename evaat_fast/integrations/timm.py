"""joint_attention in timm's models with rotary embeddings: EVA-02, ViT-RoPE, DINOv3, Perception Encoder.

model = timm.create_model("eva02_base_patch14_224")
accelerate(model)      # the same results, parameters and state dict; restore(model) undoes it

timm rotates queries and keys with slices, concatenations and five elementwise passes for each; here each is one fused pass, and
the rest is joint_attention. What it has not (a mask, causal order, dropout of scores) is left to torch's attention, and what
timm computes otherwise (frequencies that learn, attention that is not fused) to timm.

Tested with timm 1.0.26 to 1.0.31; whatever the version, `accelerate` compares results before it changes a model.

An accelerated module is of a subclass of timm's class and else unchanged: copies, replicas, pickles, torch.save, torch.compile,
torch.export and torch.fx do with it what they do with timm's. torch.jit.script and torch.jit.trace keep timm's arithmetic, for
their files are to load where evaat_fast is not. Impossible is that for torch.save(model): its file names our classes, so save
the state dict, which is timm's, or a restored model.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["accelerate", "restore"]

TESTED = "1.0.26 to 1.0.31"
# By how much one attention's results may differ: root mean square of the difference over that of timm's. Measured on the
# models of tests/test_timm.py: at most 2e-7 in float32, 2e-5 in float16, 0 in bfloat16; without the biases 0.14 and more.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Makes every rotary attention of a timm model use joint_attention.

    Each kind of attention in the model first computes one tiny random input as timm does and as we do, with random weights in
    the model's dtype and on its device (on the CPU for the meta device), in a copy: the model, its weights, its mode and the
    state of random numbers are not touched.

    Args:
        model: a torch.nn.Module with timm's EvaAttention or AttentionRope in it. Changed in place; accelerating it twice is
            accelerating it once. Subclasses of the two are somebody's own attention, and left alone.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: it has no such attention, or one for which ours gives other results than this timm's, or cannot be run, or
            whose `forward` was replaced on the instance. The model is as it was.
        ImportError: timm is not installed, or has no AttentionRope (before 1.0.16).

    Source: timm.models.eva.EvaAttention, timm.layers.AttentionRope (https://github.com/huggingface/pytorch-image-models).
    """
    joint = _classes()
    kinds: dict[tuple, nn.Module] = {}
    attentions = [(name, module) for name, module in _attentions(model) if type(module) in joint]
    for name, module in attentions:
        if "forward" in vars(module):
            raise ValueError(f"model: {name}.forward was replaced on the instance, which would hide ours; undo that first")
        kinds.setdefault(_kind(module), module)
    for module in kinds.values():
        _compare(module)
    for _, module in attentions:
        module.__class__ = joint[type(module)]
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: the modules are of timm's classes again.

    Args:
        model: a torch.nn.Module with timm's EvaAttention or AttentionRope in it, accelerated or not. Changed in place.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: it has no such attention.
        ImportError: as `accelerate`.

    Source: as `accelerate`.
    """
    theirs = {ours: theirs for theirs, ours in _classes().items()}
    for _, module in _attentions(model):
        module.__class__ = theirs.get(type(module), type(module))
    return model


def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    """timm's classes to ours."""
    try:
        from evaat_fast.integrations._timm_attention import JOINT
    except ImportError as error:
        raise ImportError(f"timm (tested: {TESTED}) is needed: pip install 'evaat-fast[peers]' ({error})") from error
    return JOINT


def _attentions(model: object) -> list[tuple[str, nn.Module]]:
    """The attention modules that are of timm's classes or of ours, and their names in the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    classes = _classes()
    known = {*classes, *classes.values()}
    found = [(name, module) for name, module in model.named_modules() if type(module) in known]
    if not found:
        names = " or ".join(c.__name__ for c in classes)
        raise ValueError(f"model: expected timm's {names} in it, found none in {type(model).__name__}")
    return found


def _kind(module: nn.Module) -> tuple:
    """Equal for modules that compute the same from their weights."""
    settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, str)) and k != "training")
    weights = tuple((name, x.shape, x.dtype, x.device) for name, x in module.state_dict(keep_vars=True).items())
    return type(module), repr(module), settings, weights


def _compare(module: nn.Module) -> None:
    """Raises ValueError where our forward of a module of timm's gives other results than timm's."""
    name = f"timm's {type(module).__name__}"
    try:
        dtype, differences = _differences(module)
    except Exception as error:  # whatever a timm of tomorrow raises is the reason
        raise ValueError(
            f"model: {name} cannot be run on a tiny input, to compare ours with it ({type(error).__name__}: {error}); "
            f"tested with timm {TESTED}"
        ) from error
    for case, difference in differences.items():
        if not difference <= _TOLERANCE.get(dtype, 1e-3):  # so that NaN is a difference
            raise ValueError(
                f"model: this timm's {type(module).__name__} computes something else than ours: {case} the results differ by "
                f"{difference:.1e} of their size in {str(dtype).removeprefix('torch.')}; tested with timm {TESTED}"
            )


def _differences(module: nn.Module) -> tuple[torch.dtype, dict[str, float]]:
    """The dtype, and root mean squares of our results less timm's, over those of timm's."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, device="cpu")  # noqa: E731
    twin: Any = _twin(module, random)
    first = twin.q_proj if twin.qkv is None else twin.qkv
    device, dtype = first.weight.device, first.weight.dtype
    batch, cells = 2, 6
    tokens = twin.num_prefix_tokens + cells
    angles = random(cells, twin.head_dim // 2)
    # timm's layout: sines, then cosines, each angle's twice, side by side or in the other half.
    angles = angles.repeat(1, 2) if getattr(twin, "rotate_half", False) else angles.repeat_interleave(2, 1)
    rope = torch.cat((angles.sin(), angles.cos()), 1).to(device)
    mask = ((random(tokens, tokens) > 0) | torch.eye(tokens, dtype=torch.bool, device="cpu")).to(device)
    x = random(batch, tokens, first.in_features).to(device, dtype)
    # The mask goes another way than the other two.
    cases = {"with rope": dict(rope=rope), "without rope": {}, "with rope and a mask": dict(rope=rope, attn_mask=mask)}
    theirs, ours = type(module), _classes()[type(module)]
    twin.__class__ = ours
    found = {}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for case, arguments in cases.items():
            expected = theirs.forward(twin, x, is_causal=False, **arguments).double()
            found[case] = ((ours.forward(twin, x, **arguments) - expected).norm() / expected.norm()).item()
    return dtype, found


def _twin(module: nn.Module, random: Callable[..., torch.Tensor]) -> nn.Module:
    """A copy with weights of its own: random, for those of a fresh model are partly zeros, which would hide a difference."""
    memo = {}
    for _, x in (*module.named_parameters(), *module.named_buffers()):
        value = random(*x.shape) / math.sqrt(x.shape[-1] if x.ndim > 1 else 1)
        value = value.to("cpu" if x.is_meta else x.device, x.dtype)
        memo[id(x)] = nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
    return copy.deepcopy(module, memo).eval()
