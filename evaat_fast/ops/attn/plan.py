"""What a call of joint_attention is besides its tensors: checked once, decided once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evaat_fast.ops._core import dispatch
from evaat_fast.ops._core.tensor import check_device, kind, number
from evaat_fast.ops.attn.clips import clip_positions
from evaat_fast.ops.rope3d.rotation import Rope, Rotation, check_grid, check_place, needs
from evaat_fast.ops.rope3d.rotation import plan as plan_rotation

_STILL = Rotation(None, None, (), 0, True, False, "reference")


@dataclass(frozen=True)
class AttentionPlan:
    """A checked call. rope: whether there is a rotation; k_positions: of the keys, where they have their own. cu_seqlens,
    max_seqlen: of packed clips. scale: of the scores. deterministic: of the gradients."""

    rotation: Rotation
    k_positions: Tensor | None
    rope: bool
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    scale: float
    backend: str
    deterministic: bool = False

    def k_rotation(self) -> Rotation:
        return self.rotation if self.k_positions is None else self.rotation.of(self.rotation.freqs, self.k_positions)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What `of` takes: autograd saves these in its own way."""
        return self.rotation.freqs, self.rotation.positions, self.k_positions, self.cu_seqlens

    def of(
        self, freqs: Tensor | None, positions: Tensor | None, k_positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> "AttentionPlan":
        """With these tensors."""
        return self._with(self.rotation.of(freqs, positions), k_positions, self.rope, cu_seqlens, self.scale)

    def bare(self) -> "AttentionPlan":
        """Without its tensors."""
        return self._with(self.rotation.bare(), None, self.rope, None, self.scale)

    def without_rope(self) -> "AttentionPlan":
        """Of queries and keys that are turned already."""
        return self._with(_STILL, None, False, self.cu_seqlens, self.scale)

    def of_scale(self, scale: float) -> "AttentionPlan":
        return self._with(self.rotation, self.k_positions, self.rope, self.cu_seqlens, scale)

    # Not dataclasses.replace, which Dynamo cannot trace.
    def _with(self, rotation, k_positions, rope, cu_seqlens, scale):
        of_all = (self.max_seqlen, scale, self.backend, self.deterministic)
        return AttentionPlan(rotation, k_positions, rope, cu_seqlens, *of_all)


def plan(
    shape: torch.Size,
    k_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    rope: Rope,
    k_positions: Tensor | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    deterministic: bool,
    return_lse: bool,
    transformed: bool,
    trains: bool,
    backend: str | None,
) -> AttentionPlan:
    """The plan of queries [B, H, N, D] and keys [B, Hk, M, D], or of [total, H, D] and [total, Hk, D] with cu_seqlens.
    transformed: by torch.func, or tensors of other classes. trains: gradients are recorded."""
    (grid, freqs, prefix_tokens, positions, interleaved), head_dim = rope, shape[-1]
    _check_clips(cu_seqlens, max_seqlen, shape[0], device)
    of_torch = torch.are_deterministic_algorithms_enabled()
    alone = deterministic and device.type == "cuda" and not of_torch
    asked = {dispatch.LSE: return_lse, dispatch.DETERMINISTIC_CALL: alone, dispatch.WIDE_HEADS: head_dim > 128}
    wanted = tuple(need for need, is_asked in asked.items() if is_asked)
    if device.type == "cuda":
        halves, clips = not interleaved and (grid is not None or positions is not None), cu_seqlens is not None
        packed = clips and not (_is_gluon(backend) and head_dim == 64)
        others = {dispatch.HALVES: halves, dispatch.PACKED: packed, dispatch.TRANSFORMED: transformed}
        wanted += tuple(need for need, is_asked in others.items() if is_asked)
        of_shape = (device, head_dim, shape[-2], k_shape[-2], trains, backend)
        wanted += dispatch.lacks_for_hopper(device) if clips else needs_of_shape(*of_shape)
    chosen = dispatch.pick("joint_attention", device, dtype, backend, wanted)
    scale = head_dim**-0.5 if scale is None else number("scale", scale)
    rest = (cu_seqlens, max_seqlen, scale, chosen, deterministic or of_torch)
    if freqs is not None and grid is None and positions is None:
        raise ValueError("freqs: given, but neither grid nor positions is")
    if k_positions is not None and (positions is None or grid is not None):
        raise ValueError("k_positions: expected together with positions, and without grid")
    if grid is None and positions is None:
        return AttentionPlan(_STILL, None, False, *rest)
    same = chosen if chosen in ("reference", "triton") else None
    turns = dispatch.pick("rope3d", device, dtype, same, needs(freqs))
    if cu_seqlens is not None:
        _check_longest(cu_seqlens, grid, prefix_tokens, positions)
        shape, k_shape = (torch.Size((1, s[1], s[0], s[2])) for s in (shape, k_shape))
        # The prefixes of packed clips are tokens at the origin.
        shown = positions if grid is None else clip_positions(cu_seqlens, shape[2], grid, None, prefix_tokens)
        rope = (None, freqs, 0, shown, interleaved)
    rotation = plan_rotation(shape, device, k_shape[1] if k_positions is None else None, turns, rope)
    if k_positions is not None:
        k_rope = (None, freqs, rope[2], k_positions, interleaved)
        k_positions = plan_rotation(k_shape, device, None, turns, k_rope, of="k_positions").positions
    elif k_shape[2] != shape[2]:
        raise ValueError(f"k: expected the shape [{shape[0]}, Hk, {shape[2]}, {head_dim}], got {list(k_shape)}")
    if cu_seqlens is not None and grid is None:
        of_clips = lambda x: clip_positions(cu_seqlens, shape[2], None, x, prefix_tokens)  # noqa: E731
        rotation = rotation.of(rotation.freqs, of_clips(rotation.positions))
        k_positions = None if k_positions is None else of_clips(k_positions)
    return AttentionPlan(rotation, k_positions, True, *rest)


def needs_of_shape(
    device: torch.device, head_dim: int, N: int, M: int, trains: bool, backend: str | None = None
) -> tuple[str, ...]:
    """What N queries and M keys on a CUDA device ask for that a kernel for Hopper lacks; trains: gradients, too. Which heads it
    serves but by name is what was measured."""
    fits = head_dim in (64, 128) and N >= 192 and N == M
    needs = (() if fits else (dispatch.OTHER_SHAPE,)) + dispatch.lacks_for_hopper(device)
    return needs if _is_gluon(backend) or head_dim in dispatch.faster_heads(device, trains) else (*needs, dispatch.NOT_FASTER)


def _is_gluon(backend):
    """Whether it is asked for by name."""
    return (dispatch.DEFAULT.get("joint_attention") if backend is None else backend) == "gluon"


def _check_clips(cu_seqlens, max_seqlen, total, device):
    """The limits of packed clips; their values on the CPU only, as reading them from a GPU would wait for it."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen: given without cu_seqlens")
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {kind(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected the shape [clips + 1], got {list(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens.device, device, "q's")
    if max_seqlen is not None and (not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool)):
        raise TypeError(f"max_seqlen: expected an int, got {max_seqlen!r}")
    if not _is_readable(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (lengths < 0).any():
        shown = cu_seqlens.tolist() if len(cu_seqlens) <= 8 else [*cu_seqlens[:4].tolist(), "...", int(cu_seqlens[-1])]
        raise ValueError(f"cu_seqlens: expected to rise from 0 to q's {total} tokens, got {shown}")
    if max_seqlen is not None and len(lengths) and lengths.max() > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest clip, {int(lengths.max())}, got {max_seqlen}")


def _check_longest(cu_seqlens, grid, prefix_tokens, positions):
    """That the grid has a cell for every token of the longest clip."""
    check_place(grid, prefix_tokens, positions)
    if grid is None:
        return
    T, Hp, Wp = check_grid(grid)
    longest = max(cu_seqlens.diff().tolist(), default=0) if _is_readable(cu_seqlens) else 0
    if longest > prefix_tokens + T * Hp * Wp:
        raise ValueError(
            f"grid: {T} x {Hp} x {Wp} cells and prefix_tokens={prefix_tokens} make {prefix_tokens + T * Hp * Wp} tokens, "
            f"but the longest clip has {longest}"
        )


def _is_readable(x):
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu
