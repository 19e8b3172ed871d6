"""Programs for hardware that is not here, on the one target that is: the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from shampoo_jax.inspect import compiled, targets

PARAMS = {"w": jax.ShapeDtypeStruct((32, 64), jnp.float32)}
ARRAY = 4 * 32 * 64


def test_any_optimizer_of_optax_is_compiled_from_shapes():
    found = sj.compile_update(optax.adam(1e-3), PARAMS, "cpu:8")
    assert found.target.devices == tuple(jax.devices()[:8])
    # Gradients, two moments and a count come in; what comes out takes their place.
    assert 3 * ARRAY <= found.arguments <= 3 * ARRAY + 16
    assert found.outputs < 100 and found.peak >= found.arguments and found.short == 0
    assert found.program is not None and not found.program.exchanges


def test_parameters_that_are_split_take_their_part_of_memory():
    whole = sj.compile_update(optax.adam(1e-3), PARAMS, "cpu:8")
    split = sj.compile_update(
        optax.adam(1e-3), PARAMS, "cpu:8", parameter_spec=lambda path, leaf: P("data")
    )
    assert split.arguments == pytest.approx(whole.arguments / 8, abs=16)


def test_shampoo_on_a_mesh_sends_its_blocks():
    target = sj.target_devices("cpu:4")
    mesh = Mesh(np.array(target.devices), ("data",), axis_types=(AxisType.Auto,))
    tx = sj.scale_by_shampoo(placement=sj.Placement(mesh, "data"))
    params = {name: PARAMS["w"] for name in "abcd"}
    program = sj.compile_update(tx, params, target, mesh=mesh).program
    assert program is not None and program.exchanges
    assert any("syev" in call for call in program.calls)


@pytest.mark.parametrize(
    "name", ["h100", "h100:0", "h100:2x4", "h99:8", "v5e:", "v5e:2x", "v5e:0x4", "cpu:", "", None]
)
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(ValueError, match="target=.*h100:8, or v5e:2x4"):
        sj.target_devices(name)


def test_more_devices_than_this_process_has_are_asked_for_with_the_way_to_get_them():
    with pytest.raises(RuntimeError, match="has 8 CPU devices; .*device_count=64"):
        sj.target_devices("cpu:64")


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:8"])
def test_a_compiler_that_is_not_here_is_named_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=f"target='{name}' needs .*make compilers"):
        sj.target_devices(name)


def test_a_plugin_of_another_version_than_jaxlib_is_refused(monkeypatch):
    """It would only warn, and then miss kernels."""
    versions = {"jax_cuda13_plugin": "0.12.0", "jaxlib": "0.12.0.1"}
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(targets.importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(RuntimeError, match="is 0.12.0 and jaxlib 0.12.0.1"):
        sj.target_devices("h100:8")


def test_what_does_not_fit_is_told_in_bytes(monkeypatch):
    """By the sum of memory, or by what the compiler says when it gives up."""
    target = sj.target_devices("cpu:1")
    small = targets.Target("cpu:1", "cpu", target.devices, 2 * ARRAY)
    assert sj.compile_update(optax.adam(1e-3), PARAMS, small).short >= ARRAY
    words = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm "
    assert compiled._missing(words + "capacity by 4.75G.") == 4.75 * 2**30
    assert compiled._missing("Mosaic failed to compile") is None
