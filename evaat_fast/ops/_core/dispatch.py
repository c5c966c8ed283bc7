"""Which backend serves an op: a committed table, a recorded reason for everything not used, no timing at run time.

A backend asked for by name (`backend=` or EVAAT_FAST_BACKEND) works or raises with the reason. `auto` takes the first usable
one of its row and logs once why an earlier one was passed over. EVAAT_FAST_BACKEND is read at import: a name for every op
("reference"), or names per op ("rope3d=cpu,patchify=reference").
"""

import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

_log = logging.getLogger("evaat_fast")

BACKENDS = ("triton", "triton_onepass", "gluon", "cuda", "cpu", "sdpa", "reference")
LOW = ("bfloat16", "float16")
FLOATS = ("float32", *LOW)

# What the C++ kernels call the dtypes (csrc/common/cpu.h).
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


@dataclass(frozen=True)
class Support:
    """One op on one backend: dtypes, whether it has a backward, and what the doctor says beside it."""

    dtypes: tuple[str, ...]
    backward: bool = True
    note: str = ""


_UNMEASURED = "unmeasured: proven in Triton's interpreter and compiled ahead of time, not yet run on a GPU"
_BY_NAME = "by name only until a GPU run shows it correct"
_ALL = (*FLOATS, "float64")

SUPPORT = {
    "rope3d": {
        "triton": Support(FLOATS, note=_UNMEASURED),
        "cuda": Support(FLOATS, note=_BY_NAME),
        "cpu": Support(FLOATS),
        "reference": Support(_ALL),
    },
    "joint_attention": {
        "sdpa": Support(_ALL, note="rope3d, then torch's scaled_dot_product_attention"),
        "triton": Support(FLOATS, note="by name, and for log-sum-exps and deterministic gradients; " + _UNMEASURED),
        "triton_onepass": Support(FLOATS, note=_BY_NAME),
        "reference": Support(_ALL),
    },
    "sms_loss": {"triton": Support(FLOATS, note=_UNMEASURED), "cpu": Support(_ALL), "reference": Support(_ALL)},
    "clip_loss": {"triton": Support(FLOATS, note=_UNMEASURED), "cpu": Support(_ALL), "reference": Support(_ALL)},
    "mi_mm_loss": {"triton": Support(FLOATS, note=_UNMEASURED), "cpu": Support(_ALL), "reference": Support(_ALL)},
    "adaptive_mi_mm_loss": {"triton": Support(FLOATS, note=_UNMEASURED), "cpu": Support(_ALL), "reference": Support(_ALL)},
    "ego_nce_loss": {"triton": Support(FLOATS, note=_UNMEASURED), "cpu": Support(_ALL), "reference": Support(_ALL)},
    "patchify": {
        "cuda": Support(FLOATS, backward=False, note=_BY_NAME),
        "cpu": Support(FLOATS, backward=False),
        "reference": Support(FLOATS, backward=False),
    },
}

# Order of choice for CPU tensors and for CUDA tensors. Every other device gets the reference, or SDPA.
AUTO = {
    ("rope3d", False): ("cpu", "reference"),
    ("rope3d", True): ("triton", "reference"),
    ("joint_attention", False): ("sdpa",),
    ("joint_attention", True): ("sdpa",),
    ("sms_loss", False): ("cpu", "reference"),
    ("sms_loss", True): ("triton", "reference"),
    ("mi_mm_loss", False): ("cpu", "reference"),
    ("mi_mm_loss", True): ("triton", "reference"),
    ("adaptive_mi_mm_loss", False): ("cpu", "reference"),
    ("adaptive_mi_mm_loss", True): ("triton", "reference"),
    ("clip_loss", False): ("cpu", "reference"),
    ("clip_loss", True): ("triton", "reference"),
    ("ego_nce_loss", False): ("cpu", "reference"),
    ("ego_nce_loss", True): ("triton", "reference"),
    ("patchify", False): ("cpu", "reference"),
    ("patchify", True): ("reference",),
}

_MODULE = {
    "triton": "triton",
    "triton_onepass": "triton",
    "gluon": "triton.experimental.gluon",
    "cuda": "evaat_fast._cuda",
    "cpu": "evaat_fast._cpu",
}
_reasons: dict[str, str | None] = {}
_choices: dict[tuple, str] = {}

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _constant(function):
    """Dynamo takes the function's result as a constant: it must not trace the import of a backend.

    What torch.compiler.assume_constant_result does, without the two seconds that importing Dynamo takes.
    """
    function._dynamo_marked_constant = True
    return function


def not_built(name, detail="it is on the way"):
    """The error of a public name whose implementation comes with a later release."""
    return NotImplementedError(f"{name} is part of the public contract but not built yet: {detail}")


def why_not(backend):
    """None if the backend's module imports here, else the reason, found once."""
    if backend not in _reasons:
        try:
            if backend in _MODULE:
                importlib.import_module(_MODULE[backend])
            _reasons[backend] = None
        except Exception as error:  # a broken install must become a reason, whatever it raises
            _reasons[backend] = f"{type(error).__name__}: {error}" + _hint(backend)
    return _reasons[backend]


def _hint(backend):
    """A clone in the current folder hides the installed package and has no modules of its own, unless installed with -e."""
    source = Path(__file__).resolve().parents[1]
    if backend != "cpu" or not (source / "setup.py").exists():
        return ""
    return f" (not built in the source tree {source}: pip install -e . there, or run from another folder)"


@_constant
def unusable(op, backend, is_cuda, dtype):
    """None if `backend` can serve `op` for tensors of that device and dtype, else the reason."""
    support = SUPPORT[op].get(backend)
    if support is None:
        return f"no {backend} version of {op} is built; there are: {', '.join(SUPPORT[op]) or 'none yet'}"
    if dtype is not None and str(dtype).removeprefix("torch.") not in support.dtypes:
        return f"{backend} takes {', '.join(support.dtypes)}, not {str(dtype).removeprefix('torch.')}"
    if backend == "cpu" and is_cuda:
        return "the cpu backend takes CPU tensors"
    if backend in ("cuda", "gluon") and not is_cuda:
        return f"the {backend} backend takes CUDA tensors"
    if backend.startswith("triton") and not is_cuda and not INTERPRET:
        return f"{backend} takes CUDA tensors (CPU tensors only under TRITON_INTERPRET=1)"
    return why_not(backend)


def _read_default(text):
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


_DEFAULT = _read_default(os.environ.get("EVAAT_FAST_BACKEND", ""))


def is_auto(op, backend):
    """Whether the table chooses, not a name."""
    return backend == "auto" or (backend is None and op not in _DEFAULT)


def pick(op, tensor, backend=None, dtype=None):
    """The backend that serves `op` for `tensor`; `dtype` where the tensor's own is not the one that decides.

    Raises ValueError for an unknown name and BackendError, a RuntimeError, with the reason for one that cannot serve.
    """
    dtype = dtype or tensor.dtype
    named = _DEFAULT.get(op) if backend is None else backend if backend != "auto" else None
    if named is None:
        key = (op, tensor.is_cuda, tensor.is_cpu, dtype)
        # Dynamo would guard on the dictionary, which the first choice changes.
        choice = None if torch.compiler.is_compiling() else _choices.get(key)
        return choice if choice is not None else _choose(key)
    if named not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(('auto', *BACKENDS))}, got {backend!r}")
    reason = unusable(op, named, tensor.is_cuda, dtype)
    if reason is None and named == "cpu" and not tensor.is_cpu:
        reason = f"the cpu backend takes CPU tensors, not {tensor.device}"
    if reason is not None:
        source = "" if backend is not None else " (EVAAT_FAST_BACKEND; op=backend,... names ops singly)"
        raise BackendError(f"{op}: backend {named!r} was asked for but cannot serve this call: {reason}{source}")
    return named


@_constant
def _choose(key):
    op, is_cuda, is_cpu, dtype = key
    if not is_cuda and not is_cpu:
        return AUTO[op, False][-1]
    for name in AUTO[op, is_cuda]:
        reason = unusable(op, name, is_cuda, dtype)
        if reason is None:
            _choices[key] = name
            return name
        _log.warning("%s: %s passed over: %s", op, name, reason)
    raise TypeError(f"{op}: no backend takes {dtype} on {'cuda' if is_cuda else 'cpu'}: {reason}")
