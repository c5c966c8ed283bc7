"""add_norm and swiglu_norm on every backend, against float64 and the error that plain torch makes."""

import random

import pytest
import torch
import torch.nn.functional as F
from check import close
from conftest import INTERPRET

from evaat_fast import ops

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PLACES = [
    pytest.param("reference", "cpu", F32, id="reference-float32"),
    pytest.param("reference", "cpu", BF16, id="reference-bfloat16"),
    *(pytest.param("cpu", "cpu", t, id=f"cpu-{t}") for t in (F32, BF16, F16)),
    *(pytest.param("triton", "cpu", t, id=f"triton-{t}", marks=pytest.mark.interpret) for t in (F32, F16)),
    *(pytest.param(None, "cuda", t, id=f"cuda-{t}", marks=pytest.mark.gpu) for t in (F32, BF16, F16)),
]
places = pytest.mark.parametrize("backend, device, dtype", PLACES)


def plain_add_norm(x, residual, weight, bias, eps=1e-6):
    """As a block of a model has it without the op: the stream of the wider type, the norm in that."""
    total = x if residual is None else x + residual
    return layer_norm(total, weight, bias, eps).to(x.dtype), total


def plain_swiglu_norm(x, weight, bias, eps=1e-6):
    gate, value = x.chunk(2, -1)
    out = F.silu(gate) * value
    return out if weight is None else layer_norm(out, weight, bias, eps).to(x.dtype)


def layer_norm(x, weight, bias, eps):
    """Torch's; in Triton's interpreter, whose multiply-adds round twice, a composition of operators that do so too."""
    x = x if x.dtype == F64 else x.float()
    weight, bias = (None if w is None else w.to(x.dtype) for w in (weight, bias))
    if not INTERPRET or x.dtype == F64:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    deviation = x - x.mean(-1, keepdim=True)
    out = deviation * (deviation.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return out if bias is None else out + bias


def results(function, inputs, upstream):
    """Outputs, and the gradients of all inputs that are there for the given ones of the outputs."""
    given = [x for x in inputs if x is not None]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, given, [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)])
    return [*outs, *grads]


def near(ours, low, truth, what):
    """The rule; but of float32 numbers in the interpreter, which rounds the products of multiply-adds, and of a few of them,
    whose rms error is luck, twice the norm of torch's errors and a rounding."""
    if ours.dtype != F32 or not (INTERPRET or ours.numel() < 4000):
        return close(ours, low, truth, what)
    error, allowed = (ours.double() - truth).norm(), 2 * (low.double() - truth).norm() + 2.4e-7 * truth.norm()
    assert error <= allowed, f"{what}: {error:.2e} > {allowed:.2e}"


def check(function, plain, inputs, close=close, **options):
    """Ours in its backend, by the rule; where a total or a gradient of ours is wider than torch's, in torch's dtype."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    double = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(1234)
    outs = plain(*double)
    shapes = [x.shape for x in (outs if isinstance(outs, tuple) else (outs,))]
    upstream = [torch.randn(s, generator=generator, dtype=F64).to(inputs[0].dtype).to(inputs[0].device) for s in shapes]
    ours = results(lambda *x: function(*x, **options), inputs, upstream)
    again = results(lambda *x: function(*x, **options), inputs, upstream)
    low, truth = results(plain, inputs, upstream), results(plain, double, [u.double() for u in upstream])
    assert all(map(torch.equal, ours, again)), "two runs differ"
    for i, (a, b, t) in enumerate(zip(ours, low, truth, strict=True)):
        close(a.to(b.dtype), b, t, f"result {i}")
    return ours


def rows(shape, dtype, device, scale=1.0):
    return (torch.randn(shape, dtype=F64) * scale).to(dtype).to(device)


def norm_weights(C, dtype, device):
    return rows((C,), dtype, device) + 1, rows((C,), dtype, device)


WIDTHS = [384, 768, 1024, 1000, 2048, 2730, 4096]


@pytest.mark.sample(12)
@places
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("stream", ["none", "float32", "same"])
def test_add_norm(backend, device, dtype, C, stream):
    x = rows((2, 19, C), dtype, device)
    residual = None if stream == "none" else rows(x.shape, F32 if stream == "float32" else dtype, device, 3.0)
    check(ops.add_norm, plain_add_norm, (x, residual, *norm_weights(C, F32, device)), backend=backend)


@pytest.mark.sample(12)
@places
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("norm", [True, False])
def test_swiglu_norm(backend, device, dtype, C, norm):
    inputs = rows((3, 13, 2 * C), dtype, device, 2.0), *(norm_weights(C, F32, device) if norm else (None, None))
    check(ops.swiglu_norm, plain_swiglu_norm, inputs, backend=backend)


def biased(op):
    """op, or plain torch, of what has the last of its inputs in it already: a bias that is there for its gradient."""

    def plain(x, *given, **options):
        nothing = (given[-1] - given[-1].detach()).to(x.dtype)
        return PLAIN[op](x + nothing, *given[:-1], **options)

    return lambda *given, **options: op(*given[:-1], x_bias=given[-1], **options), plain


PLAIN = {ops.add_norm: plain_add_norm, ops.swiglu_norm: plain_swiglu_norm}


@pytest.mark.sample(12)
@places
@pytest.mark.parametrize("C, kind", [(768, None), (1000, F32), (48, F32)])
def test_a_bias_that_x_has_in_it(backend, device, dtype, C, kind):
    """Its gradient, of float32 or of x's dtype."""
    bias = rows((2 * C,), kind or dtype, device)
    x, stream, weights = rows((2, 7, C), dtype, device), rows((2, 7, C), F32, device), norm_weights(C, F32, device)
    ours, plain = biased(ops.add_norm)
    check(ours, plain, (x, stream, *weights, bias[:C]), near, backend=backend)
    ours, plain = biased(ops.swiglu_norm)
    for given in (weights, (None, None)):
        check(ours, plain, (rows((2, 7, 2 * C), dtype, device), *given, bias), near, backend=backend)


@places
def test_a_bias_alone(backend, device, dtype):
    """It learns, or all but it do, or the sum leads on and the norm nowhere; what else comes out stays the same to the bit."""
    x, stream = rows((5, 64), dtype, device), rows((5, 64), F32, device)
    weights, x_bias = norm_weights(64, F32, device), rows((64,), F32, device)

    def grads(*learn, of=0):
        given = [y.detach().requires_grad_(n in learn) for n, y in zip("xrwbc", (x, stream, *weights, x_bias), strict=True)]
        out = ops.add_norm(*given[:4], x_bias=given[4], backend=backend)[of]
        inner = ops.swiglu_norm(given[0], given[2][:32], None, x_bias=given[4], backend=backend)
        return (
            out,
            inner,
            torch.autograd.grad(out.float().square().sum() + inner.float().sum(), [y for y in given if y.requires_grad]),
        )

    out, inner, every = grads("x", "r", "w", "b", "c")
    normed, total = ops.add_norm(x, stream, *weights, backend=backend)
    assert torch.equal(out, normed) and torch.equal(inner, ops.swiglu_norm(x, weights[0][:32], None, backend=backend))
    assert torch.equal(grads("c")[2][0], every[4]) and every[4].dtype == F32
    assert all(map(torch.equal, grads("x", "r", "w", "b")[2], every))
    through = ops.add_norm(x, stream, *weights, x_bias=x_bias.requires_grad_(), backend=backend)[1]
    (of_total,) = torch.autograd.grad(through.square().sum(), x_bias)
    torch.testing.assert_close(of_total, (2 * total).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.sample(8)
@places
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (400, 3), (2, 3, 4, 48)], ids=str)
def test_shapes(backend, device, dtype, shape):
    """Any leading shape, narrow rows, weights of x's dtype, no bias."""
    x, w = rows(shape, dtype, device), rows(shape[-1:], dtype, device)
    call = lambda *y, backend: ops.add_norm(*y, eps=1e-2, backend=backend)  # noqa: E731
    check(call, lambda *y: plain_add_norm(*y, eps=1e-2), (x, rows(shape, F32, device), w, None), backend=backend)
    wide = rows((*shape[:-1], 2 * shape[-1]), dtype, device)
    check(ops.swiglu_norm, plain_swiglu_norm, (wide, None, None), backend=backend)


@pytest.mark.sample(6)
@places
def test_any_strides(backend, device, dtype):
    # 128 rows: an error of a row's statistics is one of all its elements, and of 32 rows the mean is a matter of luck.
    x = rows((8, 96, 4, 7), dtype, device).permute(2, 3, 0, 1)[:, ::2]
    residual = rows((96, 8), F32, device).t().expand(4, 4, 8, 96)
    w = rows((96, 2), F32, device)[:, 1]
    check(ops.add_norm, plain_add_norm, (x, residual, w, w.flip(0)), backend=backend)
    check(ops.swiglu_norm, plain_swiglu_norm, (x, w[:48], w[48:]), backend=backend)


@places
def test_large_and_small_numbers(backend, device, dtype):
    """A row far from zero keeps its variance; the sigmoid of large numbers is what it should be; a constant row is the bias."""
    x, w, b = rows((4, 512), dtype, device) + 64, *norm_weights(512, F32, device)
    normed, total = ops.add_norm(x, rows((4, 512), F32, device) + 100, w, b, backend=backend)
    exact = plain_add_norm(total.double(), None, w, b)[0]  # where squares in float32 would leave three digits
    torch.testing.assert_close(normed.double(), exact, rtol=1e-5 if dtype == F32 else 1e-2, atol=5e-5)
    values = torch.tensor([-1000.0, -104, -88.5, -87, -20, -1e-4, 0, 1e-4, 20, 89, 104, 1000], device=device).to(dtype)
    both = torch.cat((values, torch.ones_like(values)))[None]
    out = ops.swiglu_norm(both, None, None, backend=backend)
    torch.testing.assert_close(
        out[0].double(), F.silu(values.double()), rtol=4e-3 if dtype != F32 else 4e-7, atol=6e-8 if dtype == F16 else 1e-30
    )
    w, b = norm_weights(96, F32, device)
    same = ops.add_norm(torch.full((3, 96), 7.0, device=device, dtype=dtype), None, w, b, backend=backend)[0]
    assert torch.equal(same, b.to(dtype).expand(3, -1))


@places
def test_gradients_of_what_is_asked_for(backend, device, dtype):
    """One output alone; frozen weights; a frozen stream."""
    x, residual, weight, bias = rows((5, 64), dtype, device), rows((5, 64), F32, device), *norm_weights(64, F32, device)

    def grads(*learn, of):
        given = [y.detach().requires_grad_(name in learn) for name, y in zip("xrwb", (x, residual, weight, bias), strict=True)]
        out = ops.add_norm(*given, backend=backend)[of]
        return torch.autograd.grad(out.float().square().sum(), [y for y in given if y.requires_grad])

    every = grads("x", "r", "w", "b", of=0)
    assert torch.equal(grads("x", of=0)[0], every[0]) and torch.equal(grads("r", of=0)[0], every[1])
    assert torch.equal(grads("w", of=0)[0], every[2]) and torch.equal(grads("b", of=0)[0], every[3])
    d = 2 * (x.double() + residual.double())
    torch.testing.assert_close(grads("x", of=1)[0].double(), d, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grads("r", of=1)[0].double(), d, rtol=1e-5, atol=1e-5)
    assert [y.dtype for y in every] == [dtype, F32, F32, F32]


@places
def test_what_comes_back(backend, device, dtype):
    x, weight, bias = rows((2, 3, 64), dtype, device), *norm_weights(64, F32, device)
    normed, total = ops.add_norm(x, None, weight, bias, backend=backend)
    assert total is x and normed.dtype == dtype
    normed, total = ops.add_norm(x, x, weight, bias, backend=backend)
    assert total.dtype == F32 and torch.equal(total, 2 * x.float()) and normed.is_contiguous()
    for empty in (x[:0], x[..., :0]):
        w = weight[: empty.shape[-1]]
        assert ops.add_norm(empty, empty, w, w, backend=backend)[0].shape == empty.shape
    assert ops.swiglu_norm(x[:0], None, None, backend=backend).shape == (0, 3, 32)
    low = F16 if device == "cpu" and backend == "triton" else BF16
    with torch.autocast(device, low):
        assert ops.add_norm(x.float(), None, weight, bias, backend=backend)[0].dtype == low
        assert ops.swiglu_norm(x.float(), None, None, backend=backend).dtype == low
        assert ops.add_norm(x.double(), None, weight, bias, backend="reference")[0].dtype == F64


@places
def test_a_product_of_another_dtype(backend, device, dtype):
    """The norm of a float32 stream, rounded once to the dtype asked for; its gradients are those of the wide norm."""
    low = dtype if dtype != F32 else F16
    x, weight, bias, upstream = rows((5, 96), F32, device), *norm_weights(96, F32, device), rows((5, 96), low, device)
    learn = [y.requires_grad_() for y in (x, weight, bias)]
    wide, narrow = (ops.add_norm(x, None, weight, bias, dtype=t, backend=backend)[0] for t in (None, low))
    assert wide.dtype == F32 and narrow.dtype == low and torch.equal(narrow, wide.to(low))
    pairs = zip(torch.autograd.grad(narrow, learn, upstream), torch.autograd.grad(wide, learn, upstream.float()), strict=True)
    assert all(a.dtype == F32 and torch.equal(a, b) for a, b in pairs)
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16, float16 or float64, got torch.int32"):
        ops.add_norm(x, None, weight, bias, dtype=torch.int32, backend=backend)
    exact = ops.add_norm(x.double(), None, weight, bias, backend="reference")[0]
    torch.testing.assert_close(ops.add_norm(x, None, weight, bias, dtype=F64)[0], exact, rtol=1e-4, atol=1e-5)  # torch serves
    if backend not in (None, "reference"):
        with pytest.raises(RuntimeError, match="float64"):
            ops.add_norm(x, None, weight, bias, dtype=F64, backend=backend)


def test_float64():
    x, residual, weight, bias = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((3, 8), (3, 8), (8,), (8,)))
    assert torch.autograd.gradcheck(lambda *y: ops.add_norm(*y, eps=1e-3), (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda *y: ops.swiglu_norm(*y, eps=1e-3), (x, weight[:4], bias[:4]))
    both = lambda *y: ops.add_norm(y[0] + bias.detach(), *y[1:], x_bias=bias)[0]  # noqa: E731
    x_bias = torch.autograd.grad(both(x, residual, weight, None).sum(), bias)[0]
    torch.testing.assert_close(x_bias, torch.autograd.grad(both(x, residual, weight, None).sum(), x)[0].sum(0))
    assert torch.autograd.gradgradcheck(lambda *y: ops.swiglu_norm(*y, eps=1e-3), (x, weight[:4], bias[:4]))


devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_plain_torch(device, dynamic):
    x, residual = rows((2, 5, 64), BF16, device).requires_grad_(), rows((2, 5, 64), F32, device).requires_grad_()
    weight, bias = (w.requires_grad_() for w in norm_weights(64, F32, device))
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def block(x, residual, weight, bias):
        normed, total = ops.add_norm(x, residual, weight, bias)
        return ops.swiglu_norm(torch.cat((normed, normed), -1), weight, bias), total

    ours = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)(x, residual, weight, bias)
    for a, b in zip(ours, block(x, residual, weight, bias), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == BF16 else 1e-6, atol=1e-2 if a.dtype == BF16 else 1e-6)
    assert sum("layer_norm" in name for name in seen) == 2 and not any("evaat" in name for name in seen)
    grads = torch.autograd.grad(ours[0].float().square().sum(), (x, residual, weight, bias))
    assert all(g.isfinite().all() for g in grads)


@places
def test_memory_that_negates(backend, device, dtype):
    """A lazily negated view, of an input and of a gradient."""
    x, residual, weight = (rows(s, dtype, device) for s in ((3, 64), (3, 64), (64,)))
    negated = torch._neg_view
    want = ops.add_norm(-x, -residual, -weight, None, backend=backend)
    ours = ops.add_norm(negated(x), negated(residual), negated(weight), None, backend=backend)
    assert all(map(torch.equal, ours, want))
    leaf = x.detach().requires_grad_()
    out = ops.swiglu_norm(leaf, -weight[:32], None, backend=backend)
    assert torch.equal(
        *(torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in (negated(out.detach()), -out.detach()))
    )


@places
def test_gates_of_any_size(backend, device, dtype):
    largest = torch.finfo(dtype).max
    gates = torch.tensor([-largest, -1e4, -90, 90, 1e4, largest], dtype=dtype, device=device)
    x = torch.cat((gates, torch.ones_like(gates)))[None].requires_grad_()
    out = ops.swiglu_norm(x, None, None, backend=backend)
    torch.testing.assert_close(out[0], F.silu(gates), rtol=1e-2, atol=1e-2)
    grad = torch.autograd.grad(out.sum(), x)[0][0, :6].float()
    torch.testing.assert_close(grad, torch.tensor([0.0, 0, 0, 1, 1, 1], device=device), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1e-5, 1e5])
def test_a_gradient_that_float16_has_not(factor):
    """It reaches a stream of another dtype through float32."""
    x, residual = rows((2, 64), F16, "cuda").requires_grad_(), rows((2, 64), BF16, "cuda").requires_grad_()
    weights = norm_weights(64, F32, "cuda")
    totals = [ops.add_norm(x, residual, *weights, backend=backend)[1] for backend in ("triton", "reference")]
    ours, want = (torch.autograd.grad((total * factor).sum(), residual)[0] for total in totals)
    assert ours.isfinite().all() and torch.equal(ours, want)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_each_instruction_set(isa, dtype):
    for seed in range(3000, 3008):
        draw(seed, "cpu", "cpu", dtype)
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-torch.inf, torch.inf, torch.nan])]).to(dtype)
    x = torch.cat((values, torch.ones_like(values)))
    torch.testing.assert_close(
        *(ops.swiglu_norm(x, None, None, backend=b) for b in ("cpu", "reference")), equal_nan=True, rtol=4e-7, atol=1e-30
    )


def calls(dtype, M, C):
    """Of both ops on the CPU, each (function of a backend, inputs that learn)."""
    learn = lambda *given: [x.requires_grad_() for x in given]  # noqa: E731
    stream, wide = learn(rows((M, C), dtype, "cpu"), rows((M, C), F32, "cpu")), learn(rows((M, 2 * C), dtype, "cpu"))
    weights = learn(*norm_weights(C, F32, "cpu"))
    yield lambda backend: ops.add_norm(*stream, *weights, backend=backend), [*stream, *weights]
    yield lambda backend: (ops.swiglu_norm(*wide, *weights, backend=backend),), [*wide, *weights]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_same_bits_with_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    for call, inputs in calls(dtype, 333, 500):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs = call("cpu")
            results.append([*outs, *torch.autograd.grad(outs, inputs, [o.detach() for o in outs])])
        torch.set_num_threads(before)
        assert all(map(torch.equal, results[0], other) for other in results[1:]), "two numbers of threads, two results"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_saves_no_more_than_torch(dtype):
    def saved(call, backend):
        kept = {}
        keep = lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _ = call(backend)
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    for call, _ in calls(dtype, 64, 96):
        assert saved(call, "cpu") <= saved(call, "reference") + 64  # what allocators round up


def test_gradients_that_torch_is_faster_with():
    """Of themselves: by name C++ serves them, and without gradients it always does."""
    for call, dtype, M, ours in (
        (lambda x, **how: ops.swiglu_norm(x, None, None, **how), F32, 2, False),
        (lambda x, **how: ops.swiglu_norm(x, None, None, **how), F32, 2000, True),
        (lambda x, **how: ops.swiglu_norm(x, None, None, **how), BF16, 2, True),
        (lambda x, **how: ops.add_norm(x, x, x[0], None, **how)[0], BF16, 2, False),
        (lambda x, **how: ops.add_norm(x, x, x[0], None, **how)[0], BF16, 2000, True),
        (lambda x, **how: ops.add_norm(x, x, x[0], None, **how)[0], F32, 2000, False),
    ):
        x = torch.randn(M, 64).to(dtype).requires_grad_()
        names = [call(x, **how).grad_fn.name() for how in ({}, {"backend": "auto"}, {"backend": "cpu"})]
        assert ["AddNorm" in name or "Swiglu" in name for name in names] == [ours, ours, True]
        with torch.no_grad():
            assert torch.equal(call(x), call(x, backend="cpu"))


@pytest.mark.interpret
def test_by_name_where_it_is_traced():
    x, w = torch.randn(3, 32), torch.ones(32)
    with pytest.raises(RuntimeError, match="add_norm: backend 'triton' was asked for but cannot serve this call: what traces"):
        torch.func.vmap(lambda y: ops.add_norm(y, None, w, w, backend="triton")[0])(x)
    with pytest.raises(RuntimeError, match="what traces"):  # nor of tensors that a transform does not see
        torch.func.grad(lambda s: (ops.add_norm(x, None, w, w, backend="triton")[0] * s).sum())(torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="rows of up to 16,384"):
        ops.swiglu_norm(torch.zeros(1, 2 * 16385), None, None, backend="triton")
    x.requires_grad_()
    for out in (ops.swiglu_norm(x, None, None, backend="triton"), ops.add_norm(x, x, w, w, backend="triton")[0]):
        with pytest.raises(RuntimeError, match="a kernel has no double backward"):
            torch.autograd.grad(out.square().sum(), x, create_graph=True)


@devices
def test_torch_func(device):
    x, w = rows((4, 3, 32), F32, device), rows((32,), F32, device)
    call = lambda y: ops.add_norm(y, 2 * y, w, w)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(call)(x), call(x))
    want = torch.autograd.functional.vjp(lambda y: call(y).sum(), x)[1]
    torch.testing.assert_close(torch.func.grad(lambda y: call(y).sum())(x), want)
    scaled = torch.func.grad(lambda s: (call(x) * s).sum())(torch.tensor(2.0, device=device))
    torch.testing.assert_close(scaled, call(x).sum())
    torch.testing.assert_close(torch.func.jvp(call, (x,), (x,))[0], call(x))


X, W = torch.zeros(2, 3, 8), torch.ones(8)
BAD = [
    ((None, None, W, W), TypeError, "x: expected a floating-point tensor, got NoneType"),
    ((X.int(), None, W, W), TypeError, "x: expected a floating-point tensor, got torch.int32"),
    ((X.to_sparse(), None, W, W), TypeError, "x: expected a dense tensor, got a torch.sparse_coo one"),
    ((X[0, 0, 0], None, W, W), ValueError, r"x: expected the shape \[..., C\], got \[\]"),
    ((X, X[0], W, W), ValueError, r"residual: expected x's shape \[2, 3, 8\], got \[3, 8\]"),
    ((X, X.to("meta"), W, W), ValueError, "residual: expected x's device cpu, got meta"),
    ((X, X.bool(), W, W), TypeError, "residual: expected a floating-point tensor, got torch.bool"),
    ((X, None, None, W), TypeError, "weight: expected a floating-point tensor, got NoneType"),
    ((X, None, W[:4], W), ValueError, r"weight: expected the shape \[8\], as x is \[2, 3, 8\], got \[4\]"),
    ((X, None, W, W[None]), ValueError, r"bias: expected the shape \[8\], as x is \[2, 3, 8\], got \[1, 8\]"),
    ((X, None, W, W.to("meta")), ValueError, "bias: expected x's device cpu, got meta"),
    ((X, X, W, W, 1e-6, W[:4]), ValueError, r"x_bias: expected the shape \[8\], as x is \[2, 3, 8\], got \[4\]"),
    ((X, X, W, W, 1e-6, W.int()), TypeError, "x_bias: expected a floating-point tensor, got torch.int32"),
    ((X, None, W, W, 1e-6, W), ValueError, "x_bias: expected None without a residual, where the sum is x itself"),
    ((X, None, W, W, -1.0), ValueError, "eps: expected a float >= 0, got -1.0"),
    ((X, None, W, W, "small"), TypeError, "eps: expected a float, got 'small'"),
    ((X, None, W, W, float("nan")), ValueError, "eps: expected a finite float, got nan"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.add_norm(*arguments[:5], x_bias=arguments[5] if arguments[5:] else None)


def test_errors_of_swiglu_norm():
    for arguments, error, message in (
        ((X[..., :7], None, None), ValueError, "x: expected gates and as many values in the last dimension"),
        ((X, W, None), ValueError, r"weight: expected the shape \[4\], as half of x is \[2, 3, 8\], got \[8\]"),
        ((X, None, W), ValueError, "bias: given without weight, where there is no norm"),
        ((X, None, None, 1e-6, W[:4]), ValueError, r"x_bias: expected the shape \[8\], as x is \[2, 3, 8\], got \[4\]"),
        (("x", None, None), TypeError, "x: expected a floating-point tensor, got str"),
    ):
        with pytest.raises(error, match=message):
            ops.swiglu_norm(*arguments[:4], x_bias=arguments[4] if arguments[4:] else None)
    with pytest.raises(ValueError, match="backend: expected one of"):
        ops.swiglu_norm(X, None, None, backend="fast")


def draw(seed, backend, device, dtype):
    """A random call of either op."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    C = pick.choice([31, 64, 96, 384, 768, pick.randint(20, 1500)])
    shape = tuple(pick.randint(1, 5) for _ in range(pick.randint(0, 3)))
    other = pick.choice([F32, dtype])
    weight, bias = norm_weights(C, other, device)
    bias, eps = pick.choice([bias, None]), pick.choice([1e-6, 1e-5, 1e-2])
    if pick.random() < 0.5:
        residual = pick.choice([None, rows((*shape, C), pick.choice([F32, dtype]), device)])
        call = ops.add_norm, plain_add_norm, (rows((*shape, C), dtype, device), residual, weight, bias)
    else:
        weight, bias = pick.choice([(weight, bias), (None, None)])
        call = ops.swiglu_norm, plain_swiglu_norm, (rows((*shape, 2 * C), dtype, device), weight, bias)
    function, plain, inputs = call
    if pick.random() < 0.5 and (function is ops.swiglu_norm or residual is not None):
        inputs = *inputs, rows(inputs[0].shape[-1:], other, device)
        function, plain = biased(function)
    check(lambda *x: function(*x, eps=eps, backend=backend), lambda *x: plain(*x, eps=eps), inputs, near)


@places
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))])
def test_random_calls(part, backend, device, dtype):
    """2,000 in all, 100 at a time."""
    for seed in range(100 * part, 100 * part + (100 if part or device == "cuda" else 40)):
        try:
            draw(seed, backend, device, dtype)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None
