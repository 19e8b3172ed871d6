"""States of Meta's distributed_shampoo: recorded ones go on as there, others are told apart."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax
from scripts.maintenance import replay_golden
from shampoo_jax import Blocking, import_meta_state, meta_archive, state_to_tree
from tests.shampoo_jax.test_golden import only

GOLDEN = Path(__file__).parents[2] / "golden"
STATES = {path.stem[:2]: path for path in sorted((GOLDEN / "meta_states").glob("*.npz"))}
# Parameters do not interact: some of each file, all seven shapes in one or another. All of all:
# python -m scripts.maintenance.replay_golden FILES --states tests/golden/meta_states
REPLAYED = {
    "01": "low ten4",  # summed factors
    "05": "vec one mat",  # a graft
    "09": "mat ten3",  # a cutoff, decay
    "32": "tall",  # an eigenbasis, kept for two steps
    "35": "mat ten3",  # eigendecompositions, kept for two steps
    "39": "mat low",  # KL statistics
}


def recorded(number, names=None):
    """The archive, of some parameters only."""
    with np.load(STATES[number], allow_pickle=False) as file:
        archive = dict(file)
    return {k: x for k, x in archive.items() if names is None or k.split("/")[1] in names.split()}


def replayed(number, archive):
    """Error over tolerance of the second half of a recording, begun with the archive."""
    trajectory = replay_golden.load(GOLDEN / "meta" / STATES[number].name)
    names = [key.partition("/")[2] for key in archive if key.startswith("params/")]
    return replay_golden.replay(only(trajectory, names), archive=archive)


@pytest.mark.parametrize("number", REPLAYED)
def test_their_state_at_half_time_goes_on_as_theirs_did(number):
    assert replayed(number, recorded(number, REPLAYED[number])) <= 1


@pytest.mark.parametrize(
    ("number", "name", "field", "change"),
    [
        ("05", "vec", "filtered_grad", lambda x: 1.01 * x),
        ("05", "vec", "adagrad", lambda x: 1.01 * x),
        ("05", "vec", "factor_matrices/0", lambda x: x[::-1]),
        ("35", "vec", "eigenvalues/0", lambda x: x[::-1]),
    ],
)
def test_every_array_counts(number, name, field, change):
    archive = recorded(number, name)
    (key,) = (key for key in archive if key.endswith(field) and "inv_" not in key)
    archive[key] = change(archive[key])
    assert replayed(number, archive) > 1


def test_committed_states_are_numbers_and_small():
    assert set(STATES) == set(REPLAYED)
    assert sum(path.stat().st_size for path in STATES.values()) < 2e6
    for number in STATES:
        assert {x.dtype.kind for x in recorded(number).values()} == {"f", "i"}


SIZE, SHAPE = 8, (12, 20)
WHOLE = np.arange(240.0).reshape(SHAPE)


def boxes(shape):
    """Where blocks of at most 8 lie, row by row."""
    return [
        (slice(r, r + SIZE), slice(c, c + SIZE))
        for r in range(0, shape[0], SIZE)
        for c in range(0, shape[1], SIZE)
    ]


def symmetric(seed, d):
    x = np.random.default_rng(seed).integers(0, 9, (d, d))
    return (x + x.T).astype(np.float32)


def theirs(shape=SHAPE, **options):
    """A state of theirs as torch would give it, its factors numbered 10 * block + dimension."""
    entry: dict = {"step": np.array(7)}
    for i, box in enumerate(boxes(shape)):
        block = WHOLE.reshape(shape)[box]
        factors = {k: symmetric(10 * i + k, d) for k, d in enumerate(block.shape)}
        packed = {k: f[np.triu_indices(len(f))] for k, f in factors.items()}
        entry[f"block_{i}"] = {
            "filtered_grad": block,
            "shampoo": {"factor_matrices": packed, "inv_factor_matrices": factors},
            **{name: f(block) for name, f in options.items()},
        }
    return meta_archive({"params": {"a.w": WHOLE.reshape(shape)}, "state": {0: entry}})


def direction(**options):
    options = {"blocking": Blocking(SIZE, None, canonical=False), "graft": None} | options
    return shampoo_jax.scale_by_shampoo(solver=shampoo_jax.ShiftedEigh(1e-6), **options)


PARAMS = {"a": {"w": jnp.zeros(SHAPE)}}
COMMON = direction()
fresh = functools.cache(lambda: COMMON.init(PARAMS))


def imported(archive, tx=COMMON, params=PARAMS, **options):
    """Fields of our state of the only parameter, by their last words."""
    state = fresh() if tx is COMMON else jax.jit(tx.init)(params)
    state = import_meta_state(archive, state, params, **options)
    tree = state_to_tree(state, params)
    (fields,) = tree["parameters"].values()
    short = {re.sub(r".*/(?=[a-z]+/)", "", key): x for key, x in fields.items()}
    last = {key.rpartition("/")[2]: x for key, x in {**fields, **tree["shared"]}.items()}
    return last | short


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_block_comes_to_its_place(canonical, transposed):
    """Blocks of our (12, 20) against theirs of the same, or of its transpose (20, 12)."""
    there = SHAPE[::-1] if transposed else SHAPE
    whole = WHOLE.reshape(there).T if transposed else WHOLE
    tx = direction(blocking=Blocking(SIZE, None, canonical=canonical))
    given = {"transposed": ["a/w"]} if transposed else {}
    found = imported(theirs(there), tx, **given)
    stacks = {}
    for rows, columns in boxes(SHAPE):
        box = whole[rows, columns]
        swapped = (columns, rows) if transposed else (rows, columns)
        i = boxes(there).index(swapped)
        factors = [symmetric(10 * i + k, d) for k, d in enumerate(whole[rows, columns].shape)]
        if transposed:
            factors = [symmetric(10 * i + 1 - k, d) for k, d in enumerate(box.shape)]
        if canonical and box.shape[0] < box.shape[1]:
            box, factors = box.T, factors[::-1]
        stacks.setdefault("x".join(map(str, box.shape)), []).append((box, *factors))
    for key, blocks in stacks.items():
        expected = [np.stack(x) for x in zip(*blocks, strict=True)]
        got = [found[f"mu/{key}"], found[f"factors/{key}/0"], found[f"factors/{key}/1"]]
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(found[f"roots/{key}/1"], expected[2])
    assert found["count"] == 7


def test_momentum_and_averages_have_the_shape_of_the_parameter():
    archive = theirs(momentum_buffer=lambda block: block + 1)
    tx = shampoo_jax.as_optimizer(direction(), 0.1, momentum=0.9, preconditioned=lambda *_: True)
    np.testing.assert_array_equal(imported(archive, tx)["trace"], WHOLE + 1)
    archive = theirs(SHAPE[::-1], weight_buffer=lambda block: block + 1)
    archive |= {"state/a.w/lr_sum": np.float32(0.5), "state/a.w/train_mode": np.array(True)}
    inner = optax.chain(direction(), optax.scale_by_learning_rate(0.1))
    tx = shampoo_jax.averaging(inner, "schedule_free", learning_rate=0.1)
    found = imported(archive, tx, transposed=["a/w"])
    np.testing.assert_array_equal(found["z"], WHOLE.reshape(SHAPE[::-1]).T + 1)
    assert found["weight_sum"] == 0.5
    archive["state/a.w/train_mode"] = np.array(False)
    with pytest.raises(ValueError, match="train_mode is false.*optimizer.train"):
        imported(archive, tx, transposed=["a/w"])


def test_without_a_first_moment_there_is_none_here():
    archive = {key: x for key, x in theirs().items() if "filtered_grad" not in key}
    assert not imported(archive, direction(b1=0.0))["mu/8x8"].any()


def test_parameters_of_other_optimizers_start_afresh():
    params = {**PARAMS, "bias": jnp.ones(3)}
    tx = shampoo_jax.shampoo(0.1, blocking=Blocking(SIZE, None), graft=None)
    state = jax.jit(tx.init)(params)
    found = state_to_tree(import_meta_state(theirs(), state, params), params)
    adam = [x for key, x in found["parameters"]["bias"].items() if key.endswith(("mu", "nu"))]
    assert len(adam) == 2 and not np.any(adam)
    assert {int(x) for key, x in found["shared"].items() if key.endswith("/count")} == {7}


def without(key):
    return lambda archive: {k: x for k, x in archive.items() if key not in k}


def plus(**entries):
    return lambda archive: archive | {k.replace("__", "/"): x for k, x in entries.items()}


def at(key, change):
    return lambda archive: archive | {key: change(archive[key])}


MU = "state/a.w/block_1/filtered_grad"
ROOT = "state/a.w/block_1/shampoo/inv_factor_matrices/0"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without(MU), {}, f"{MU} is missing, .* of a/w: build it without a first moment"),
        (without(ROOT), {}, f"{ROOT} is missing"),
        (without("/step"), {}, "state/a.w/step is missing: .* several processes"),
        (without("block_1/"), {}, "state/a.w/block_1 is missing: .* several processes"),
        (without("block_5/"), {}, r"blocks 2 of 8x8, 1 of 8x4, 2 of 4x8, into .* \(12, 20\)"),
        (without("state/"), {}, "state/a/w is missing, of parameter a/w; the archive has"),
        (at(MU, lambda x: x.T[:3]), {}, "blocks .* is not cut"),
        (at(ROOT, lambda x: x[:3]), {}, rf"{ROOT} has shape \(3, 8\), .* \(8, 8\) or .* \(36,\)"),
        (at(MU, lambda x: x + np.nan), {}, f"{MU} of dtype float64 .* finite"),
        (at(MU, lambda x: x.astype(object)), {}, f"{MU} of dtype object"),
        (at("params/a.w", lambda x: x.T), {}, r"params/a.w has shape \(20, 12\), .* transposed"),
        (plus(state__b__step=np.array(7)), {}, "state/b is of no parameter"),
        (plus(state__b=np.array(7)), {}, "'state/b' is no key of an archive"),
        (at("state/a.w/step", lambda x: x - 9), {}, "step is -2"),
        (at("state/a.w/step", lambda x: x + 0.5), {}, "step is 7.5"),
        ({}, {"graft": "adam"}, r"block_\d/adagrad is missing, .* without graft='adam'"),
        ({}, {"blocking": Blocking(6)}, r"blocks .* blocking=Blocking\(size=8, merge=None"),
        ({}, {"blocking": Blocking(8, 1)}, None),  # nothing merges: 12 * 20 is more than 8
        ({}, {"exponents": "left"}, "factor_matrices/1 has no counterpart.*exponent that is not 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, options, message):
    archive = change(theirs()) if change else theirs()
    if message is None:
        imported(archive, direction(**options))
        return
    with pytest.raises(ValueError, match=message):
        imported(archive, direction(**options) if options else COMMON)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (shampoo_jax.scale_by_soap(blocking=Blocking(SIZE, None)), "eigenvectors/0 is missing"),
        (
            shampoo_jax.scale_by_shampoo(
                solver=shampoo_jax.CarriedBasis(), blocking=Blocking(SIZE, None), graft=None
            ),
            "eigenvectors/0 is missing, .* CarriedBasis",
        ),
        (
            shampoo_jax.scale_by_kl_shampoo(blocking=Blocking(SIZE, None)),
            "for which Meta's state has nothing",
        ),
    ],
)
def test_another_kind_of_preconditioner_is_refused(tx, message):
    with pytest.raises(ValueError, match=message):
        imported(theirs(), tx)


def test_eigendecompositions_need_the_solver():
    archive = recorded("35", "vec")
    params = {"vec": jnp.asarray(archive["params/vec"])}
    tx = shampoo_jax.scale_by_shampoo(
        solver=shampoo_jax.CarriedBasis(damping=1e-4), graft="adam", blocking=Blocking(merge=None)
    )
    with pytest.raises(ValueError, match=r"eigenvalues/0: they kept .* solver=CarriedBasis"):
        imported(archive, tx, params)
    with pytest.raises(ValueError, match="solver"):
        imported(archive, tx, params, solver=shampoo_jax.ShiftedEigh(1e-4))


def test_names_and_transposes_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"'b' in names or transposed is no parameter.*a/w"):
        imported(theirs(), transposed=["b"])
    merged = meta_archive({"params": {}, "state": {}}) | {
        "state/v/step": np.array(1), "state/v/block_0/filtered_grad": np.ones(12)
    }  # fmt: skip
    tx = direction(blocking=Blocking(16, 1, dimension_numbers=None))
    params = {"w": jnp.zeros((3, 4))}
    with pytest.raises(ValueError, match=r"state/v is that of shape \(12,\): .* cannot be transp"):
        imported(merged, tx, params, names={"w": "v"}, transposed=["w"])


def test_groups_that_counted_differently_are_refused():
    archive = recorded("05", "vec one")
    archive["state/one/step"] = archive["state/one/step"] + 1
    params = {n: jnp.asarray(archive[f"params/{n}"]) for n in ("vec", "one")}
    tx = direction(graft="adam", blocking=Blocking(merge=None))
    with pytest.raises(ValueError, match="step is 6, that of one 7: all parameters count alike"):
        import_meta_state(archive, tx.init(params), params)


class Tensor:
    """What of torch's tensors is asked for."""

    dtype = "torch.bfloat16"

    def detach(self):
        return self

    def float(self):
        return np.ones(2, np.float32)


def test_torch_states_by_number_and_by_name():
    entry = {"step": np.array(1), "block_0": {"filtered_grad": Tensor()}}
    for key in (1, "w"):
        archive = meta_archive({"params": {"v": np.ones(1), "w": Tensor()}, "state": {key: entry}})
        assert archive["state/w/block_0/filtered_grad"].dtype == np.float32
        assert archive["params/w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([], "is expected, not list"),
        ({"model": {}}, r"is expected, not \['model'\]"),
        ({"params": {"w": 1}, "state": {1: {}}}, r"\"state\" has 1, \"params\" has \['w'\]"),
    ],
)
def test_another_structure_is_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        meta_archive(saved)
