"""integrations.timm: the same model with our kernels in it, forward and backward, in all its copies, and back again."""

import copy
import inspect
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import peers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaat_fast.integrations import timm as integration

# name -> what makes it small: fused and separate projections, frequencies per head, half-split pairs
MODELS = {
    "eva02_tiny_patch14_224": dict(img_size=56, depth=2),
    "eva02_base_patch16_clip_224": dict(img_size=64, depth=2),
    "vit_small_patch16_rope_224": dict(img_size=64, depth=2),
    "vit_small_patch16_rope_mixed_224": dict(img_size=64, depth=2),
    "vit_medium_patch16_rope_reg1_gap_256": dict(img_size=64, depth=2),
    "vit_small_patch16_dinov3": dict(img_size=64, depth=2),
}
CLOSE = dict(rtol=1e-4, atol=1e-5)


def make(name="eva02_tiny_patch14_224", **changes):
    timm = peers.peer("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **{**MODELS[name], **changes})
    if hasattr(model, "rope") and getattr(model.rope, "freqs", None) is not None:
        model.rope.freqs.requires_grad_(False)
    return model


def image(name="eva02_tiny_patch14_224", batch=2):
    return torch.randn(batch, 3, MODELS[name]["img_size"], MODELS[name]["img_size"])


def run(model, x):
    """Output and gradients of all parameters."""
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class Operators(TorchDispatchMode):
    """Counts our operators."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "evaat_fast":
            self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(function, *args):
    """(its result, how many of our operators ran)."""
    with Operators() as operators:
        result = function(*args)
    return result, operators.names.total()


@pytest.mark.parametrize("name", MODELS)
def test_equal_and_reversible(name):
    model, x = make(name), image(name)
    (before, none), state = counted(run, model, x), model.state_dict(keep_vars=True)
    assert none == 0
    assert integration.accelerate(model) is model
    ours, calls = counted(run, model, x)
    assert calls >= 2 * len(model.blocks), "each layer, forward and backward"
    integration.accelerate(model)
    assert counted(run, model, x)[1] == calls, "accelerating twice is accelerating once"
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[k] is state[k] for k in state)
    for a, b in zip(ours, before, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert integration.restore(model) is model
    after, none = counted(run, model, x)
    assert none == 0 and all(map(torch.equal, after, before))


def test_patch_dropout():
    name = "vit_small_patch16_rope_mixed_224"
    model, x = make(name, patch_drop_rate=0.5).train(), image(name)
    torch.manual_seed(1)
    before = run(model, x)
    integration.accelerate(model)
    torch.manual_seed(1)
    ours, calls = counted(run, model, x)
    assert calls >= 4
    for a, b in zip(ours, before, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_frequencies_that_learn_are_left_to_timm():
    name = "vit_small_patch16_rope_mixed_224"
    model, x = make(name), image(name)
    model.rope.freqs.requires_grad_()
    before = run(model, x)
    integration.accelerate(model)
    ours, calls = counted(run, model, x)
    assert calls == 0 and all(map(torch.equal, ours, before)) and model.rope.freqs.grad is not None
    with torch.no_grad():
        assert counted(model, x)[1] >= 2


def test_low_precision_and_checkpointing():
    model, x = make().bfloat16(), image().bfloat16()
    before = run(model, x)
    model.set_grad_checkpointing()
    ours, calls = counted(run, integration.accelerate(model), x)
    assert calls >= 3 * len(model.blocks)
    for a, b in zip(ours, before, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm() + 1e-3


@pytest.mark.parametrize(
    "options", [dict(num_kv_heads=2, gated=True), dict(rotate_half=True, qk_norm=True), dict(attn_drop=0.5)]
)
@pytest.mark.parametrize("mask", [False, True])
def test_attention_modules(options, mask):
    """Grouped queries, gates, norms, half-split pairs, dropout, masks and causal order, each as timm has it."""
    layers = peers.peer("timm.layers")
    if not options.keys() <= inspect.signature(layers.AttentionRope).parameters.keys():
        pytest.skip("this timm has no such option")
    module = layers.AttentionRope(64, 4, qkv_fused="num_kv_heads" not in options, norm_layer=torch.nn.LayerNorm, **options)
    angles = torch.randn(6, 8)
    angles = angles.repeat(1, 2) if "rotate_half" in options else angles.repeat_interleave(2, 1)
    arguments = dict(rope=torch.cat((angles.sin(), angles.cos()), 1), is_causal=not mask)
    arguments |= dict(attn_mask=torch.randn(7, 7)) if mask else {}
    x = torch.randn(2, 7, 64)
    torch.manual_seed(1)
    expected = module(x, **arguments)
    integration.accelerate(module)
    torch.manual_seed(1)
    ours, calls = counted(lambda: module(x, **arguments))
    assert calls >= 1
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_is_still_of_timm():
    eva = peers.peer("timm.models.eva")
    model = integration.accelerate(make(depth=2))
    attention = model.blocks[0].attn
    assert isinstance(attention, eva.EvaAttention) and "(attn): JointEvaAttention(\n" in repr(model)
    assert "forward" not in vars(attention)
    integration.restore(model)
    assert type(attention) is eva.EvaAttention and "Joint" not in repr(model)


def replica(module):
    """What DataParallel runs on a second GPU, as torch.nn.parallel.replicate makes it."""
    twin = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters(recurse=False):
        setattr(twin, name, parameter.detach().clone())
    return twin


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, replica, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_run_on_their_own(duplicate):
    model, x = make(depth=1).eval(), torch.randn(2, 17, 192)
    attention = model.blocks[0].attn
    with torch.no_grad():
        before, twin = attention(x), duplicate(attention)
        twin.num_heads = 1
        expected = twin(x)
        twin = duplicate(integration.accelerate(attention))
        twin.num_heads = 1
        torch.testing.assert_close(twin(x), expected, **CLOSE)
        torch.testing.assert_close(attention(x), before, **CLOSE)
        if duplicate is not copy.copy:  # which shares the weights, as of any module
            twin.proj = torch.nn.Linear(192, 192)
            assert (twin(x) - expected).abs().max() > 0.01
            torch.testing.assert_close(attention(x), before, **CLOSE)
    assert type(twin) is type(attention) and (expected - before).abs().max() > 1e-4


def test_averaged_copy():
    model, x = integration.accelerate(make(depth=1)), image()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        expected, _ = counted(model, x)  # in a mode norms are torch's, and its last bits
        model.blocks[0].attn.proj.weight.zero_()
        out, calls = counted(average, x)
        assert calls >= 1 and torch.equal(out, expected) and not torch.equal(model(x), expected)


def test_saved_models_load_elsewhere(tmp_path):
    model, x = integration.accelerate(make(depth=1)).eval(), image()
    with torch.no_grad(), open(tmp_path / "model.pickle", "wb") as file:
        pickle.dump(model, file)
        torch.save(model, tmp_path / "model.pt")
        torch.save((x, model(x)), tmp_path / "answer.pt")
    program = f"""
import pickle, sys
sys.path.insert(0, {str(Path(peers.__file__).parent)!r})
import peers, torch
peers.load("timm")
x, expected = torch.load("answer.pt")
with open("model.pickle", "rb") as file, torch.no_grad():
    for model in pickle.load(file), torch.load("model.pt", weights_only=False):
        assert torch.equal(model(x), expected)
        print(type(model.blocks[0].attn).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "JointEvaAttention\n" * 2, done.stderr
