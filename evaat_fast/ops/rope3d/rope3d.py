"""The public functions of rope3d.

q, k = rope3d(q, k, grid=(4, 14, 14))            # new tensors, with gradients
rope3d_(q, k, grid=(4, 14, 14))                  # in place, for inference
qkv = rope3d_qkv_(linear(x), 12, (4, 14, 14))    # training in place, on the linear layer's own output
"""

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.tensor import check_device, contiguous_rows, memory_of, packed_base, writable
from evaat_fast.ops.rope3d import rotate as rotating
from evaat_fast.ops.rope3d.freqs import joint_freqs, spatial_freqs, split_freqs
from evaat_fast.ops.rope3d.reference import rope3d_reference, turn
from evaat_fast.ops.rope3d.rotation import Grid, Rotation, needs, plan, wrong

__all__ = ["joint_freqs", "rope3d", "rope3d_", "rope3d_qkv_", "rope3d_reference", "spatial_freqs", "split_freqs"]

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class Options(TypedDict, total=False):
        freqs: Tensor | None
        prefix_tokens: int
        positions: Tensor | None
        interleaved: bool
        backend: str | None

    class RopeOptions(Options, total=False):
        inverse: bool


@overload
def rope3d(q: Tensor, k: None = None, grid: Grid = None, **options: "Unpack[RopeOptions]") -> Tensor: ...
@overload
def rope3d(q: Tensor, k: Tensor, grid: Grid = None, **options: "Unpack[RopeOptions]") -> tuple[Tensor, Tensor]: ...
def rope3d(
    q: Tensor,
    k: Tensor | None = None,
    grid: Grid = None,
    *,
    freqs: Tensor | None = None,
    prefix_tokens: int = 1,
    positions: Tensor | None = None,
    interleaved: bool = True,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotates queries and keys by their tokens' positions in space and time.

    Each channel pair (x, y) of a token at position p becomes (x cos a - y sin a, y cos a + x sin a) with
    a = p . freqs[:, pair], computed in float32 (float64 for float64) and rounded once. The inputs are never written to.

    Args:
        q: [B, Hq, N, D] float32, bfloat16, float16 or (reference only) float64; D even, 2 to 256. Any strides: with a
            contiguous last dimension it is read in place, so views of a packed qkv cost no copy.
        k: [B, Hk, N, D] of q's dtype and device, or None. Hk may differ from Hq.
        grid: (T, Hp, Wp); the tokens after the prefix are its cells in row-major order, N = prefix_tokens + T*Hp*Wp.
        freqs: float32 [3, D/2], or [Hq, 3, D/2] per head (then Hk = Hq); None: `joint_freqs(D)`. Learnable: where freqs
            requires a gradient, the backward pass sums it in the same order on every run.
        prefix_tokens: number of leading tokens that are not rotated (the class token).
        positions: [N, 3] or [B, N, 3], integers or float32, instead of grid; the prefix tokens' rows are ignored.
        interleaved: pairs are channels (2c, 2c + 1), as in EVA-02; False: (c, c + D/2), as in GPT-NeoX.
        inverse: rotates by the opposite angles.
        backend: "auto", "triton", "cuda" (which computes no gradient of freqs), "cpu" or "reference".

    Returns:
        q alone if k is None, else (q, k): new tensors, contiguous, or in the memory order [B, N, H, D] where the input
        lies in that order (the reference's are always contiguous).

    Raises:
        TypeError, ValueError: the argument, what was expected and what came.
        NotImplementedError: vmap.

    Source: EVA02-AT (arXiv 2506.14356), section 3.2; RoFormer (arXiv 2104.09864).
    """
    q, k, rotation = _planned(q, k, backend, (grid, freqs, prefix_tokens, positions, interleaved), inverse)
    new_q, new_k = rotating.rotate(q, k, rotation)
    return new_q if new_k is None else (new_q, new_k)


@overload
def rope3d_(q: Tensor, k: None = None, grid: Grid = None, **options: "Unpack[RopeOptions]") -> Tensor: ...
@overload
def rope3d_(q: Tensor, k: Tensor, grid: Grid = None, **options: "Unpack[RopeOptions]") -> tuple[Tensor, Tensor]: ...
def rope3d_(
    q: Tensor,
    k: Tensor | None = None,
    grid: Grid = None,
    *,
    freqs: Tensor | None = None,
    prefix_tokens: int = 1,
    positions: Tensor | None = None,
    interleaved: bool = True,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rope3d` in place, for q and k that need no gradient; prefix tokens are not touched.

    Args: as `rope3d`; q and k must have a contiguous last dimension and no two elements at one address.

    Returns: q, or (q, k): the tensors given.

    Raises: as `rope3d`; ValueError also if q, k or freqs requires a gradient, or if memory overlaps.

    Source: as `rope3d`.
    """
    _, _, rotation = _planned(q, k, backend, (grid, freqs, prefix_tokens, positions, interleaved), inverse, in_place=True)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("freqs", freqs)):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name}: requires a gradient, and rope3d_ computes none; use rope3d_qkv_ (in place on the packed "
                    "tensor), rope3d, or torch.no_grad()"
                )
    if k is not None and (k is q or _share_memory(q, k)):
        raise ValueError("k: shares its memory with q, so that in place it would be rotated twice")
    rotating.rotate_([q] if k is None else [q, k], rotation)
    return q if k is None else (q, k)


def rope3d_qkv_(
    qkv: Tensor,
    num_heads: int,
    grid: Grid = None,
    *,
    freqs: Tensor | None = None,
    prefix_tokens: int = 1,
    positions: Tensor | None = None,
    interleaved: bool = True,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotates the queries and keys of a packed projection in place, also in training.

    A linear layer's backward pass does not need its output, so nothing is kept twice, and autograd sees one in-place
    operation. Use the tensor that is returned. Where freqs requires a gradient, a copy of q and k is kept for it.

    Args:
        qkv: contiguous [B, N, 3 * num_heads * D], columns in the order (q, k, v), (head), (channel). Where a gradient
            flows it must be a linear layer's own output: no leaf, and no view of a part of another tensor.
        num_heads: H, of q and k alike.
        others: as `rope3d`.

    Returns:
        qkv, its q and k parts rotated. (Where autograd sees qkv as a reshape, as `torch.nn.Linear` with a bias returns
        it, a new reshape of the same memory.)

    Raises:
        as `rope3d`; ValueError also if qkv is not contiguous, or requires a gradient and is a leaf or a partial view.

    Source: as `rope3d`.
    """
    if not isinstance(qkv, Tensor) or qkv.ndim != 3:
        raise wrong("qkv", "a tensor [B, N, 3 * num_heads * D]", qkv)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"num_heads: expected a positive int such that 3 * num_heads divides {qkv.shape[2]}, got {num_heads!r}"
        )
    _check_float(qkv)
    base = packed_base("rope3d_qkv_", qkv, isinstance(freqs, Tensor) and freqs.requires_grad)
    B, N, width = qkv.shape
    shape = torch.Size((B, num_heads, N, width // (3 * num_heads)))
    backend = dispatch.pick("rope3d", qkv.device, qkv.dtype, backend, needs(freqs))
    rotation = plan(shape, qkv.device, None, backend, (grid, freqs, prefix_tokens, positions, interleaved), inverse)
    return rotating.rotate_packed_(qkv, base, num_heads, rotation)


def _planned(q, k, backend, rope, inverse, in_place=False):
    """q and k as tensors [B, H, N, D] of one dtype and device, whose memory a kernel can read, and their rotation."""
    q = _head("q", q, in_place)
    _check_float(q)
    if k is not None:
        k, (B, _, N, D) = _head("k", k, in_place), q.shape
        if k.dtype != q.dtype:
            raise TypeError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
        check_device("k", k.device, q.device, "q's")
        if k.shape[0] != B or k.shape[2] != N or k.shape[3] != D:
            raise ValueError(f"k: expected the shape [{B}, Hk, {N}, {D}], got {list(k.shape)}")
    # In place there is no gradient, and that freqs wants one an error of its own.
    backend = dispatch.pick("rope3d", q.device, q.dtype, backend, () if in_place else needs(rope[1]))
    return q, k, plan(q.shape, q.device, None if k is None else k.shape[1], backend, rope, inverse)


def _check_float(q):
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"q: expected float32, bfloat16, float16 or float64, got {q.dtype}")


def _head(name, x, in_place):
    if isinstance(x, Tensor):
        x = writable("rope3d", name, x) if in_place else memory_of("rope3d", name, x, rows=True)
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise wrong(name, "a tensor [B, H, N, D]", x)
    return x


def rotate_by_table(x: Tensor, table: Tensor, prefix_tokens: int, interleaved: bool) -> Tensor:
    """rope3d by cosines and sines that somebody else made, for integrations: no check, and no gradient for the table.

    x: [B, H, N, D]. table: as `Rotation` has it.
    """
    backend = dispatch.pick("rope3d", x.device, x.dtype)
    if backend == "reference":
        return turn(x, table[0], table[1], prefix_tokens, interleaved)
    rotation = Rotation(None, None, (), prefix_tokens, interleaved, False, backend, table)
    return rotating.rotate(contiguous_rows(x), None, rotation)[0]


def _share_memory(q, k):
    """Whether an element of q and one of k may lie at one address. Views of one packed tensor are told apart exactly."""
    if torch.compiler.is_compiling() or q.numel() == 0 or k.numel() == 0 or not torch._C._is_alias_of(q, k):  # type: ignore[attr-defined]
        return False
    reach = [sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) for x in (q, k)]
    apart = k.storage_offset() - q.storage_offset()
    if apart > reach[0] or -apart > reach[1]:
        return False
    steps = []
    for i in range(4):
        if q.shape[i] > 1 or k.shape[i] > 1:
            strides = {x.stride(i) for x in (q, k) if x.shape[i] > 1}
            if len(strides) > 1:
                return True
            steps.append((strides.pop(), q.shape[i], k.shape[i]))
    return _reachable(apart, sorted(steps, reverse=True))


def _reachable(apart, steps):
    """Whether sum(stride * (i_q - i_k)) = apart for some indices; steps: (stride, size in q, size in k), largest first."""
    if not steps:
        return apart == 0
    stride, q_size, k_size = steps[0]
    if stride == 0:
        return _reachable(apart, steps[1:])
    near = apart // stride
    return any(-k_size < d < q_size and _reachable(apart - d * stride, steps[1:]) for d in (near, near + 1))
