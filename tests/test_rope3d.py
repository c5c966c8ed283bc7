"""rope3d on every backend that runs eagerly: values, gradients, layouts, properties, errors, torch.compile."""

import math
import re
import weakref

import peers
import pytest
import rope3d_cases as cases
import torch
from check import launched
from rope3d_cases import LAYOUTS, make

from evaat_fast import ops
from evaat_fast.ops.rope3d.freqs import grid_positions
from evaat_fast.ops.rope3d.reference import rope3d_reference
from evaat_fast.ops.rope3d.table import hold_constant

GRID, N = (3, 4, 5), 61
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference", *(pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda"))]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", BACKENDS)
learning = pytest.mark.parametrize("backend", BACKENDS[:-1])


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") else "cpu"


@backends
@dtypes
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, dtype, interleaved, layout):
    device = device_of(backend)
    q, k = make(layout, 2, 5, N, 64, dtype, device), make("packed", 2, 2, N, 64, dtype, device)
    cases.check(backend, q, k, GRID, interleaved=interleaved)


@dtypes
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("D", [2, 30, 64, 80, 256])
def test_instruction_sets_and_head_dims(isa, dtype, interleaved, D):
    freqs = torch.randn(3, D // 2)
    for layout in ("contiguous", "tokens first"):
        q, k = make(layout, 1, 7, 13, D, dtype, "cpu"), make(layout, 1, 3, 13, D, dtype, "cpu")
        cases.check("cpu", q, k, (2, 2, 3), freqs=freqs, interleaved=interleaved, inverse=True)


@backends
@dtypes
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_packed_and_gradients(backend, dtype, prefix):
    device = device_of(backend)
    cases.check_packed(backend, 2, prefix + 60, 3, 64, dtype, device, GRID, prefix_tokens=prefix)
    q, k = (make("packed", 2, H, prefix + 60, 64, dtype, device) for H in (4, 2))
    cases.check_gradients(backend, q, k, GRID, prefix_tokens=prefix, interleaved=False)


@backends
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["int32", "int64", "fractional"])
def test_positions(backend, batched, kind):
    device = device_of(backend)
    positions = torch.randn((2, N, 3) if batched else (N, 3)) * 50
    positions = positions.to(device) if kind == "fractional" else positions.to(device, getattr(torch, kind))
    q, k = make("contiguous", 2, 4, N, 32, torch.float32, device), make("packed", 2, 2, N, 32, torch.float32, device)
    cases.check(backend, q, k, positions=positions)
    cases.check_gradients(backend, q, k, positions=positions)
    cases.check_packed(backend, 2, N, 4, 32, torch.float32, device, positions=positions)


@backends
def test_grid_is_positions(backend):
    q = make("contiguous", 2, 4, N, 32, torch.float32, device_of(backend))
    rows = torch.cat((torch.full((1, 3), 99), grid_positions(GRID))).to(q.device)
    assert torch.equal(ops.rope3d(q, None, GRID, backend=backend), ops.rope3d(q, positions=rows, backend=backend))


@backends
def test_frequencies_per_head(backend):
    device = device_of(backend)
    freqs = torch.randn(4, 3, 16, device=device)
    q, k = make("contiguous", 2, 4, N, 32, torch.float32, device), make("packed", 2, 4, N, 32, torch.float32, device)
    cases.check(backend, q, k, GRID, freqs=freqs)
    cases.check(backend, k, None, GRID, freqs=freqs)
    cases.check_packed(backend, 2, N, 4, 32, torch.float32, device, GRID, freqs=freqs)


@learning
@dtypes
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("per_head", [False, True])
def test_learnable_frequencies(backend, dtype, interleaved, per_head):
    device = device_of(backend)
    freqs = torch.randn((4, 3, 32) if per_head else (3, 32), device=device) / 4
    q, k = make("contiguous", 3, 4, N, 64, dtype, device), make("packed", 3, 4, N, 64, dtype, device)
    cases.check_learnable(backend, q, k, GRID, freqs=freqs, interleaved=interleaved)
    cases.check_learnable(backend, k, None, GRID, freqs=freqs, interleaved=interleaved, inverse=True)
    positions = torch.randn(3, N, 3, device=device) * 10
    cases.check_learnable(backend, k, q, positions=positions, freqs=freqs, prefix_tokens=0, interleaved=interleaved)
    if backend != "reference":
        cases.check_learnable_packed(backend, 2, N, 4, 64, dtype, device, GRID, freqs=freqs, interleaved=interleaved)


@dtypes
@pytest.mark.parametrize("D", [2, 30, 80, 256])
def test_learnable_frequencies_of_every_instruction_set(isa, dtype, D):
    for interleaved in (True, False):
        q, k = make("tokens first", 2, 7, 133, D, dtype, "cpu"), make("contiguous", 2, 3, 133, D, dtype, "cpu")
        cases.check_learnable("cpu", q, k, (3, 4, 11), freqs=torch.randn(3, D // 2), interleaved=interleaved)


@learning
def test_learnable_frequencies_of_no_tokens(backend):
    q, freqs = make("contiguous", 2, 2, 4, 8, torch.float32, device_of(backend)), torch.randn(3, 4)
    q, freqs = q.requires_grad_(), freqs.to(q.device).requires_grad_()
    for x, prefix in ((q, 4), (q[:0], 1), (q[:, :0], 1)):
        out = ops.rope3d(
            x, None, positions=torch.zeros(4, 3, device=q.device), freqs=freqs, prefix_tokens=prefix, backend=backend
        )
        (of_freqs,) = torch.autograd.grad(out.sum(), freqs, allow_unused=True)
        assert of_freqs is None or not of_freqs.any()


@backends
def test_kept_tables_follow_their_tensors(backend):
    q, freqs = make("contiguous", 1, 2, N, 32, torch.float32, device_of(backend)), torch.randn(3, 16)
    freqs, positions = freqs.to(q.device), torch.randn(N, 3).to(q.device)
    for options in (dict(grid=GRID, freqs=freqs), dict(positions=positions), dict(positions=positions, freqs=freqs)):
        first = ops.rope3d(q, backend=backend, **options)
        freqs.data.mul_(2)
        positions.data.mul_(2)
        second = ops.rope3d(q, backend=backend, **options)
        torch.testing.assert_close(second, rope3d_reference(q, **options))
        assert not torch.allclose(first, second)


@backends
def test_large_time_stamps(backend):
    """Seconds since the morning: a float32 angle of 30000 is wrong by 1e-3, ours is not."""
    q = make("contiguous", 1, 1, 3, 8, torch.float32, device_of(backend))
    positions = torch.tensor([[0.0, 0, 0], [30000.25, 0, 0], [30001.5, 3, 4]], device=q.device)
    out = ops.rope3d(q, positions=positions, backend=backend)
    torch.testing.assert_close(out.double(), rope3d_reference(q.double(), positions=positions), rtol=0, atol=1e-6)


@backends
@pytest.mark.parametrize("shape", [(0, 2, N, 32), (2, 0, N, 32)])
def test_empty(backend, shape):
    q = torch.zeros(shape, device=device_of(backend))
    assert ops.rope3d(q, q[:, :1], GRID, backend=backend)[0].shape == shape
    assert ops.rope3d_(q, None, GRID, backend=backend) is q


@backends
def test_only_prefix_tokens(backend):
    q = make("contiguous", 2, 2, 4, 8, torch.float32, device_of(backend))
    positions = torch.zeros(4, 3, device=q.device)
    assert torch.equal(ops.rope3d(q, positions=positions, prefix_tokens=4, backend=backend), q)
    cases.check_packed(backend, 2, 4, 2, 8, torch.float32, q.device, positions=positions, prefix_tokens=4)


@backends
def test_more_clips_than_a_grid_s_third_dimension_has(backend):
    q = make("contiguous", 70000, 1, 2, 4, torch.float32, device_of(backend))
    positions = torch.randn(70000, 2, 3, device=q.device)
    cases.check(backend, q, positions=positions, prefix_tokens=0)


@backends
@dtypes
def test_not_finite_passes_through(backend, dtype):
    q = make("contiguous", 1, 2, N, 64, dtype, device_of(backend))
    q[0, 0, 0, 0], q[0, 1, 7, 9], q[0, 1, 9, 20] = math.inf, math.nan, math.inf
    ours, low = ops.rope3d(q, None, GRID, backend=backend), rope3d_reference(q, None, GRID)
    assert torch.equal(ours.isnan(), low.isnan()) and torch.equal(ours.isinf(), low.isinf())
    assert torch.equal(ours[:, :, 0], q[:, :, 0])


@backends
def test_properties(backend):
    q, k = (make("contiguous", 2, 3, N, 64, torch.float32, device_of(backend)) for _ in range(2))
    turn = lambda x, **o: ops.rope3d(x, None, backend=backend, **{"grid": GRID, **o})  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    close(turn(q).norm(dim=-1), q.norm(dim=-1))
    close(turn(turn(q), inverse=True), q)
    # Scores depend on the difference of positions alone.
    p, shift = torch.randn(N, 3, device=q.device) * 5, torch.tensor([3.0, -2.0, 7.5], device=q.device)
    here = (turn(q, grid=None, positions=p) * turn(k, grid=None, positions=p.flip(0))).sum(-1)
    there = (turn(q, grid=None, positions=p + shift) * turn(k, grid=None, positions=p.flip(0) + shift)).sum(-1)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    # The joint rotation is the spatial one, then the temporal one.
    time = ops.joint_freqs(64).to(q.device)
    time[1:] = 0
    close(turn(turn(q, freqs=ops.spatial_freqs(64).to(q.device)), freqs=time), turn(q))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
def test_threads(threads, layout):
    q, before = make(layout, 3, 5, N, 64, torch.float32, "cpu"), torch.get_num_threads()
    one = ops.rope3d(q, q, GRID, backend="cpu")
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, ops.rope3d(q, q, GRID, backend="cpu"), one))
        freqs, x = ops.joint_freqs(64).requires_grad_(), torch.randn(2, 3, 785, 64)
        slopes = torch.autograd.grad(ops.rope3d(x, None, (4, 14, 14), freqs=freqs, backend="cpu").square().sum() * 3, freqs)
        torch.set_num_threads(before)
        assert torch.equal(
            torch.autograd.grad(ops.rope3d(x, None, (4, 14, 14), freqs=freqs).square().sum() * 3, freqs)[0], slopes[0]
        )
    finally:
        torch.set_num_threads(before)


def test_fuzz_cpu():
    for seed in range(150):
        cases.random_call(seed, "cpu", "cpu", DTYPES, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_fuzz_cpu_long(block):
    for seed in cases.seeds_of(block):
        cases.random_call(seed, "cpu", "cpu", DTYPES, 1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_fuzz_gpu(backend):
    for seed in range(300):
        cases.random_call(seed, backend, "cuda", DTYPES, 2.0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_fuzz_gpu_long(backend, block):
    for seed in cases.seeds_of(block):
        cases.random_call(seed, backend, "cuda", DTYPES, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend,learnable", [("triton", True), ("triton", False), ("cuda", False)])
def test_cuda_graph(backend, learnable):
    """Forward and backward captured once, replayed on other numbers and frequencies."""
    freqs = ops.joint_freqs(64).cuda().requires_grad_(learnable)
    q, qkv = torch.randn(2, 3, N, 64, device="cuda"), torch.randn(2, N, 3 * 3 * 64, device="cuda")
    q.requires_grad_(), qkv.requires_grad_()
    leaves = (q, qkv, freqs) if learnable else (q, qkv)

    def step():
        out = ops.rope3d(q, None, GRID, freqs=freqs, backend=backend)
        packed = ops.rope3d_qkv_(qkv * 1, 3, GRID, freqs=freqs, backend=backend)
        return *(x.detach() for x in (out, packed)), *torch.autograd.grad(out.pow(3).sum() + packed.pow(3).sum(), leaves)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        outs = step()
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            q.normal_(), qkv.normal_(), freqs.mul_(1.5)
        graph.replay()
        assert all(map(torch.equal, outs, step()))


def kernels_of(call):
    """The names of the kernels that a call launches, without what C++ adds to them."""
    return [re.search(r"\w+(?=<|\(evaat|$)", name)[0] for name in launched(call)]


@pytest.mark.gpu
@pytest.mark.counts
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("of_a_model", [True, False])
def test_a_graph_has_the_rotation_s_kernels_alone(of_a_model, backend):
    """Forward and backward, with the default frequencies and with those that a model owns."""
    freqs = hold_constant(ops.joint_freqs(64, scale=(1.0, 1.5, 1.5)).cuda()) if of_a_model else None
    q = torch.randn(2, 3, N, 64, device="cuda", requires_grad=True)
    grad = torch.randn_like(q)
    step = lambda: torch.autograd.grad(ops.rope3d(q, None, GRID, freqs=freqs, backend=backend), q, grad)[0]  # noqa: E731
    want, stream, graph = step(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    assert kernels_of(step) == ["rope3d_kernel"] * 2
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    with torch.cuda.graph(graph):
        out = step()
    assert kernels_of(graph.replay) == ["rope3d_kernel"] * 2
    assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.counts
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_packed_gradient_is_one_launch(backend):
    qkv, grad = (torch.randn(2, N, 3 * 3 * 64, device="cuda") for _ in range(2))
    out = ops.rope3d_qkv_(qkv.requires_grad_() * 1, 3, GRID, backend=backend)
    back = lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True)  # noqa: E731
    assert [name for name in kernels_of(back) if name == "rope3d_kernel"] == ["rope3d_kernel"]
    assert not any("copy" in name.lower() for name in kernels_of(back))


@pytest.mark.gpu
@pytest.mark.counts
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_table_is_one_launch(backend):
    """Of positions, which no call may keep: where Triton is there it makes CUDA C++'s, too."""
    pytest.importorskip("triton")
    q, positions = torch.randn(2, 3, N, 64, device="cuda"), torch.randn(N, 3, device="cuda")
    turned = lambda: ops.rope3d(q, positions=positions, backend=backend)  # noqa: E731
    turned()
    assert kernels_of(turned) == ["rope3d_table_kernel", "rope3d_kernel"]


def test_constant_frequencies():
    """Their table is made once; a change through torch is noticed; nothing is kept of what is gone."""
    freqs = hold_constant(ops.joint_freqs(64, scale=(1.0, 1.5, 1.5)))
    q = torch.randn(1, 2, N, 64)
    turned = lambda: ops.rope3d(q, None, GRID, freqs=freqs)  # noqa: E731
    assert torch.equal(turned(), ops.rope3d(q, None, GRID, freqs=freqs.clone())) and torch.equal(turned(), turned())
    freqs.mul_(2)
    assert torch.equal(turned(), ops.rope3d(q, None, GRID, freqs=freqs.clone()))
    freqs.requires_grad_()
    assert torch.autograd.grad(turned().sum(), freqs)[0].isfinite().all()
    gone = weakref.ref(freqs)
    freqs = None
    assert gone() is None


# Frequencies


def test_joint_freqs_are_the_paper_s():
    """The spatial rotation of the whole head dim, then the temporal one, each written out on complex pairs."""
    D, theta = 64, 10000.0
    x = torch.randn(1, 1, N, D, dtype=torch.double)
    pairs = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous()).clone()
    spatial = [theta ** (-4 * i / D) for i in range(D // 4)]
    for n, (t, h, w) in enumerate((t, h, w) for t in range(3) for h in range(4) for w in range(5)):
        angles = torch.tensor([h * f for f in spatial] + [w * f for f in spatial], dtype=torch.double)
        pairs[0, 0, n] *= torch.polar(torch.ones_like(angles), angles)
        angles = torch.tensor([t * theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.double)
        pairs[0, 0, n] *= torch.polar(torch.ones_like(angles), angles)
    ours = ops.rope3d(x, None, GRID)
    torch.testing.assert_close(ours[:, :, 1:], torch.view_as_real(pairs).flatten(-2), rtol=0, atol=2e-6)


def test_scale_multiplies_positions():
    q, scale = torch.randn(1, 1, N, 32), torch.tensor([2.0, 0.5, 0.25])
    rows = torch.cat((torch.zeros(1, 3), grid_positions(GRID) * scale))
    freqs = ops.joint_freqs(32, scale=tuple(scale.tolist()))
    torch.testing.assert_close(ops.rope3d(q, None, GRID, freqs=freqs), ops.rope3d(q, positions=rows))


def test_split_freqs():
    restart = ops.split_freqs(20, (4, 8, 6), theta=100.0, scale=(1.0, 2.0, 1.0))
    assert restart.dtype == torch.float32 and restart.shape == (3, 10)
    expected = torch.zeros(3, 10)
    expected[0, :2] = torch.tensor([1.0, 0.1])
    expected[1, 2:6] = 2 * 100.0 ** (-torch.arange(4) / 4)
    expected[2, 6:9] = 100.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(restart, expected)
    sections = ops.split_freqs(20, (4, 8, 6), theta=100.0, restart=False)
    torch.testing.assert_close(sections.sum(0)[:9], (100.0 ** (-torch.arange(10) / 10))[:9])
    assert torch.equal(sections != 0, restart != 0)


def test_spatial_freqs_are_eva02_s():
    layers = peers.peer("timm.layers")
    rope = layers.RotaryEmbeddingCat(64, in_pixels=False, feat_shape=[14, 14], ref_feat_shape=[16, 16])
    x = torch.randn(1, 2, 196, 64)
    ours = ops.rope3d(x, None, (1, 14, 14), prefix_tokens=0, freqs=ops.spatial_freqs(64, scale=(16 / 14, 16 / 14)))
    torch.testing.assert_close(ours, layers.apply_rot_embed_cat(x, rope.get_embed()), rtol=1e-5, atol=1e-5)


BAD_FREQS = [
    (lambda: ops.joint_freqs(6), "head_dim: expected a positive multiple of 4, got 6"),
    (lambda: ops.joint_freqs(0), "head_dim: expected a positive multiple of 4, got 0"),
    (lambda: ops.joint_freqs(64.0), "head_dim: expected a positive multiple of 4, got 64.0"),
    (lambda: ops.joint_freqs(64, theta=0), "theta: expected a positive number, got 0"),
    (lambda: ops.joint_freqs(64, scale=(1, 1)), r"scale: expected 3 finite numbers, got \(1, 1\)"),
    (lambda: ops.joint_freqs(64, scale=1), "scale: expected 3 finite numbers, got 1"),
    (lambda: ops.spatial_freqs(64, scale=(1, math.nan)), "scale: expected 2 finite numbers"),
    (lambda: ops.split_freqs(7, (2, 2, 2)), "head_dim: expected a positive multiple of 2, got 7"),
    (lambda: ops.split_freqs(8, (2, 3, 2)), r"dims: expected three even numbers .* at most 8, got \(2, 3, 2\)"),
    (lambda: ops.split_freqs(8, (4, 4, 2)), "dims: expected three even numbers"),
    (lambda: ops.split_freqs(8, (4, 4)), "dims: expected 3 finite numbers"),
]


@pytest.mark.parametrize("call,message", BAD_FREQS)
def test_bad_frequencies(call, message):
    with pytest.raises(ValueError, match=message):
        call()
