"""integrations.timm: the same model with rope3d in it, forward and backward, and back again."""

import importlib

import peers
import pytest
import torch

from evaat_fast.integrations import timm as integration

op = importlib.import_module("evaat_fast.ops.rope3d.rope3d")

# name -> what makes it small: fused and separate projections, frequencies per head, half-split pairs, grouped queries
MODELS = {
    "eva02_tiny_patch14_224": dict(img_size=56),
    "eva02_base_patch16_clip_224": dict(img_size=64, depth=2),
    "vit_small_patch16_rope_224": dict(img_size=64, depth=2),
    "vit_small_patch16_rope_mixed_224": dict(img_size=64, depth=2),
    "vit_medium_patch16_rope_reg1_gap_256": dict(img_size=64, depth=2),
    "vit_small_patch16_dinov3": dict(img_size=64, depth=2),
}


def make(name, **changes):
    timm = peers.peer("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **{**MODELS[name], **changes})
    if hasattr(model, "rope") and getattr(model.rope, "freqs", None) is not None:
        model.rope.freqs.requires_grad_(False)
    return model


def run(model, x):
    """Output and gradients of all parameters."""
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels' op was called."""
    count = []
    original = op._rotate_table
    monkeypatch.setattr(op, "_rotate_table", lambda *a: (count.append(1), original(*a))[1])
    return count


@pytest.mark.parametrize("name", MODELS)
def test_equal_and_reversible(name, calls):
    model = make(name)
    x = torch.randn(2, 3, MODELS[name]["img_size"], MODELS[name]["img_size"])
    before, keys = run(model, x), list(model.state_dict())
    assert integration.accelerate(model) is model
    ours = run(model, x)
    layers = len(model.blocks)
    assert len(calls) == 4 * layers, "q and k of every layer, forward and backward"
    integration.accelerate(model)
    run(model, x)
    assert len(calls) == 8 * layers, "accelerating twice is accelerating once"
    assert list(model.state_dict()) == keys
    for a, b in zip(ours, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    integration.restore(model)
    after = run(model, x)
    assert len(calls) == 8 * layers and all(map(torch.equal, after, before))


def test_patch_dropout(calls):
    name = "vit_small_patch16_rope_mixed_224"
    model = make(name, patch_drop_rate=0.5).train()
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    before = run(model, x)
    torch.manual_seed(1)
    ours = run(integration.accelerate(model), x)
    assert len(calls) == 8
    for a, b in zip(ours, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_frequencies_that_learn_are_left_to_timm(calls):
    model = make("vit_small_patch16_rope_mixed_224")
    model.rope.freqs.requires_grad_()
    x = torch.randn(1, 3, 64, 64)
    before = run(model, x)
    ours = run(integration.accelerate(model), x)
    assert not calls and all(map(torch.equal, ours, before)) and model.rope.freqs.grad is not None
    with torch.no_grad():
        model(x)
    assert len(calls) == 4


def test_low_precision_and_checkpointing(calls):
    model = make("eva02_tiny_patch14_224").bfloat16()
    x = torch.randn(2, 3, 56, 56, dtype=torch.bfloat16)
    before = run(model, x)
    model.set_grad_checkpointing()
    ours = run(integration.accelerate(model), x)
    assert len(calls) == 6 * len(model.blocks)
    for a, b in zip(ours, before, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm() + 1e-3


def test_compiles():
    model = make("eva02_tiny_patch14_224", depth=2)
    x = torch.randn(1, 3, 56, 56)
    expected = run(model, x)
    compiled = torch.compile(integration.accelerate(model), backend="aot_eager")
    for a, b in zip(run(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        integration.accelerate("eva02")
    with pytest.raises(ValueError, match="model: expected timm's EvaAttention or AttentionRope in it, found none in Linear"):
        integration.accelerate(torch.nn.Linear(2, 2))
