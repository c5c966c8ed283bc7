"""joint_attention: equal to rotation plus softmax attention in float64, from every layout the model and others use."""

import pytest
import torch
import torch.utils.checkpoint
from check import close, on_hopper
from torch.nn.functional import scaled_dot_product_attention

from evaat_fast import ops
from evaat_fast.ops._core import dispatch
from evaat_fast.ops.attn.reference import attention_reference

GRID = (2, 3, 4)
N = 1 + 2 * 3 * 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tensors(B=2, H=3, n=N, D=32, Hk=None, dtype=torch.float64, device="cpu"):
    q = torch.randn(B, H, n, D, dtype=torch.float64)
    k, v = torch.randn(2, B, Hk or H, n, D, dtype=torch.float64).unbind()
    return [x.to(dtype).to(device).requires_grad_() for x in (q, k, v)]


def truth(q, k, v, grid=GRID, scale=None, core=attention_reference):
    """The rotation's reference, then the specification of attention, or torch's SDPA to whose error ours is held."""
    if grid is not None:
        q, k = ops.rope3d(q, k, grid, backend="reference")
    return core(q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def results(function, inputs):
    """Output and gradients for a fixed, uneven upstream gradient."""
    out = function(*inputs)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype).to(out.device)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,grid", [(1, None), (2, (1, 1, 1)), (17, (1, 4, 4)), (N, GRID), (65, (4, 4, 4)), (N, None)])
def test_against_float64(dtype, device, n, grid):
    inputs = tensors(n=n, dtype=dtype, device=device)
    double = [x.detach().double().requires_grad_() for x in inputs]
    ours = results(lambda q, k, v: ops.joint_attention(q, k, v, grid=grid), inputs)
    low = results(lambda q, k, v: truth(q, k, v, grid, core=scaled_dot_product_attention), inputs)
    exact = results(lambda q, k, v: truth(q, k, v, grid), double)
    for name, o, w, t in zip(("out", "dq", "dk", "dv"), ours, low, exact, strict=True):
        close(o, w, t, name)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n,grid", [(1, None), (17, (1, 4, 4)), (129, (2, 8, 8)), (785, (4, 14, 14))])
def test_triton_against_float64(n, grid, dtype, D, interleaved):
    inputs = tensors(H=4, Hk=2, n=n, D=D, dtype=dtype, device="cuda")
    rope = dict(grid=grid, interleaved=interleaved) if grid else {}
    run = lambda backend: lambda *x: ops.joint_attention(*x, backend=backend, **rope)  # noqa: E731
    ours, again, low = results(run("triton"), inputs), results(run("triton"), inputs), results(run("sdpa"), inputs)
    exact = results(run("reference"), [x.detach().double().requires_grad_() for x in inputs])
    assert all(map(torch.equal, ours, again)), "two runs differ"
    for name, o, w, t in zip(("out", "dq", "dk", "dv"), ours, low, exact, strict=True):
        close(o, w, t, name)


hopper = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")


def test_gluon_says_why_not():
    q, k, v = tensors(n=200, D=64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="'gluon' was asked for but cannot serve this call: the gluon backend takes CUDA"):
        ops.joint_attention(q, k, v, backend="gluon")
    device, needs = torch.device("cuda"), (dispatch.OTHER_GPU, dispatch.HALVES, dispatch.PACKED)
    for need in needs:
        assert dispatch.pick("joint_attention", device, torch.bfloat16, None, (need,)) == "sdpa"
    assert dispatch.pick("joint_attention", device, torch.float32) == "sdpa"


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_any_layout(device):
    """cuDNN keeps a graph of the backward pass that goes by the strides of the first dO, and reads the next one likewise."""
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in tensors(n=785, D=64)]
    inputs = [x.to(device, torch.bfloat16).detach().requires_grad_() for x in inputs]
    out = ops.joint_attention(*inputs)
    dO = torch.randn(out.shape, device=device).bfloat16()
    layouts = {
        "rows": dO.contiguous(),
        "tokens": dO.transpose(1, 2).contiguous().transpose(1, 2),
        "padded": torch.nn.functional.pad(dO, (0, 8))[..., :64],
        "shifted": torch.cat((dO.new_zeros(1), dO.transpose(1, 2).flatten()))[1:].view(2, 785, 3, 64).transpose(1, 2),
        "one": dO[:, :, :1].expand_as(dO),
        "columns": dO.mT.contiguous().mT,
    }
    for name, x in layouts.items():
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        exact = attention_reference(*exact_inputs, 64**-0.5)
        want = torch.autograd.grad(exact, exact_inputs, x.double())
        for what, a, b in zip("qkv", torch.autograd.grad(out, inputs, x, retain_graph=True), want, strict=True):
            assert (a - b).norm() <= 1e-2 * b.norm(), f"{name}, d{what}"


@pytest.mark.gpu
def test_what_sdpa_has_not_is_tritons():
    q, k, v = tensors(dtype=torch.float16, device="cuda")
    out, lse = ops.joint_attention(q, k, v, grid=GRID, return_lse=True)
    want = ops.joint_attention(q, k, v, grid=GRID, return_lse=True, backend="triton")
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert torch.equal(ops.joint_attention(q, k, v, grid=GRID, deterministic=True), out)
    with pytest.raises(RuntimeError, match="on CUDA sdpa is deterministic only under"):
        ops.joint_attention(q, k, v, grid=GRID, deterministic=True, backend="sdpa")


@pytest.mark.gpu
def test_triton_a_thousand_times():
    inputs = tensors(B=4, H=4, n=785, D=64, dtype=torch.bfloat16, device="cuda")
    run = lambda *x: ops.joint_attention(*x, grid=(4, 14, 14), backend="triton")  # noqa: E731
    first = results(run, inputs)
    for _ in range(1000):
        assert all(map(torch.equal, first, results(run, inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "triton", pytest.param("gluon", marks=hopper)])
def test_in_a_cuda_graph(backend):
    weight = torch.nn.Linear(64, 3 * 4 * 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 785, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        out = ops.joint_attention_qkv_(weight(x), 4, (4, 14, 14), backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), weight.parameters())

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def packed(B=2, H=3, D=32, dtype=torch.float32):
    weight = torch.nn.Linear(16, 3 * H * D).to(dtype)
    return weight, torch.randn(B, N, 16, dtype=dtype)


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
@pytest.mark.parametrize(
    "rope",
    [dict(grid=GRID), dict(), dict(positions=torch.randn(N, 3)), dict(grid=GRID, interleaved=False)],
    ids=["grid", "no rotation", "positions", "grid, half-split"],
)
def test_packed_equals_unpacked(rope, backend):
    linear, x = packed()
    out = ops.joint_attention_qkv_(linear(x), 3, backend=backend, **rope)
    grads = torch.autograd.grad(out.square().sum(), list(linear.parameters()))
    q, k, v = (t.transpose(1, 2) for t in linear(x).unflatten(2, (3, 3, 32)).unbind(2))
    expected = ops.joint_attention(q, k, v, backend=backend, **rope)
    torch.testing.assert_close(out, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(linear.parameters()))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


def assert_bias_learns(heads, D, n, frozen, tolerance, device="cpu", dtype=torch.float32, **options):
    """A projection's bias learns behind the attention what it does in its layer; frozen: there is nothing else to learn."""
    linear = torch.nn.Linear(16, 3 * heads * D, device=device).to(dtype)
    x = torch.randn(2, n, 16, device=device, dtype=dtype)
    linear.weight.requires_grad_(not frozen)
    wanted = [x for x in linear.parameters() if x.requires_grad]
    runs = []
    for bias in (None, linear.bias):
        qkv = linear(x) if bias is None else torch.nn.functional.linear(x, linear.weight, bias.detach())
        out = ops.joint_attention_qkv_(qkv, heads, qkv_bias=bias, **options)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
    for found, expected in zip(*runs, strict=True):
        assert found.dtype == expected.dtype and (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rope", [dict(grid=GRID), dict()], ids=["grid", "no rotation"])
def test_bias_that_qkv_has_in_it(rope, frozen, backend):
    assert_bias_learns(3, 32, N, frozen, 1e-5, backend=backend, **rope)


@pytest.mark.parametrize("attend", [lambda q: ops.rope3d(q, q, GRID)[0], lambda q: ops.joint_attention(q, q, q, grid=GRID)])
def test_beside_what_torch_func_transforms(attend):
    """A tensor with a gradient of its own in a transform of something else."""
    (q,) = tensors(dtype=torch.float32)[:1]
    out = attend(q).detach()
    slope = torch.func.grad(lambda factor: (factor * attend(q) * out).sum())(torch.ones(()))
    torch.testing.assert_close(slope.detach(), out.square().sum())


class _Unmoved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.gpu
def test_what_has_no_gradient_behind_sdpa():
    q, k, v = tensors(dtype=torch.float32, device="cuda")
    _Unmoved.apply(ops.joint_attention(q, k, v, backend="sdpa")).backward()
    assert q.grad is None or not q.grad.any()


def test_output_is_a_view_of_packed_heads():
    q, k, v = tensors(dtype=torch.float32)
    for out in (
        ops.joint_attention(q, k, v, grid=GRID),
        ops.joint_attention(q, k, v, grid=GRID, backend="reference"),
        ops.joint_attention_qkv_(torch.randn(2, N, 3 * 3 * 32), 3, GRID),
    ):
        assert out.shape == (2, 3, N, 32) and out.transpose(1, 2).is_contiguous()


def test_never_writes_to_its_inputs():
    inputs = tensors(dtype=torch.float32)
    before = [x.detach().clone() for x in inputs]
    ops.joint_attention(*inputs, grid=GRID).sum().backward()
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True))


def test_grouped_queries():
    q, k, v = tensors(H=6, Hk=2)
    out = ops.joint_attention(q, k, v, grid=GRID)
    full = ops.joint_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), grid=GRID)
    torch.testing.assert_close(out, full)


def test_keys_with_positions_of_their_own():
    q, k, v = tensors()
    p, shorter = torch.randn(N, 3), torch.randn(10, 3)
    out = ops.joint_attention(q, k[:, :, :10], v[:, :, :10], positions=p, k_positions=shorter)
    rq, rk = ops.rope3d(q, positions=p), ops.rope3d(k[:, :, :10], positions=shorter)
    torch.testing.assert_close(out, attention_reference(rq, rk, v[:, :, :10], 32**-0.5))


def test_scores_see_relative_positions_only():
    q, k, v = tensors()
    p = torch.randint(0, 9, (N, 3))
    near = ops.joint_attention(q, k, v, positions=p, prefix_tokens=0)
    far = ops.joint_attention(q, k, v, positions=p + torch.tensor([3, -2, 5]), prefix_tokens=0)
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-6)


def test_scale():
    q, k, v = tensors()
    torch.testing.assert_close(ops.joint_attention(q, k, v, grid=GRID, scale=0.3), truth(q, k, v, scale=0.3))


@pytest.mark.parametrize("size", [120.0, 0.0], ids=["big logits", "all equal"])
def test_extreme_scores(size):
    q, k, v = (x.detach() * (size**0.5 if i < 2 else 1) for i, x in enumerate(tensors(D=32, dtype=torch.float32)))
    out = ops.joint_attention(q, k, v, grid=GRID)
    close(out, truth(q, k, v, core=scaled_dot_product_attention), truth(q.double(), k.double(), v.double()))


def test_nan_stays_in_its_clip():
    q, k, v = (x.detach() for x in tensors(dtype=torch.float32))
    k[1, 0, 3, 5] = float("nan")
    out = ops.joint_attention(q, k, v, grid=GRID)
    assert out[1, 0].isnan().any() and torch.isfinite(out[0]).all()


def test_log_sum_exps():
    q, k, v = tensors()
    rq, rk = ops.rope3d(q, k, GRID)
    scores = rq @ rk.transpose(2, 3) / 32**0.5
    out, lse = ops.joint_attention(q, k, v, grid=GRID, return_lse=True)
    torch.testing.assert_close((out, lse), (scores.softmax(-1) @ v, scores.logsumexp(-1)))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k)))
    qkv = torch.stack([x.detach().transpose(1, 2) for x in (q, k, v)], 2).flatten(2)
    torch.testing.assert_close(ops.joint_attention_qkv_(qkv, 3, GRID, return_lse=True), (out, lse))


def test_empty_batch():
    assert ops.joint_attention(*tensors(B=0, dtype=torch.float32), grid=GRID).shape == (0, 3, N, 32)


def test_autocast_casts_first():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.joint_attention(q, k, v, grid=GRID)
        packed_out = ops.joint_attention_qkv_(torch.randn(2, N, 288), 3, GRID)
    assert out.dtype == packed_out.dtype == torch.bfloat16
    low = [x.detach().bfloat16() for x in (q, k, v)]
    torch.testing.assert_close(out, ops.joint_attention(*low, grid=GRID))


def test_compiles_whole():
    linear, x = packed()
    step = lambda x: ops.joint_attention_qkv_(linear(x), 3, GRID).square().sum()  # noqa: E731
    eager = torch.autograd.grad(step(x), list(linear.parameters()))
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), list(linear.parameters()))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("Hk", [4, 2])
def test_compiles_for_all_sizes(Hk):
    call = lambda q, k, v: ops.joint_attention(q, k, v, grid=GRID)  # noqa: E731
    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend="aot_eager")
    for B in (2, 3):
        inputs = tensors(B=B, H=4, Hk=Hk, dtype=torch.float32)
        for ours, want in zip(results(compiled, inputs), results(call, inputs), strict=True):
            torch.testing.assert_close(ours, want)


CLIPS = torch.tensor([0, 4, N], dtype=torch.int32)
CALLS = {
    "sdpa": lambda q, k, v: ops.joint_attention(q, k, v, grid=GRID),
    "clips": lambda q, k, v: ops.joint_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens=CLIPS),
    "packed": lambda q, k, v: ops.joint_attention_qkv_(torch.stack((q, k, v), 1).permute(0, 3, 1, 2, 4).flatten(2), 3, GRID),
}
TRITON = {
    "triton": lambda q, k, v: ops.joint_attention(q, k, v, grid=GRID, backend="triton"),
    "packed triton": lambda q, k, v: ops.joint_attention_qkv_(
        torch.stack((q, k, v), 1).permute(0, 3, 1, 2, 4).flatten(2), 3, GRID, backend="triton"
    ),
}


@pytest.mark.parametrize("name", [*CALLS, *(pytest.param(name, marks=pytest.mark.interpret) for name in TRITON)])
def test_double_backward_is_an_error_where_a_kernel_has_none(name):
    """Not silence, of a sum neither, whose gradient is a constant."""
    inputs = tensors(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no double backward|derivative for .* is not implemented"):
        grads = torch.autograd.grad((CALLS | TRITON)[name](*inputs).sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)


def test_the_reference_is_twice_differentiable():
    call = lambda *x: ops.joint_attention(*x, grid=(1, 1, 2), backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(call, tensors(B=1, H=1, n=3, D=4))


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("options", [{"grid": GRID}, {"positions": torch.randn(N, 3)}], ids=["grid", "positions"])
def test_transforms_name_their_argument(name, options):
    """Before anything else of the call is looked at."""
    q, k, v = (x.detach() for x in tensors(dtype=torch.float32))

    def loss(x):
        return ops.joint_attention(*(x if n == name else y for n, y in zip("qkv", (q, k, v), strict=True)), **options).sum()

    for transformed in (torch.func.grad(loss), lambda x: torch.func.vmap(loss)(x[None])):
        with pytest.raises(NotImplementedError, match=f"{name}: joint_attention has no vmap rule"):
            transformed(q)


def test_log_sum_exps_are_float32_under_autocast():
    inputs = tensors(dtype=torch.float32)
    want = ops.joint_attention(*(x.bfloat16() for x in inputs), return_lse=True, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.joint_attention(*inputs, return_lse=True, backend="reference")
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    assert ours[0].equal(want[0]) and ours[1].equal(want[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    linear, x = packed()
    step = lambda x: ops.joint_attention_qkv_(linear(x), 3, GRID)  # noqa: E731

    def gradient(function):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        return leaf.grad

    again = lambda x: torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant)  # noqa: E731
    assert torch.equal(gradient(step), gradient(again))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("triton", marks=pytest.mark.interpret)])
def test_what_is_consumed_is_not_used_again(backend, bias):
    linear, x = torch.nn.Linear(16, 3 * 3 * 32, bias=bias), torch.randn(2, N, 16)
    qkv = linear(x)
    out = ops.joint_attention_qkv_(qkv, 3, GRID, backend=backend)
    out.sum().backward(retain_graph=True)
    out.sum().backward(retain_graph=True)
    for loss in (out.sum() + qkv.square().sum(), qkv.square().sum()):
        with pytest.raises(RuntimeError, match="qkv: was used again after joint_attention_qkv_|modified by an inplace"):
            loss.backward(retain_graph=True)


def test_gradients_turned_in_place_are_nobody_elses():
    """The rotation turns the gradients of its own results where they lie, and only those."""
    q, k, v = tensors(dtype=torch.float32)
    out = ops.joint_attention(q, k, v, grid=GRID)
    first = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b, c in zip(first, kept, again, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_exports():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.joint_attention(q, k, v, grid=GRID)

    inputs = tuple(x.detach() for x in tensors(dtype=torch.float32))
    program = torch.export.export(Attention(), inputs)
    torch.testing.assert_close(program.module()(*inputs), ops.joint_attention(*inputs, grid=GRID))


GOOD = dict(q=torch.zeros(2, 4, N, 32), k=torch.zeros(2, 4, N, 32), v=torch.zeros(2, 4, N, 32), grid=GRID)
BAD = [
    (dict(q=None), TypeError, "q: expected a floating-point tensor, got NoneType"),
    (dict(q=torch.zeros(2, 4, N, 32, dtype=torch.int32)), TypeError, "q: expected a floating-point tensor, got torch.int32"),
    (dict(q=torch.zeros(4, N, 32)), ValueError, r"q: expected the shape \[B, H, N, D\], got \[4, 25, 32\]"),
    (dict(k=torch.zeros(2, 3, N, 32)), ValueError, r"k: expected \[2, a divisor of 4, M, 32\]"),
    (dict(k=torch.zeros(2, 4, N, 64)), ValueError, "k: expected .* got .*64"),
    (dict(k=torch.zeros(2, 4, N, 32).half()), ValueError, "k: expected torch.float32 on cpu as q, got torch.float16"),
    (dict(v=torch.zeros(2, 4, N - 1, 32)), ValueError, "v: expected the shape of k"),
    (dict(grid=(2, 3, 5)), ValueError, "grid"),
    (dict(grid=None, k_positions=torch.zeros(N, 3)), ValueError, "k_positions: expected together with positions"),
    (dict(grid=None, freqs=ops.joint_freqs(32)), ValueError, "freqs: given, but neither grid nor positions"),
    (dict(return_lse=True, backend="sdpa"), RuntimeError, "joint_attention: backend 'sdpa' .* sdpa returns no log-sum-exps"),
    (dict(backend="triton"), RuntimeError, "triton takes CUDA tensors"),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.joint_attention(**{**GOOD, **change})


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ((torch.zeros(2, N, 100), 3, GRID), ValueError, r"qkv: expected the shape \[B, N, 3 \* 3 \* D\], got \[2, 25, 100\]"),
        ((torch.zeros(2, N, 288), 0, GRID), ValueError, "num_heads: expected a positive int, got 0"),
        ((torch.zeros(2, N, 288, dtype=torch.int8), 3, GRID), TypeError, "qkv: expected a floating-point tensor"),
        ((torch.zeros(2, N, 288), 3, (1, 1, 1)), ValueError, "grid"),
        ((torch.zeros(2, N, 288, requires_grad=True), 3, GRID), ValueError, "leaf"),
    ],
)
def test_bad_packed_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.joint_attention_qkv_(*arguments)


@pytest.mark.parametrize(
    "bias,error,message",
    [
        (torch.zeros(96), ValueError, r"qkv_bias: expected the shape \[288\] to go with qkv, got \[96\]"),
        (torch.zeros(288, dtype=torch.int8), TypeError, "qkv_bias: expected a floating-point tensor"),
        (torch.zeros(288, device="meta"), ValueError, "qkv_bias"),
        (0.5, TypeError, "qkv_bias: expected a floating-point tensor, got float"),
    ],
)
def test_bad_bias(bias, error, message):
    with pytest.raises(error, match=message):
        ops.joint_attention_qkv_(torch.zeros(2, N, 288), 3, GRID, qkv_bias=bias)


@pytest.mark.parametrize("option", ["dropout_p", "attn_mask"])
def test_no_dropout_no_mask(option):
    with pytest.raises(TypeError, match=option):
        ops.joint_attention(**GOOD, **{option: 0.1})
