"""What docs/cluster gives to Slurm: started on two processes of this machine, with stand-ins for Slurm's own commands."""

import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from corpus import configuration

from evaat_fast.train.log import read

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, SUBMIT = ROOT / "docs" / "cluster" / "train.sbatch", ROOT / "docs" / "cluster" / "submit.py"
# srun runs what follows its options once for each node, scontrol knows one, python says what it was started with.
COMMANDS = {
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 1; node < SLURM_NNODES; node++)); do "$@" & done
"$@" && wait
""",
    "scontrol": "#!/bin/bash\necho localhost\n",
    "torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    "python": f'#!/bin/bash\necho "started $RANK of $WORLD_SIZE, kernels in $TRITON_CACHE_DIR"\nexec {sys.executable} "$@"\n',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of one node with two GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    own = {k: v for k, v in os.environ.items() if k not in names}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    return own | job | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_TMPDIR": str(tmp_path), "MASTER_PORT": "0"}


@pytest.mark.parametrize("nodes, times", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_sbatch_script_trains_and_goes_on(slurm, tmp_path, nodes, times):
    pytest.importorskip("av")
    pytest.importorskip("tokenizers")
    configuration(tmp_path)
    with socket.socket() as free:  # where both nodes meet
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    gpus = 2 // nodes
    slurm |= {"SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus), "MASTER_PORT": str(port)}
    command = ["bash", str(SCRIPT), str(tmp_path / "run.toml"), "--set", "train.epochs=1"]
    run = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    started = re.findall(r"started (\d) of (\d), kernels in (\S+)", run.stdout)
    assert sorted(started) == [(str(r), "2", f"{tmp_path}/evaat-7/triton-{r % gpus}") for r in range(2)]
    steps = [r for r in read(tmp_path / "run/log.jsonl") if r["event"] == "step"]
    assert len(steps) == 3 and (tmp_path / "run/last.pt").is_file()
    before = (tmp_path / "run/last.pt").read_bytes()
    if times == 2:  # it finds the run as it is, and has nothing left to do
        run = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0 and (tmp_path / "run/last.pt").read_bytes() == before, run.stderr[-3000:]


@pytest.fixture
def machines():
    """Two network namespaces that reach each other, and how to cut the wire between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root, and ip of iproute2")
    names = [f"evaat-{os.getpid()}-{i}" for i in range(2)]
    made = [subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0 for name in names]
    try:
        if not all(made):
            pytest.skip("no network namespaces here")
        ends = [f"v{os.getpid()}{x}" for x in "ab"]
        subprocess.run(
            ["ip", "link", "add", ends[0], "netns", names[0], *"type veth peer name".split(), ends[1], "netns", names[1]]
        )
        for i, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            for words in (["addr", "add", f"10.98.76.{i}/24", "dev", end], *(["link", "set", x, "up"] for x in ("lo", end))):
                subprocess.run(["ip", "-n", name, *words], check=True)

        def cut():
            for name, end in zip(names, ends, strict=True):
                subprocess.run(["ip", "-n", name, "link", "set", end, "down"], check=True)

        yield list(zip(names, ends, strict=True)), cut
    finally:
        for name, there in zip(names, made, strict=True):
            if there:
                subprocess.run(["ip", "netns", "del", name])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_machine_that_is_gone_without_a_word_ends_the_run_within_a_minute(machines, tmp_path, parallel):
    """Nobody closes a connection: both sides, that with torch's store and that without, end with an error all the same."""
    pytest.importorskip("av")
    pytest.importorskip("tokenizers")
    configuration(tmp_path)
    (places, cut), runs = machines, []
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")
    own = {k: v for k, v in os.environ.items() if k not in names} | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    own |= {"MASTER_ADDR": "10.98.76.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "evaat_fast", "train", str(tmp_path / "run.toml"), "--set", "train.epochs=5000"]
    command += ["--set", f"train.parallel={parallel}", "--set", "eval.every=0"]
    try:
        for rank, (name, end) in enumerate(places):
            environ = own | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": end}
            with open(tmp_path / f"{rank}.txt", "w") as file:
                runs.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *command], env=environ, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        end = time.monotonic() + 60
        while not any(r["event"] == "step" for r in _log(tmp_path)) and time.monotonic() < end:
            time.sleep(0.2)
        cut()
        begin = time.monotonic()
        assert all(run.wait(timeout=75) for run in runs) and time.monotonic() - begin < 60
        said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
        assert any(r["event"] == "step" for r in _log(tmp_path)) and all("Error: " in text for text in said), said
    finally:
        for run in runs:
            run.kill()
            run.wait()


def _log(folder):
    return read(folder / "run/log.jsonl") if (folder / "run/log.jsonl").is_file() else []


def test_the_sbatch_script_asks_for_what_it_needs():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SCRIPT.read_text(), re.M))
    assert asked["ntasks-per-node"] == "1" and "requeue" in asked
    # A process for each GPU, and those that decode for it: 12 in the recipes.
    assert int(asked["cpus-per-task"]) == 13 * int(asked["gpus-per-node"])
    # Or the others would wait for a node that is lost for ten minutes.
    assert int(re.search(r"--rdzv-conf join_timeout=(\d+)", SCRIPT.read_text())[1]) < 60
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def submit():
    spec = importlib.util.spec_from_file_location("submit", SUBMIT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_submitit_is_asked_for_a_task_a_gpu(monkeypatch, tmp_path):
    asked = {}

    class AutoExecutor:
        def __init__(self, folder, cluster):
            asked.update(folder=folder, cluster=cluster)

        def update_parameters(self, **parameters):
            asked.update(parameters)

        def submit(self, task):
            asked["task"] = task
            return types.SimpleNamespace(job_id="7")

    class TorchDistributedEnvironment:
        def export(self, set_cuda_visible_devices, overwrite):
            monkeypatch.setenv("LOCAL_RANK", "3")

    helpers = types.SimpleNamespace(
        TorchDistributedEnvironment=TorchDistributedEnvironment, DelayedSubmission=lambda task: ("again", task)
    )
    environment = types.SimpleNamespace(job_id="7")
    fake = types.SimpleNamespace(AutoExecutor=AutoExecutor, helpers=helpers, JobEnvironment=lambda: environment)
    monkeypatch.setitem(sys.modules, "submitit", fake)
    submit().submit(["--nodes", "4", "--partition", "gpu", "--", "--recipe", "egoclip-b", "--set", "train.out=x"])
    assert asked["nodes"] == 4 and asked["tasks_per_node"] == asked["gpus_per_node"] == 8
    assert asked["cpus_per_task"] == 13 and asked["timeout_min"] == 1440 and asked["slurm_partition"] == "gpu"
    task, given = asked["task"], []
    assert task.checkpoint() == ("again", task)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    monkeypatch.setattr("evaat_fast.cli.main", lambda argv: given.append(argv) or len(given) - 1)
    task()
    assert given == [["train", "--recipe", "egoclip-b", "--set", "train.out=x", "--resume"]]
    assert os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/evaat-7/triton-3"
    with pytest.raises(SystemExit):  # a run that fails is a task that fails
        task()


def test_submitit_trains_on_two_tasks(tmp_path):
    pytest.importorskip("submitit")
    pytest.importorskip("av")
    pytest.importorskip("tokenizers")
    configuration(tmp_path)
    arguments = ["--cluster", "local", "--gpus", "2", "--cpus", "1", "--hours", "0.1", "--logs", str(tmp_path / "logs")]
    arguments += ["--", str(tmp_path / "run.toml"), "--set", "train.epochs=1"]
    code = f"import sys, submit; job = submit.submit({json.dumps(arguments)}); job.results()"
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=SUBMIT.parent, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len([r for r in read(tmp_path / "run/log.jsonl") if r["event"] == "step"]) == 3
