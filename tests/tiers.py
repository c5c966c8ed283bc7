"""Runs the test tiers, each in a process of its own, and fails if any fails: python tests/tiers.py [--all].

cpu        everything that runs eagerly on the CPU
interpret  Triton kernels in its interpreter, which TRITON_INTERPRET=1 selects when a kernel is decorated
aot        shipped kernels compiled for GPUs that are not here
gpu        only with --gpu, where there is a device
"""

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


def main(argv):
    chosen = ["gpu"] if "--gpu" in argv else ["cpu", "interpret", "aot"]
    failed = []
    for tier in chosen:
        marks, variables = TIERS[tier]
        if "--all" not in argv:
            marks = f"({marks}) and not slow"
        started = time.monotonic()
        print(f"== {tier}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *[a for a in argv if a not in ("--all", "--gpu")]]
        # -P keeps the source tree off sys.path: the tests must import what was installed.
        command[1:1] = ["-P"] if sys.version_info >= (3, 11) else []
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode
        print(f"== {tier}: {'passed' if status == 0 else f'exit {status}'} in {time.monotonic() - started:.0f} s", flush=True)
        failed += [tier] * (status != 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
