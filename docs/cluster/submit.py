"""Submits a training run to Slurm through submitit, a task for each GPU:

    python docs/cluster/submit.py --nodes 4 --gpus 8 --partition gpu -- --recipe egoclip-b --set train.out=/shared/egoclip-b

What follows "--" is given to `evaat-fast train`. A job that is preempted, or reaches its time limit, is queued again and goes
on from the run's last checkpoint. Without Slurm, --cluster local starts the tasks here.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path


class Run:
    """What a task does: it is pickled, so it holds nothing but the arguments of the command."""

    def __init__(self, arguments):
        self.arguments = arguments

    def __call__(self):
        import submitit

        # All GPUs of the node stay visible: a process takes the one of its local rank.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        rank, job = os.environ["LOCAL_RANK"], submitit.JobEnvironment().job_id
        # On the node's own disk, a folder for each process: on a shared one all ranks would wait for its locks.
        kernels = Path(os.environ.get("SLURM_TMPDIR", tempfile.gettempdir()), f"evaat-{job}")
        os.environ["TRITON_CACHE_DIR"] = str(kernels / f"triton-{rank}")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kernels / f"inductor-{rank}")
        os.environ.setdefault("OMP_NUM_THREADS", "1")

        from evaat_fast.cli import main

        status = main(["train", *self.arguments, "--resume"])
        if status:
            raise SystemExit(status)

    def checkpoint(self):
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(argv=None):
    """Submits the run; returns submitit's job."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--cpus", type=int, default=13, help="of each GPU: data.workers, and one")
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--partition")
    parser.add_argument("--logs", default="slurm", metavar="DIR")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENTS", help="of evaat-fast train")
    args = parser.parse_args(argv)
    try:
        import submitit
    except ImportError:
        raise SystemExit("submit.py needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=args.logs, cluster=args.cluster)
    executor.update_parameters(
        name="evaat",
        nodes=args.nodes,
        tasks_per_node=args.gpus,
        gpus_per_node=args.gpus if args.cluster == "slurm" else 0,
        cpus_per_task=args.cpus,
        timeout_min=round(60 * args.hours),
        **({"slurm_partition": args.partition} if args.partition else {}),
        **({"slurm_mem": "0"} if args.cluster == "slurm" else {}),
    )
    job = executor.submit(Run(args.arguments))
    print(f"job {job.job_id}, logs in {args.logs}")
    return job


if __name__ == "__main__":
    submit(sys.argv[1:])
