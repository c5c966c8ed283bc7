"""Random calls of every pairwise loss on every backend: sizes, dtypes, views, labels, one-sided gradients, factors."""

import pairwise_cases as cases
import pytest
import torch

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize("block", range(4))
def test_fuzz_cpu(block):
    for seed in cases.calls(block, 40):
        cases.random_call(seed, "cpu", "cpu", (F32, F64, BF16, F16), cases.SIZES[:-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(10, 20))
def test_fuzz_cpu_long(block):
    for seed in cases.calls(block):
        cases.random_call(seed, "cpu", "cpu", (F32, F64, BF16, F16))


@pytest.mark.interpret
def test_fuzz_triton():
    for seed in cases.calls(0, 12):
        cases.random_call(seed, "triton", "cpu", (F32, F16), cases.SIZES[:-2], cases.FEATURES[:6])


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(10, 16))
def test_fuzz_triton_long(block):
    for seed in cases.calls(block):
        cases.random_call(seed, "triton", "cpu", (F32, F16), cases.SIZES[:-2])


@pytest.mark.gpu
@pytest.mark.parametrize("block", range(4))
def test_fuzz_cuda(block):
    pytest.importorskip("evaat_fast._cuda")
    for seed in cases.calls(block, 100):
        cases.random_call(seed, "cuda", "cuda", (BF16, F16), kinds=cases.MAX_MARGIN)


@pytest.mark.gpu
@pytest.mark.timeout(600)  # most of the time goes into compiling
@pytest.mark.parametrize("block", range(16))
def test_fuzz_gpu(block):
    for seed in cases.calls(block, 25):
        cases.random_call(seed, "triton", "cuda", (F32, BF16, F16))
