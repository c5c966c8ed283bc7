"""The command line, which a signal meets: python killed.py HOW WHEN ARGUMENTS...

HOW is write, SIGKILL as the WHENth checkpoint is to take its name; or rank, SIGKILL of rank 1 in step WHEN of a job's first
start, and SIGTERM to torchrun as many steps after the job was started again; or float64, SIGKILL of rank 1 in step WHEN, 0 for
none, of a model in float64.
"""

import os
import signal
import sys

from evaat_fast.cli import main
from evaat_fast.train import steps, trainer

how, when, *arguments = sys.argv[1:]
count = 0


def counted(function, act):
    def called(*values):
        global count
        count += act is not replaced or "last.pt" in str(values[1])
        act(count)
        return function(*values)

    return called


def replaced(n):
    if n == int(when):
        os.kill(os.getpid(), signal.SIGKILL)


def stepped(n):
    again, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0", os.environ["RANK"]
    if not again and rank == "1" and n == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
    if again and rank == "0" and n == int(when):
        os.kill(os.getppid(), signal.SIGTERM)


def killed(n):
    if os.environ.get("RANK") == "1" and n == int(when):
        os.kill(os.getpid(), signal.SIGKILL)


if how == "write":
    os.replace = counted(os.replace, replaced)
elif how == "rank":
    steps.batch_loss = counted(steps.batch_loss, stepped)
else:
    build = trainer.build_model
    trainer.build_model = lambda *values: build(*values).double()
    steps.batch_loss = counted(steps.batch_loss, killed)
sys.exit(main(arguments))
