"""The CUDA C++ kernels, thread by thread on the CPU: what the other backends' tests check, at small sizes."""

import pytest
import rope3d_cases as cases
import torch
from cuda_emulated import emulated
from rope3d_cases import LAYOUTS, make

from evaat_fast import ops

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


@pytest.mark.sample(3)
@dtypes
@interleaving
@pytest.mark.parametrize("per_head", [False, True])
def test_rope3d_learnable_frequencies(dtype, interleaved, per_head):
    freqs = torch.randn((5, 3, 32) if per_head else (3, 32)) / 4
    q, k = make("contiguous", 2, 5, 121, 64, dtype, "cpu"), make("packed", 2, 5, 121, 64, dtype, "cpu")
    cases.check_learnable("cuda", q, k, (2, 6, 10), freqs=freqs, interleaved=interleaved)
    cases.check_learnable("cuda", k, None, positions=torch.randn(2, 121, 3), freqs=freqs, interleaved=interleaved, inverse=True)
    cases.check_learnable_packed("cuda", 2, 121, 5, 64, dtype, "cpu", (2, 6, 10), freqs=freqs, interleaved=interleaved)


@pytest.mark.parametrize("D", [2, 30, 80, 256])
def test_rope3d_learnable_frequencies_of_any_head_dim(D):
    q, k = make("tokens first", 2, 6, N, D, torch.float32, "cpu"), make("sliced", 2, 3, N, D, torch.float32, "cpu")
    cases.check_learnable("cuda", q, k, GRID, freqs=torch.randn(3, D // 2))


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
