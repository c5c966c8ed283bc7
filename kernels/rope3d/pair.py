"""A pair of channels in Triton: how it lies in memory, and its turn by an angle. Both channels lie in one thread."""

import triton
import triton.language as tl


@triton.jit
def turn_pair(a, b, cos, sin, turned):
    """(a, b) by the angles of cos and sin where turned; elsewhere it passes unchanged, even if it is not finite.

    Products are fused by hand: left to the compiler, which one it fuses depends on how a kernel is specialised, and a rotation
    in place differed from one out of place in the last bit.
    """
    new_a, new_b = tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)
    return tl.where(turned, new_a, a), tl.where(turned, new_b, b)


@triton.jit
def load_pair(
    row, c, present,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_C] twice: channels c of rows, pointers [BLOCK_N, 1] to D channels each. Interleaved rows are
    loaded whole, 16 bytes a thread, and split in registers. ZEROS: instead of what is not present."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_C)[None, :]
        if ZEROS:
            x = tl.load(row + d, mask=present & (d < D), other=0.0)
        else:
            x = tl.load(row + d, mask=present & (d < D))
        return tl.split(tl.reshape(x.to(tl.float32), (BLOCK_N, BLOCK_C, 2)))
    mask = present & (c < D // 2)[None, :]
    if ZEROS:
        a, b = tl.load(row + c[None, :], mask=mask, other=0.0), tl.load(row + c[None, :] + D // 2, mask=mask, other=0.0)
    else:
        a, b = tl.load(row + c[None, :], mask=mask), tl.load(row + c[None, :] + D // 2, mask=mask)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pair(row, a, b, c, present, D: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """What `load_pair` loads, back to memory."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_C)[None, :]
        x = tl.reshape(tl.join(a, b), (BLOCK_N, 2 * BLOCK_C))
        tl.store(row + d, x.to(row.dtype.element_ty), mask=present & (d < D))
    else:
        mask = present & (c < D // 2)[None, :]
        tl.store(row + c[None, :], a.to(row.dtype.element_ty), mask=mask)
        tl.store(row + c[None, :] + D // 2, b.to(row.dtype.element_ty), mask=mask)
