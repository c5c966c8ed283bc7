"""What every backend of rope3d must do, as functions of (backend, device), for the CPU, interpreter and GPU tests."""

import random

import torch
from check import close

from evaat_fast import ops
from evaat_fast.ops.rope3d.reference import rope3d_reference

LAYOUTS = ("contiguous", "tokens first", "packed", "sliced", "last dim strided")


def make(layout, B, H, N, D, dtype, device):
    """A tensor [B, H, N, D] that lies in memory as named."""
    x = torch.randn(B, H, N, D).to(dtype).to(device)
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        packed = torch.randn(B, N, 3, H, D).to(dtype).to(device)
        packed[:, :, 1] = x.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)
    if layout == "sliced":
        wide = torch.randn(B, H + 1, N + 2, D + 6).to(dtype).to(device)
        wide[:, 1:, 1:-1, 2 : 2 + D] = x
        return wide[:, 1:, 1:-1, 2 : 2 + D]
    if layout == "last dim strided":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def expected(q, k, grid=None, **options):
    """(low, truth): the specification in the inputs' dtype, and in float64."""
    double = rope3d_reference(q.double(), None if k is None else k.double(), grid, **options)
    low = rope3d_reference(q, k, grid, **options)
    return ((low,), (double,)) if k is None else (low, double)


def check(backend, q, k=None, grid=None, **options):
    """Out of place and in place against the specification; inputs and prefix rows keep every bit."""
    low, truth = expected(q, k, grid, **options)
    inputs = [x for x in (q, k) if x is not None]
    before = [x.clone() for x in inputs]
    outs = ops.rope3d(q, k, grid, backend=backend, **options)
    outs = (outs,) if k is None else outs
    prefix = options.get("prefix_tokens", 1)
    for name, x, old, out, a, b in zip("qk", inputs, before, outs, low, truth, strict=False):
        close(out, a, b, name)
        assert torch.equal(x, old), f"{name} was written to"
        assert torch.equal(out[:, :, :prefix], old[:, :, :prefix])
        if backend != "reference":
            order = (0, 2, 1, 3) if x.stride(1) < x.stride(2) else (0, 1, 2, 3)
            assert out.permute(order).is_contiguous()
    if any(x.stride(3) != 1 for x in inputs):
        return
    with torch.no_grad():
        again = ops.rope3d_(q, k, grid, backend=backend, **options)
    for name, x, result, out, old in zip("qk", inputs, (again,) if k is None else again, outs, before, strict=False):
        assert result is x
        assert torch.equal(x, out), f"{name}: in place differs from out of place"
        assert torch.equal(x[:, :, :prefix], old[:, :, :prefix])


def check_packed(backend, B, N, H, D, dtype, device, grid=None, **options):
    """rope3d_qkv_ without and with autograd, value and gradient."""
    qkv = torch.randn(B, N, 3 * H * D).to(dtype).to(device)
    split = lambda x: x.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)  # noqa: E731
    join = lambda x: torch.stack(x).permute(1, 3, 0, 2, 4).flatten(2)  # noqa: E731
    q, k, v = split(qkv)
    low, truth = expected(q, k, grid, **options)
    low, truth = join((*low, v)), join((*truth, v.double()))
    with torch.no_grad():
        out = ops.rope3d_qkv_(qkv.clone(), H, grid, backend=backend, **options)
    close(out, low, truth, "qkv")
    assert torch.equal(split(out)[2], v)

    leaf, grad = qkv.clone().requires_grad_(), torch.randn(B, N, 3 * H * D).to(dtype).to(device)
    passed = grad.clone()
    trained = leaf * 1
    result = ops.rope3d_qkv_(trained, H, grid, backend=backend, **options)
    assert result is trained and torch.equal(result, out)
    (ours,) = torch.autograd.grad(result, leaf, passed)
    assert torch.equal(passed, grad), "the incoming gradient was written to"
    dq, dk, dv = split(grad)
    inverse = {**options, "inverse": not options.get("inverse", False)}
    low, truth = expected(dq, dk, grid, **inverse)
    close(ours, join((*low, dv)), join((*truth, dv.double())), "gradient of qkv")


def check_gradients(backend, q, k, grid=None, **options):
    """Gradients of rope3d against autograd through the specification."""
    grads = [torch.randn(x.shape).to(x.dtype).to(x.device) for x in (q, k)]

    def run(function, cast):
        leaves = [cast(x.detach()).requires_grad_() for x in (q, k)]
        return torch.autograd.grad(function(*leaves, grid, **options), leaves, [cast(g) for g in grads])

    ours = run(lambda *a, **o: ops.rope3d(*a, backend=backend, **o), lambda x: x)
    low, truth = run(rope3d_reference, lambda x: x), run(rope3d_reference, lambda x: x.double())
    for name, a, b, c in zip("qk", ours, low, truth, strict=True):
        close(a, b, c, f"gradient of {name}")


def check_learnable(backend, q, k, grid=None, *, freqs, **options):
    """Gradients of q, k and freqs against autograd through the specification; k may be None."""
    inputs = [x for x in (q, k) if x is not None]
    grads = [torch.randn(x.shape).to(x.dtype).to(x.device) for x in inputs]

    def run(function, cast, wide=False):
        learned = freqs.detach().double() if wide else freqs.detach().clone()
        leaves = [cast(x.detach()).requires_grad_() for x in inputs] + [learned.requires_grad_()]
        out = function(*leaves[:-1], *[None] * (2 - len(inputs)), grid, freqs=leaves[-1], **options)
        return torch.autograd.grad(out, leaves, [cast(g) for g in grads])

    ours = run(lambda *a, **o: ops.rope3d(*a, backend=backend, **o), lambda x: x)
    low, truth = run(rope3d_reference, lambda x: x), run(rope3d_reference, lambda x: x.double(), wide=True)
    for name, a, b, c in zip(("q", "k")[: len(inputs)] + ("freqs",), ours, low, truth, strict=True):
        if name == "freqs" and c.numel() < 64:  # of a handful of sums, which one torch rounds least is luck
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6 * c.abs().max(), (a, b, c)
        else:
            close(a, b, c, f"gradient of {name}")
    again = run(lambda *a, **o: ops.rope3d(*a, backend=backend, **o), lambda x: x)
    assert all(map(torch.equal, ours, again)), "two runs differ"


def check_learnable_packed(backend, B, N, H, D, dtype, device, grid=None, *, freqs, **options):
    """rope3d_qkv_ in training with learnable freqs is rope3d's, to the last bit."""
    qkv, grad = (torch.randn(B, N, 3 * H * D).to(dtype).to(device) for _ in range(2))

    def split(x):
        return x.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)

    leaf, learned = qkv.clone().requires_grad_(), freqs.detach().clone().requires_grad_()
    out = ops.rope3d_qkv_(leaf * 1, H, grid, freqs=learned, backend=backend, **options)
    ours = torch.autograd.grad(out, (leaf, learned), grad)
    leaves = [x.detach().requires_grad_() for x in split(qkv)[:2]]
    apart = ops.rope3d(*leaves, grid, freqs=learned, backend=backend, **options)
    assert all(map(torch.equal, split(out), (*apart, split(qkv)[2])))
    theirs = torch.autograd.grad(apart, (*leaves, learned), tuple(split(grad)[:2]))
    assert all(map(torch.equal, (*split(ours[0]), ours[1]), (*theirs[:2], split(grad)[2], theirs[2])))


def seeds_of(block):
    """The seeds of one of eight blocks of the 2,000 random calls that every backend must pass."""
    return range(1000 + 250 * block, 1250 + 250 * block)


def random_call(seed, backend, device, dtypes, largest=1.0):
    """One random valid call, checked; a failure names its seed."""
    try:
        _random_call(random.Random(seed), seed, backend, device, dtypes, largest)
    except AssertionError as wrong:
        raise AssertionError(f"seed {seed}: {wrong}") from wrong


def _random_call(r, seed, backend, device, dtypes, largest):
    torch.manual_seed(seed)
    B, Hq, D = (
        r.choice([0, 1, 1, 2, 3]),
        r.randint(1, 8),
        2 * r.choice([1, 2, 3, 4, 8, 15, 16, 20, 32, 33, 48, 64, 128]),
    )
    grid = tuple(r.randint(1, max(1, round(most * largest))) for most in (4, 6, 6))
    prefix = r.choice([0, 1, 1, 5])
    N = prefix + grid[0] * grid[1] * grid[2]
    options = dict(prefix_tokens=prefix, interleaved=r.random() < 0.6, inverse=r.random() < 0.4)
    per_head = r.random() < 0.2
    if D % 4 or r.random() < 0.5 or per_head:
        shape = (Hq, 3, D // 2) if per_head else (3, D // 2)
        options["freqs"] = torch.randn(shape, device=device)
    if r.random() < 0.4:
        shape = r.choice([(N, 3), (B, N, 3)])
        positions = torch.randn(shape) * 10 if r.random() < 0.5 else torch.randint(-20, 20, shape)
        options["positions"], grid = positions.to(device), None
    Hk = Hq if per_head else r.randint(1, 8)
    dtype, layouts = r.choice(dtypes), (r.choice(LAYOUTS), r.choice(LAYOUTS))
    q = make(layouts[0], B, Hq, N, D, dtype, device)
    k = make(layouts[1], B, Hk, N, D, dtype, device) if r.random() < 0.8 else None
    check(backend, q, k, grid, **options)
    if k is not None:
        check_gradients(backend, q, k, grid, **options)
    check_packed(backend, B, N, Hq, D, dtype, device, grid, **options)
    # CUDA C++ learns none; with a handful of frequencies, torch's own error is a matter of luck.
    if "freqs" in options and D >= 64 and backend != "cuda":
        check_learnable(backend, q, k, grid, **options)
        check_learnable_packed(backend, B, N, Hq, D, dtype, device, grid, **options)
