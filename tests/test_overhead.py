"""What a call costs before any work is done, counted and not timed: calls of Python functions, of C functions from Python, of
torch's operators, and allocations. All four are the same on every machine and under any load.

`pytest --benchmark-only tests/test_overhead.py` prints the times.
"""

import sys
from dataclasses import astuple, dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from evaat_fast import ops
from evaat_fast.ops._core import dispatch as _dispatch

VIDEO = torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8)
Q, K = torch.randn(2, 1, 1, 9, 8)
QKV = torch.randn(1, 9, 24)
ROWS, STREAM, WEIGHT = torch.randn(4, 16), torch.randn(4, 16), torch.ones(16)
FEATURES, LABELS = torch.randn(2, 4, 8), torch.rand(4, 4)


@dataclass(frozen=True)
class Cost:
    """Of one call: Python and C functions called, operators run (those inside of others too), tensors allocated."""

    python: int
    c: int
    operators: int
    allocations: int


# At most these: what was counted with Python 3.11 and torch 2.13, of which other versions differ in a few, and a fifth more; of
# allocations none.
CASES = {
    "pick": (lambda: _dispatch.pick("rope3d", Q.device, Q.dtype), Cost(4, 3, 0, 0)),
    "rope3d": (lambda: ops.rope3d(Q, K, (2, 2, 2)), Cost(64, 64, 8, 2)),
    "rope3d_qkv_": (lambda: ops.rope3d_qkv_(QKV, 1, (2, 2, 2)), Cost(57, 62, 20, 0)),
    "joint_attention": (lambda: ops.joint_attention(Q, K, K, grid=(2, 2, 2)), Cost(84, 81, 35, 3)),
    "joint_attention_qkv_": (lambda: ops.joint_attention_qkv_(QKV, 1, (2, 2, 2)), Cost(75, 76, 64, 1)),
    "sms_loss": (lambda: ops.sms_loss(*FEATURES, LABELS), Cost(155, 188, 70, 13)),
    "clip_loss": (lambda: ops.clip_loss(*FEATURES, 5.0), Cost(113, 155, 112, 22)),
    "add_norm": (lambda: ops.add_norm(ROWS, STREAM, WEIGHT, WEIGHT), Cost(57, 40, 16, 2)),
    "add_norm, C++": (lambda: ops.add_norm(ROWS, STREAM, WEIGHT, WEIGHT, backend="cpu"), Cost(69, 68, 8, 3)),
    "swiglu_norm": (lambda: ops.swiglu_norm(ROWS, WEIGHT[:8], WEIGHT[:8]), Cost(45, 38, 30, 3)),
    "swiglu_norm, C++": (lambda: ops.swiglu_norm(ROWS, WEIGHT[:8], WEIGHT[:8], backend="cpu"), Cost(62, 57, 9, 2)),
    "patchify": (lambda: ops.patchify(VIDEO, 16, (0.0,) * 3, (1.0,) * 3), Cost(32, 53, 3, 1)),
}


class Passing(TorchDispatchMode):
    """Sees every operator, and so keeps calls from going past the dispatcher."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def functions(call):
    """(Python functions, C functions) that `call` calls, itself not counted."""
    counts = {"call": 0, "c_call": 0}

    def hook(frame, event, argument):
        if event in counts:
            counts[event] += 1

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        call()
    finally:
        sys.setprofile(before)  # counted
    return counts["call"] - 1, counts["c_call"] - 1


def events(call):
    """The names of torch's operators and allocations ("[memory]") in `call`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return [event.name for event in profiler.events()]


@pytest.mark.parametrize("name", CASES)
def test_an_eager_call_costs_little(name, monkeypatch):
    monkeypatch.undo()  # the poison of conftest.py, which is not the op's to pay for
    call, most = CASES[name]
    with torch.no_grad():
        for _ in range(3):  # what is made once and kept
            call()
        names = events(call)
        cost = Cost(*functions(call), sum(n.startswith("aten::") for n in names), names.count("[memory]"))
        assert astuple(cost)[:2] == functions(call), "counted twice, not the same"
    assert not [n for n in names if n.startswith("evaat_fast")], "an eager call goes past the dispatcher"
    for field in ("python", "c", "operators", "allocations"):
        count, bound = getattr(cost, field), getattr(most, field)
        assert count <= bound, f"{name}: one call costs {count} ({field}), expected at most {bound}"


def test_what_costs_is_counted():
    x = torch.zeros(3, 3).T
    assert functions(lambda: (lambda: x.add(1))()) == (1, 1)
    names = events(lambda: x.add(1).contiguous())
    assert {"aten::add", "aten::contiguous", "aten::clone"} <= set(names) and names.count("[memory]") >= 2
    with Passing():
        names = events(CASES["rope3d"][0])
    assert any(n.startswith("evaat_fast::rope3d") for n in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_times(name, benchmark, monkeypatch):
    """Printed, and held to nothing: a loaded machine is no fault."""
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            benchmark(CASES[name][0])
    finally:
        torch.set_num_threads(threads)
