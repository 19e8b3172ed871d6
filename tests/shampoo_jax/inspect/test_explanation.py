"""What `explain` says, against counting by hand and against what is built and compiled."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scripts.maintenance.compile_size import gpt2_matrices, measure, one_root_per_factor
from shampoo_jax import (
    Blocking,
    CarriedBasis,
    DimensionNumbers,
    EighBasis,
    Placement,
    Polynomial,
    QRBasis,
    Refresh,
    TruncatedEigh,
    accumulate_factors,
    as_optimizer,
    averaging,
    blocked,
    explain,
    in_eigenbasis,
    invert_roots,
    kl_shampoo,
    momentum,
    one_sided_shampoo,
    precondition,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
    state_bytes,
)
from shampoo_jax.matrix.polynomial import FULL, polynomial_root

SIX = Blocking(6)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "layers": {
        str(i): {"w": struct(6, 4), "fc": struct(4, 10), "bias": struct(4)} for i in range(3)
    },
    "embed": {"embedding": struct(50, 4)},
}


def row(report, name):
    return next(r for r in report.rows if r.name == name)


def test_routing_blocks_and_factors_of_each_parameter():
    report = explain(PARAMS, shampoo(0.1, blocking=SIX))
    assert [r.name for r in report.rows if not r.preconditioned] == [
        "embed/embedding",
        *(f"layers/{i}/bias" for i in range(3)),
    ]
    fc = row(report, "layers/1/fc")  # 4x10 is cut into 4x6 and 4x4, and 4x6 stored as 6x4
    assert fc.merged == (4, 10)
    assert dict(fc.blocks) == {(6, 4): 1, (4, 4): 1}
    assert dict(fc.factors) == {6: 1, 4: 3}
    assert report.largest_factor == 6
    assert report.root_batches == 4  # two sides of 6x4, two of 4x4


def test_with_the_smaller_side_alone_the_other_one_is_whole():
    report = explain(PARAMS, one_sided_shampoo(0.1, side="smaller", blocking=SIX))
    fc = row(report, "layers/1/fc")
    assert (dict(fc.blocks), dict(fc.factors)) == ({(10, 4): 1}, {4: 1})
    assert report.statistics_flops == 3 * 2 * (6 * 4 + 10 * 4) * 4


def test_flops_are_the_sums_of_the_stated_formulas():
    report = explain(PARAMS, shampoo(0.1, blocking=SIX))
    # Per layer: w is one 6x4 block, fc one 6x4 and one 4x4.
    edges = 3 * [6, 4, 6, 4, 4, 4]
    assert report.refresh_flops == sum(11 * d**3 for d in edges)
    rng = np.random.default_rng(0)
    flops = 0
    for shape in 3 * [(6, 4), (6, 4), (4, 4)]:
        g = rng.normal(size=shape)
        for x in (g, g.T):
            flops += 2 * x.shape[0] * x.shape[1] * (x @ x.T).shape[1]
    assert report.statistics_flops == report.apply_flops == flops


@pytest.mark.parametrize(
    "options", [{}, {"graft": None}, {"momentum": 0.9}, {"exponents": {2: {0: 0.5, 1: 0.0}}}]
)
def test_state_bytes_are_those_of_the_built_state(options):
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), PARAMS)
    tx = shampoo(0.1, blocking=SIX, **options)
    state, report = tx.init(params), explain(params, tx)
    assert sum(report.state_bytes.values()) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_state_bytes_by_kind():
    found = explain(PARAMS, shampoo(0.1, blocking=SIX)).state_bytes
    weights, factors = 4 * 3 * (24 + 40), 4 * 3 * (2 * 36 + 4 * 16)
    assert found["first moment"] == found["second moment"] == weights
    assert found["factors"] == found["roots"] == factors
    assert found["adam"] == 2 * 4 * (200 + 3 * 4) + 4  # and a count


def test_comparison_with_adamw_and_muon():
    report = explain(PARAMS)
    matrices, others, count = 3 * (24 + 40), 200 + 3 * 4, 4
    assert report.adamw_bytes == 2 * 4 * (matrices + others) + count
    assert report.muon_bytes == 4 * matrices + 2 * 4 * others + count
    assert explain(PARAMS["layers"]["0"]["w"]).muon_bytes == 4 * 24  # without AdamW no count


def test_state_bytes_of_any_transformation_in_its_own_dtype():
    params = {"w": struct(3, 5, dtype=jnp.bfloat16)}
    assert state_bytes(optax.sgd(0.1, momentum=0.9), params) == 2 * 15
    assert state_bytes(optax.sgd(0.1), params) == 0


def test_a_bare_direction_preconditions_everything():
    report = explain(PARAMS, scale_by_shampoo(blocking=Blocking(None)))
    assert all(r.preconditioned for r in report.rows)
    assert dict(row(report, "layers/0/bias").factors) == {4: 1}


def test_a_rule_and_dimension_numbers_are_followed():
    params = {"q": struct(2, 8, 4, 2), "head": struct(8, 8)}
    numbers = DimensionNumbers(dimensions=((1,), (2, 3)), batch=(0,))
    tx = shampoo(
        0.1,
        preconditioned=lambda path, leaf: path[0].key == "q",
        blocking=Blocking(dimension_numbers=lambda path, leaf: numbers),
    )
    report = explain(params, tx)
    q = row(report, "q")
    assert (q.batch, q.merged) == (2, (8, 8))
    assert dict(q.blocks) == {(8, 8): 2} and dict(q.factors) == {8: 4}
    assert not row(report, "head").preconditioned
    assert report.statistics_flops == 2 * 2 * 64 * (8 + 8)  # two slices
    assert "2 of 8x8  2 of 8x8  4 of 8" in str(report)


def test_sizes_are_in_powers_of_a_thousand():
    report = explain({"scale": struct()})
    kilo = dataclasses.replace(report, state_bytes={"adam": 1010})
    assert "1.01 kB (adam 1.01 kB)" in str(kilo)
    assert "scalar" in str(report)


def test_whitening_by_all_other_sides_is_counted_with_the_statistics():
    apart = Blocking(merge=None, dimension_numbers=None)
    tx = scale_by_shampoo(blocking=apart, statistics="kl")
    report = explain({"w": struct(4, 3, 2)}, tx)
    # For each side, products with two roots, then the contraction.
    whitening = sum(2 * 24 * (a + b) for a, b in ((3, 2), (4, 2), (4, 3)))
    assert report.statistics_flops == 2 * 24 * (4 + 3 + 2) + whitening
    assert report.apply_flops == 2 * 24 * (4 + 3 + 2)


def test_a_dimension_with_exponent_zero_has_no_factor():
    report = explain({"w": struct(6, 4)}, shampoo(0.1, exponents={2: {0: 0.5, 1: 0.0}}))
    assert dict(row(report, "w").factors) == {6: 1}
    assert report.root_batches == 1


@pytest.mark.parametrize(
    ("optimizer", "batches", "factors"),
    [(soap, 2, {6: 1, 4: 1}), (kl_shampoo, 2, {6: 1, 4: 1}), (one_sided_shampoo, 1, {6: 1})],
)
def test_every_alias_is_read_from_the_state_it_builds(optimizer, batches, factors):
    report = explain({"w": struct(4, 6)}, optimizer(0.1))
    assert report.root_batches == batches
    assert dict(row(report, "w").factors) == factors
    squares = sum(4 * d * d * n for d, n in factors.items())
    assert report.state_bytes["factors"] == squares
    eigenvalues = 4 * (4 + 6) if optimizer is kl_shampoo else 0
    assert report.state_bytes["roots"] == squares + eigenvalues


@pytest.mark.parametrize(
    ("optimizer", "options", "multiple", "method"),
    [
        (shampoo, {}, 11, "eigh, 11 d^3"),
        (shampoo, {"solver": "coupled_newton"}, 8, "Newton iterations, 8 d^3 per factor and iter"),
        (shampoo, {"solver": CarriedBasis(EighBasis(0.1))}, 11, "eigh at most, 11 d^3"),
        (soap, {}, 6 + 8 / 3, "1 QR step, 8.67 d^3"),
        (soap, {"basis": "eigh"}, 9, "eigh, 9 d^3"),
        (soap, {"basis": QRBasis(2)}, 12 + 2 * 8 / 3, "2 QR steps, 17.3 d^3"),
        (kl_shampoo, {}, 4 + 8 / 3, "1 QR step, 6.67 d^3"),
    ],
)
def test_a_refresh_is_named_and_counted_by_its_method(optimizer, options, multiple, method):
    report = explain({"w": struct(6, 4)}, optimizer(0.1, **options))
    np.testing.assert_allclose(report.refresh_flops, multiple * (6**3 + 4**3))
    assert f" by {method}" in str(report)
    once = 2 * 24 * (6 + 4)
    assert report.apply_flops == (1 if optimizer is shampoo else 3) * once
    assert report.statistics_flops == (2 if optimizer is kl_shampoo else 1) * once


@pytest.mark.parametrize(("p", "d"), [(1, 64), (2, 64), (3, 256), (4, 256), (5, 64), (8, 64)])
@pytest.mark.parametrize("semantics", ["cut", "clip"])
def test_products_of_a_root_are_those_of_the_program(p, d, semantics):
    """All products in what is traced; thin ones are those of the checks."""
    factor = struct(d, d)
    solve = functools.partial(polynomial_root, semantics=semantics, precision=FULL)
    text = jax.jit(lambda a: solve(a, 1 / p)[0]).lower(factor).as_text()
    cost = Polynomial(semantics=semantics).cost(d, jnp.float32, 1 / p)
    found = re.findall(rf"dot_general .* -> tensor<{d}x{d}xf32>", text)
    assert cost.flops == 2 * len(found)
    assert cost.method == f"{len(found)} products" and cost.fallback


def test_flops_and_memory_of_polynomials_are_those_that_xla_finds():
    numbers = DimensionNumbers(((1,), (2,)), batch=(0,))
    stacked = Blocking(dimension_numbers=lambda path, leaf: numbers)
    tx = scale_by_shampoo(solver="polynomial", blocking=stacked)
    report = explain({"w": struct(3, 256, 256)}, tx)
    compiled = jax.jit(lambda a: polynomial_root(a, 0.25, precision=FULL))
    compiled = compiled.lower(struct(3, 256, 256)).compile()
    flops, memory = compiled.cost_analysis(), compiled.memory_analysis()
    np.testing.assert_allclose(report.refresh_flops, 2 * flops["flops"], rtol=0.03)
    assert memory is not None
    # Six matrices with jax 0.10; XLA's of jax 0.8 and 0.12 keeps five.
    assert 0.8 < memory.temp_size_in_bytes / report.working_bytes < 1.01
    assert (report.root_batches, report.fallback_batches) == (2, 2)
    assert "2 (block shapes x sides), 2 by eigh as fallback" in str(report)


def test_auto_names_what_it_resolves_to(monkeypatch):
    params = {"w": struct(768, 64)}
    tx = shampoo(0.1, solver="auto")
    assert "by eigh (auto on cpu), 11 d^3" in str(explain(params, tx))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    report = explain(params, tx)
    assert "27 products (auto on gpu), 54 d^3 per factor of 768" in report.refresh_method
    assert "eigh (auto on gpu), 11 d^3 per factor of 64" in report.refresh_method
    assert report.refresh_flops == 54 * 768**3 + 11 * 64**3 and report.fallback_batches == 1


def test_a_staggered_refresh_costs_a_share_of_each_stack():
    params = {str(i): {"w": struct(6, 6), "v": struct(4, 4)} for i in range(7)}
    del params["0"]["v"]
    options = dict(every=3, mu_dtype=jnp.bfloat16, root_dtype=jnp.bfloat16)
    at_once = explain(params, scale_by_shampoo(**options))
    assert at_once.staggered_flops == at_once.refresh_flops == 2 * 11 * (7 * 6**3 + 6 * 4**3)
    assert at_once.working_bytes == 7 * 5 * 36 * 4
    assert "per factor, every 3 steps" in str(at_once)
    report = explain(params, scale_by_shampoo(refresh=Refresh(stagger=True), **options))
    assert report.staggered_flops == 2 * 11 * (3 * 6**3 + 2 * 4**3)
    assert report.working_bytes == 3 * 5 * 36 * 4
    assert f"{report.staggered_flops / 1e3:.3g} kFLOP of it each step" in str(report)
    chunks = explain(params, scale_by_shampoo(refresh=Refresh(chunk=2), **options))
    assert chunks.working_bytes == 2 * 5 * 36 * 4
    longer = explain(params, scale_by_shampoo(refresh=Refresh(stagger=True), every=14))
    assert longer.staggered_flops * 14 == longer.refresh_flops
    dtypes = ("first moment", "factors", "roots")
    assert [report.dtypes[kind] for kind in dtypes] == ["bfloat16", "float32", "bfloat16"]
    assert "roots 1.39 kB in bfloat16" in str(report) and "factors 2.78 kB," in str(report)


def test_what_a_solver_carries_counts_as_roots():
    report = explain({"w": struct(6, 4)}, shampoo(0.1, solver=CarriedBasis()))
    assert report.state_bytes["roots"] == 2 * report.state_bytes["factors"]
    tx = shampoo(0.1, solver="polynomial")
    counts = explain({"w": struct(6, 4)}, tx).state_bytes["roots"]
    assert counts == report.state_bytes["factors"] + 2 * 4  # two counts of fallbacks


@pytest.mark.parametrize(
    "optimizer",
    [
        shampoo,  # not built
        optax.adam(0.1),
        optax.chain(scale_by_shampoo(), optax.scale(-0.1)),
        averaging(shampoo(0.1), learning_rate=0.1),
        as_optimizer(optax.scale_by_lion(), 0.1),
    ],
    ids=["function", "stock", "chain", "averaging", "stock direction"],
)
def test_what_tells_no_blocks_is_refused(optimizer):
    with pytest.raises(TypeError, match="cannot tell the blocks .* give it what shampoo"):
        explain(PARAMS, optimizer)


def test_the_table_folds_layers_and_names_each_choice():
    text = str(explain(PARAMS, shampoo(0.1, blocking=SIX)))
    lines = [line.split() for line in text.splitlines()]
    assert ["layers/*/bias", "3", "4", "nadamw,", "rate", "x4", "-", "-", "-"] in lines
    folded = next(line for line in text.splitlines() if line.startswith("layers/*/fc"))
    assert "1 of 6x4, 1 of 4x4" in folded and "3 of 4" in folded
    assert "root batches      4" in text


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (shampoo(0.1, others_rate=1.0), "nadamw"),
        (shampoo(0.1, graft=None), "nadamw"),
        (shampoo(0.1, others_rate=jnp.float32(0.5)), "nadamw, rate x0.5"),
        (as_optimizer(scale_by_shampoo(), 0.1), "nadamw"),
        (shampoo(0.1, others=optax.sgd(0.1)), "others"),
    ],
    ids=["one rate", "no graft", "array", "direction", "own"],
)
def test_the_table_names_what_trains_the_others(optimizer, told):
    report = explain(PARAMS, optimizer)
    assert report.others == told
    assert f"  {told}  " in str(report)


def test_none_and_empty_parameters_are_no_obstacle():
    report = explain({"w": None, "e": struct(0, 3)})
    assert [r.name for r in report.rows] == ["e"]
    assert report.root_batches == report.refresh_flops == report.largest_factor == 0


def test_none_means_shampoo():
    assert explain(PARAMS) == explain(PARAMS, shampoo(1.0))


def test_a_direction_is_read_as_its_optimizer_routes_it():
    """`as_optimizer`, its rule, its momentum and its others, whatever the direction is."""
    others = optax.sgd(0.1, momentum=0.9)
    rule = lambda path, leaf: path[-1].key == "fc"  # noqa: E731
    direction = scale_by_soap(blocking=SIX, basis="eigh")
    tx = as_optimizer(
        direction,
        0.1,
        momentum=momentum(0.9),
        preconditioned=rule,
        others=others,
    )
    report = explain(PARAMS, tx)
    assert [r.name for r in report.rows if r.preconditioned] == [f"layers/{i}/fc" for i in range(3)]
    alone = explain(
        {str(i): struct(4, 10) for i in range(3)}, scale_by_soap(blocking=SIX, basis="eigh")
    )
    for field in ("refresh_flops", "refresh_method", "every", "root_batches", "apply_flops"):
        assert getattr(report, field) == getattr(alone, field)
    assert report.state_bytes["factors"] == alone.state_bytes["factors"] == 4 * 3 * (36 + 3 * 16)
    assert report.state_bytes["adam"] == 0
    elements = 3 * 40, 3 * (24 + 4) + 200  # momentum of the matrices, and that of the others
    counts = report.state_bytes["other"] - 4 * sum(elements)
    assert 0 < counts < 500
    assert sum(report.state_bytes.values()) == state_bytes(tx, PARAMS)


def by_hand(placement=None):
    parts = accumulate_factors(0.9), invert_roots(TruncatedEigh(), every=2), precondition()
    return blocked(optax.chain(*parts), blocking=SIX, placement=placement)


@pytest.mark.parametrize("container", [tuple, list])
def test_parameters_may_lie_in_any_container(container):
    params = container([struct(6, 4), struct(4), struct(4, 10)])
    report = explain(params, shampoo(0.1, blocking=SIX))
    named = explain(dict(zip("012", params, strict=True)), shampoo(0.1, blocking=SIX))
    assert [r.preconditioned for r in report.rows] == [True, False, True]
    assert report == named


def test_parts_chained_by_hand_are_read_from_the_state():
    """Blocks, factors and products are known; what their own refreshes cost is not."""
    for tx in (by_hand(), as_optimizer(by_hand(), 0.1)):
        report = explain(PARAMS["layers"], tx)
        known = explain(PARAMS["layers"], shampoo(0.1, blocking=SIX, preconditioned=rule_of(tx)))
        assert report.state_bytes["factors"] == known.state_bytes["factors"]
        assert report.state_bytes["roots"] == known.state_bytes["roots"]
        assert report.statistics_flops == known.statistics_flops
        assert (report.root_batches, report.largest_factor) == (known.root_batches, 6)
        assert report.refresh_flops == report.working_bytes == 0
        assert "parts of one's own" in str(report)
    rotated = blocked(optax.chain(accumulate_factors(0.9), in_eigenbasis(optax.scale_by_lion())))
    report = explain({"w": struct(6, 4)}, rotated)
    assert report.apply_flops == 3 * report.statistics_flops == 3 * 2 * 24 * (6 + 4)
    nothing = explain({"w": struct(6, 4)}, blocked(optax.identity()))
    assert nothing.refresh_flops == nothing.apply_flops == nothing.root_batches == 0


def rule_of(tx):
    """A bare direction takes every parameter."""
    routed = hasattr(tx.design, "rule")
    return tx.design.rule if routed else lambda path, leaf: True


def test_a_missing_option_is_named_where_the_optimizer_is_built():
    with pytest.raises(TypeError, match="'block_size'"):
        explain(PARAMS, block_size=4)  # pyrefly: ignore
    with pytest.raises(TypeError, match="shampoo has no option 'blocksize'"):
        explain(PARAMS, shampoo(0.1, blocksize=4))  # pyrefly: ignore


SQUARES = {f"w{i}": struct(16, 16) for i in range(6)} | {"bias": struct(16)}
PLANNED = {
    "alias": lambda placement=None: shampoo(0.1, placement=placement),
    "momentum": lambda placement=None: shampoo(0.1, momentum=0.9, placement=placement),
    "direction": lambda placement=None: scale_by_soap(every=3, placement=placement),
    "as_optimizer": lambda placement=None: as_optimizer(by_hand(placement), 0.1),
    "parts": by_hand,
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_mesh_is_reported_like_one_that_is_there(name):
    """No devices are needed: the same figures as of an optimizer with a placement on real ones."""
    planned = explain(SQUARES, PLANNED[name](), mesh={"data": 4, "fsdp": 2}, owners="data")
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    built = explain(SQUARES, PLANNED[name](Placement(mesh, "data")))
    assert planned == built
    on_mesh = planned.on_mesh
    assert on_mesh is not None and on_mesh.devices == 8
    assert on_mesh.blocks["16x16" if name in ("alias", "momentum", "direction") else "6x6"] > 0
    # Of the whole state an owner holds about its share.
    assert on_mesh.state_bytes < sum(planned.state_bytes.values())
    alone = explain(SQUARES, PLANNED[name]())
    assert alone.on_mesh is None and alone.rows == planned.rows


def test_plans_that_contradict_each_other_are_refused():
    mesh = jax.make_mesh((8,), ("data",))
    with pytest.raises(ValueError, match="the optimizer has a placement on one: drop one"):
        explain(SQUARES, shampoo(0.1, placement=Placement(mesh, "data")), mesh={"data": 8})
    for bad in ({}, {"data": 0}, {"data": 2.0}, 8):
        with pytest.raises(ValueError, match="must give the size of each axis, at least 1"):
            explain(SQUARES, mesh=bad)
    with pytest.raises(ValueError, match="say nothing without mesh: give mesh="):
        explain(SQUARES, owners="data")


@pytest.mark.parametrize("layers", [2, 12])
def test_the_program_holds_as_many_eigh_calls_as_explained(layers):
    params = gpt2_matrices(layers, 32)
    report = explain(params, scale_by_shampoo())
    measured = measure(scale_by_shampoo(), params)
    print(f"{layers} layers: {measured}")
    assert measured["eigh_calls"] == report.root_batches == 4


def test_the_unstacked_comparison_holds_one_eigh_call_per_factor():
    params = gpt2_matrices(1, 8)
    assert measure(one_root_per_factor(params), params)["eigh_calls"] == 12


def test_more_owners_than_blocks_are_advised_against():
    params = {f"w{i}": jax.ShapeDtypeStruct((16, 16), jnp.float32) for i in range(8)}
    advice = "75.0% filling, name fewer mesh axes as `owners`"
    assert advice in str(explain(params, mesh={"data": 4, "fsdp": 8}))
    assert "owners`" not in str(explain(params, mesh={"data": 4, "fsdp": 8}, owners="fsdp"))
