"""The CUDA C++ kernels on a CPU: csrc/*.cu compiled by the C++ compiler against tests/cuda_on_cpu, as evaat_fast._cuda."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path

import pytest
import torch

from evaat_fast.ops._core import dispatch as _dispatch

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def module():
    """The compiled module. It is kept among temporary files, as workers and runs share it."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [ROOT / "tests/cuda_on_cpu", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-w", *(f"-I{p}" for p in includes)]
    sources = [str(ROOT / "csrc/bind_cuda.cpp"), "-x", "c++", *map(str, sorted((ROOT / "csrc").rglob("*.cu")))]
    command = [*os.environ.get("CXX", "c++").split(), *flags, *sources]
    read = [p for folder in ("csrc", "tests/cuda_on_cpu") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    content = hashlib.sha256(repr([sys.version, command, [p.read_bytes() for p in read]]).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"evaat_fast_cuda_on_cpu_{os.getuid()}" / content / "_cuda.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        made.replace(target)
    spec = importlib.util.spec_from_file_location("_cuda", target)
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    return compiled


@contextlib.contextmanager
def emulated(monkeypatch):
    """Within, backend="cuda" serves CPU tensors."""
    import evaat_fast

    compiled, unusable, why_not = module(), _dispatch.unusable, _dispatch.why_not
    with monkeypatch.context() as patch:
        patch.setattr(evaat_fast, "_cuda", compiled, raising=False)
        patch.setattr(_dispatch, "why_not", lambda b: None if b == "cuda" else why_not(b))
        patch.setattr(_dispatch, "unusable", lambda op, b, device, *rest: unusable(op, b, b if b == "cuda" else device, *rest))
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
        yield
