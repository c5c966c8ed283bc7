"""Which backend serves an op: a committed table, a recorded reason for everything not used, no timing at run time.

A backend asked for by name (`backend=` or EVAAT_FAST_BACKEND) works or raises with the reason. `auto` takes the first usable
one of its row and logs once why an earlier one cannot be used. EVAAT_FAST_BACKEND is read at import: a name for every op
("reference"), or names per op ("rope3d=cpu,patchify=reference").
"""

import functools
import importlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evaat_fast.ops._core import measured

_log = logging.getLogger("evaat_fast")

BACKENDS = ("gluon", "triton", "cuda", "cpu", "sdpa", "reference")
FLOATS = ("float32", "bfloat16", "float16")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


@dataclass(frozen=True)
class Support:
    """One op on one backend: dtypes, whether it has a backward, what of a call's needs it lacks and why, and what the doctor
    says beside it."""

    dtypes: tuple[str, ...]
    backward: bool = True
    lacks: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


# What one H200 has shown; bench/README.md says it op by op, and what of all has changed since.
_RIGHT = "right on an H200"
_BEFORE = "before the last change of its code"
_ALL = (*FLOATS, "float64")

# A need of a call of rope3d.
LEARNED = "a gradient of freqs"

# Needs of a call of the losses.
GROUP, LITTLE_SHARED = "a group of ranks", "E of 129 to 256 on a GPU whose blocks have 99 KB of shared memory"
FEW_PAIRS = "fewer pairs than CUDA C++ is faster with"

# Needs of a call of joint_attention.
LSE, WIDE_HEADS = "log-sum-exps", "head dims over 128"
# Torch's attention on CUDA is deterministic where torch is told to be, not call by call.
DETERMINISTIC_CALL = "deterministic gradients, of this call alone"
OTHER_GPU = "a GPU that is no Hopper"
OTHER_SHAPE, HALVES, PACKED = "heads of other sizes, short clips or other keys than queries", "half-split pairs", "packed clips"
NOT_FASTER = "heads, or their gradients, with which it was not measured to be faster"
TRANSFORMED = "a call that is transformed"

# Needs of a call of the norms.
TRACED, WIDE_ROWS, TORCHS_GRADIENTS = "a call that is traced", "rows over 16,384", "gradients that torch is faster with"
_BY_GRADIENT = "but with gradients of few numbers, and of add_norm in float32, where torch is faster"
_PLAIN = {TRACED: "what traces or transforms a call (torch.compile, torch.func, a mode) is given plain torch to fuse"}
_NORM = {
    "triton": Support(
        FLOATS,
        lacks={**_PLAIN, WIDE_ROWS: "its kernels take rows of up to 16,384"},
        note=f"{_RIGHT}, and faster there than torch's",
    ),
    "cpu": Support(
        FLOATS,
        lacks={**_PLAIN, TORCHS_GRADIENTS: "with gradients torch is faster (few numbers; add_norm in float32)"},
        note=_BY_GRADIENT,
    ),
    "reference": Support(_ALL),
}

_LOSS = {"triton": Support(FLOATS, note=_RIGHT), "cpu": Support(_ALL), "reference": Support(_ALL)}
_MAX_MARGIN = {
    "cuda": Support(
        ("bfloat16", "float16"),
        lacks={
            GROUP: "it reads whole batches alone; for a group there are triton, cpu and reference",
            # Chunks of 128 captions stay in shared memory up to E = 256: 113 KB.
            LITTLE_SHARED: "on this GPU it takes E up to 128 or above 256",
            FEW_PAIRS: "triton is faster",
        },
        note=f"{_RIGHT}, and faster there than triton from 2,048 pairs on",
    ),
    **_LOSS,
}
SUPPORT = {
    "rope3d": {
        "triton": Support(FLOATS, note=_RIGHT),
        "cuda": Support(
            FLOATS,
            lacks={LEARNED: "it computes no gradient of freqs, and freqs requires one; triton and the reference do"},
            note=f"where freqs are not learned; {_RIGHT}, and on the device faster there than triton at every shape",
        ),
        "cpu": Support(FLOATS),
        "reference": Support(_ALL),
    },
    "joint_attention": {
        "gluon": Support(
            ("bfloat16", "float16"),
            lacks={
                OTHER_GPU: "its kernel is for Hopper (sm_90)",
                OTHER_SHAPE: "its kernels take heads of 64 and 128, and at least 192 tokens, as many queries as keys",
                NOT_FASTER: "with such heads, or their gradients, it was not measured to be faster",
                HALVES: "its kernel turns neighbouring pairs",
                PACKED: "packed clips it takes by name alone, of heads of 64",
                TRANSFORMED: "torch.func and subclasses of Tensor know torch's own attention",
            },
            note=f"Hopper's heads of 64, and without gradients of 128; {_RIGHT}, {_BEFORE}",
        ),
        "sdpa": Support(
            _ALL,
            lacks={
                LSE: "sdpa returns no log-sum-exps; triton and the reference do",
                DETERMINISTIC_CALL: "on CUDA sdpa is deterministic only under torch.use_deterministic_algorithms(True)",
            },
            note="rope3d, then torch's scaled_dot_product_attention",
        ),
        "triton": Support(
            FLOATS,
            lacks={WIDE_HEADS: "its kernels take head dims up to 128"},
            note="by name, and for log-sum-exps and deterministic gradients; right on an H200, its backward slower than sdpa's",
        ),
        "reference": Support(_ALL),
    },
    **dict.fromkeys(("sms_loss", "mi_mm_loss", "adaptive_mi_mm_loss"), _MAX_MARGIN),
    **dict.fromkeys(("clip_loss", "ego_nce_loss"), _LOSS),
    **dict.fromkeys(("add_norm", "swiglu_norm"), _NORM),
    "patchify": {
        "cuda": Support(FLOATS, backward=False, note=f"{_RIGHT}, its speed not measured"),
        "cpu": Support(FLOATS, backward=False),
        "reference": Support(FLOATS, backward=False),
    },
}

# Order of choice for CPU tensors and for CUDA tensors. Every other device gets the last one of the CPU's row.
_LOSS_CPU, _LOSS_CUDA = ("cpu", "reference"), ("triton", "reference")
# An SMS step of 1,024, 4,096, 8,192 and 32,768 pairs, E 256, in bfloat16 on an H200: 0.085, 0.18, 0.43 and 5.9 ms in CUDA C++,
# 0.056, 0.29, 1.0 and 15.6 in Triton.
_MAX_MARGIN_CUDA = ("cuda", *_LOSS_CUDA)
AUTO = {
    ("rope3d", False): ("cpu", "reference"),
    # On an H200, of B 32 and N 785 / 3,137: 0.0408 / 0.156 ms in CUDA C++ and 0.0433 / 0.162 in Triton, packed 0.0424 / 0.162
    # and 0.0488 / 0.190, with gradient 0.0816 / 0.316 and 0.0860 / 0.326. An eager call at N 785 costs 71 us and 146, with
    # gradient 798 and 750.
    ("rope3d", True): ("cuda", "triton", "reference"),
    ("joint_attention", False): ("sdpa", "reference"),
    # Rotation and attention of B 32, H 12 and N 785 / 1,569 / 3,137 forward on an H200: 0.197 / 0.605 / 2.19 ms in Gluon,
    # 0.252 / 0.740 / 2.53 in SDPA. Where SDPA lacks what is asked, there is no fast attention that Triton's would have to beat.
    ("joint_attention", True): ("gluon", "sdpa", "triton", "reference"),
    **{(op, False): _LOSS_CPU for op in SUPPORT if op.endswith("_loss")},
    **{(op, True): _MAX_MARGIN_CUDA if SUPPORT[op] is _MAX_MARGIN else _LOSS_CUDA for op in SUPPORT if op.endswith("_loss")},
    **{(op, False): ("cpu", "reference") for op in ("add_norm", "swiglu_norm")},
    **{(op, True): ("triton", "reference") for op in ("add_norm", "swiglu_norm")},
    ("patchify", False): ("cpu", "reference"),
    ("patchify", True): ("cuda", "reference"),
}
# Ops whose first choice needs no device of its own: torch's attention runs wherever torch does.
_ANY_DEVICE = {"joint_attention"}

_MODULE = {
    "gluon": "evaat_fast.kernels.attn.sm90_backward",
    "triton": "triton",
    "cuda": "evaat_fast._cuda",
    "cpu": "evaat_fast._cpu",
}
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _constant(function):
    """Dynamo takes the function's result as a constant: it must not trace the import of a backend. As does
    torch.compiler.assume_constant_result, after the two seconds that importing Dynamo takes."""
    function._dynamo_marked_constant = True
    return function


@functools.cache
def why_not(backend: str) -> str | None:
    """None if the backend's module imports here and runs on the GPUs that are here, else the reason, found once."""
    try:
        module = importlib.import_module(_MODULE[backend]) if backend in _MODULE else None
    except Exception as error:  # a broken install must become a reason, whatever it raises
        return f"{type(error).__name__}: {error}" + _hint(backend, str(error))
    for i in range(torch.cuda.device_count() if backend == "cuda" else 0):
        capability = torch.cuda.get_device_capability(i)
        if not any(_runs_on(code, capability) for code in module.CODES.split()):  # type: ignore[union-attr]
            return f"evaat_fast._cuda is built for {module.CODES}, but there is an sm_{capability[0]}{capability[1]}"  # type: ignore[union-attr]
    return None


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether what nvcc calls sm_80, sm_90a or compute_100 runs on a GPU of that compute capability."""
    kind, number, suffix = re.fullmatch(r"(\w+)_(\d+)([af]?)", code).groups()  # type: ignore[union-attr]
    of = divmod(int(number), 10)
    if suffix == "a":
        return of == capability
    return of <= capability and (of[0] == capability[0] or (kind == "compute" and not suffix))


@_constant
def has_triton() -> bool:
    return why_not("triton") is None


@_constant
def has_little_shared(device: torch.device) -> bool:
    """Whether a block of a CUDA device gets 99 KB of shared memory, as on GPUs for graphics, not 163 or 227."""
    return _capability(device) in ((8, 6), (8, 9), (12, 0), (12, 1))


@_constant
def lacks_for_hopper(device: torch.device) -> tuple[str, ...]:
    """The needs of attention on a CUDA device that a kernel for Hopper cannot meet."""
    return (OTHER_GPU,) if _capability(device) != (9, 0) else ()


@_constant
def faster_heads(device: torch.device, trains: bool) -> tuple[int, ...]:
    """The head dims with which attention in Gluon was measured to be faster on such a CUDA device, forward and, if trains, with
    its gradients. `bench/decide.py` makes the table."""
    asked = ("forward", "gradients")[: 1 + trains]
    of_device = _capability(device)
    return tuple(D for (on, D), passes in measured.GLUON.items() if on == of_device and all(p in passes for p in asked))


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device)


def _hint(backend: str, why: str) -> str:
    """Which Triton has Gluon's names. A clone in the current folder hides the installed package and has no modules of its own,
    unless installed with -e."""
    if backend == "gluon":
        return "" if "3.6" in why else " (attention in Gluon needs Triton 3.6 or later)"
    source = Path(__file__).resolve().parents[3]
    if backend != "cpu" or not (source / "setup.py").exists():
        return ""
    return f" (not built in the source tree {source}: pip install -e . there, or run from another folder)"


@_constant
def unusable(op: str, backend: str, device: str, dtype: torch.dtype | None, needs: tuple[str, ...] = ()) -> str | None:
    """None if `backend` can serve `op` for tensors of that device type and dtype, else the reason."""
    support = SUPPORT[op].get(backend)
    if support is None:
        return f"no {backend} version of {op} is built; there are: {', '.join(SUPPORT[op])}"
    if dtype is not None and str(dtype).removeprefix("torch.") not in support.dtypes:
        return f"{backend} takes {', '.join(support.dtypes)}, not {str(dtype).removeprefix('torch.')}"
    if backend == "cpu" and device != "cpu":
        return f"the cpu backend takes CPU tensors, not {device}"
    if backend in ("cuda", "gluon") and device != "cuda":
        return f"the {backend} backend takes CUDA tensors"
    if backend == "triton" and device != "cuda" and not INTERPRET:
        return f"{backend} takes CUDA tensors (CPU tensors only under TRITON_INTERPRET=1)"
    if backend == "triton" and INTERPRET and dtype == torch.bfloat16:
        return f"{backend} has no bfloat16 in its interpreter (TRITON_INTERPRET=1), which would compute garbage"
    lacking = next((support.lacks[need] for need in needs if need in support.lacks), None)
    return lacking if lacking is not None else why_not(backend)


def read_default(text: str) -> dict[str, str]:
    """EVAAT_FAST_BACKEND -> {op: backend}."""
    default = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, backend = part.rpartition("=")
        if backend not in (*BACKENDS, "auto") or (op and op not in SUPPORT):
            raise ValueError(
                f"EVAAT_FAST_BACKEND={text!r}: expected one of {', '.join(('auto', *BACKENDS))}, alone or as op=backend "
                f"with an op of {', '.join(SUPPORT)}"
            )
        if backend != "auto":
            default.update({op: backend} if op else dict.fromkeys(SUPPORT, backend))
    return default


DEFAULT = read_default(os.environ.get("EVAAT_FAST_BACKEND", ""))


def pick(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None, needs: tuple[str, ...] = ()) -> str:
    """The backend that serves `op` for tensors of that device and dtype. needs: what of the call only some backends have, as
    named in `Support.lacks`. An unknown name is a ValueError, one that cannot serve a BackendError with the reason."""
    named = DEFAULT.get(op) if backend is None else backend if backend != "auto" else None
    if named is None:
        return (_choose if torch.compiler.is_compiling() else _chosen)(op, device.type, dtype, needs)
    if named not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")
    reason = unusable(op, named, device.type, dtype, needs)
    if reason is not None:
        source = "" if backend is not None else " (EVAAT_FAST_BACKEND; op=backend,... names ops singly)"
        raise BackendError(f"{op}: backend {named!r} was asked for but cannot serve this call: {reason}{source}")
    return named


@_constant
def _choose(op: str, device: str, dtype: torch.dtype, needs: tuple[str, ...]) -> str:
    reason = None
    if device not in ("cpu", "cuda"):
        order = AUTO[op, False] if op in _ANY_DEVICE else AUTO[op, False][-1:]
    else:
        order = AUTO[op, device == "cuda"]
    for name in order:
        reason = unusable(op, name, device, dtype, needs)
        if reason is None:
            return name
        if reason not in SUPPORT[op][name].lacks.values():
            _log.warning("%s: %s passed over: %s", op, name, reason)
    raise TypeError(f"{op}: no backend takes {dtype} on {device}: {reason}")


_chosen = functools.cache(_choose)  # which Dynamo would trace
