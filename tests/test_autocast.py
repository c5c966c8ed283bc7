"""What autocast is set to, in eager calls and in compiled ones, where no part of a graph may break."""

import pytest
import torch

import evaat_fast
from evaat_fast import ops
from evaat_fast.ops._core.autocast import autocast_dtype

VIDEO = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
TOKENS = torch.randint(0, 49408, (2, 7))


@pytest.fixture
def old_dynamo(monkeypatch):
    """torch up to 2.11, whose Dynamo cannot trace this query."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))


def test_the_dtype_of_where_it_stands():
    assert autocast_dtype("cpu") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16 and autocast_dtype("cuda") is None
        with torch.autocast("cpu", torch.float16):
            assert autocast_dtype("cpu") == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype("cpu") is None
        assert autocast_dtype("meta") is None


def test_a_compiled_call_follows_the_setting(old_dynamo):
    compiled = torch.compile(lambda x: x.to(autocast_dtype(x.device.type) or x.dtype), fullgraph=True, backend="eager")
    x = torch.ones(3)
    assert compiled(x).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert compiled(x).dtype == dtype
    assert compiled(x).dtype == torch.float32
    assert compiled(x.to("meta")).dtype == torch.float32


devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.sample(2)
@devices
@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_towers_compile_whole_under_autocast(tower, backend, old_dynamo, device):
    model = evaat_fast.create_model("eva02_at_tiny_patch16_64", num_frames=2, vision_layers=2, text_layers=2).to(device)
    tower, given = getattr(model, tower), (VIDEO if tower == "visual" else TOKENS).to(device)
    compiled = torch.compile(tower, fullgraph=True, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        ours, want = compiled(given), tower(given)
    assert ours.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(ours, want, rtol=2e-2, atol=2e-2)
    for of in (ours, want):
        of.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())
        tower.zero_grad()


GRID, N, PAIRS = (2, 2, 2), 9, 12
HEADS, PACKED, FEATURES = (2, 2, N, 16), (2, N, 96), (PAIRS, 16)
OPS = {
    "rope3d": (lambda x: ops.rope3d(x, x * 2, GRID)[0], HEADS),
    "rope3d_qkv_": (lambda x: ops.rope3d_qkv_(x * 1, 2, GRID), PACKED),
    "joint_attention": (lambda x: ops.joint_attention(x, x * 2, x * 3, grid=GRID), HEADS),
    "joint_attention_qkv_": (lambda x: ops.joint_attention_qkv_(x * 1, 2, GRID), PACKED),
    "sms_loss": (lambda x: ops.sms_loss(x, x * 2 + 1, torch.eye(PAIRS, device=x.device)), FEATURES),
    "mi_mm_loss": (lambda x: ops.mi_mm_loss(x, x * 2 + 1), FEATURES),
    "adaptive_mi_mm_loss": (lambda x: ops.adaptive_mi_mm_loss(x, x + 1, torch.ones(PAIRS, device=x.device)), FEATURES),
    "clip_loss": (lambda x: ops.clip_loss(x, x * 2 + 1, 2.0), FEATURES),
    "ego_nce_loss": (lambda x: ops.ego_nce_loss(x, x + 1, torch.eye(PAIRS, dtype=torch.bool, device=x.device)), FEATURES),
}


@devices
@pytest.mark.parametrize("name", OPS)
def test_ops_compile_whole_under_autocast(name, old_dynamo, device):
    """Compiled and eager calls, each against the call without autocast in float32: a failure says which of the two is wrong."""
    call, shape = OPS[name]
    x = (torch.randn(shape) / 2).to(device).requires_grad_()
    exact = call(x)
    want = exact, torch.autograd.grad(exact.square().sum(), x)[0]
    for how, function in (("eager", call), ("compiled", torch.compile(call, fullgraph=True, backend="aot_eager"))):
        with torch.autocast(device, torch.bfloat16):
            out = function(x)
            ours = out, torch.autograd.grad(out.float().square().sum(), x)[0]
        for what, a, b in zip(("value", "gradient"), ours, want, strict=True):
            assert (a.float() - b).norm() <= 3e-2 * b.norm() + 1e-6, f"the {how} {what}"
