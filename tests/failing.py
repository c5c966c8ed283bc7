"""Two processes that train, and one of them fails: python failing.py CONFIG FOLDER CASE..., over gloo.

A case is PARALLEL-SAVED-RANK-HOW-STEP. HOW is batch, an error in place of the batch of a step; forward, before what the loss
gathers; backward, in the midst of it; loss, a NaN; spike, sixteen times itself; update, in the midst of it; full, a disk that
has no room for a checkpoint from there on. Then the run goes on, and ends as one that nothing has befallen, to the bit.
"""

import os
import resource
import socket
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp

from evaat_fast.train import checkpoint, inputs, load, steps, train
from evaat_fast.train.log import read

OPTIONS = ["train.batch_size=8", "train.save_minutes=0", "eval.every=1", "train.spike=8", "schedule.name=constant"]


def bad(*_):
    raise ZeroDivisionError("a bad batch")


def armed(patch, how, when):
    """From now on the step of that number, counted from 1, fails."""
    count = 0

    def due():
        nonlocal count
        count += 1
        return count == when

    def batched(tokens):
        return bad() if due() else trim(tokens)

    def lost(*arguments):
        now = due()
        if now and how == "forward":
            bad()
        if now and how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        loss = original(*arguments)
        if now and how == "backward":
            loss.register_hook(bad)
        return loss * {"loss": float("nan"), "spike": 16.0}.get(how, 1.0) if now else loss

    trim, original, update = inputs.trim, steps.batch_loss, torch.optim.AdamW.step
    if how == "batch":
        patch.setattr(inputs, "trim", batched)
    elif how == "update":
        patch.setattr(torch.optim.AdamW, "step", lambda *x, **y: bad() if due() else update(*x, **y))
    else:
        patch.setattr(steps, "batch_loss", lost)


def run(config, port, **options):
    os.environ["MASTER_PORT"] = str(port)
    return train(config, quiet=True, **options)


def fail(case, rank, path, folder, ports):
    parallel, saved, where, how, when = case.split("-")
    options = [*OPTIONS, f"train.parallel={parallel}", f"train.save_as={saved}"]
    whole = f"{folder}/whole-{parallel}"
    config = load(path, [*options, f"train.out={folder}/{case}"])
    with pytest.MonkeyPatch.context() as patch:
        if rank == int(where):
            armed(patch, how, int(when))
        began = time.monotonic()
        try:
            run(config, ports[0])
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        else:
            found = ""
        took = time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(f"{case}, process {rank}, {took:.0f} s: {found}", flush=True)
    if rank == 0:
        found = checkpoint.find(config.train.out)
        stored = checkpoint.read(found) if found else {"epoch": 0, "within": {"step": 0}}
        print(f"{case} stands at {6 * stored['epoch'] + stored['within']['step']}", flush=True)
    result = run(config, ports[1], resume=True)
    if rank == 0:
        check_same(result, whole)
        print(f"{case} goes on", flush=True)


def check_same(result, whole):
    ours, theirs = (checkpoint.read(x) for x in (result["checkpoint"], checkpoint.find(whole)))
    for name in ("state_dict", "optimizer"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    ours, theirs = (read(x) for x in (result["log"], f"{whole}/log.jsonl"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in a if "second" not in k), (a, b)


def main(rank, path, folder, cases, ports):
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    ports = iter(ports)
    for parallel in dict.fromkeys(case.split("-")[0] for case in cases):
        run(load(path, [*OPTIONS, f"train.parallel={parallel}", f"train.out={folder}/whole-{parallel}"]), next(ports))
    for case in cases:
        fail(case, rank, path, folder, (next(ports), next(ports)))


def free(count):
    sockets = [socket.socket() for _ in range(count)]
    for x in sockets:
        x.bind(("127.0.0.1", 0))
    ports = [x.getsockname()[1] for x in sockets]
    for x in sockets:
        x.close()
    return ports


if __name__ == "__main__":
    path, folder, *cases = sys.argv[1:]
    mp.spawn(main, (path, folder, cases, free(2 + 2 * len(cases))), 2)
