"""What is installed, which backend serves which op here, and the reason for everything that is not used."""

import functools
import importlib.metadata
import math
import os
import platform

import torch

import evaat_fast
from evaat_fast.data import decode
from evaat_fast.data.decode import speed
from evaat_fast.ops._core import dispatch as _dispatch

_PACKAGES = (
    "numpy",
    "einops",
    "triton",
    "av",
    "torchcodec",
    "decord2",
    "decord",
    "pyarrow",
    "tokenizers",
    "ftfy",
    "regex",
    "tqdm",
    "matplotlib",
    "pillow",
    "jinja2",
    "starlette",
    "uvicorn",
)
_ISA = ("plain C++", "AVX2", "AVX-512")


def report() -> str:
    """The whole report as text."""
    return "\n".join([*_versions(), "", *_backends(), "", *_decoders(), "", *_table()])


def healthy() -> bool:
    """Whether the C++ kernels, which every install has, can be used."""
    return _dispatch.why_not("cpu") is None


def matrix() -> str:
    """The op x backend table as Markdown: what the README shows. It does not depend on the machine."""
    columns = [b for b in _dispatch.BACKENDS if any(b in row for row in _dispatch.SUPPORT.values())]
    lines = ["| op | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for op, row in _dispatch.SUPPORT.items():
        lines.append(f"| `{op}` | " + " | ".join(_cell(row, c) for c in columns) + " |")
    return "\n".join(lines)


def orders() -> str:
    """In which order a call that names no backend tries them, as Markdown."""
    lines = ["| op | CPU tensors | CUDA tensors | other devices |", "|---|---|---|---|"]
    for op in _dispatch.SUPPORT:
        cpu, cuda = _dispatch.AUTO[op, False], _dispatch.AUTO[op, True]
        other = cpu if op in _dispatch._ANY_DEVICE else cpu[-1:]
        lines.append(f"| `{op}` | " + " | ".join(", ".join(order) for order in (cpu, cuda, other)) + " |")
    return "\n".join(lines)


def _cell(row, backend):
    if backend not in row:
        return "–"
    support = row[backend]
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
    text = ", ".join(short[d] for d in support.dtypes)
    text += "" if support.backward else "; no gradient"
    return text + (f"; {support.note.split(':')[0]}" if support.note else "")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions():
    lines = [f"evaat-fast {evaat_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}"]
    found = [(p, _version(p)) for p in _PACKAGES]
    lines.append("packages  " + ", ".join(f"{p} {v}" for p, v in found if v))
    missing = [p for p, v in found if not v and p not in ("decord", "torchcodec")]
    if missing:
        lines.append("missing   " + ", ".join(missing) + "  (extras: video, train, serve, bench)")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        lines.append(
            f"device    {torch.cuda.device_count()} x {', '.join(sorted(names))} (sm {capability}), CUDA {torch.version.cuda}"
        )
    else:
        lines.append(
            f"device    no CUDA device (torch built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'})"
        )
    if _dispatch.why_not("cpu") is None:
        from evaat_fast import _cpu

        lines.append(f"cpu       {_ISA[_cpu.isa()]} kernels, {torch.get_num_threads()} threads of {os.cpu_count()} processors")
    return lines


def _backends():
    lines = []
    for name in ("cpu", "triton", "gluon", "cuda"):
        reason = _dispatch.why_not(name)
        lines.append(f"{name:<10}{'imports' if reason is None else 'not usable: ' + reason}")
    if os.environ.get("EVAAT_FAST_BACKEND"):
        lines.append(f"EVAAT_FAST_BACKEND={os.environ['EVAAT_FAST_BACKEND']}")
    return lines


def _decoders():
    """Who decodes videos, why, and for how fast a GPU one core is enough."""
    problems = {name: decode.why_not(name) for name in decode.ORDER}
    served = next((name for name, problem in problems.items() if problem is None), None)
    lines = ['video decoders (* is "auto")']
    for name, why in decode.ORDER.items():
        state = f"not usable: {problems[name]}" if problems[name] else why
        lines.append(f"  {'*' if name == served else ' '} {name:<12}{state}")
    if served is None:
        return lines
    try:
        rate = _clips_per_second(served)
    except Exception as error:  # an FFmpeg without x264, for one
        return [*lines, f"  its speed was not measured: {error}"]
    cores = ", ".join(f"{math.ceil(wanted / rate)} for {wanted}" for wanted in (100, 200, 500))
    size = f"16 frames of {speed.WIDTH} x {speed.HEIGHT} from chunks"
    return [*lines, f"  {rate:.0f} clips/s on one core here ({size}); cores that a GPU needs: {cores} clips/s"]


@functools.cache
def _clips_per_second(decoder):
    """Half a second is enough to say it once."""
    return speed.clips_per_second(decoder)


def _table():
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = torch.bfloat16 if cuda else torch.float32  # as most train there
    lacking = _dispatch.lacks_for_hopper(torch.device(device)) if cuda else ()
    of = f"{'CUDA' if cuda else 'CPU'} tensors in {str(dtype).removeprefix('torch.')}"
    lines = [f"op x backend for {of} (* serves a call that names none)"]
    ops, backends = (1 + max(map(len, names)) for names in (_dispatch.SUPPORT, _dispatch.BACKENDS))
    for op, row in _dispatch.SUPPORT.items():
        named = _dispatch.DEFAULT.get(op)
        order = (named,) if named else _dispatch.AUTO[op, cuda]
        reasons = {b: _dispatch.unusable(op, b, device, dtype, lacking) for b in row}
        served = next((b for b in order if b in reasons and reasons[b] is None), None)
        if named and served is None:
            why = reasons.get(named) or f"there is no {named} version of it"
            lines.append(f"  {op:<{ops}}! EVAAT_FAST_BACKEND asks for {named}, which cannot serve: {why}")
            continue
        for i, (backend, support) in enumerate(row.items()):
            mark = "*" if backend == served else " "
            state = reasons[backend] or ("serves" if mark == "*" else "by name")
            note = f"  [{support.note}]" if support.note else ""
            lines.append(f"  {op if i == 0 else '':<{ops}}{mark} {backend:<{backends}}{state}{note}")
    return lines
