"""What a call costs before any work is done, as a ratio to torch's own smallest call in the same run.

`pytest --benchmark-only tests/test_overhead.py` prints the times; without it each case still runs and holds its bound.
"""

import statistics
import time

import pytest
import torch

from evaat_fast import ops
from evaat_fast.ops._core import dispatch as _dispatch

VIDEO = torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8)
QK = torch.randn(2, 1, 1, 9, 8)
QKV = torch.randn(1, 9, 24)

# Calls of `x.add_(1)` that one call may cost, about twice what was measured (AMD EPYC, torch 2.13).
CASES = {
    "pick": (lambda: _dispatch.pick("rope3d", QK), 3),
    "rope3d": (lambda: ops.rope3d(QK[0], QK[1], (2, 2, 2)), 25),
    "rope3d_qkv_": (lambda: ops.rope3d_qkv_(QKV, 1, (2, 2, 2)), 25),
    "joint_attention_qkv_": (lambda: ops.joint_attention_qkv_(QKV, 1, (2, 2, 2)), 45),
    "patchify": (lambda: ops.patchify(VIDEO, 16, (0.0,) * 3, (1.0,) * 3), 15),
}


def seconds(function, calls=300):
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


@pytest.mark.parametrize("name", CASES)
def test_call_overhead(name, benchmark):
    function, bound = CASES[name]
    x = torch.zeros(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            seconds(function, 50)
            ratio = statistics.median(seconds(function) / seconds(lambda: x.add_(1)) for _ in range(7))
            benchmark(function)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info["calls of add_"] = ratio
    assert ratio <= bound, f"{name}: one call costs {ratio:.1f} calls of add_, expected at most {bound}"
