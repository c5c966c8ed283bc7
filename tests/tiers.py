"""Runs the test tiers, each in processes of its own, and fails if any fails: python tests/tiers.py [--all] [files, options].

cpu        everything that runs eagerly on the CPU
interpret  Triton kernels in its interpreter, which TRITON_INTERPRET=1 selects when a kernel is decorated
aot        shipped kernels compiled for GPUs that are not here
gpu        only with --gpu, where there is a device; in one process, or in n with -n n

A tier takes a process a core (pytest-xdist), each with one thread; OMP_NUM_THREADS says otherwise. What else is given goes to
pytest: -n 0 for one process, files, -k, -x.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIERS = {
    "cpu": ("not interpret and not aot and not gpu", {}),
    "interpret": ("interpret", {"TRITON_INTERPRET": "1"}),
    "aot": ("aot", {}),
    "gpu": ("gpu", {}),
}
# Threads that wait for each other asleep: as many processes as cores spin at each other's cost otherwise.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
NO_TESTS = 5  # pytest's exit status: none of the given files has a test of this tier


def command(tier, options, everything):
    """The pytest of a tier."""
    marks = TIERS[tier][0] if everything else f"({TIERS[tier][0]}) and not slow"
    # -P keeps the source tree off sys.path: the tests must import what was installed.
    python = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-m", "pytest"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = []  # each takes a run of neighbours, which share what they made, and later half of what another has left
    if importlib.util.find_spec("xdist"):
        processes = ["-n", "0" if tier == "gpu" else str(min(cores, 8)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_benchmark"):
        processes += ["--benchmark-disable"]  # which it does beside other processes anyway, with a warning
    return [*python, "-q", "--durations=10", *processes, "-m", marks, *options]


def main(argv):
    options = [a for a in argv if a not in ("--all", "--gpu")]
    failed = []
    for tier in ["gpu"] if "--gpu" in argv else ["cpu", "interpret", "aot"]:
        started = time.monotonic()
        print(f"== {tier}", flush=True)
        threads = {} if tier == "gpu" else THREADS
        environment = {**threads, **os.environ, **TIERS[tier][1]}
        status = subprocess.run(command(tier, options, "--all" in argv), cwd=ROOT, env=environment).returncode
        passed = status == 0 or (status == NO_TESTS and bool(options))
        print(f"== {tier}: {'passed' if passed else f'exit {status}'} in {time.monotonic() - started:.0f} s", flush=True)
        failed += [tier] * (not passed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
