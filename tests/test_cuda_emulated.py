"""The CUDA C++ kernels, thread by thread on the CPU: what the other backends' tests check, at small sizes."""

import pytest
import rope3d_cases as cases
import torch
from cuda_emulated import emulated
from rope3d_cases import LAYOUTS, make

from evaat_fast import ops

pytestmark = pytest.mark.together("emulated")  # compiled once, by the process that has them all
GRID, N = (2, 3, 5), 31
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
interleaving = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    with emulated(monkeypatch):
        yield


@pytest.mark.sample(10)
@dtypes
@interleaving
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope3d_layouts(dtype, interleaved, layout):
    q, k = make(layout, 2, 5, N, 64, dtype, "cpu"), make("packed", 2, 2, N, 64, dtype, "cpu")
    cases.check("cuda", q, k, GRID, interleaved=interleaved)


@pytest.mark.sample(10)
@dtypes
@interleaving
@pytest.mark.parametrize("D", [2, 30, 80, 256])
def test_rope3d_head_dims(dtype, interleaved, D):
    q, freqs = make("contiguous", 1, 5, N, D, dtype, "cpu"), torch.randn(3, D // 2)
    cases.check("cuda", q, None, GRID, freqs=freqs, interleaved=interleaved, inverse=True)


@dtypes
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rope3d_packed_and_gradients(dtype, prefix):
    cases.check_packed("cuda", 2, prefix + 30, 3, 64, dtype, "cpu", GRID, prefix_tokens=prefix)
    q, k = (make("packed", 2, H, prefix + 30, 64, dtype, "cpu") for H in (4, 2))
    cases.check_gradients("cuda", q, k, GRID, prefix_tokens=prefix, interleaved=False)


def test_rope3d_refuses_frequencies_that_learn():
    q, freqs = torch.randn(1, 2, N, 16), ops.joint_freqs(16).requires_grad_()
    calls = [
        lambda: ops.rope3d(q, None, GRID, freqs=freqs, backend="cuda"),
        lambda: ops.rope3d_qkv_(torch.randn(1, N, 48), 1, GRID, freqs=freqs, backend="cuda"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="rope3d: backend 'cuda' was asked for but .* no gradient of freqs"):
            call()
    with torch.no_grad():
        expected = ops.rope3d(q, None, GRID, freqs=freqs, backend="reference")
        torch.testing.assert_close(ops.rope3d(q, None, GRID, freqs=freqs, backend="cuda"), expected)
        assert ops.rope3d_(q, None, GRID, freqs=freqs, backend="cuda") is q


def test_rope3d_fuzz():
    for seed in range(12):
        cases.random_call(seed, "cuda", "cpu", DTYPES, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_rope3d_fuzz_long(block):
    for seed in cases.seeds_of(block):
        cases.random_call(seed, "cuda", "cpu", DTYPES, 0.4)


@dtypes
def test_patchify(dtype):
    video = torch.randint(0, 256, (2, 3, 40, 48, 3), dtype=torch.uint8)
    for clip in (video, video[:, :, 8:, :32]):
        expected = ops.patchify(clip, 8, [120, 110, 100], [60, 61, 62], dtype, backend="reference")
        assert torch.equal(ops.patchify(clip, 8, [120, 110, 100], [60, 61, 62], dtype, backend="cuda"), expected)
