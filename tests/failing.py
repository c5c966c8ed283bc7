"""The command line on a process that fails: torchrun failing.py RANK HOW WHEN ARGUMENTS...

HOW is batch, an error in place of the WHENth batch; forward, before what the loss gathers; backward, in the midst of it; loss, a
NaN; or full, a disk on which no checkpoint has room from then on.
"""

import os
import resource
import sys

from evaat_fast.cli import main
from evaat_fast.train import inputs, steps

rank, how, when, *arguments = sys.argv[1:]
count = 0


def now():
    global count
    count += 1
    return os.environ["RANK"] == rank and count == int(when)


def of_batch(*values):
    due = now()
    if due and how == "forward":
        raise ValueError("this batch is bad")
    if due and how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    loss = original(*values)
    if due and how == "backward":
        loss.register_hook(lambda gradient: 1 / 0)
    return loss * float("nan") if due and how == "loss" else loss


if how == "batch":
    trim = inputs.trim

    def trimmed(tokens):
        if now():
            raise ValueError("this batch is bad")
        return trim(tokens)

    inputs.trim = trimmed
else:
    original, steps.batch_loss = steps.batch_loss, of_batch
sys.exit(main(arguments))
