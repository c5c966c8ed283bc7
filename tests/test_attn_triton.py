"""The Triton kernels of joint_attention in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

import random

import pytest
import torch
import torch.utils.checkpoint
from check import close
from test_attn import assert_bias_learns, results, tensors
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops._core.register import flat
from evaat_fast.ops.attn.plan import AttentionPlan
from evaat_fast.ops.attn.reference import attention_reference
from evaat_fast.ops.rope3d.rotation import Rotation

pytestmark = pytest.mark.interpret
F32, F16, F64 = torch.float32, torch.float16, torch.float64
dtypes = pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])


def plain(q, k, v, scale=None, core=attention_reference, **rope):
    """Rotation, then attention, by their specifications, or by torch's in the same dtype."""
    k_positions = rope.pop("k_positions", None)
    if rope:
        other = rope if k_positions is None else rope | {"positions": k_positions}
        q, k = ops.rope3d(q, backend="reference", **rope), ops.rope3d(k, backend="reference", **other)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if core is attention_reference:
        return core(q, k, v, scale)
    return core(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def check(inputs, backend="triton", **options):
    """Output and gradients against float64: of float16 held to the errors of torch's own by the rule of all ops; of float32,
    which is not what the kernels are for, to twice their norm and a rounding."""
    ours = results(lambda *x: ops.joint_attention(*x, backend=backend, **options), inputs)
    low = results(lambda *x: plain(*x, core=scaled_dot_product_attention, **options), inputs)
    double = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(lambda *x: plain(*x, **options), double)
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, low, truth, strict=True):
        if a.dtype == F16:
            close(a, b, t, name)
        else:
            size = max(x.norm() for x in (t, *double))  # of which a gradient may be a small difference
            error, allowed = (a.double() - t).norm(), 2 * (b.double() - t).norm() + 2.4e-7 * size
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.sample(10)
@dtypes
@pytest.mark.parametrize("N", [1, 2, 17, 64, 65, 127, 128, 129, 197, pytest.param(785, marks=pytest.mark.slow)])
def test_sizes(N, dtype):
    rope = {} if N == 1 else {"positions": torch.rand(N, 3) * 9}
    check(tensors(B=1, H=2, n=N, D=16 if N > 200 else 64, dtype=dtype), **rope)


@pytest.mark.sample(8)
@dtypes
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("D", [32, 80, 96, 128])
def test_head_dims(D, interleaved, dtype):
    check(tensors(B=1, H=1, n=49, D=D, dtype=dtype), grid=(3, 4, 4), interleaved=interleaved)


def test_head_dims_without_rotation():
    for D in (1, 7, 33):
        check(tensors(B=1, H=1, n=20, D=D, dtype=F32))


@pytest.mark.parametrize("prefix", [0, 3, 25])
def test_prefix_tokens(prefix):
    check(tensors(n=25, dtype=F32), positions=torch.randint(0, 9, (25, 3)), prefix_tokens=prefix)


@pytest.mark.parametrize("shape", [(2, 25, 3), (25, 3)])
def test_positions_of_each_clip(shape):
    check(tensors(n=25, dtype=F32), positions=torch.randn(shape) * 5)


def test_frequencies_of_each_head():
    check(tensors(n=25, dtype=F32), grid=(2, 3, 4), freqs=torch.randn(3, 3, 16))


def test_grouped_queries_and_other_keys():
    q, k, v = tensors(H=6, Hk=2, n=40, dtype=F32)
    k, v = (x.detach()[:, :, :33].requires_grad_() for x in (k, v))
    check((q, k, v))
    check((q, k, v), positions=torch.randn(40, 3), k_positions=torch.randn(33, 3), prefix_tokens=0)


def test_learned_frequencies_have_a_gradient():
    q, k, v = tensors(n=25, dtype=F32)
    freqs = ops.joint_freqs(32).requires_grad_()
    ours, truth = (
        torch.autograd.grad(ops.joint_attention(q, k, v, grid=(2, 3, 4), freqs=freqs, backend=b).square().sum(), freqs)[0]
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", ["packed", "tokens first", "sliced", "last dim strided", "one head for all"])
def test_views(view):
    q, k, v = (x.detach() for x in tensors(n=25, dtype=F32))
    given = {
        "packed": lambda x: (
            torch.stack((x, x, x), 3).transpose(1, 2).flatten(3).unflatten(3, (3, 32))[..., 1, :].transpose(1, 2)
        ),
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
        "last dim strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "one head for all": lambda x: x[:, :1].expand_as(x),
    }[view]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    run = lambda f: results(lambda *x: ops.joint_attention(*map(f, x), grid=(2, 3, 4), backend="triton"), leaves)  # noqa: E731
    for a, b in zip(run(given), run(lambda x: given(x).contiguous()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scales(scale):
    check(tensors(n=25, dtype=F32), grid=(2, 3, 4), scale=scale)


@pytest.mark.parametrize("size", [120.0, 0.0], ids=["big logits", "all equal"])
def test_extreme_scores(size):
    q, k, v = (x.detach() * (size**0.5 if i < 2 else 1) for i, x in enumerate(tensors(D=32, dtype=F32)))
    check([x.requires_grad_() for x in (q, k, v)], grid=(2, 3, 4))


def test_log_sum_exps_and_their_gradient():
    q, k, v = tensors(n=70, dtype=F32)

    def run(backend, *x):
        out, lse = ops.joint_attention(*x, positions=torch.arange(210).view(70, 3) % 7, return_lse=True, backend=backend)
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + (lse * torch.arange(70)).sum()
        return out, lse, *torch.autograd.grad(loss, x)

    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for a, b in zip(run("triton", q, k, v), run("reference", *double), strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()
    alone = ops.joint_attention(q, k, v, return_lse=True, backend="triton")[1]
    want = ops.joint_attention(*double, return_lse=True, backend="reference")[1]
    for a, b in zip(torch.autograd.grad(alone.sum(), (q, k)), torch.autograd.grad(want.sum(), double[:2]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_empty_batch_has_log_sum_exps():
    q, k, v = (x[:0] for x in tensors(dtype=F32))
    out, lse = ops.joint_attention(q, k, v, grid=(2, 3, 4), return_lse=True, backend="triton")
    assert out.shape == (0, 3, 25, 32) and lse.shape == (0, 3, 25)
    packed = (torch.randn(0, 2, 16) for _ in range(3))
    none = torch.zeros(1, dtype=torch.int32)
    out, lse = ops.joint_attention(*packed, cu_seqlens=none, max_seqlen=0, return_lse=True, backend="triton")
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_one_sided_gradients_and_inference():
    q, k, v = (x.detach() for x in tensors(n=25, dtype=F32))
    every = results(
        lambda *x: ops.joint_attention(*x, grid=(2, 3, 4), backend="triton"), [x.clone().requires_grad_() for x in (q, k, v)]
    )
    for i in range(3):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        out = ops.joint_attention(*inputs, grid=(2, 3, 4), backend="triton")
        upstream = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape).float()
        assert torch.equal(torch.autograd.grad(out, inputs[i], upstream)[0], every[1 + i])
    with torch.no_grad():
        assert torch.equal(ops.joint_attention(q, k, v, grid=(2, 3, 4), backend="triton"), every[0])


@pytest.mark.sample(8)
@pytest.mark.parametrize("bias", [True, False])  # with one, torch returns the projection as a view
@pytest.mark.parametrize(
    "options",
    [dict(grid=(2, 3, 4)), dict(positions=torch.randn(2, 25, 3)), {}, dict(scale=-0.2)],
    ids=["grid", "positions", "no rotation", "scale"],
)
def test_packed_projection(bias, options):
    linear, x = torch.nn.Linear(16, 3 * 3 * 32, bias=bias), torch.randn(2, 25, 16)
    options = dict(grid=(2, 3, 4)) | options if "scale" in options else options

    def run(backend):
        out, lse = ops.joint_attention_qkv_(linear(x), 3, return_lse=True, backend=backend, **options)
        assert out.transpose(1, 2).is_contiguous()
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.square().sum()
        return out, lse, *torch.autograd.grad(loss, linear.parameters())

    for a, b in zip(run("triton"), run("reference"), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "options", [dict(grid=(2, 3, 4)), {}, dict(grid=(2, 3, 4), scale=-0.2)], ids=["grid", "no rotation", "scale"]
)
def test_bias_that_qkv_has_in_it(options, frozen):
    assert_bias_learns(3, 32, 25, frozen, 1e-5, backend="triton", **options)


def test_packed_projection_in_place():
    """Keys and queries are turned where they lie: what the linear layer returned holds what the backward pass needs."""
    qkv = torch.randn(2, 25, 3 * 3 * 32)
    turned, leaf = ops.rope3d_qkv_(qkv.clone(), 3, (2, 3, 4)), qkv.clone().requires_grad_()
    packed = leaf * 1
    ops.joint_attention_qkv_(packed, 3, (2, 3, 4), backend="triton")
    torch.testing.assert_close(packed.detach(), turned)
    without = ops.joint_attention_qkv_(qkv.clone(), 3, (2, 3, 4), backend="triton")
    torch.testing.assert_close(without, ops.joint_attention_qkv_(leaf * 1, 3, (2, 3, 4), backend="triton").detach())
    with pytest.raises(ValueError, match="leaf"):
        ops.joint_attention_qkv_(leaf, 3, (2, 3, 4), backend="triton")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_head(bad):
    q, k, v = (x.detach() for x in tensors(dtype=F32))
    k[1, 0, 3, 5] = bad
    out = ops.joint_attention(q, k, v, grid=(2, 3, 4), backend="triton")
    assert out[1, 0].isnan().any() and out[0].isfinite().all() and out[1, 1:].isfinite().all()


def settings(rope=True, scale=0.2):
    """An AttentionPlan as the operators take it."""
    still = Rotation(None, None, (2, 3, 4) if rope else (), 1 if rope else 0, True, False, "triton")
    return flat(AttentionPlan(still, None, rope, None, None, scale, "triton"))


@pytest.mark.sample(1)
@pytest.mark.parametrize("rope", [True, False])
def test_opcheck(rope):
    q, k, v = (x.detach() for x in tensors(H=4, Hk=2, n=25, dtype=F32))
    raw = torch.ops.evaat_fast
    torch.library.opcheck(raw.attn_forward.default, (q, k, v, True, *settings(rope)))
    out, lse, turned_q, turned_k = raw.attn_forward(q, k, v, True, *settings(rope))
    saved = (turned_q if rope else q, turned_k if rope else k, v, out, lse)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(raw.attn_backward.default, (*saved, torch.randn_like(out), dlse, True, True, *settings(rope)))


def test_opcheck_packed():
    qkv, raw = torch.randn(2, 25, 3 * 4 * 32), torch.ops.evaat_fast
    torch.library.opcheck(raw.attn_qkv_forward_.default, (qkv.clone(), 4, True, *settings()))
    out, lse = raw.attn_qkv_forward_(qkv, 4, True, *settings())
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(raw.attn_qkv_backward.default, (qkv, out, lse, torch.randn_like(out), dlse, 4, True, *settings()))


def test_operators_and_compilation():
    q, k, v = tensors(n=25, dtype=F32)
    loss = lambda *x: ops.joint_attention(*x, grid=(2, 3, 4), backend="triton").square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b)
    linear, x = torch.nn.Linear(16, 3 * 3 * 32), torch.randn(2, 25, 16)
    step = lambda x: ops.joint_attention_qkv_(linear(x), 3, (2, 3, 4), backend="triton").square().sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(x), linear.parameters()) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="once_differentiable|twice|double"):
        (grad,) = torch.autograd.grad(loss(q, k, v), q, create_graph=True)
        grad.sum().backward()


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    ops.register_flop_formulas()
    ops.register_flop_formulas()  # once is enough, twice is no harm
    q, k, v = tensors(n=25, dtype=F32)
    x, limits = torch.randn(25, 3, 32), torch.tensor([0, 9, 9, 25], dtype=torch.int32)
    linear = torch.randn(2, 25, 3 * 3 * 32, requires_grad=True)
    for call, flops in (
        (lambda: ops.joint_attention(q, k, v, grid=(2, 3, 4), backend="triton").sum().backward(), 14 * 2 * 25**2),
        (lambda: ops.joint_attention(x, x, x, cu_seqlens=limits, backend="triton"), 4 * (9**2 + 16**2)),
        (lambda: ops.joint_attention_qkv_(linear * 1, 3, (2, 3, 4), backend="triton").sum().backward(), 14 * 2 * 25**2),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == flops * 3 * 32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    linear, x = torch.nn.Linear(16, 3 * 3 * 32), torch.randn(2, 25, 16)
    step = lambda x: ops.joint_attention_qkv_(linear(x), 3, (2, 3, 4), backend="triton")  # noqa: E731

    def gradient(function):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        return leaf.grad

    again = lambda x: torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant)  # noqa: E731
    assert torch.equal(gradient(step), gradient(again))


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.joint_attention(q, k, v, grid=(2, 3, 4), backend="triton")

    inputs = tuple(x.detach() for x in tensors(n=25, dtype=F32))
    program = torch.export.export(Attention(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Attention()(*inputs))


def test_autocast_casts_first():
    q, k, v = (x.detach() for x in tensors(n=25, dtype=F32))
    with torch.autocast("cpu", torch.float16):
        out = ops.joint_attention(q, k, v, grid=(2, 3, 4), backend="triton")
    want = ops.joint_attention(*(x.half() for x in (q, k, v)), grid=(2, 3, 4), backend="triton")
    assert out.dtype == F16 and torch.equal(out, want)


def test_what_it_cannot_do():
    big = tensors(D=160, dtype=F32)
    with pytest.raises(RuntimeError, match="joint_attention: backend 'triton' .* head dims up to 128"):
        ops.joint_attention(*big, backend="triton")
    q, k, v = tensors(dtype=F32)
    with pytest.raises(ValueError, match="grid"):
        ops.joint_attention(q, k, v, grid=(2, 3, 5), backend="triton")
    with pytest.raises(ValueError, match=r"k: expected the shape \[2, Hk, 25, 32\]"):
        ops.joint_attention(q, k[:, :, :9], v[:, :, :9], grid=(2, 3, 4), backend="triton")
    assert ops.joint_attention(*(x[:0] for x in (q, k, v)), grid=(2, 3, 4), backend="triton").shape == (0, 3, 25, 32)


def random_call(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    D, N, Hk, groups = rng.choice((8, 16, 32, 64, 80)), rng.randint(1, 140), rng.choice((1, 2)), rng.choice((1, 2, 3))
    inputs = tensors(B=rng.choice((1, 2)), H=Hk * groups, Hk=Hk, n=N, D=D, dtype=rng.choice((F32, F16)))
    options = {}
    if rng.random() < 0.8:
        prefix = rng.choice((0, 1, 5))
        options = dict(positions=torch.rand(N, 3) * 20, prefix_tokens=min(prefix, N), interleaved=rng.random() < 0.5)
    if rng.random() < 0.3:
        options["scale"] = rng.choice((0.05, 0.5))
    check(inputs, backend="triton", **options)


def test_fuzz():
    for seed in range(8):
        random_call(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(1, 7))
def test_fuzz_long(block):
    for seed in range(100 * block, 100 * block + 50):
        random_call(seed)
