"""Tables of cosines and sines from frequencies and positions in one launch: in eager torch they are a dozen small ones.

Angles are float64, as time stamps may be large, and so are sine and cosine, by the polynomials of fdlibm after a reduction to
[-pi/4, pi/4]: the library's functions keep an array on the stack for angles of astronomical size.
"""

from collections import namedtuple

import triton
import triton.language as tl
from evaat_fast.kernels.launch import FUSED, cdiv, launch, next_power_of_2, table_of

BLOCK = 1024  # entries of a program

Positions = namedtuple("Positions", "at b n axis")  # and the strides of clips, tokens and axes


@triton.jit
def _sin_cos(angle):
    """Sine and cosine in float64; exact to the last bit or two for angles below 1e6, and as exact as the angle beyond."""
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)  # quarter turns
    # pi/2 in two parts, of which the first times `turns` is exact.
    r = (angle - turns * 1.57079632673412561417) - turns * 6.07710050650619224932e-11
    z = r * r
    s = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
    s = -1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * s)
    s = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * s))
    c = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11
    c = 2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * c)
    c = 1.0 - (0.5 * z - z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * c)))
    quadrant = turns - 4.0 * tl.floor(turns * 0.25)
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    return tl.where(quadrant >= 2.0, -sin, sin), tl.where((quadrant == 1.0) | (quadrant == 2.0), -cos, cos)


@triton.jit
def rope3d_table_kernel(
    freqs, freqs_h, positions, out, M, Hp, Wp, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """freqs: float32 [.., 3, C]. positions: [.., M, 3] of integers or float32, or None for those of a grid."""
    blocks = tl.cdiv(M, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    h, b = tl.program_id(1).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    angle = tl.zeros((BLOCK_M, BLOCK_C), tl.float64)
    for axis in tl.static_range(3):
        if positions is not None:
            row = positions.at + b * positions.b + n.to(tl.int64) * positions.n + axis * positions.axis
            at = tl.load(row, mask=n < M, other=0)
        elif axis == 0:
            at = n // (Hp * Wp)
        elif axis == 1:
            at = n // Wp % Hp
        else:
            at = n % Wp
        f = tl.load(freqs + h * freqs_h + axis * C + c, mask=c < C, other=0.0).to(tl.float64)
        angle += at.to(tl.float64)[:, None] * f[None, :]
    sin, cos = _sin_cos(angle)
    target = out.at + b * out.b + h * out.h + n.to(tl.int64)[:, None] * C + c[None, :]
    mask = (n < M)[:, None] & (c < C)[None, :]
    tl.store(target, cos.to(out.at.dtype.element_ty), mask=mask)
    tl.store(target + out.half, sin.to(out.at.dtype.element_ty), mask=mask)


def fill(out, freqs, positions, grid):
    """Fills a table.

    out: float32 or float64 [2, B, H, M, C], contiguous. freqs: float32 [H, 3, C], contiguous. positions: [B, M, 3], integers or
    float32, any strides; or None, and then grid = (T, Hp, Wp), M = T * Hp * Wp and B = 1.
    """
    _, B, H, M, C = out.shape
    BLOCK_C = next_power_of_2(C)
    BLOCK_M = max(1, BLOCK // BLOCK_C)
    _, Hp, Wp = grid or (1, 1, 1)
    rows = None if positions is None else Positions(positions, *positions.stride())
    places = (freqs, freqs.stride(0), rows, table_of(out), M, Hp, Wp)
    options = {"C": C, "BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C, **FUSED}
    launch(rope3d_table_kernel, (B * cdiv(M, BLOCK_M), H), places, options)
