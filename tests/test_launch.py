"""Triton's kernels are launched as Triton would, by a shorter way, and the benchmark of that way runs without a GPU."""

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


def test_host_benchmark():
    shown = run("../bench/host.py", "--only", "layer norm", "--seconds", "0.01")
    assert re.search(r"layer norm +\d+\.\d +\d+\.\d +-?\d+\.\d$", shown, re.MULTILINE), shown
