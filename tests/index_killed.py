"""Indexing that SIGKILL ends, many times in one process: python index_killed.py, with a JSON of what to do on stdin.

{"videos": a folder, "checkpoint": weights, "shots": whether clips keep to their shot,
 "phases": [{"kills": [[what, when], ...], "remove": names, "add": {name: file}}]}

what is "replace" or "fsync", the whenth call of which is the last, or "after", so many seconds. Each kill of a phase begins
with the folder as the phase before left it, changed. Prints a line for a run that nothing ends and one for each kill: how the
process ended and after how many seconds, whether the index opened then and how many rows it had, how a run that goes on ended,
and the hashes of the files that it left.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import av  # noqa: F401, once for all processes, and so what follows: importing takes longer than indexing
import pyarrow.dataset  # noqa: F401
import pyarrow.parquet  # noqa: F401
import safetensors.torch  # noqa: F401
import torch

import evaat_fast
import evaat_fast.data.decode.pyav
import evaat_fast.ops.norm.cpu  # noqa: F401
from evaat_fast.search import Index

torch.set_num_threads(1)
evaat_fast.get_tokenizer()
SETTINGS = {"seconds": 1.0, "overlap": 0.9, "device": "cpu"}


def work(index, videos, checkpoint, kill, shots):
    if kill and kill[0] == "after":
        threading.Thread(target=lambda: (time.sleep(kill[1]), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    elif kill:
        original, calls = getattr(os, kill[0]), [0]

        def counted(*arguments):
            calls[0] += 1
            if calls[0] == kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, kill[0], counted)
    if not (index / "index.json").exists():
        Index.create(index, checkpoint, shots=shots, **SETTINGS)
    Index.open(index, device="cpu").add(videos, workers=2)


def forked(function):
    """The exit status of a process that calls it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function() or 0
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def hashes(index):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(index.iterdir()) if p.name != ".lock"}


def main(job):
    videos = Path(job["videos"])
    index, before = videos / ".evaat-index", videos.with_name("before")
    for phase in job["phases"]:
        shutil.rmtree(before, ignore_errors=True)
        if index.exists():
            shutil.copytree(index, before)
        for name in phase.get("remove", []):
            (videos / name).unlink()
        for name, file in phase.get("add", {}).items():
            shutil.copy(file, videos / name)
        for kill in [None, *phase["kills"]]:
            shutil.rmtree(index, ignore_errors=True)
            if before.exists():
                shutil.copytree(before, index)
            began = time.monotonic()
            ended = forked(lambda kill=kill: work(index, videos, job["checkpoint"], kill, job["shots"]))
            took = time.monotonic() - began
            manifest = index / "index.json"
            opens = forked(lambda: len(Index.open(index)) * 0) if kill and manifest.exists() else 0
            rows = json.loads(manifest.read_text())["rows"] if manifest.exists() else None
            again = forked(lambda: work(index, videos, job["checkpoint"], None, job["shots"])) if kill else 0
            print(json.dumps([kill, ended, took, opens, rows, again, hashes(index)]), flush=True)


main(json.load(sys.stdin))
