"""The Triton kernel of rope3d in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

The interpreter has no bfloat16 arithmetic; bfloat16 is left to the compiled tiers.
"""

import pytest
import rope3d_cases as cases
import torch
from rope3d_cases import LAYOUTS, make

from evaat_fast import ops
from evaat_fast.ops._core import dispatch

pytestmark = pytest.mark.interpret
GRID, N = (2, 3, 7), 43
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


@pytest.mark.sample(10)
@dtypes
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, interleaved, layout):
    q, k = make(layout, 2, 6, N, 64, dtype, "cpu"), make("packed", 2, 2, N, 64, dtype, "cpu")
    cases.check("triton", q, k, GRID, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("D", [2, 30, 80, 128, 256])
def test_head_dims(D, interleaved):
    q, freqs = make("sliced", 1, 5, N, D, torch.float32, "cpu"), torch.randn(3, D // 2)
    cases.check("triton", q, None, GRID, freqs=freqs, interleaved=interleaved, inverse=True)


@dtypes
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_packed_and_gradients(dtype, prefix):
    cases.check_packed("triton", 2, prefix + 42, 3, 64, dtype, "cpu", GRID, prefix_tokens=prefix)
    q, k = (make("packed", 2, H, prefix + 42, 64, dtype, "cpu") for H in (4, 2))
    cases.check_gradients("triton", q, k, GRID, prefix_tokens=prefix, interleaved=False)


@pytest.mark.parametrize("batched", [False, True])
def test_positions_and_frequencies_per_head(batched):
    positions, freqs = torch.randn((2, N, 3) if batched else (N, 3)) * 20, torch.randn(5, 3, 16)
    q, k = make("contiguous", 2, 5, N, 32, torch.float32, "cpu"), make("packed", 2, 5, N, 32, torch.float32, "cpu")
    cases.check("triton", q, k, positions=positions, freqs=freqs)
    cases.check("triton", q, k, positions=positions)


def test_prefix_rows_that_are_not_finite_pass_unchanged():
    from evaat_fast import ops

    q = make("contiguous", 1, 2, N, 64, torch.float32, "cpu")
    q[:, :, 0] = torch.inf
    assert torch.equal(ops.rope3d(q, None, GRID, backend="triton")[:, :, 0], q[:, :, 0])


@pytest.mark.parametrize("prefix", [33, 43])
def test_programs_of_prefix_tokens_alone(prefix):
    """A program has 32 tokens here; of 43 none is turned, and the table has no row."""
    positions = torch.randn(N, 3)
    cases.check_packed("triton", 1, N, 2, 64, torch.float32, "cpu", positions=positions, prefix_tokens=prefix)
    q, k = make("contiguous", 1, 5, N, 64, torch.float32, "cpu"), make("packed", 1, 2, N, 64, torch.float32, "cpu")
    q[:, :, 0] = torch.nan
    ours = ops.rope3d(q, k, positions=positions, prefix_tokens=prefix, backend="triton")
    for x, out in zip((q, k), ours, strict=True):
        assert torch.equal(out[:, :, :prefix].view(torch.int32), x[:, :, :prefix].view(torch.int32))
    options = dict(positions=positions, prefix_tokens=prefix)
    expected = ops.joint_attention(k, k, k, **options, backend="reference")
    torch.testing.assert_close(ops.joint_attention(k, k, k, **options, backend="triton"), expected)


@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(16))
def test_fuzz(seed):
    cases.random_call(seed, "triton", "cpu", [torch.float32, torch.float16], 0.6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(8))
def test_fuzz_long(block):
    for seed in cases.seeds_of(block):
        cases.random_call(seed, "triton", "cpu", [torch.float32, torch.float16], 0.4)


@pytest.mark.sample(2)
@dtypes
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("per_head", [False, True])
def test_learnable_frequencies(dtype, interleaved, per_head):
    freqs = torch.randn((5, 3, 32) if per_head else (3, 32)) / 4
    q, k = make("contiguous", 2, 5, N, 64, dtype, "cpu"), make("packed", 2, 5, N, 64, dtype, "cpu")
    cases.check_learnable("triton", q, k, GRID, freqs=freqs, interleaved=interleaved)
    cases.check_learnable("triton", k, None, positions=torch.randn(2, N, 3), freqs=freqs, interleaved=interleaved, inverse=True)
    cases.check_learnable_packed("triton", 2, N, 5, 64, dtype, "cpu", GRID, freqs=freqs, interleaved=interleaved)


@pytest.mark.sample(3)
@pytest.mark.parametrize("D", [2, 30, 80, 256])
def test_learnable_frequencies_of_any_head_dim(D):
    q, k = make("tokens first", 2, 6, N, D, torch.float32, "cpu"), make("sliced", 2, 3, N, D, torch.float32, "cpu")
    cases.check_learnable("triton", q, k, GRID, freqs=torch.randn(3, D // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_tables(dtype):
    from evaat_fast.ops.rope3d.freqs import joint_freqs
    from evaat_fast.ops.rope3d.rotation import Rotation
    from evaat_fast.ops.rope3d.table import torch_table, triton_table

    rows = torch.rand(2, 9, 3) * torch.tensor([1e6, 50.0, -50.0])
    cases = [
        (None, rows, (), 1, 32),
        (torch.randn(3, 3, 10), rows[0], (), 0, 20),
        (joint_freqs(64), None, (3, 4, 5), 1, 64),
        (None, torch.randint(-(10**9), 10**9, (7, 3)), (), 2, 8),
        (None, torch.randint(0, 255, (7, 3), dtype=torch.uint8), (), 0, 8),
        (None, rows[:, :1], (), 1, 8),
    ]
    for freqs, positions, grid, prefix, head_dim in cases:
        rotation = Rotation(freqs, positions, grid, prefix, True, False, "triton")
        ours, expected = (make(rotation, head_dim, dtype, torch.device("cpu")) for make in (triton_table, torch_table))
        assert ours.shape == expected.shape and ours.dtype == dtype
        # An angle of 1e9 in float64 is itself uncertain by 1e-7.
        largest = positions.double().abs().max().item() if positions is not None else 10
        exact = max(4e-16, largest * 4e-16) if dtype == torch.float64 else max(6e-8, largest * 4e-16)
        torch.testing.assert_close(ours, expected, rtol=0, atol=exact)


def test_bfloat16_is_refused():
    """The interpreter computes garbage of it, and says nothing."""
    q = torch.randn(1, 1, N, 16).bfloat16()
    for call in (ops.rope3d, lambda q, **options: ops.joint_attention(q, q, q, **options)):
        with pytest.raises(RuntimeError, match="triton has no bfloat16 in its interpreter"):
            call(q, grid=GRID, backend="triton")
    assert "no bfloat16 in its interpreter" in dispatch.unusable("rope3d", "triton", "cuda", torch.bfloat16)
    assert dispatch.pick("rope3d", torch.device("cuda"), torch.bfloat16, None, (dispatch.LEARNED,)) == "reference"
