"""integrations.timm compares results before it changes a model, touches nothing by that, and says why it refuses."""

import copy
import sys

import peers
import pytest
import torch
from test_timm import CLOSE, counted, make

from evaat_fast.integrations import timm as integration


@pytest.fixture
def eva():
    return peers.peer("timm.models.eva")


def kinds(model):
    return {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}


CHANGES = {
    "scale": lambda theirs, self, x, rope, mask, causal: theirs(self, 1.5 * x, rope, mask, causal),
    "causal order": lambda theirs, self, x, rope, mask, causal: theirs(self, x, rope, mask, mask is None),
    "no rotation": lambda theirs, self, x, rope, mask, causal: theirs(self, x, None, mask, causal),
    "mask": lambda theirs, self, x, rope, mask, causal: theirs(self, x, rope, None, causal),
    "NaN": lambda theirs, self, x, rope, mask, causal: theirs(self, x, rope, mask, causal) * float("nan"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_timm_that_computes_something_else(eva, monkeypatch, change, dtype):
    theirs = eva.EvaAttention.forward

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        return change(theirs, self, x, rope, attn_mask, is_causal)

    model = make(depth=2).to(dtype)
    monkeypatch.setattr(eva.EvaAttention, "forward", forward)
    with pytest.raises(
        ValueError, match="timm's EvaAttention computes something else than ours: with.* rope.* the results differ"
    ):
        integration.accelerate(model)
    assert kinds(model) == {"EvaAttention"}


OTHERS = {
    "EvaBlock": (
        "eva02_tiny_patch14_224",
        {
            "post-norm": lambda self, x, *rest, **options: x + self.norm2(self.mlp(x)),
            "no first sum": lambda self, x, *rest, **options: x + self.mlp(self.norm2(self.attn(self.norm1(x), **options))),
            "no rope": lambda self, x, rope=None, **options: THEIRS["EvaBlock"](self, x, **options),
            "no mask": lambda self, x, rope=None, attn_mask=None, **options: THEIRS["EvaBlock"](self, x, rope, **options),
        },
    ),
    "SwiGLU": (
        "eva02_base_patch16_clip_224",
        {
            "gate and value": lambda self, x: self.fc2(self.norm(self.act(self.fc1_x(x)) * self.fc1_g(x))),
            "no norm": lambda self, x: self.fc2(self.act(self.fc1_g(x)) * self.fc1_x(x)),
        },
    ),
    "GluMlp": ("eva02_tiny_patch14_224", {"half": lambda self, x: THEIRS["GluMlp"](self, x) / 2}),
}
THEIRS = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, change", [(kind, change) for kind in OTHERS for change in OTHERS[kind][1]])
def test_a_timm_whose_blocks_compute_something_else(eva, monkeypatch, kind, change, dtype):
    name, changes = OTHERS[kind]
    model, theirs = make(name, depth=1).to(dtype), getattr(eva, kind)
    monkeypatch.setitem(THEIRS, kind, theirs.forward)
    monkeypatch.setattr(theirs, "forward", changes[change])
    with pytest.raises(ValueError, match=f"timm's {kind} computes something else than ours: with.* the results differ"):
        integration.accelerate(model)
    assert "Joint" not in repr(model) and "Fused" not in repr(model)


def test_a_timm_that_cannot_be_run(eva, monkeypatch):
    model = make(depth=1)
    monkeypatch.setattr(eva.EvaAttention, "forward", lambda self, x, rope=None, attn_mask=None: x)
    expected = r"cannot be run on a tiny input.*TypeError: .*is_causal.*; tested with timm 1\.\d+\.\d+ to"
    with pytest.raises(ValueError, match=expected):
        integration.accelerate(model)
    assert kinds(model) == {"EvaAttention"}


def test_no_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaat_fast.integrations._timm_attention", None)
    with pytest.raises(ImportError, match=r"timm \(tested: .* is needed: pip install 'evaat-fast\[peers\]'"):
        integration.accelerate(torch.nn.Linear(2, 2))


def test_nothing_is_touched():
    model = make(depth=2).train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        integration.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_one_comparison_for_each_kind():
    one, two = (counted(integration.accelerate, make(depth=n))[1] for n in (1, 3))
    assert one == two > 0
    mixed = make(depth=3)
    mixed.blocks[1].double()
    mixed.blocks[2].attn.num_prefix_tokens = 2
    assert counted(integration.accelerate, mixed)[1] >= 2 * one
    assert counted(integration.accelerate, mixed)[1] == 0


def test_weights_do_not_hide_a_difference(eva, monkeypatch):
    """Zeros in and out: the model's own weights would make any two attentions equal."""
    theirs = eva.EvaAttention.forward
    model = make(depth=1)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
    monkeypatch.setattr(eva.EvaAttention, "forward", lambda self, x, **rest: theirs(self, 2 * x, **rest))
    with pytest.raises(ValueError, match="computes something else"):
        integration.accelerate(model)


def test_meta_device():
    attention = make(depth=1).eval().blocks[0].attn
    empty = copy.deepcopy(attention).to("meta")
    integration.accelerate(empty)
    assert kinds(empty) == {"JointEvaAttention"} and empty.proj.weight.is_meta
    empty.to_empty(device="cpu").load_state_dict(attention.state_dict())
    empty.init_non_persistent_buffers()
    x = torch.randn(1, 17, 192)
    torch.testing.assert_close(empty(x), attention(x), **CLOSE)


def test_meta_device_of_a_block():
    block = make("eva02_base_patch16_clip_224", depth=1).eval().blocks[0]
    empty = integration.accelerate(copy.deepcopy(block).to("meta"))
    assert type(empty).__name__ == "FusedEvaBlock" and type(empty.mlp).__name__ == "FusedSwiGLU"
    assert empty.norm2.weight.is_meta and empty.mlp.fc2.weight.is_meta


def test_somebody_elses_block(eva):
    """A subclass may compute anything, and a forward of the instance is somebody's."""
    model = make(depth=3)
    model.blocks[0].__class__ = type("OwnBlock", (eva.EvaBlock,), {})
    model.blocks[1].forward = lambda x, **rest: x
    integration.accelerate(model)
    assert [type(b).__name__ for b in model.blocks] == ["OwnBlock", "EvaBlock", "FusedEvaBlock"]
    integration.restore(model)
    assert [type(b).__name__ for b in model.blocks] == ["OwnBlock", "EvaBlock", "EvaBlock"]


def test_somebody_elses_attention(eva):
    """A subclass may compute anything, and a forward of the instance would hide ours."""
    model = make(depth=2)
    model.blocks[0].attn.__class__ = type("OwnAttention", (eva.EvaAttention,), {})
    integration.accelerate(model)
    assert kinds(model) == {"OwnAttention", "JointEvaAttention"}
    integration.restore(model)
    assert kinds(model) == {"OwnAttention", "EvaAttention"}
    model.blocks[1].attn.forward = lambda x, **rest: x
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.forward was replaced on the instance"):
        integration.accelerate(model)


def test_bad_input():
    peers.peer("timm")
    for function in (integration.accelerate, integration.restore):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            function("eva02")
        with pytest.raises(
            ValueError, match="model: expected timm's EvaAttention or AttentionRope in it, found none in Linear"
        ):
            function(torch.nn.Linear(2, 2))
