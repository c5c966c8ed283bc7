"""rope3d in C++ and CUDA: what stands between the operators and pointers."""

import torch
from torch import Tensor

from evaat_fast.ops._core.native import dtype_codes, module_of, run, shared_stride
from evaat_fast.ops.rope3d.rotation import Rotation


def turn(xs: list[Tensor], outs: list[Tensor], table: Tensor, rotation: Rotation) -> None:
    """Writes the turned xs, one or two of [B, H, N, D], to outs, which may be the same tensors; CUDA copies a third."""
    module, first = module_of(rotation.backend), xs[0]
    tensors = [_tensor(module, x, out) for x, out in zip(xs, outs, strict=True)]
    run(module.rope3d, first.shape, first.device, _call(module, first, rotation), tensors, *_table(table))


def turn_with_freqs(
    grads: list[Tensor], outs: list[Tensor], xs: list[Tensor], table: Tensor, positions: Tensor, rotation: Rotation
) -> Tensor:
    """On a CPU. Writes the turned grads to outs. Returns the sums of the angles' slopes, float64 [B, chunks, 1 or H, 3, D/2].

    xs: what the forward pass turned. table: float64. positions: of the tokens, float32 [1 or B, N - prefix, 3].
    """
    module, first = module_of(rotation.backend), xs[0]
    B, _, N, D = first.shape
    # One sum for every so many tokens, whatever the number of threads, in float64 as torch's.
    chunks = -(-(N - rotation.prefix_tokens) // module.ROPE_CHUNK)
    partial = first.new_empty((B, chunks, table.shape[2], 3, D // 2), dtype=torch.float64)
    tensors = [
        module.RopeGradient(_tensor(module, grad, out), x.data_ptr(), x.stride()[:3])
        for grad, out, x in zip(grads, outs, xs, strict=True)
    ]
    at = (positions.data_ptr(), shared_stride(positions, 0), partial.data_ptr())
    run(module.rope3d_freqs, first.shape, first.device, _call(module, first, rotation), tensors, *_table(table), *at)
    return partial


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
