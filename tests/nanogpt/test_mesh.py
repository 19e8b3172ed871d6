"""A run on a mesh: the same losses as on one device, everything split as the layout says."""

import collections
import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import write_shard
from nanogpt.config import (
    AdamWConfig,
    AuxiliaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ScheduleConfig,
    ShampooConfig,
)
from nanogpt.distributed import join_arguments
from nanogpt.loop import fit
from nanogpt.mesh import make_layout
from nanogpt.metrics import read_records
from nanogpt.optimizers import build_optimizer
from nanogpt.train_step import abstract_params, init_state, make_train_step

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for name, count in (("train_000001", 4000), ("val_000000", 600)):
        write_shard(folder / f"text_{name}.bin", random.integers(0, 32, count).astype(np.uint16))
    return folder


def config_of(shards, directory, mesh, matrices=None):
    return Config(
        name="run",
        seed=0,
        model=ModelConfig(32, 1, 16, 8, 32, 8, "float32", "float32"),
        data=DataConfig(str(shards), "shuffled", 16, 8, 512),
        schedule=ScheduleConfig(4),
        optimizer="shampoo" if matrices is None else "adamw",
        # A cutoff far from rounding does not exist here: few steps keep the difference small.
        matrices=matrices or ShampooConfig(0.01, 0.1),
        auxiliary=AuxiliaryConfig(0.01, 0.01, 0.01),
        output=OutputConfig(str(directory), log_every=1),
        mesh=mesh,
    )


def losses(config):
    fit(config)
    folder = pathlib.Path(config.output.directory) / config.name
    return [r["loss"] for r in read_records(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("matrices", [None, AdamWConfig(0.01, 0.1)], ids=["shampoo", "adamw"])
def test_a_mesh_changes_no_loss(shards, tmp_path, matrices):
    alone = losses(config_of(shards, tmp_path / "alone", "", matrices))
    meshed = losses(config_of(shards, tmp_path / "meshed", "data=2,fsdp=-1", matrices))
    np.testing.assert_allclose(meshed, alone, rtol=2e-5)
    scattered = config_of(shards, tmp_path / "scattered", "data=8", matrices)
    scattered = dataclasses.replace(scattered, scatter_gradients=True)
    np.testing.assert_allclose(losses(scattered), alone, rtol=2e-5)


def summing(config):
    """Bytes that the compiled step sums over devices, by kind, within and outside of loops."""
    layout = make_layout(config)
    tx = build_optimizer(config, abstract_params(config.model), layout.placement)
    graphdef, state = init_state(config, tx, layout)
    tokens = jax.ShapeDtypeStruct((16, 8), jnp.int32, sharding=layout.rows)
    step = make_train_step(graphdef, tx, config, layout).lower(
        state, {"inputs": tokens, "targets": tokens}
    )
    found = collections.Counter()
    for shapes, kind, path in re.findall(
        r"= (.*?) (all-reduce|reduce-scatter)\(.*?op_name=\"(.*?)\"", step.compile().as_text()
    ):
        size = sum(
            int(np.prod([int(d) for d in dims.split(",") if d]))
            for dims in re.findall(r"f32\[([\d,]*)\]", shapes)
        )
        found[kind, "while" in path] += 4 * size
    return found


def test_scattered_gradients_are_summed_once_a_step(shards, tmp_path):
    config = config_of(shards, tmp_path, "data=8")
    size = sum(4 * x.size for x in jax.tree.leaves(abstract_params(config.model)))
    every = summing(config)
    assert every["all-reduce", True] > 0.9 * size  # once for each of the two microbatches
    once = summing(dataclasses.replace(config, scatter_gradients=True))
    assert once["all-reduce", True] == 0
    assert once["reduce-scatter", False] == pytest.approx(size / 8, rel=0.1)
    assert once["all-reduce", False] < 0.1 * size  # norms, losses


def test_split_parameters_have_no_scattered_gradients(shards, tmp_path):
    config = dataclasses.replace(
        config_of(shards, tmp_path, "data=2,fsdp=4"), scatter_gradients=True
    )
    with pytest.raises(ValueError, match="set fsdp=1"):
        make_layout(config)
    with pytest.raises(ValueError, match="name a mesh"):
        make_layout(dataclasses.replace(config, mesh=""))


def test_another_number_of_devices_is_refused_by_name(shards, tmp_path):
    config = config_of(shards, tmp_path, "data=8")
    fit(config)
    again = dataclasses.replace(config, mesh="")
    with pytest.raises(ValueError, match=r"mesh='': .* mesh='data=8', .* as many devices"):
        fit(again, resume=True)


def test_everything_lies_where_the_layout_says(shards, tmp_path):
    config = config_of(shards, tmp_path, "data=2,fsdp=4")
    layout = make_layout(config)
    tx = build_optimizer(config, abstract_params(config.model), layout.placement)
    _, state = init_state(config, tx, layout)

    def share(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.size >= 256]
        return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(
            x.nbytes for x in leaves
        )

    assert share(state.params) == 1 / 4  # over fsdp
    assert share(state.opt_state) == 1 / 8  # over all devices


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        ("data=3", "8 devices"),
        ("model=8", "axes data and fsdp"),
        ("data=-1,fsdp=-1", "one of them may be -1"),
        ("data=0", "sizes of the axes"),
    ],
)
def test_impossible_meshes_are_refused(shards, tmp_path, mesh, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_layout(config_of(shards, tmp_path, mesh))


def test_a_microbatch_must_be_whole_rows_everywhere(shards, tmp_path):
    config = config_of(shards, tmp_path, "data=8")
    data = dataclasses.replace(config.data, microbatch_rows=4)
    with pytest.raises(ValueError, match=r"microbatch_rows=4 .* 8 devices"):
        make_layout(dataclasses.replace(config, data=data))


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"DISTRIBUTED": "1"}, {}),
        (
            {"COORDINATOR_ADDRESS": "host:1", "PROCESS_COUNT": "2", "PROCESS_ID": "1"},
            {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_the_environment_says_whether_to_join(environment, arguments):
    assert join_arguments(environment) == arguments


def test_a_coordinator_alone_is_refused():
    with pytest.raises(ValueError, match="PROCESS_COUNT and PROCESS_ID"):
        join_arguments({"COORDINATOR_ADDRESS": "host:1"})


def speedrun(shards, directory, steps, *flags):
    """Runs the script in two processes with two devices each; their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (
        "--optimizer shampoo --name run --mesh data=2,fsdp=2 --model.vocab-size 32 "
        "--model.num-layers 1 --model.model-dim 16 --model.head-dim 8 --model.mlp-dim 32 "
        "--model.sequence-length 8 --data.batch-rows 16 --data.microbatch-rows 8 "
        f"--data.val-tokens 512 --output.log-every 1 --schedule.steps {steps} "
        f"--data.directory {shards} --output.directory {directory}"
    ).split()
    processes = []
    for number in range(2):
        environment = os.environ | {
            "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "PROCESS_COUNT": "2",
            "PROCESS_ID": str(number),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        command = [sys.executable, "-m", "scripts.speedrun", *settings, *flags]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    return outputs


def test_two_processes_train_save_and_resume(shards, tmp_path):
    """Cut after 2 of 4 steps and resumed, two processes give what one process gives."""
    speedrun(shards, tmp_path / "whole", 4, "--output.checkpoint-every", "2")
    records = read_records(tmp_path / "whole" / "run" / "metrics.jsonl")
    other = read_records(tmp_path / "whole" / "run" / "metrics-1.jsonl")
    seen = [r["loss"] for r in records if r["kind"] == "train"]
    assert seen == [r["loss"] for r in other if r["kind"] == "train"]
    # The end of the run is undone: the next process finds the checkpoint of step 2.
    checkpoints = tmp_path / "whole" / "run" / "checkpoints"
    (checkpoints / "4").rename(tmp_path / "set_aside")
    speedrun(shards, tmp_path / "whole", 4, "--output.checkpoint-every", "2", "--resume")
    resumed = read_records(tmp_path / "whole" / "run" / "metrics.jsonl")
    assert [r["loss"] for r in resumed if r["kind"] == "train"] == seen
    assert jnp.isfinite(jnp.array(seen)).all()
