"""Calls of the kernels that rotate: what stands between the registered operators of rope3d.py and pointers."""

import torch

from evaat_fast.ops._core import dispatch as _dispatch

_CHUNK = 64  # kRopeChunk of csrc/rope3d/rope3d.h


def empty(x):
    """For the rotated x [B, H, N, D]: contiguous, or in the memory order [B, N, H, D] where x lies in that order."""
    B, H, N, D = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((B, N, H, D)).transpose(1, 2)
    return x.new_empty((B, H, N, D))


def launch(xs, outs, table, prefix_tokens, interleaved, inverse, backend):
    """Writes the rotated xs, one or two of [B, H, N, D], to outs, which may be the same tensors."""
    if all(x.numel() == 0 for x in xs):
        return
    if backend == "triton":
        from evaat_fast.kernels.rope3d.rotate import rotate

        rotate(xs, outs, table, prefix_tokens, interleaved, inverse)
    else:
        B, _, N, D = xs[0].shape
        settings = (B, N, D, prefix_tokens, interleaved, inverse)
        _call("rope3d", backend, xs[0], _pointers(xs, outs), *_table(table), *settings)


def _call(name, backend, x, *arguments):
    """Calls a function of the C++ or the CUDA module for the dtype and device of x."""
    if backend == "cpu":
        from evaat_fast import _cpu

        return getattr(_cpu, name)(_dispatch.DTYPE_CODE[x.dtype], *arguments, torch.get_num_threads())
    from evaat_fast import _cuda

    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = getattr(_cuda, name)(_dispatch.DTYPE_CODE[x.dtype], *arguments, stream)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error} at shape {list(x.shape)}")


def launch_freqs(grads, outs, xs, table, rows, prefix_tokens, interleaved, inverse, backend):
    """Writes the rotated gradients to outs and returns the gradient of the frequencies, float32 [1 or H, 3, D/2].

    xs are the tensors that the forward pass rotated the other way, rows their positions float32 [1 or B, N - prefix, 3].
    """
    B, H, N, D = xs[0].shape
    heads = table.shape[2]
    if backend == "triton":
        from evaat_fast.kernels.rope3d.freqs import programs, rotate_with_freqs

        partial = xs[0].new_empty((*programs(grads, heads > 1), 3, D // 2), dtype=torch.float64)
        rotate_with_freqs(grads, outs, xs, partial, table, rows, prefix_tokens, interleaved, inverse)
        partial = partial.view(partial.shape[0], -1, heads, 3, D // 2)
    else:
        # One sum for every so many tokens, whatever the number of threads, in float64 as torch's.
        chunks = -(-(N - prefix_tokens) // _CHUNK)
        partial = xs[0].new_empty((B, chunks, heads, 3, D // 2), dtype=torch.float64)
        saved = [(x.data_ptr(), *x.stride()[:3]) for x in xs]
        tensors = [a + b for a, b in zip(_pointers(grads, outs), saved, strict=True)]
        at = (rows.data_ptr(), rows.stride(0) if rows.shape[0] > 1 else 0, partial.data_ptr())
        settings = (B, N, D, prefix_tokens, interleaved, inverse)
        _call("rope3d_freqs", backend, xs[0], tensors, *_table(table), *at, *settings)
    # The kernels sum the slopes of the angles of the forward pass, which turned by -angle where this one turns by it.
    total = partial.sum((0, 1), dtype=torch.float64)
    return (total if inverse else -total).float()


def _pointers(xs, outs):
    """Per tensor: in, out, heads, then the strides of b, h, n of in and of out."""
    pairs = zip(xs, outs, strict=True)
    return [(x.data_ptr(), out.data_ptr(), x.shape[1], *x.stride()[:3], *out.stride()[:3]) for x, out in pairs]


def _table(table):
    """Cosines, sines, and the strides of a table's clips and heads, 0 where there is one for all."""
    shared = (table.stride(i) if table.shape[i] > 1 else 0 for i in (1, 2))
    return table.data_ptr(), table[1].data_ptr(), *shared
