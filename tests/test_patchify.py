"""patchify: equal to the convolution it replaces, and equal to the reference to the last bit on every backend."""

import pytest
import torch

from evaat_fast import ops
from evaat_fast.ops.patchify.patchify import patchify_reference

MEAN, STD = (122.77, 116.75, 104.09), (68.5, 66.63, 70.32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]


def video(*shape, device="cpu"):
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape,patch", [((2, 3, 28, 42, 3), 14), ((1, 4, 32, 48, 3), 16), ((1, 1, 5, 5, 3), 5), ((2, 1, 4, 6, 3), 1)]
)
def test_equals_reference_bitwise(backend, dtype, shape, patch):
    device = "cuda" if backend == "cuda" else "cpu"
    x = video(*shape, device=device)
    ours = ops.patchify(x, patch, MEAN, STD, dtype, backend=backend)
    assert torch.equal(ours, patchify_reference(x, patch, MEAN, STD, dtype))


def test_is_the_patch_convolution():
    x = video(2, 3, 32, 48, 3)
    conv = torch.nn.Conv2d(3, 8, 16, 16).double()
    rows = ops.patchify(x, 16, MEAN, STD).double()
    ours = torch.nn.functional.linear(rows, conv.weight.flatten(1), conv.bias)
    normal = (x.double() - torch.tensor(MEAN)) / torch.tensor(STD)
    theirs = conv(normal.flatten(0, 1).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2).reshape(2, 3 * 2 * 3, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[:, :, 3:35, 5:37], lambda x: x.flip(1), lambda x: x.transpose(2, 3)]
)
def test_views_are_read_in_place(view):
    x = view(video(2, 4, 48, 48, 3))
    x = x[:, :, : x.shape[2] // 16 * 16, : x.shape[3] // 16 * 16]
    assert torch.equal(ops.patchify(x, 16, MEAN, STD), ops.patchify(x.contiguous(), 16, MEAN, STD))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    x, before = video(1, 3, 32, 32, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.patchify(x, 16, MEAN, STD), patchify_reference(x, 16, MEAN, STD, torch.float32))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 2, 32, 32, 3), (1, 0, 32, 32, 3), (1, 2, 0, 32, 3)])
def test_empty(shape):
    out = ops.patchify(video(*shape), 16, MEAN, STD)
    assert out.shape == (shape[0], shape[1] * (shape[2] // 16) * 2, 768)


BAD = [
    (dict(video=torch.zeros(1, 1, 16, 16, 3)), TypeError, "video: expected a uint8 tensor, got torch.float32"),
    (dict(video=[1]), TypeError, "video: expected a uint8 tensor, got list"),
    (
        dict(video=torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
        ValueError,
        r"expected the shape \[B, T, H, W, 3\], got \[1, 3, 16, 16\]",
    ),
    (dict(patch=7), ValueError, r"multiples of patch=7, got \[16, 16\]"),
    (dict(patch=0), ValueError, "patch: expected a positive int, got 0"),
    (dict(patch=16.0), ValueError, "patch: expected a positive int"),
    (dict(dtype=torch.float64), TypeError, "dtype: expected torch.float32, torch.bfloat16 or torch.float16"),
    (dict(mean=(1.0, 2.0)), ValueError, r"mean: expected three floats in units of 0..255, got \(1.0, 2.0\)"),
    (dict(mean=None), ValueError, "mean: expected three floats"),
    (dict(std=(1.0, 0.0, 1.0)), ValueError, "std: expected three non-zero floats"),
    (dict(backend="cuda"), RuntimeError, "backend 'cuda' was asked for but cannot serve this call"),
    (
        dict(backend="opencl"),
        ValueError,
        "backend: expected one of auto, gluon, triton, cuda, cpu, sdpa, reference, got 'opencl'",
    ),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_input(change, error, message):
    good = dict(video=video(1, 1, 16, 16, 3), patch=16, mean=MEAN, std=STD, dtype=torch.float32)
    with pytest.raises(error, match=message):
        ops.patchify(**{**good, **change})


def test_compiles_and_traces():
    x = video(1, 2, 32, 32, 3)
    compiled = torch.compile(lambda v: ops.patchify(v, 16, MEAN, STD) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.patchify(x, 16, MEAN, STD) * 2)
    torch.library.opcheck(torch.ops.evaat_fast.patchify.default, (x, 16, list(MEAN), list(STD), torch.float32, "cpu"))
