"""The launch scripts, with stand-ins for srun, gcloud, make and python that record their words."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts" / "launch"
RUN = ["-m", "nanogpt", "train"]
# What a shell could take apart, and what it could run.
SETTINGS = ["--optimizer", "shampoo", "--name", "it's a $(name)"]
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["RECORD"], "a") as record:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=record)
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a bash command in a clone with stand-ins; returns what it called and its errors."""
    clone, programs = tmp_path / "shampoo-jax", tmp_path / "bin"
    shutil.copytree(SCRIPTS, clone / "scripts" / "launch")
    for place in (programs, clone / ".venv" / "bin"):
        place.mkdir(parents=True)
    for path in (*(programs / n for n in ("srun", "gcloud", "make")), clone / ".venv/bin/python"):
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def run(*command, cwd=clone, **variables):
        record = tmp_path / "record"
        record.write_text("")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", *command],
            env={"PATH": path, "RECORD": str(record), **variables},
            cwd=cwd, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        called = [json.loads(line) for line in record.read_text().splitlines()]
        return called, done.stderr

    run.clone = clone
    return run


def test_a_gpu_node_runs_one_process_on_all_devices(launch):
    called, _ = launch("scripts/launch/gpu_node.sh", *SETTINGS)
    assert called == [["python", *RUN, "--mesh", "data=-1", *SETTINGS]]
    shutil.rmtree(launch.clone / ".venv")
    called, _ = launch("scripts/launch/gpu_node.sh", EXTRAS="cuda13")
    assert called == [["make", "venv", "EXTRAS=cuda13"]]


def test_slurm_starts_the_processes_by_srun(launch, tmp_path):
    spooled = shutil.copy(SCRIPTS / "slurm.sbatch", tmp_path / "slurm_script")  # as sbatch does
    submitted = {"SLURM_SUBMIT_DIR": str(launch.clone), "cwd": tmp_path}
    ((*called,), *more), _ = launch(spooled, *SETTINGS, **submitted, MESH="data=4,fsdp=8")
    python = [".venv/bin/python", *RUN, "--mesh", "data=4,fsdp=8"]
    assert called == ["srun", "--kill-on-bad-exit=1", *python, *SETTINGS] and not more
    called, complaint = launch(spooled, **submitted | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert not called and "make venv" in complaint


def test_every_host_of_a_tpu_slice_gets_the_same_words(launch, tmp_path):
    told = {"TPU": "slice", "ZONE": "here", "DATA": "/mnt/my data", "OUTPUT": "/mnt/runs"}
    ((*called, command),), _ = launch("scripts/launch/tpu_pod.sh", *SETTINGS, **told)
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone", "here"]
    assert called == [*ssh, "--worker=all", "--command"]
    called, _ = launch("-c", command, cwd=tmp_path)  # what sshd does on a host, in its home
    folders = ["--data.directory", "/mnt/my data", "--output.directory", "/mnt/runs"]
    assert called == [["python", *RUN, "--distributed", "--mesh", "data=-1", *folders, *SETTINGS]]
    called, complaint = launch("-c", command, cwd=launch.clone)  # a home without a clone
    assert not called and "set REPOSITORY" in complaint


@pytest.mark.parametrize("missing", ["TPU", "ZONE", "DATA", "OUTPUT"])
def test_a_tpu_slice_needs_to_be_named(launch, missing):
    told = dict.fromkeys({"TPU", "ZONE", "DATA", "OUTPUT"} - {missing}, "x")
    called, complaint = launch("scripts/launch/tpu_pod.sh", *SETTINGS, **told)
    assert not called and f"{missing}: " in complaint
