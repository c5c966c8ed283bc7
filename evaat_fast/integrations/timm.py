"""Our ops in timm's models with rotary embeddings: EVA-02, ViT-RoPE, DINOv3, Perception Encoder.

model = timm.create_model("eva02_base_patch14_224")
accelerate(model)      # the same results, parameters and state dict; restore(model) undoes it

timm rotates queries and keys with slices, concatenations and five elementwise passes for each; here each is one fused pass, and
the rest is joint_attention. What it has not (a mask, causal order, dropout of scores) is left to torch's attention, and what
timm computes otherwise (frequencies that learn, attention that is not fused) to timm.

EvaBlock's first sum becomes one pass with the norm after it (add_norm), and the inside of its SwiGLU or packed GluMlp another
(swiglu_norm). timm's stay: another norm or activation, a module that somebody put in, dropout inside the MLP, a hook on a
module that would not be called, or on all modules; where bytes say that nothing is saved (`_timm_blocks`); and what a compiler
or a tracer sees. What `train()` or somebody may change is looked at in each call, so a model may change after `accelerate`.

Tested with timm 1.0.26 to 1.0.31; whatever the version, `accelerate` compares results before it changes a model.

An accelerated module is of a subclass of timm's class and else unchanged: copies, replicas, pickles, torch.save, torch.compile,
torch.export and torch.fx do with it what they do with timm's. torch.jit.script and torch.jit.trace keep timm's arithmetic, for
their files are to load where evaat_fast is not. Impossible is that for torch.save(model): its file names our classes, so save
the state dict, which is timm's, or a restored model.
"""

from typing import Any, TypeVar

from torch import nn

from evaat_fast.integrations._timm_check import compare, kind

__all__ = ["accelerate", "restore"]

TESTED = "1.0.26 to 1.0.31"

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Makes every rotary attention of a timm model use joint_attention, and its EvaBlock, SwiGLU and GluMlp the fused norms.

    Each kind of module first computes one tiny random input as timm does and as we do, with random weights in the model's dtype
    and on its device (on the CPU for the meta device), in a copy: the model, its weights, its mode and the state of random
    numbers are not touched.

    Args:
        model: a torch.nn.Module with timm's EvaAttention or AttentionRope in it. Changed in place; accelerating it twice is
            accelerating it once. Subclasses of timm's classes are somebody's own, and left alone, as are blocks and MLPs whose
            parts are not those that the ops compute.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: it has no such attention, or one whose `forward` was replaced on the instance, or a module of which ours
            gives other results than this timm's, or cannot be run. The model is as it was.
        ImportError: timm is not installed, or has no AttentionRope (before 1.0.16).

    Source: EvaAttention and EvaBlock of timm.models.eva; AttentionRope, SwiGLU and GluMlp of timm.layers
        (https://github.com/huggingface/pytorch-image-models).
    """
    joint, fused = _classes()
    kinds: dict[tuple, tuple[nn.Module, Any]] = {}
    exchanged = []
    for name, module in _known(model):
        theirs = type(module)
        if theirs in joint and "forward" in vars(module):
            raise ValueError(f"model: {name}.forward was replaced on the instance, which would hide ours; undo that first")
        if theirs in joint or (theirs in fused and "forward" not in vars(module) and fused[theirs].fits(module)):
            ours = joint[theirs] if theirs in joint else fused[theirs]
            kinds.setdefault(kind(module), (module, ours))
            exchanged.append((module, ours))
    for module, ours in kinds.values():
        compare(module, ours, TESTED)
    for module, ours in exchanged:
        module.__class__ = ours
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
    joint, fused = _classes()
    theirs = {ours: theirs for theirs, ours in (*joint.items(), *fused.items())}
    for _, module in _known(model):
        module.__class__ = theirs.get(type(module), type(module))
    return model


def _classes() -> tuple[dict[type[nn.Module], type[nn.Module]], dict[type[nn.Module], Any]]:
    """timm's attention classes to ours, and timm's other classes to ours."""
    try:
        from evaat_fast.integrations._timm_attention import JOINT
        from evaat_fast.integrations._timm_blocks import FUSED
    except ImportError as error:
        raise ImportError(f"timm (tested: {TESTED}) is needed: pip install 'evaat-fast[peers]' ({error})") from error
    return JOINT, FUSED


def _known(model: object) -> list[tuple[str, nn.Module]]:
    """The modules that are of timm's classes or of ours, and their names in the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    joint, fused = _classes()
    attentions, others = {*joint, *joint.values()}, {*fused, *fused.values()}
    if not any(type(module) in attentions for module in model.modules()):
        names = " or ".join(c.__name__ for c in joint)
        raise ValueError(f"model: expected timm's {names} in it, found none in {type(model).__name__}")
    return [(name, module) for name, module in model.named_modules() if type(module) in attentions | others]
