"""A run on a mesh: the same losses as on one device, everything split as the layout says."""

import collections
import dataclasses
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import write_shard
from nanogpt.config.run import (
    AuxiliaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ScheduleConfig,
)
from nanogpt.config.settings import AdamWConfig, ShampooConfig
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.loop import fit
from nanogpt.train.mesh import make_layout
from nanogpt.train.metrics import read_records
from nanogpt.train.train_step import abstract_params, init_state, make_train_step


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
        output=OutputConfig(str(directory), log_every=1, checkpoint_every=2),
        mesh=mesh,
    )


def losses(config, **how):
    fit(config, **how)
    folder = pathlib.Path(config.output.directory) / config.name
    return [r["loss"] for r in read_records(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def scattered(shards, tmp_path_factory):
    """A run on eight replicas, and its losses."""
    config = config_of(shards, tmp_path_factory.mktemp("scattered"), "data=8")
    return config, losses(config)


def test_a_mesh_changes_no_loss(shards, tmp_path, scattered):
    alone = losses(config_of(shards, tmp_path / "alone", ""))
    meshed = losses(config_of(shards, tmp_path / "meshed", "data=2,fsdp=-1"))
    np.testing.assert_allclose(meshed, alone, rtol=2e-5)
    np.testing.assert_allclose(scattered[1], alone, rtol=2e-5)


def test_a_mesh_changes_no_loss_of_an_optimizer_without_placement(shards, tmp_path):
    """It knows nothing of the mesh: one with both axes stands for all."""
    adamw = AdamWConfig(0.01, 0.1)
    alone = losses(config_of(shards, tmp_path / "alone", "", adamw))
    meshed = losses(config_of(shards, tmp_path / "meshed", "data=2,fsdp=-1", adamw))
    np.testing.assert_allclose(meshed, alone, rtol=2e-5)


def test_a_mesh_changes_no_statistics_of_microbatches(shards, tmp_path):
    """Cross-fitted and corrected; each microbatch's gradients are summed over devices."""
    form = {"statistics": "corrected", "cross_fit": True, "cutoff": "shift", "damping": 1e-3}
    found = []
    for mesh in ("", "data=8"):
        config = config_of(shards, tmp_path / mesh, mesh, ShampooConfig(0.01, 0.1, **form))
        data = dataclasses.replace(config.data, batch_rows=32)
        config = dataclasses.replace(config, optimizer="shampoo", data=data)
        found.append(losses(config))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-5)
    with pytest.raises(ValueError, match="scatter_gradients=True sums over microbatches"):
        make_layout(dataclasses.replace(config, scatter_gradients=True))


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
    every = summing(dataclasses.replace(config, scatter_gradients=False))
    assert every["all-reduce", True] > 0.9 * size  # once for each of the two microbatches
    once = summing(config)
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


def test_a_run_goes_on_on_another_number_of_devices(tmp_path, scattered):
    """Its records before the checkpoint stay; those after it differ by rounding."""
    config, before = scattered
    shutil.copytree(config.output.directory, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    output = dataclasses.replace(config.output, directory=str(tmp_path))
    after = losses(dataclasses.replace(config, mesh="", output=output), resume=True)
    assert after[:3] == before[:3]
    np.testing.assert_allclose(after, before, rtol=2e-5)


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
