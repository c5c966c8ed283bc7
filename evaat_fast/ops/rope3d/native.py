"""rope3d in C++ and CUDA: what stands between the operators and pointers."""

import torch
from torch import Tensor

from evaat_fast.ops._core.native import checked, dtype_codes, shared_stride
from evaat_fast.ops.rope3d.rotation import Rotation


def turn(xs: list[Tensor], outs: list[Tensor], table: Tensor, rotation: Rotation) -> None:
    """Writes the turned xs, one or two of [B, H, N, D], to outs, which may be the same tensors."""
    module = _module(rotation)
    tensors = [_tensor(module, x, out) for x, out in zip(xs, outs, strict=True)]
    _run(module.rope3d, xs[0], _call(module, xs[0], rotation), tensors, *_table(table))


def turn_with_freqs(
    grads: list[Tensor], outs: list[Tensor], xs: list[Tensor], table: Tensor, positions: Tensor, rotation: Rotation
) -> Tensor:
    """Writes the turned grads to outs. Returns the sums of the angles' slopes, float64 [B, chunks, 1 or H, 3, D/2].

    xs: what the forward pass turned. table: float64. positions: of the tokens, float32 [1 or B, N - prefix, 3].
    """
    module = _module(rotation)
    B, _, N, D = xs[0].shape
    # One sum for every so many tokens, whatever the number of threads, in float64 as torch's.
    chunks = -(-(N - rotation.prefix_tokens) // module.ROPE_CHUNK)
    partial = xs[0].new_empty((B, chunks, table.shape[2], 3, D // 2), dtype=torch.float64)
    tensors = [
        module.RopeGradient(_tensor(module, grad, out), x.data_ptr(), x.stride()[:3])
        for grad, out, x in zip(grads, outs, xs, strict=True)
    ]
    at = (positions.data_ptr(), shared_stride(positions, 0), partial.data_ptr())
    _run(module.rope3d_freqs, xs[0], _call(module, xs[0], rotation), tensors, *_table(table), *at)
    return partial


def _module(rotation):
    if rotation.backend == "cpu":
        from evaat_fast import _cpu

        return _cpu
    from evaat_fast import _cuda

    return _cuda


def _run(function, x, *arguments):
    if x.is_cuda:
        with torch.cuda.device(x.device):
            checked(function.__name__, x.shape, function(*arguments, torch.cuda.current_stream().cuda_stream))
    else:
        checked(function.__name__, x.shape, function(*arguments, torch.get_num_threads()))


def _call(module, x, rotation):
    B, _, N, D = x.shape
    prefix, pairs = rotation.prefix_tokens, (rotation.interleaved, rotation.inverse)
    return module.RopeCall(dtype_codes(module)[x.dtype], B, N, D, prefix, *pairs)


def _tensor(module, x, out):
    return module.RopeTensor(x.data_ptr(), x.stride()[:3], out.data_ptr(), out.stride()[:3], x.shape[1])


def _table(table):
    """Cosines, sines, and the strides of a table's clips and heads."""
    cos = table.data_ptr()
    return cos, cos + table.stride(0) * table.element_size(), shared_stride(table, 1), shared_stride(table, 2)
