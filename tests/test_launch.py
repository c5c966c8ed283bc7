"""Triton's kernels are launched as Triton would, by shorter ways, and the benchmark of these ways runs without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
pytest.importorskip("triton.knobs", reason="needs Triton 3.4")
TESTS = Path(__file__).resolve().parent


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("count", [16, pytest.param(400, marks=pytest.mark.slow)])
def test_a_known_call_launches_what_triton_would(count):
    """Kernels, constants, specialisations, grids and arguments of random calls, hooks of a kernel and of a profiler."""
    assert int(run("launches.py", count)) >= count


def test_a_known_step_launches_for_new_tensors_what_triton_would():
    """Functions, grids, numbers and addresses of losses of every kind, and torch's products between; C++ launches, unless
    somebody looks on."""
    assert int(run("replays.py")) > 150


@pytest.mark.parametrize("only", [["--only", "layer norm"], pytest.param([], marks=pytest.mark.slow)])
def test_host_benchmark(only):
    shown = run("../bench/host.py", "--seconds", "0.01", *only)
    rows = re.findall(r"^(\w.*?)  +\d+\.\d +\d+\.\d +-?\d+\.\d$", shown, re.MULTILINE)
    assert rows == ["layer norm"] if only else {"add_norm", "joint_attention_qkv_, a copy", "clip_loss"} < set(rows), shown
