"""integrations.timm: add_norm and swiglu_norm in timm's blocks and MLPs, and the calls that stay timm's."""

import copy
import pickle
from collections import Counter

import peers
import pytest
import torch
from test_timm import replica, run
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from evaat_fast.integrations import timm as integration

SMALL = dict(embed_dim=64, num_heads=2, depth=2, num_classes=7)
# name -> what makes it small, and the modules of a block that are no longer called
MODELS = {
    "eva02_tiny_patch14_224": (dict(img_size=56), ("norm2", "mlp.act", "mlp.drop1", "mlp.norm")),
    "eva02_base_patch14_224": (dict(img_size=56), ("norm2", "mlp.fc1_g", "mlp.fc1_x", "mlp.act", "mlp.drop1", "mlp.norm")),
    "eva02_base_patch16_clip_224": (
        dict(img_size=64),
        ("norm2", "mlp.fc1_g", "mlp.fc1_x", "mlp.act", "mlp.drop1", "mlp.norm"),
    ),
    "vit_small_patch16_rope_224": (dict(img_size=64), ("norm2",)),
    "vit_small_plus_patch16_dinov3": (
        dict(img_size=64),
        ("norm2", "mlp.fc1_g", "mlp.fc1_x", "mlp.act", "mlp.drop1", "mlp.norm"),
    ),
    "eva_giant_patch14_224": (dict(img_size=56), ("norm2",)),
}
NORMED, PACKED = "eva02_base_patch14_224", "eva02_tiny_patch14_224"


def make(name=NORMED, **changes):
    timm = peers.peer("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **MODELS[name][0], **changes})
    with torch.no_grad():  # fresh gates, scales and heads are next to nothing, and would hide a difference
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def image(name=NORMED, batch=16):
    """Rows enough for SwiGLU: 17 tokens of each."""
    size = MODELS[name][0]["img_size"]
    return torch.randn(batch, 3, size, size)


@pytest.fixture
def called(monkeypatch):
    """A function that runs another, and returns its result and the modules of a model that it called, without hooks: those
    would make every call timm's."""
    calls, theirs = Counter(), nn.Module.__call__

    def call(self, *args, **kwargs):
        calls[self] += 1
        return theirs(self, *args, **kwargs)

    def called(model, function, *args):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__call__", call)
            result = function(*args)
        return result, {name for name, module in model.named_modules() if calls[module]}

    return called


def assert_near(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", MODELS)
def test_equal_and_reversible(called, name):
    model, x = make(name), image(name)
    before, all_called = called(model, run, model, x)
    state = model.state_dict(keep_vars=True)
    integration.accelerate(model)
    ours, still_called = called(model, run, model, x)
    gone = {f"blocks.{i}.{part}" for i in range(2) for part in MODELS[name][1]}
    assert all_called - still_called == gone and gone
    assert_near(ours, before)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[k] is state[k] for k in state)
    again, same = called(integration.accelerate(model), run, model, x)
    assert same == still_called and all(map(torch.equal, again, ours))
    after, called_again = called(integration.restore(model), run, model, x)
    assert called_again == all_called and all(map(torch.equal, after, before))
    assert "Fused" not in repr(model)


def test_names():
    model = integration.accelerate(make(PACKED))
    eva, layers = peers.peer("timm.models.eva"), peers.peer("timm.layers")
    assert type(model.blocks[0]).__name__ == "FusedEvaBlock" and isinstance(model.blocks[0], eva.EvaBlock)
    assert type(model.blocks[0].mlp).__name__ == "FusedGluMlp" and isinstance(model.blocks[0].mlp, layers.GluMlp)
    assert type(integration.accelerate(make()).blocks[0].mlp).__name__ == "FusedSwiGLU"


@pytest.mark.parametrize("options", [{}, dict(init_values=0.5), dict(qkv_bias=False, scale_attn_inner=True)], ids=str)
@pytest.mark.parametrize("name", [NORMED, PACKED])
def test_drop_path(called, name, options):
    """Dropped branches and scaled ones are summed in norm2 too, with timm's random numbers."""
    model, x = make(name, drop_path_rate=0.5, **options).train(), image(name)
    torch.manual_seed(1)
    before = run(model, x)
    integration.accelerate(model)
    torch.manual_seed(1)
    ours, names = called(model, run, model, x)
    assert "blocks.1.drop_path1" in names and "blocks.1.norm2" not in names
    assert_near(ours, before)


@pytest.mark.parametrize("name", [NORMED, PACKED])
def test_dropout_inside(called, name):
    """train() decides at each call."""
    model, x = make(name, proj_drop_rate=0.5), image(name)
    torch.manual_seed(1)
    before = run(model.train(), x)
    integration.accelerate(model)
    torch.manual_seed(1)
    ours, names = called(model, run, model, x)
    assert {"blocks.0.mlp.drop1", "blocks.0.mlp.norm"} <= names and "blocks.0.norm2" not in names
    assert_near(ours, before)
    ours, names = called(model, run, model.eval(), x)
    assert not {"blocks.0.mlp.drop1", "blocks.0.mlp.norm"} & names
    assert_near(ours, run(integration.restore(model), x))


class Adapted(nn.Linear):
    """A linear layer that somebody changed."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def adapt(model, part, kind):
    old = model.get_submodule(part)
    new = kind(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.set_submodule(part, new)


SOMEBODY = {
    "another linear layer": lambda model: adapt(model, "blocks.0.mlp.fc1_x", Adapted),
    "another activation": lambda model: model.set_submodule("blocks.0.mlp.act", nn.GELU()),
    "no weight": lambda model: model.set_submodule("blocks.0.mlp.norm", nn.LayerNorm(170, elementwise_affine=False)),
    "another norm": lambda model: model.set_submodule("blocks.0.mlp.norm", peers.peer("timm.layers").RmsNorm(170)),
    "a forward": lambda model: setattr(model.blocks[0].mlp.norm, "forward", lambda x: 2 * x),
    "a parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1_g),
    "no dropout": lambda model: model.set_submodule("blocks.0.mlp.drop1", nn.Identity()),
    "one bias": lambda model: setattr(model.blocks[0].mlp.fc1_g, "bias", None),
}


@pytest.mark.parametrize("change", SOMEBODY.values(), ids=SOMEBODY)
@pytest.mark.parametrize("after", [False, True])
def test_somebody_elses_parts(called, change, after):
    """Before accelerate and after it: what an adapter has put in is called."""
    model, x = make(), image()
    if after:
        integration.accelerate(model)
    change(model)
    ours, names = called(model, run, integration.accelerate(model), x)
    assert {f"blocks.0.mlp.{part}" for part in ("fc1_g", "fc1_x", "act", "norm")} <= names
    assert "blocks.1.mlp.norm" not in names and "blocks.0.norm2" not in names
    assert_near(ours, run(integration.restore(model), x))


@pytest.mark.parametrize("kind", ["nn.LayerNorm", "RmsNorm", "fast norm", "another branch"])
def test_somebody_elses_block(called, kind):
    model, x, layers = make(), image(), peers.peer("timm.layers")
    if kind == "another branch":
        model.blocks[0].mlp = nn.Sequential(nn.Tanh(), nn.Linear(64, 64))
    else:
        model.blocks[0].norm2 = {"nn.LayerNorm": nn.LayerNorm, "RmsNorm": layers.RmsNorm}.get(kind, layers.LayerNorm)(64)
        model.blocks[0].norm2._fast_norm = kind == "fast norm"
    before = run(model, x)
    ours, names = called(model, run, integration.accelerate(model), x)
    assert ("blocks.0.norm2" in names) == (kind != "nn.LayerNorm") and "blocks.1.norm2" not in names
    assert_near(ours, before)


@pytest.mark.parametrize("name", [NORMED, PACKED])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called(called, name, when):
    """Of every module, forward and backward, in timm's order; and once they are gone, ours is back."""
    seen, model, x = [], make(name), image(name)

    def hook_all():
        handles = []
        for part, module in model.named_modules():
            handles.append(module.register_forward_hook(lambda m, x, y, part=part: seen.append(part)))
            handles.append(module.register_full_backward_hook(lambda m, dx, dy, part=part: seen.append(("backward", part))))
        return handles

    handles = hook_all()
    expected, order = run(model, x), seen.copy()
    if when == "after":
        [handle.remove() for handle in handles]
    integration.accelerate(model)
    if when == "after":
        handles = hook_all()
    seen.clear()
    assert_near(run(model, x), expected)
    assert seen == order
    [handle.remove() for handle in handles]
    assert not {f"blocks.0.{part}" for part in MODELS[name][1]} & called(model, model, x)[1]


@pytest.mark.sample(6)
@pytest.mark.parametrize("part", MODELS[NORMED][1])
@pytest.mark.parametrize(
    "register",
    ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_pre_hook", "register_full_backward_hook"],
)
def test_each_hook_is_called(part, register):
    seen, model = [], integration.accelerate(make())
    getattr(model.blocks[0].get_submodule(part), register)(lambda *given: seen.append(part))
    run(model, image())
    assert seen == [part]


def test_hooks_for_all_modules_are_called():
    seen, model = [], integration.accelerate(make())
    with nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(module)):
        model(image())
    assert {model.blocks[0].get_submodule(part) for part in MODELS[NORMED][1]} <= set(seen)


@pytest.mark.parametrize("why", ["few rows", "bfloat16", "float64", "autocast"])
def test_calls_that_stay_timms(called, why):
    """Where ours would save nothing, the results are timm's to the bit."""
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(why, torch.float32)
    model, x = make().to(dtype), image(batch=1 if why == "few rows" else 16).to(dtype)
    block, rope = model.blocks[1], model.rope.get_embed()
    tokens = torch.randn(len(x), 17, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        expected, all_called = called(block.mlp, block.mlp, tokens)
        integration.accelerate(model)
        ours, names = called(block.mlp, block.mlp, tokens)
        assert names == all_called and torch.equal(ours, expected) and ours.dtype == expected.dtype
        names = called(block, block, tokens, rope)[1]
        assert ("norm2" in names) == (why != "few rows")


@pytest.mark.parametrize("part", ["fc1_x", "norm"])
def test_wrapped_weights(called, part):
    """Quantized or distributed ones may have no other operators than those that timm calls."""
    mlp, x = integration.accelerate(make()).blocks[0].mlp, torch.randn(16, 17, 64)
    expected, names = called(mlp, mlp, x)
    assert part not in names
    weight = mlp.get_submodule(part).weight.detach()
    mlp.get_submodule(part).weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    out, names = called(mlp, mlp, x)
    assert part in names and isinstance(out, TwoTensor)
    torch.testing.assert_close(out.a, expected, rtol=1e-4, atol=1e-4)


def test_other_layouts(called):
    """Post-norm blocks, and gates that come last."""
    post, x = make(use_post_norm=True), image()
    before = run(post, x)
    integration.accelerate(post)
    assert type(post.blocks[0]).__name__ == "EvaBlockPostNorm" and type(post.blocks[0].mlp).__name__ == "FusedSwiGLU"
    assert_near(run(post, x), before)
    last = make(PACKED)
    last.blocks[0].mlp.gate_last = True
    before = run(last, x)
    ours, names = called(last, run, integration.accelerate(last), x)
    assert "blocks.0.mlp.act" in names and "blocks.1.mlp.act" not in names
    assert_near(ours, before)


@pytest.mark.parametrize("part", ["", "mlp"], ids=["block", "mlp"])
@pytest.mark.parametrize("name", [NORMED, PACKED, "vit_small_plus_patch16_dinov3"])
def test_autocast(name, part):
    """Our arithmetic under autocast, which on CUDA is what `forward` takes: timm's dtypes, and no less exact than timm's."""
    model = make(name)
    x = torch.randn(16, 17, 64)

    def outcome(call, dtype=torch.float32):
        y = x.to(dtype).requires_grad_()
        out = call(y)
        return [out, *torch.autograd.grad(out.square().sum(), [y, *(p for p in module.parameters() if p.requires_grad)])]

    module = model.blocks[0].get_submodule(part)
    exact = outcome(module)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = outcome(module)
        integration.accelerate(model)
        ours = outcome(module.fused)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        allowed = 1.2 * (b.double() - c.double()).norm() + 2e-3 * c.double().norm()
        assert (a.double() - c.double()).norm() <= allowed


@pytest.mark.parametrize("duplicate", [copy.deepcopy, replica, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", [NORMED, PACKED])
def test_copies_run_on_their_own(called, duplicate, name):
    mlp, x = integration.accelerate(make(name)).blocks[0].mlp.eval(), torch.randn(16, 17, 64)
    with torch.no_grad():
        before, twin = mlp(x), duplicate(mlp)
        out, names = called(twin, twin, x)
        assert type(twin) is type(mlp) and torch.equal(out, before) and "norm" not in names
        twin.fc2 = nn.Linear(twin.fc2.in_features, 64)
        assert (twin(x) - before).abs().max() > 0.01 and torch.equal(mlp(x), before)


def test_checkpointing(called):
    model, x = make(), image()
    before = run(model, x)
    integration.accelerate(model).set_grad_checkpointing()
    ours, names = called(model, run, model, x)
    assert "blocks.0.norm2" not in names and "blocks.0.mlp.norm" not in names
    assert_near(ours, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_low_precision(called, dtype):
    """The stream's sums stay timm's, and its dtype; the MLPs are ours."""
    model, x = make().cuda().to(dtype), image().cuda().to(dtype)
    theirs = model(x)
    ours, names = called(model, integration.accelerate(model), x)
    assert "blocks.0.norm2" in names and "blocks.0.mlp.norm" not in names and ours.dtype == dtype
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuda(called, name, autocast):
    """Triton's kernels in the models, as exact as timm's."""
    model, x = make(name).cuda(), image(name).cuda()
    exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        theirs = run(model, x)
        ours, names = called(model, run, integration.accelerate(model), x)
    assert not {f"blocks.0.{part}" for part in MODELS[name][1]} & names
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-2 * c.norm()
