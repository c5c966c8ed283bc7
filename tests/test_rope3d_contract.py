"""rope3d's contract around the kernel: what autograd, torch.compile and bad input get."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from evaat_fast import ops

GRID, N = (2, 3, 3), 19
raw = torch.ops.evaat_fast


def qk(dtype=torch.float32, **options):
    return torch.randn(2, 4, N, 16, dtype=dtype, **options), torch.randn(2, 2, N, 16, dtype=dtype, **options)


# Autograd


@pytest.mark.sample(1)
@pytest.mark.parametrize("interleaved", [True, False])
def test_gradcheck_of_the_specification(interleaved):
    q, k = qk(torch.float64, requires_grad=True)
    call = lambda q, k: ops.rope3d(q, k, GRID, interleaved=interleaved, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k))


def test_gradient_of_freqs():
    """auto serves the reference; its gradient is that of finite differences in float64 angles."""
    q, freqs = torch.randn(1, 1, N, 8, dtype=torch.float64), ops.joint_freqs(8).requires_grad_()
    weight = torch.randn_like(q)
    (ours,) = torch.autograd.grad((ops.rope3d(q, None, GRID, freqs=freqs) * weight).sum(), freqs)
    for axis, pair in ((0, 1), (1, 0), (2, 3)):
        step = torch.zeros_like(freqs)
        step[axis, pair] = 2**-10
        with torch.no_grad():
            up, down = (ops.rope3d(q, None, GRID, freqs=freqs + s * step) for s in (1, -1))
        slope = ((up - down) * weight).sum() / 2**-9
        assert abs(slope - ours[axis, pair]) <= 1e-3 * max(1, abs(slope))


def test_gradient_of_freqs_packed():
    linear, x, freqs = torch.nn.Linear(8, 48), torch.randn(2, N, 8), ops.joint_freqs(16).requires_grad_()
    q, k, _ = linear(x).unflatten(2, (3, 1, 16)).permute(2, 0, 3, 1, 4)
    a, b = ops.rope3d(q, k, GRID, freqs=freqs)
    expected = torch.autograd.grad(a.pow(3).sum() + b.pow(3).sum(), (freqs, linear.weight))
    out = ops.rope3d_qkv_(linear(x), 1, GRID, freqs=freqs)[..., :32]
    torch.testing.assert_close(torch.autograd.grad(out.pow(3).sum(), (freqs, linear.weight)), expected)


def test_frozen_freqs_that_require_grad_are_fine_without_grad_mode():
    q, freqs = qk()[0], ops.joint_freqs(16).requires_grad_()
    with torch.no_grad():
        assert torch.equal(ops.rope3d(q, None, GRID, freqs=freqs, backend="cpu"), ops.rope3d(q, None, GRID))


@pytest.mark.parametrize("which", ["q", "k"])
def test_gradient_of_one_of_the_two(which):
    q, k = qk()
    leaf = (q if which == "q" else k).requires_grad_()
    a, b = ops.rope3d(q, k, GRID)
    (grad,) = torch.autograd.grad((a if which == "q" else b).sum(), leaf, retain_graph=True)
    assert torch.allclose(grad, ops.rope3d(torch.ones_like(leaf), None, GRID, inverse=True), atol=1e-6)
    grads = torch.autograd.grad(b.sum() if which == "q" else a.sum(), leaf, allow_unused=True)
    assert grads[0] is None or not grads[0].any()


@pytest.mark.parametrize("bias", [True, False])
def test_packed_behind_a_linear_layer(bias):
    """torch.nn.Linear with a bias returns a reshape of its product: autograd must see one node, not CopySlices."""
    linear, x = torch.nn.Linear(8, 3 * 2 * 16, bias=bias), torch.randn(2, N, 8)
    q, k, v = linear(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    a, b = ops.rope3d(q, k, GRID)
    loss = a.pow(3).sum() + b.pow(3).sum() + v.pow(3).sum()
    expected = torch.autograd.grad(loss, linear.weight)[0]
    packed = linear(x)
    out = ops.rope3d_qkv_(packed, 2, GRID)
    assert out.data_ptr() == packed.data_ptr()
    names, node = [], out.grad_fn
    while node is not None and len(names) < 3:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert not any("CopySlices" in n or "AsStrided" in n for n in names), names
    torch.testing.assert_close(torch.autograd.grad(out.pow(3).sum(), linear.weight)[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("learnable", [True, False])
def test_checkpointed_in_place(reentrant, learnable):
    """What is rotated in place is recomputed in the backward pass, and rotated again."""
    linear, x = torch.nn.Linear(8, 3 * 2 * 16), torch.randn(2, N, 8, requires_grad=True)
    freqs = ops.joint_freqs(16).requires_grad_(learnable)
    block = lambda x, freqs: ops.rope3d_qkv_(linear(x), 2, GRID, freqs=freqs).pow(3).sum()  # noqa: E731
    wanted = [x, linear.weight, freqs] if learnable else [x, linear.weight]
    grads = []
    for loss in (block(x, freqs), checkpoint(block, x, freqs, use_reentrant=reentrant)):
        for leaf in wanted:
            leaf.grad = None
        loss.backward()
        grads.append([leaf.grad for leaf in wanted])
    assert all(map(torch.equal, *grads))


def test_a_tensor_saved_before_is_known_to_have_changed():
    for call in (
        lambda x: ops.rope3d_qkv_(x, 1, GRID),
        lambda x: ops.rope3d_(x.detach().view(2, N, 3, 16)[:, None, :, 0], None, GRID),
    ):
        x = torch.randn(2, N, 48, requires_grad=True) * 1
        y = x.exp().mul(x)
        call(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_frequencies_learn_where_nothing_else_does():
    q, k = qk()
    freqs = ops.joint_freqs(16).requires_grad_()
    slopes = [
        torch.autograd.grad(sum(x.pow(3).sum() for x in ops.rope3d(q, k, GRID, freqs=freqs, backend=b)), freqs)[0]
        for b in ("cpu", "reference")
    ]
    torch.testing.assert_close(*slopes)
    a, b = ops.rope3d(q, k, GRID, freqs=freqs)
    alone = torch.autograd.grad(b.pow(3).sum(), freqs)[0]
    torch.testing.assert_close(alone, torch.autograd.grad(ops.rope3d(k, None, GRID, freqs=freqs).pow(3).sum(), freqs)[0])


def test_double_backward_is_an_error_where_a_kernel_has_none():
    q, packed, freqs = qk()[0].requires_grad_(), torch.randn(2, N, 96).requires_grad_(), ops.joint_freqs(16).requires_grad_()
    losses = {
        "square": (lambda: ops.rope3d(q, None, GRID, backend="cpu").pow(2).sum(), q),
        "freqs": (lambda: ops.rope3d(q, None, GRID, freqs=freqs).sum(), q),
        "packed": (lambda: ops.rope3d_qkv_(packed * 1, 2, GRID).pow(2).sum(), packed),
        "packed freqs": (lambda: ops.rope3d_qkv_(packed * 1, 2, GRID, freqs=freqs).sum(), packed),
    }
    for name, (loss, x) in losses.items():
        with pytest.raises(RuntimeError, match='no double backward.* use backend="reference"'):
            torch.autograd.grad(loss(), x, create_graph=True)
            pytest.fail(name)
    # A rotation is linear, so the gradient of a sum is constant: its derivative is none, and not lost.
    (grad,) = torch.autograd.grad(ops.rope3d(q, None, GRID).sum(), q, create_graph=True)
    assert not grad.requires_grad
    x = [torch.randn(1, 1, N, 16, dtype=torch.float64).requires_grad_(), freqs]
    slopes = torch.autograd.grad(ops.rope3d(x[0], None, GRID, freqs=freqs).pow(3).sum(), x, create_graph=True)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(sum(s.sum() for s in slopes), x))
    assert torch.autograd.gradgradcheck(lambda q: ops.rope3d(q, None, GRID).pow(3), x[:1])


def test_in_place_and_out_of_place_are_equal_in_float64():
    q, k = qk(torch.float64)
    packed = torch.cat((q, k, k), 1).transpose(1, 2).flatten(2)[..., : 6 * 16].contiguous()  # 2 heads each
    a, b = ops.rope3d(q, k, GRID)
    want = ops.rope3d(*packed.view(2, N, 3, 2, 16).permute(2, 0, 3, 1, 4)[:2], GRID)
    ours = ops.rope3d_qkv_(packed.clone(), 2, GRID).view(2, N, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert ours[0].equal(want[0]) and ours[1].equal(want[1])
    ops.rope3d_(q, k, GRID)
    assert q.equal(a) and k.equal(b)


def test_vmap_is_an_error():
    with pytest.raises(NotImplementedError, match="q: rope3d has no vmap rule"):
        torch.vmap(lambda x: ops.rope3d(x, None, GRID))(torch.randn(3, 1, 2, N, 16))


# torch.compile, export, fake tensors


def test_opcheck():
    q, k = qk()
    settings = (None, None, list(GRID), 1, True, False, "cpu", None)
    per_call = (ops.joint_freqs(16), torch.randn(2, N, 3), [], 1, False, True, "cpu", None)
    by_table = (None, None, [], 1, True, False, "cpu", torch.randn(2, 1, 1, N - 1, 8))
    for arguments in (settings, per_call, by_table):
        torch.library.opcheck(raw.rope3d.default, ([q, k], *arguments))
        torch.library.opcheck(raw.rope3d_.default, ([q, k], *arguments))
        torch.library.opcheck(raw.rope3d_qkv.default, (q, q + 1, q + 2, *arguments))
        torch.library.opcheck(raw.rope3d_qkv_.default, (torch.randn(2, N, 48), 1, *arguments))
    torch.library.opcheck(raw.rope3d_freqs.default, ([q, k], [q.clone(), k.clone()], *per_call))
    torch.library.opcheck(raw.rope3d_qkv_freqs.default, (torch.randn(2, N, 48), torch.randn(2, N, 32), 1, *per_call))


def test_compiles_with_gradients():
    q, k = qk(requires_grad=True)
    function = lambda q, k: sum(x.pow(3).sum() for x in ops.rope3d(q, k, GRID))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), function(q, k))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(function(q, k), (q, k)))


def test_compiles_with_learnable_frequencies():
    linear, x, freqs = torch.nn.Linear(8, 96), torch.randn(2, N, 8), ops.joint_freqs(16).requires_grad_()
    packed = lambda x: ops.rope3d_qkv_(linear(x), 2, GRID, freqs=freqs).pow(3).sum()  # noqa: E731
    apart = lambda x: sum(y.pow(3).sum() for y in ops.rope3d(x, x, GRID, freqs=freqs))  # noqa: E731
    for function, y in ((packed, x), (apart, torch.randn(2, 4, N, 16))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(*(torch.autograd.grad(f(y), freqs) for f in (compiled, function)))


def test_compiles_packed_with_gradients():
    linear, x = torch.nn.Linear(8, 96), torch.randn(2, N, 8)
    function = lambda x: ops.rope3d_qkv_(linear(x), 2, GRID).pow(3).sum()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, expected = (torch.autograd.grad(f(x), linear.weight) for f in (compiled, function))
    torch.testing.assert_close(ours, expected)


def test_compiles_in_place():
    q, k = qk()
    expected = ops.rope3d(q, k, GRID)
    compiled = torch.compile(lambda q, k: ops.rope3d_(q, k, GRID), fullgraph=True, backend="aot_eager")
    compiled(q, k)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_exports():
    class Rotate(torch.nn.Module):
        def forward(self, q, k):
            return ops.rope3d(q, k, GRID)

    q, k = qk()
    ours = torch.export.export(Rotate(), (q, k)).module()(q, k)
    assert all(map(torch.equal, ours, ops.rope3d(q, k, GRID)))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, N, 4, 16).transpose(1, 2)
        out = ops.rope3d(q, None, GRID)
        assert out.shape == q.shape and out.stride() == q.stride()
        assert ops.rope3d_qkv_(torch.empty(2, N, 48), 1, GRID).shape == (2, N, 48)


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.rope3d(qk()[0], None, GRID).dtype == torch.float32


# Errors

Q, K = torch.zeros(2, 4, N, 16), torch.zeros(2, 2, N, 16)
ROWS = torch.zeros(N, 3)
BAD = [
    (dict(q=[1]), TypeError, r"q: expected a tensor \[B, H, N, D\], got \[1\]"),
    (dict(q=Q[0]), ValueError, r"q: expected a tensor \[B, H, N, D\], got torch.float32 \[4, 19, 16\]"),
    (dict(q=Q.int()), TypeError, "q: expected float32, bfloat16, float16 or float64, got torch.int32"),
    (dict(q=Q[..., :15]), ValueError, "q: expected an even head dim from 2 to 256, got 15"),
    (dict(q=torch.zeros(1, 1, N, 258)), ValueError, "q: expected an even head dim from 2 to 256, got 258"),
    (dict(k=K.bfloat16()), TypeError, "k: expected q's dtype torch.float32, got torch.bfloat16"),
    (dict(k=K.to("meta")), ValueError, "k: expected q's device cpu, got meta"),
    (dict(k=K[:1]), ValueError, r"k: expected the shape \[2, Hk, 19, 16\], got \[1, 2, 19, 16\]"),
    (dict(k=K[:, :, 1:]), ValueError, r"k: expected the shape \[2, Hk, 19, 16\]"),
    (dict(k=K, freqs=torch.zeros(4, 3, 8)), ValueError, "k: expected 4 heads, as freqs are per head, got 2"),
    (dict(prefix_tokens=-1), ValueError, "prefix_tokens: expected an int >= 0, got -1"),
    (dict(prefix_tokens=True), ValueError, "prefix_tokens: expected an int >= 0, got True"),
    (dict(prefix_tokens=1.0), ValueError, "prefix_tokens: expected an int >= 0, got 1.0"),
    (dict(grid=None), ValueError, "grid, positions: expected exactly one of the two, got neither"),
    (dict(positions=ROWS), ValueError, "grid, positions: expected exactly one of the two, got both"),
    (dict(grid=(2, 3)), ValueError, r"grid: expected three positive ints \(T, Hp, Wp\), got \(2, 3\)"),
    (dict(grid=3), ValueError, "grid: expected three positive ints"),
    (dict(grid=(0, 3, 3)), ValueError, "grid: expected three positive ints"),
    (dict(grid=(2.0, 3, 3)), ValueError, "grid: expected three positive ints"),
    (dict(grid=(2, 3, 4)), ValueError, "grid: 2 x 3 x 4 cells and prefix_tokens=1 make 25 tokens, but q has N = 19"),
    (dict(prefix_tokens=0), ValueError, "make 18 tokens, but q has N = 19"),
    (
        dict(q=Q[..., :10]),
        ValueError,
        "freqs: the default, joint_freqs, needs a head dim that is a multiple of 4, got 10",
    ),
    (dict(freqs=torch.zeros(3, 8).bfloat16()), TypeError, "freqs: expected a float32 tensor, got torch.bfloat16"),
    (dict(freqs=[0.0]), TypeError, "freqs: expected a float32 tensor, got list"),
    (dict(freqs=torch.zeros(3, 4)), ValueError, r"freqs: expected the shape \[3, 8\] or \[4, 3, 8\], got \[3, 4\]"),
    (dict(freqs=torch.zeros(3, 8, device="meta")), ValueError, "freqs: expected q's device cpu, got meta"),
    (
        dict(grid=None, positions=ROWS.double()),
        TypeError,
        "positions: expected a tensor of integers or float32, got torch.float64",
    ),
    (dict(grid=None, positions=ROWS > 0), TypeError, "positions: expected .* got torch.bool"),
    (dict(grid=None, positions=GRID), TypeError, "positions: expected a tensor of integers or float32, got tuple"),
    (
        dict(grid=None, positions=ROWS[1:]),
        ValueError,
        r"positions: expected the shape \[19, 3\] or \[2, 19, 3\], got \[18, 3\]",
    ),
    (dict(grid=None, positions=ROWS.to("meta")), ValueError, "positions: expected q's device cpu, got meta"),
    (dict(grid=None, positions=ROWS, prefix_tokens=20), ValueError, "prefix_tokens: expected at most N = 19, got 20"),
    (dict(q=Q.double(), backend="cpu"), RuntimeError, "backend 'cpu' was asked for but .* not float64"),
    (dict(q=Q.to("meta"), backend="cpu"), RuntimeError, "backend 'cpu' was asked for but .* takes CPU tensors, not meta"),
    (dict(backend="sdpa"), RuntimeError, "no sdpa version of rope3d is built"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=[m[:40] for *_, m in BAD])
@pytest.mark.parametrize("function", [ops.rope3d, ops.rope3d_], ids=["rope3d", "rope3d_"])
def test_bad_input(function, change, error, message):
    with pytest.raises(error, match=message):
        function(**{"q": Q, "grid": GRID, **change})


BAD_IN_PLACE = [
    (lambda: dict(q=Q.clone().requires_grad_()), "q: requires a gradient, .* use rope3d_qkv_"),
    (lambda: dict(q=Q, k=K.clone().requires_grad_()), "k: requires a gradient"),
    (lambda: dict(q=Q, freqs=torch.zeros(3, 8).requires_grad_()), "freqs: requires a gradient"),
    (lambda: dict(q=Q.transpose(2, 3).contiguous().transpose(2, 3)), "q: in place needs a contiguous last dimension"),
    (lambda: dict(q=Q[:, :1].expand(2, 4, N, 16)), "q: in place needs memory of its own for every element"),
    (lambda: dict(q=torch.zeros(999).as_strided((2, 4, N, 16), (32, 16, 8, 1))), "q: in place needs memory of its own"),
    (lambda: dict(q=Q, k=Q), "k: shares its memory with q"),
    (lambda: dict(q=Q, k=Q[:, :2]), "k: shares its memory with q"),
]


@pytest.mark.parametrize("arguments,message", BAD_IN_PLACE, ids=[m[:40] for _, m in BAD_IN_PLACE])
def test_bad_input_in_place(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.rope3d_(grid=GRID, **arguments())


QKV = torch.zeros(2, N, 96)
BAD_PACKED = [
    (
        lambda: (QKV[0], 2),
        ValueError,
        r"qkv: expected a tensor \[B, N, 3 \* num_heads \* D\], got torch.float32 \[19, 96\]",
    ),
    (lambda: (None, 2), TypeError, "qkv: expected a tensor .* got None"),
    (lambda: (QKV, 5), ValueError, "num_heads: expected a positive int such that 3 \\* num_heads divides 96, got 5"),
    (lambda: (QKV, 0), ValueError, "num_heads: expected a positive int"),
    (lambda: (QKV, 2.0), ValueError, "num_heads: expected a positive int"),
    (lambda: (torch.zeros(2, 96, N).transpose(1, 2), 2), ValueError, "qkv: expected a contiguous tensor, got strides"),
    (lambda: (QKV.int(), 2), TypeError, "q: expected float32"),
    (lambda: (QKV[:, 1:].contiguous(), 2), ValueError, "make 19 tokens, but q has N = 18"),
    (
        lambda: (QKV.clone().requires_grad_(), 2),
        ValueError,
        "qkv: a leaf that requires a gradient cannot be changed in place",
    ),
    (
        lambda: ((torch.zeros(3, N, 96, requires_grad=True) * 1)[1:], 2),
        ValueError,
        r"qkv: is a view of a part of a tensor \[3, 19, 96\]",
    ),
]


@pytest.mark.parametrize("arguments,error,message", BAD_PACKED, ids=[m[:40] for *_, m in BAD_PACKED])
def test_bad_input_packed(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rope3d_qkv_(*arguments(), GRID)
