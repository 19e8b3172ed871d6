"""Several processes: what tells them of each other, and two that train, fail, stop and go on."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from data_pipeline import write_shard
from nanogpt.lab import speedrun
from nanogpt.train import distributed
from nanogpt.train.distributed import JobFailedError, agreed, join_arguments
from nanogpt.train.metrics import read_records

ROOT = pathlib.Path(__file__).parents[3]
JOINED = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "host:1"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a,b",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
SLURM = {"SLURM_NTASKS": "2", **STEP}
NODE = {**SLURM, "SLURM_GPUS_ON_NODE": "3"}


@pytest.mark.parametrize(
    ("environment", "flags", "arguments"),
    [
        ({}, {}, None),
        (dict(zip(VARIABLES, ("host:1", "2", "1"), strict=True)), {}, JOINED),
        ({}, JOINED, JOINED),
        ({"JAX_PROCESS_ID": "1"}, {**JOINED, "process_id": None}, JOINED),
        ({}, {**JOINED, "num_processes": 1, "process_id": 0}, None),
        ({**COORDINATOR, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, {}, JOINED),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, {"coordinator_address": "host:1"}, JOINED),
        (SLURM, {"coordinator_address": "host:1"}, JOINED),
        (SLURM, {}, {}),
        # A node's only process takes all of its GPUs; jax alone would give it one.
        ({**NODE, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, {}, {"local_device_ids": [0, 1, 2]}),
        ({**NODE, "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, {}, {}),
        ({**NODE, "SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "1"}, {}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://1.2.3.4:5"}, {}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, {}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, {}, {}),
    ],
)
def test_environment_and_flags_say_whether_to_join(environment, flags, arguments):
    assert join_arguments(environment, flags) == arguments


def test_several_runs_of_one_process_join_once(monkeypatch):
    """As those of --seeds with an optimizer of one's own."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(joined))
    for _ in range(2):
        assert distributed.start(JOINED | {"process_id": 0}) == 0
    assert len(joined) == 1


def test_jax_can_be_told_to_ask():
    assert join_arguments({}, detect=True) == {}


@pytest.mark.parametrize(
    ("environment", "flags", "complaint"),
    [
        (COORDINATOR, {}, r"host:1 without --num-processes \(or JAX_NUM_PROCESSES\) and"),
        (COORDINATOR, {"coordinator_address": "b:2"}, "b:2 contradicts JAX_COORDINATOR_ADDRESS=ho"),
        ({}, {**JOINED, "coordinator_address": "host"}, "host is not HOST:PORT"),
        ({}, {**JOINED, "process_id": 2}, "--process-id 2 of --num-processes 2"),
        ({**COORDINATOR, "PMI_SIZE": "2", "PMI_RANK": "x"}, {}, "--process-id x of"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {}, "SLURM_STEP_NODELIST.* by srun"),
        ({"SLURM_NTASKS": "two"}, {}, "SLURM_NTASKS=two is not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "WORLD_SIZE=2, but .* --coordinator-address HOST:PORT"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, {}, "PMI_SIZE=2, but .* --coordinator-address HO"),
    ],
)
def test_partial_and_contradictory_settings_are_refused(environment, flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        join_arguments(environment, flags)


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    def in_process(number, failed, work):
        """Enters `agreed` as one of three, of which some fail; returns the complaint."""
        jax = types.SimpleNamespace(process_count=lambda: 3, process_index=lambda: number)
        told = types.SimpleNamespace(process_allgather=lambda mine: told_all(mine, number, failed))
        monkeypatch.setattr(distributed, "jax", jax)
        monkeypatch.setattr(distributed, "multihost_utils", told)
        with pytest.raises(JobFailedError) as caught, agreed("reading"):
            work()
        return str(caught.value)

    def told_all(mine, number, failed):
        assert mine == (number in failed)
        return np.array([k in failed for k in range(3)], np.int32)

    def missing():
        raise FileNotFoundError("no such shard")

    assert in_process(1, {1, 2}, missing) == "process 1 of 3 failed reading: no such shard"
    assert "process 1 of 3 failed reading; its own" in in_process(0, {1, 2}, lambda: None)
    assert "ZeroDivisionError" in in_process(0, {0}, lambda: 1 / 0)  # with its traceback


def test_a_process_alone_raises_what_it_raises():
    with pytest.raises(ZeroDivisionError), distributed.failing_for_all(), agreed("dividing"):
        1 / 0  # noqa: B018


STEPS, SAVED = 5, 2
# The script, with an accident before this process's batch number argv[1].
DRIVER = """
import os, signal, sys
from nanogpt.train import loop
from nanogpt.lab import speedrun
at, accident, to_device, batches = int(sys.argv.pop(1)), sys.argv.pop(1), loop.to_device, []
def counted(batch, layout):
    if len(batch["inputs"]) == 8:  # 4 in validation
        if len(batches) == at:
            os.kill(os.getpid(), signal.SIGTERM) if accident == "signal" else 1 / 0
        batches.append(batch)
    return to_device(batch, layout)
loop.to_device = counted
speedrun.main(sys.argv[1:])
"""
SETTINGS = (
    "--optimizer shampoo --name run --model.vocab-size 32 --model.num-layers 1 "
    "--model.model-dim 16 --model.head-dim 8 --model.mlp-dim 32 --model.sequence-length 8 "
    "--data.batch-rows 16 --data.microbatch-rows 8 --data.val-tokens 512 --output.log-every 1 "
    f"--output.checkpoint-every {SAVED} --schedule.steps {STEPS}"
).split()


def two_processes(join, accident, at, *flags):
    """Runs the script in two processes with two devices each; accidents happen to the second.

    Returns:
        Exit codes and outputs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    processes = []
    for number in range(2):
        named, variables = join(address, number)
        told = (str(at if number else STEPS), accident)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, *told, *SETTINGS, *named, *flags],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": xla} | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], outputs


def by_flags(address, number):
    coordinator = ["--coordinator-address", address, "--num-processes", "2"]
    return [*coordinator, "--process-id", str(number)], {}


def by_variables(address, number):
    return [], dict(zip(VARIABLES, (address, "2", str(number)), strict=True))


def train_losses(path):
    return {r["step"]: r["loss"] for r in read_records(path) if r["kind"] == "train"}


def test_two_processes_train_fail_resume_and_stop(tmp_path):
    """One fails, so both end; both resume, one is asked to stop, and both save the same step."""
    random = np.random.default_rng(0)
    for name, count in (("train_000001", 4000), ("val_000000", 600)):
        tokens = random.integers(0, 32, count).astype(np.uint16)
        write_shard(tmp_path / f"text_{name}.bin", tokens)
    data = ("--data.directory", str(tmp_path), "--output.directory")
    meshed = (*data, str(tmp_path / "meshed"), "--mesh", "data=2,fsdp=2")
    run = tmp_path / "meshed" / "run"

    codes, outputs = two_processes(by_flags, "error", SAVED + 1, *meshed)
    assert codes == [1, 1], outputs
    assert "process 1 of 2 failed: Traceback" in outputs[1] and "ZeroDivision" in outputs[1]
    assert "process 0 of 2 failed" in outputs[0]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [str(SAVED)]

    # One process, and one device, goes on with it as well.
    shutil.copytree(tmp_path / "meshed", tmp_path / "moved")
    speedrun.main([*SETTINGS, *data, str(tmp_path / "moved"), "--resume"])
    # The signal comes before the last batch of process 1 alone.
    last = STEPS - SAVED - 1
    codes, outputs = two_processes(by_variables, "signal", last, *meshed, "--resume")
    assert codes == [143, 143], outputs
    assert all(f"after {STEPS} steps; they are saved" in output for output in outputs)
    losses = train_losses(run / "metrics.jsonl")
    assert losses == train_losses(run / "metrics-1.jsonl")
    speedrun.main([*SETTINGS, *data, str(tmp_path / "alone")])
    alone = train_losses(tmp_path / "alone" / "run" / "metrics.jsonl")
    moved = train_losses(tmp_path / "moved" / "run" / "metrics.jsonl")
    for others in (losses, moved):
        assert list(others) == list(alone) == list(range(STEPS))
        np.testing.assert_allclose(list(others.values()), list(alone.values()), rtol=2e-5)
