"""The pairwise losses over a group of ranks, in four processes over gloo; `pairwise_ranks.py` is what they run."""

import os
import subprocess
import sys

import pairwise_ranks
import pytest


def run(tmp_path, checks, backends, **environment):
    command = [sys.executable, pairwise_ranks.__file__, str(tmp_path / "store"), checks, *backends]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})
    assert run.stdout.count("agrees") == 4, run.stdout + run.stderr


def test_every_loss_and_gradient_is_that_of_one_process(tmp_path):
    run(tmp_path, "losses", ["cpu", "reference"])


def test_wrapped_models_refusals_and_what_a_step_costs(tmp_path):
    run(tmp_path, "wrapped,refusals,costs", ["cpu", "reference"])


@pytest.mark.interpret
def test_triton_over_ranks(tmp_path):
    run(tmp_path, "losses,costs", ["triton"], TRITON_INTERPRET="1")
