"""A checkpoint goes on on any number of devices, with what it would have had where it was made."""

import functools

import jax
import numpy as np
import pytest

from scripts.maintenance import elastic
from scripts.maintenance.elastic_cases import CASES, FILLED

# A stack that is padded on every mesh, in the middle of a staggered interval.
SHAPES = {name: FILLED[name] for name in ("q0", "q1", "q2")}


@pytest.fixture(scope="module")
def trainer():
    case = CASES["averaged"]._replace(shapes=SHAPES)
    return functools.cache(functools.partial(elastic.Trainer, case))


@pytest.mark.parametrize(
    "way", [("8", "4", "2", "1", "2x4", "8"), ("no mesh", "8"), ("8", "no mesh")]
)
def test_another_layout_changes_no_number(trainer, way):
    with jax.enable_x64(True):
        assert elastic.moved(trainer, way, 14) < 1e-8


def test_blocks_that_fill_a_stack_are_fresh_ones(trainer, tmp_path):
    with jax.enable_x64(True):
        saver, reader, folder = trainer("1"), trainer("8"), elastic.Folder(str(tmp_path))
        _, state = saver.train(saver.fresh, 1)
        folder.save(state)
        read = folder.restore(reader.fresh)
        folder.close()
    filled = 0
    for old, new, fresh in zip(*map(jax.tree.leaves, (state, read, reader.fresh)), strict=True):
        assert new.sharding == fresh.sharding and new.dtype == fresh.dtype
        blocks = len(old) if old.ndim else None
        np.testing.assert_array_equal(new[:blocks] if old.ndim else new, old)
        if new.shape != old.shape:
            np.testing.assert_array_equal(new[blocks:], fresh[blocks:])
            filled += 1
    assert filled > 5


def test_the_same_layout_goes_on_bit_for_bit():
    """In the middle of an accumulation of three gradients, and of an interval of three."""
    case = CASES["accumulated"]._replace(shapes=SHAPES)
    trainer = functools.cache(functools.partial(elastic.Trainer, case))
    with jax.enable_x64(True):
        assert elastic.moved(trainer, ("no mesh", "no mesh"), 10) == 0.0
