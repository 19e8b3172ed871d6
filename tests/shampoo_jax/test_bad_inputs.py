"""What is refused, by every function that takes it: the option, its value, what to give instead.

A row is a function, the options that it is given, and words of the message. Rows of `EVERYWHERE`
are tried on all directions or all complete optimizers that have the option.
"""

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import shampoo_jax as sj
from shampoo_jax import matrix, presets

NAN, INF = math.nan, math.inf
DIRECTIONS = [
    sj.scale_by_shampoo,
    sj.scale_by_one_sided_shampoo,
    sj.scale_by_soap,
    sj.scale_by_kl_shampoo,
    sj.scale_by_kl_soap,
]
ALIASES = [
    functools.partial(alias, learning_rate=0.1)
    for alias in (sj.shampoo, sj.one_sided_shampoo, sj.soap, sj.kl_shampoo, sj.kl_soap)
]
identity, adam = optax.identity(), optax.scale_by_adam()
before = functools.partial(sj.BasisRefresh, when="before", skip_first=False)
as_optimizer = functools.partial(sj.as_optimizer, adam, 0.1)
eigenbasis = functools.partial(sj.eigenbasis, identity)
kl_eigenbasis = functools.partial(sj.kl_eigenbasis, identity, scaled=True)
averaging = functools.partial(sj.averaging, optax.sgd(0.1), learning_rate=0.1)
injected = functools.partial(sj.inject_hyperparams, sj.shampoo)
over_peak = functools.partial(sj.add_scheduled_weight_decay, kind="over_peak")
EYE = jnp.eye(2)


def place(**options):
    given: Any = {"mesh": jax.make_mesh((8,), ("data",)), "owners": "data"}
    return sj.Placement(**(given | options))


class OnlyIn:
    """A form of storage from which nothing comes back."""

    encode = staticmethod(jnp.asarray)


# Of all functions in the list that have the option.
EVERYWHERE = [
    (DIRECTIONS, dict(b1=1.0), "b1=1.0 must lie in [0, 1): 0.9 averages"),
    (DIRECTIONS, dict(b1="0.9"), "b1='0.9' is no number, which must lie in [0, 1): 0.9"),
    (DIRECTIONS, dict(b1=True), "b1=True is no number"),
    (DIRECTIONS, dict(b1=NAN), "b1=nan must lie in [0, 1)"),
    (DIRECTIONS, dict(b1=np.float32(-0.5)), "b1=-0.5 must lie in [0, 1)"),
    (DIRECTIONS, dict(b1=np.array(1.5)), "b1=1.5 must lie in [0, 1)"),
    (DIRECTIONS, dict(b1=jnp.ones(2)), "b1 has shape (2,): give one number"),
    (DIRECTIONS, dict(b1=lambda step: 0.9), "b1=", "is a function, not a number", "inject_hyperpa"),
    (DIRECTIONS, dict(b2=-0.1), "b2=-0.1 must lie in [0, 1"),
    (DIRECTIONS, dict(b2=None), "b2=None is no number", "0.95"),
    (DIRECTIONS, dict(factor_b2=1.5), "factor_b2=1.5 must lie in [0, 1]: 0.95"),
    (DIRECTIONS, dict(b3=1.0), "b3=1.0 must lie in [0, 1): None means b1"),
    (DIRECTIONS, dict(eps=-1.0), "eps=-1.0 must not be negative or infinite: 0 is none"),
    (DIRECTIONS, dict(eps=INF), "eps=inf must not be negative or infinite"),
    (DIRECTIONS, dict(damping=-1e-6), "damping=-1e-06 must not be negative"),
    (DIRECTIONS, dict(rtol=1.0), "rtol=1.0 must lie in [0, 1): 0 cuts nothing off"),
    (DIRECTIONS, dict(first_weight=-1), "first_weight=-1 must lie in [0, 1]", "1 - b2"),
    (DIRECTIONS, dict(exponent=0.0), "exponent=0.0 must be positive and finite: 0.5"),
    (DIRECTIONS, dict(max_scale="largest"), "max_scale='largest': use 'size', 'relative' or a nu"),
    (DIRECTIONS, dict(max_scale=0.0), "max_scale=0.0: use 'size', 'relative' or a number above 0"),
    (DIRECTIONS, dict(bias_correction="no"), "bias_correction='no' must be True or False"),
    (DIRECTIONS, dict(weighted=0), "weighted=0 must be True or False"),
    (DIRECTIONS, dict(normalize=None), "normalize=None must be True or False"),
    (DIRECTIONS, dict(every=0), "every=0 must be at least 1: 1 is every step"),
    (DIRECTIONS, dict(every=2.5), "every=2.5 must be a whole number"),
    (DIRECTIONS, dict(every=True), "every=True must be a whole number"),
    (DIRECTIONS, dict(every=None), "every=None must be a whole number"),
    (DIRECTIONS, dict(every=2**31), "every=2147483648 must be at most 2147483647"),
    (DIRECTIONS, dict(monitor=0.5), "monitor=0.5 must be a whole number: None records nothing"),
    (DIRECTIONS, dict(exponents=-1.0), "exponents: -1.0 must not be negative", "0.5 stands for"),
    (DIRECTIONS, dict(exponents=[0.5]), "exponents: [0.5] must not be negative"),
    (DIRECTIONS, dict(exponents=dict), "exponents=dict: give a number, or a function of the shape"),
    (DIRECTIONS, dict(exponents="both"), "exponents='both': the only names are", "'smaller'"),
    (DIRECTIONS, dict(exponents={"2": 0.5}), "exponents has the key '2'", "are ints"),
    (DIRECTIONS, dict(statistics="fisher"), "statistics='fisher': use one of 'gradients', 'kl'"),
    (DIRECTIONS, dict(side="both"), "side='both': use one of 'left', 'right', 'smaller'"),
    (DIRECTIONS, dict(solver="cholesky"), "solver='cholesky' is unknown: choose from"),
    (DIRECTIONS, dict(solver=sj.TruncatedEigh), "solver=TruncatedEigh: give a name or a Solver"),
    (DIRECTIONS, dict(basis="svd"), "basis='svd': use one of 'eigh', 'qr', None"),
    (DIRECTIONS, dict(basis=sj.QRBasis), "basis=QRBasis: give 'eigh'", "QRBasis()"),
    (DIRECTIONS, dict(graft="adamw"), "graft='adamw': use one of 'adam', 'rmsprop'"),
    (DIRECTIONS, dict(graft=0.5), "graft=0.5 is no Optax transformation"),
    (DIRECTIONS, dict(graft=optax.adam), "graft=adam is no Optax transf", "call it, adam(...)"),
    (DIRECTIONS, dict(graft=optax.adam(0.1)), "graft=", "is a complete optimizer"),
    (DIRECTIONS, dict(mu_dtype=jnp.int8), "mu_dtype=int8: use bfloat16 or float32"),
    (DIRECTIONS, dict(mu_dtype=OnlyIn), "mu_dtype=", "OnlyIn", "use bfloat16 or float32"),
    (DIRECTIONS, dict(root_dtype=jnp.float16), "root_dtype=float16: use bfloat16 or float32"),
    (DIRECTIONS, dict(blocking=64), "blocking=64: give a Blocking, such as Blocking(size=64)"),
    (DIRECTIONS, dict(placement="data"), "placement='data': give a Placement, such as"),
    (DIRECTIONS, dict(refresh=3), "refresh=3: give a ", "Refresh(stagger=True)"),
    (ALIASES, dict(learning_rate="1e-3"), "learning_rate='1e-3' is no number", "a schedule"),
    (ALIASES, dict(learning_rate=-1e-3), "learning_rate=-0.001 must not be neg", "go uphill"),
    (ALIASES, dict(learning_rate=NAN), "learning_rate=nan must not be negative or infinite"),
    (ALIASES, dict(learning_rate=None), "learning_rate=None is no number"),
    (ALIASES, dict(b1=1.0), "b1=1.0 must lie in [0, 1)"),
    (ALIASES, dict(weight_decay=-1.0), "weight_decay=-1.0 must not be negative or infinite"),
    (ALIASES, dict(weight_decay="0.1"), "weight_decay='0.1' is no number"),
    (ALIASES, dict(momentum=1.0), "momentum=1.0 must lie in [0, 1)"),
    (ALIASES, dict(momentum=sj.momentum), "momentum=momentum is a function, not a number"),
    (ALIASES, dict(decay="l2"), "decay='l2': give a Decay, such as Decay('l2')"),
    (ALIASES, dict(others=optax.sgd), "others=sgd is no Optax transformation", "sgd(...)"),
    (ALIASES, dict(preconditioned={"w": True}), "preconditioned={'w': True} must be a function of"),
]
ROWS = [
    # Options that contradict each other.
    (sj.scale_by_shampoo, dict(b1=0.0, b3=0.5), "b3=0.5 with b1=0", "drop b3"),
    (sj.scale_by_shampoo, dict(b1=0, mu_dtype="bfloat16"), "mu_dtype=bfloat16 with b1=0", "drop"),
    (sj.scale_by_shampoo, dict(every=5, refresh=sj.Refresh(2)), "start=2 must not be below every"),
    (sj.scale_by_shampoo, dict(refresh=sj.BasisRefresh()), "refresh=", "give a Refresh, such as"),
    (sj.scale_by_soap, dict(refresh=sj.Refresh()), "refresh=", "give a BasisRefresh, such as"),
    (sj.scale_by_soap, dict(damping=1e-6, rtol=None), "damping=1e-06 with rtol=None", "rtol=0.0"),
    (sj.scale_by_kl_soap, dict(basis=sj.EighBasis()), "basis=", "use QRBasis(sort=None)"),
    (sj.scale_by_kl_shampoo, dict(b2=1.0), "b2=1.0 must lie in [0, 1)"),
    (
        *(sj.scale_by_shampoo, dict(every=3, solver=sj.TruncatedEigh(0.0))),
        *("rtol=0.0", "with every=3", "use a positive rtol"),
    ),
    (
        *(sj.scale_by_shampoo, dict(every=3, solver=sj.CarriedBasis(atol=1e-3))),
        *("atol=0.001 with every=3", "or every=1"),
    ),
    (
        *(sj.scale_by_shampoo, dict(solver="coupled_newton", exponents={2: 0.4})),
        *("exponent=0.4 is not 1/p", "use 'higher_order_newton'"),
    ),
    (
        *(sj.scale_by_shampoo, dict(solver="higher_order_newton", exponents=0.31415)),
        *("exponent=0.31415 is not 1/p or q/p", "take an eigenvalue solver"),
    ),
    # Objects.
    (sj.Blocking, dict(size=0), "size=0 must be at least 1: None leaves parameters whole"),
    (sj.Blocking, dict(size=64.0), "size=64.0 must be a whole number"),
    (sj.Blocking, dict(size=jnp.asarray(64)), "size=64 is a static option", "Python value"),
    (sj.Blocking, dict(merge="2"), "merge='2' must be a whole number: 2 keeps matrices"),
    (sj.Blocking, dict(merge=True), "merge=True must be a whole number"),
    (sj.Blocking, dict(canonical=None), "canonical=None must be True or False"),
    (sj.Blocking, dict(dimension_numbers="haiku"), "dimension_numbers='haiku' is unknown: choose"),
    (sj.DimensionNumbers, dict(dimensions=(0, 1)), "dimensions=(0, 1): give axes by dimension"),
    (sj.DimensionNumbers, dict(dimensions=((0,), (1,)), batch=0), "batch=0: give a tuple of axes"),
    (sj.batch_axes, dict(axes=["layers"]), "axes=['layers']: give the batch axes of each comp"),
    (sj.batch_axes, dict(axes={"layers": "0"}), "axes={'layers': '0'}", "{'layers': 0}"),
    *((kind, dict(start=0), "start=0 must be at least 1: None") for kind in (sj.Refresh, before)),
    *((kind, dict(start=2.5), "start=2.5 must be a whole") for kind in (sj.Refresh, before)),
    *((kind, dict(chunk="all"), "chunk='all' must be a whole") for kind in (sj.Refresh, before)),
    (sj.Refresh, dict(chunk=-1), "chunk=-1 must be at least 1: None takes all at once"),
    (sj.Refresh, dict(stagger=1), "stagger=1 must be True or False"),
    (sj.BasisRefresh, dict(start=3), "start=3 with when='after': drop start, or use 'before'"),
    (sj.BasisRefresh, dict(when="never"), "when='never': use one of 'before', 'after'"),
    (sj.BasisRefresh, dict(when="before"), "skip_first=True needs when='after'"),
    (sj.BasisRefresh, dict(reorder="yes"), "reorder='yes' must be True or False"),
    (sj.Decay, dict(kind="half"), "kind='half': use one of 'l2', 'decoupled'"),
    (sj.Decay, dict(peak_lr=0.1), "peak_lr=0.1 with kind='decoupled'", "drop peak_lr"),
    (sj.Decay, dict(kind="over_peak", peak_lr=-1), "peak_lr=-1 must be positive"),
    (sj.Decay, dict(mask="bias"), "mask='bias' must be True or False"),
    (place, dict(mesh=8), "mesh=8: give a jax.sharding.Mesh"),
    (place, dict(owners="model"), "owners='model' must name different axes", "('data',)"),
    (place, dict(owners=("data", "data")), "owners=('data', 'data') must name different axes"),
    (place, dict(owners=()), "owners=() must name different axes"),
    (place, dict(owners=None), "owners=None must name axes of the mesh: owners='data'"),
    (place, dict(stack_multiple=12), "stack_multiple=12 must be a multiple of the 8 owners"),
    (place, dict(stack_multiple=0), "stack_multiple=0 must be a multiple"),
    (place, dict(stack_multiple="8"), "stack_multiple=8 must be a multiple"),
    (place, dict(communication_dtype=jnp.int8), "communication_dtype=int8: use bfloat16"),
    (place, dict(parameter_spec=PartitionSpec("data")), "parameter_spec=", "must be a function of"),
    (place, dict(parameter_spec=None), "parameter_spec=None must be a function of"),
    (place, dict(gradient_spec=PartitionSpec("data")), "gradient_spec=", "must be a function of"),
    # Solvers and bases.
    (sj.TruncatedEigh, dict(rtol=-0.1), "rtol=-0.1 must lie in [0, 1)", "d * eps"),
    (sj.TruncatedEigh, dict(atol=-1.0), "atol=-1.0 must not be negative or infinite: 0 is none"),
    (sj.TruncatedEigh, dict(implementation="lanczos"), "implementation='lanczos': use one of 'qr'"),
    (sj.ShiftedEigh, dict(damping=None), "damping=None is no number", "0 is none"),
    (sj.ShiftedEigh, dict(before="yes"), "before='yes' must be True or False"),
    (sj.CoupledNewton, dict(max_iterations=0), "max_iterations=0 must be at least 1: 100"),
    (sj.CoupledNewton, dict(max_residual=-1.0), "max_residual=-1.0 must not be neg", "math.inf"),
    (sj.CoupledNewton, dict(tolerance=NAN), "tolerance=nan must not be negative", "1e-6"),
    (sj.HigherOrderNewton, dict(order=1), "order=1 must be at least 2: 2 is Newton's"),
    (sj.HigherOrderNewton, dict(relative_damping=-1), "relative_damping=-1 must not be negative"),
    (sj.HigherOrderNewton, dict(absolute_damping=-1), "absolute_damping=-1 must not be negative"),
    (sj.Polynomial, dict(rtol=-1), "rtol=-1 must lie in [0, 1)", "None means"),
    (sj.Polynomial, dict(semantics="cutt"), "semantics='cutt': use one of 'cut', 'clip'"),
    (sj.Polynomial, dict(sign_steps=0), "sign_steps=0 must be at least 1: 3, say"),
    (sj.Polynomial, dict(precision="high"), "precision='high': give a PrecisionPolicy, such as"),
    (
        *(sj.Polynomial, dict(precision=sj.PrecisionPolicy("high", "high"))),
        *("precision='high': give a jax.lax.Precision",),
    ),
    (sj.Auto, dict(rtol=-1), "rtol=-1 must lie in [0, 1)", "None means"),
    (sj.CarriedBasis, dict(basis="qr"), "basis='qr': give EighBasis() or QRBasis()"),
    (sj.CarriedBasis, dict(damping=0.1, rtol=1e-3), "rtol=0.001", "damping=0.1", "drop damping"),
    (sj.EighBasis, dict(tolerance=-1.0), "tolerance=-1.0 must not be negative"),
    (sj.EighBasis, dict(descending=2), "descending=2 must be True or False"),
    (sj.QRBasis, dict(iterations=0), "iterations=0 must be at least 1: 1 is SOAP's"),
    (sj.QRBasis, dict(sort="up"), "sort='up': use one of 'before', 'after', None"),
    (sj.make_solver, dict(solver=3), "solver=3: give a name or a Solver"),
    (sj.register_solver, dict(name="", constructor=sj.Auto), "name='' must be a string"),
    (sj.register_solver, dict(name="mine", constructor=sj.Auto()), "constructor=Auto", "called"),
    # Parts.
    (sj.filter_gradient, dict(b3=-0.5), "b3=-0.5 must lie in [0, 1): None means b1"),
    (sj.filter_gradient, dict(mu_dtype="half a float"), "mu_dtype='half a float': ", "bfloat16"),
    (sj.accumulate_factors, dict(b2=1.1), "b2=1.1 must lie in [0, 1]: 0.95 averages over 20"),
    (sj.accumulate_kl_factors, dict(inner_roots=None), "inner_roots=None is no Optax transform"),
    (sj.damp, dict(damping=-1.0), "damping=-1.0 must not be negative"),
    (sj.normalize_by_trace, dict(exponent=1.5), "exponent=1.5 must lie in (0, 1]: 0.5 is the root"),
    (sj.normalize_by_trace, dict(floor=-1.0), "floor=-1.0 must not be negative"),
    (sj.graft, dict(magnitude="adam", direction=adam), "magnitude='adam' is no Optax transf"),
    (sj.scale_by_second_moment, dict(b2=1.5), "b2=1.5 must lie in [0, 1]"),
    (sj.scale_by_second_moment, dict(exponent=-0.5), "exponent=-0.5 must be positive and finite"),
    (sj.invert_roots, dict(solver=sj.EighBasis), "solver=EighBasis: give a name or a Solver"),
    (sj.invert_roots, dict(every=3, refresh=sj.Refresh(2)), "start=2 must not be below every=3"),
    (sj.invert_roots, dict(every=jnp.ones(2)), "every=Array([1., 1.]", "must be a whole number"),
    (eigenbasis, dict(every=3, refresh=before(start=2)), "start=2 must not be below every=3"),
    (eigenbasis, dict(basis=3), "basis=3: give 'eigh', 'qr', None, EighBasis() or QRBasis()"),
    (eigenbasis, dict(rtol=2.0), "rtol=2.0 must lie in [0, 1)"),
    (eigenbasis, dict(first_moments="mu"), "first_moments='mu': give a tuple of names"),
    (eigenbasis, dict(refresh=sj.BasisRefresh(reorder=True)), "reorder=True with", "sort='before'"),
    (sj.in_eigenbasis, dict(inner=optax.adam), "inner=adam is no Optax transformation", "call it"),
    (kl_eigenbasis, dict(b2=1.0), "b2=1.0 must lie in [0, 1)"),
    (kl_eigenbasis, dict(first_weight=2), "first_weight=2 must lie in [0, 1]"),
    (kl_eigenbasis, dict(scaled="yes"), "scaled='yes' must be True or False"),
    (sj.monitor_spectrum, dict(every=0), "every=0 must be at least 1"),
    (sj.orthogonalize, dict(steps=0), "steps=0 must be at least 1: 5 are Muon's"),
    (sj.orthogonalize, dict(method="svd"), "method='svd': use one of 'newton_schulz', 'polar'"),
    (sj.orthogonalize, dict(coefficients=(1, 2)), "coefficients=(1, 2): give three numbers"),
    *((f, dict(inner=sj.guard), "inner=guard is no Optax transf", "call it, guard(...)")
      for f in (sj.on_updates, sj.on_gradients, sj.from_gradients, sj.guard, sj.blocked)),
    # Around a direction.
    (as_optimizer, dict(placement=8), "placement=8: give a Placement, such as"),
    (sj.as_optimizer, dict(direction=sj.scale_by_soap, learning_rate=0.1), "scale_by_soap(...)"),
    (sj.momentum, dict(decay=1.0), "decay=1.0 must lie in [0, 1)"),
    (sj.momentum, dict(decay=0.9, dampening=-1), "dampening=-1 must lie in [0, 1)"),
    (sj.momentum, dict(decay=0.9, nesterov="yes"), "nesterov='yes' must be True or False"),
    (sj.hyperball, dict(learning_rate=optax.adam(0.1)), "learning_rate=", "is no number"),
    (sj.scale_to_norm, dict(target=1.0), "target=1.0 must be a function of a parameter"),
    (sj.scale_per_parameter, dict(rule=0.5), "rule=0.5 must be a function of (path, leaf)"),
    (averaging, dict(kind="polyak"), "kind='polyak': use one of 'primal', 'schedule_free'"),
    (averaging, dict(train_coeff=0.0), "train_coeff=0.0 must lie in (0, 1]: 1 is the whole"),
    (averaging, dict(eval_coeff=1.0), "eval_coeff=1.0 must lie in [0, 1): None means 0.9"),
    (averaging, dict(lr_power=2), "lr_power=2 is an option of kind='schedule_free': leave it out"),
    (averaging, dict(kind="schedule_free", eval_coeff=0.9), "eval_coeff=0.9", "leave it out"),
    (averaging, dict(kind="schedule_free", lr_power=-1), "lr_power=-1 must not be negative"),
    (averaging, dict(learning_rate=None), "learning_rate=None is no number"),
    (averaging, dict(decay=0.1), "decay=0.1 is no Optax transformation"),
    (over_peak, dict(weight_decay=-1, learning_rate=0.1), "weight_decay=-1 must not be negative"),
    (over_peak, dict(weight_decay=1, learning_rate=0.0), "peak_lr=0.0 must be positive"),
    (over_peak, dict(weight_decay=1, learning_rate=jnp.cos), "needs peak_lr", "pass Decay("),
    (sj.decay_parts, dict(weight_decay=0.1, decay="l2"), "decay='l2': give a Decay"),
    (sj.decay_parts, dict(weight_decay=0.1, learning_rate="a"), "learning_rate='a' is no number"),
    (sj.inject_hyperparams, dict(factory=sj.shampoo(0.1)), "factory=", "must be a function of opt"),
    (injected, dict(static_args="evry"), "static_args='evry': use one of learning_rate, b1"),
    (injected, dict(hyperparam_dtype=jnp.int32), "hyperparam_dtype=int32: use bfloat16 or float32"),
    (injected(), dict(learning_rate=0.1, beta2=0.9), "no option 'beta2': did you mean b2"),
    (presets.adamw_drop_in, dict(learning_rate=0.1, b1=1.5), "b1=1.5 must lie in [0, 1)"),
    (presets.algoperf, dict(trial=6, steps=10), "trial=6: choose 1 to 5"),
    (presets.algoperf, dict(trial=1, steps=0), "steps=0 must be at least 1: the workload's step"),
    (presets.meta_shampoo, dict(block_size=0), "block_size=0 must be at least 1: 1024, say"),
    (presets.meta_soap, dict(eps=-1.0), "eps=-1.0 must not be negative"),
    # Functions on matrices.
    (matrix.truncated_root, dict(factor=EYE, exponent=-1), "exponent=-1 must be positive"),
    (matrix.truncated_root, dict(factor=EYE, exponent=0.5, rtol=2), "rtol=2 must lie in [0, 1]"),
    (matrix.shifted_root, dict(factor=EYE, exponent=0.5, damping=-1), "damping=-1 must not be neg"),
    (matrix.rational_root, dict(exponent="half"), "exponent='half' is no number"),
    (matrix.coupled_newton, dict(factor=EYE, root=0, damping=0.0), "root=0 must be positive"),
    (
        *(matrix.coupled_newton, dict(factor=EYE, root=2, damping=0.0, max_iterations=0)),
        "max_iterations=0 must be at least 1",
    ),
    (matrix.polynomial_root, dict(factor=EYE, exponent=0.5, semantics=1), "semantics=1: use one"),
    (matrix.newton_schulz, dict(update=EYE, steps=-1), "steps=-1 must be at least 0: 5 are Muon's"),
    (matrix.newton_schulz, dict(update=EYE, eps=-1.0), "eps=-1.0 must not be negative"),
    (
        *(matrix.orthogonal_iteration, dict(factor=EYE, basis=EYE, iterations=0.5)),
        "iterations=0.5 must be a whole number",
    ),
    (
        *(matrix.svd_orthogonalize, dict(update=EYE, scale_by_nuclear_norm="yes")),
        "scale_by_nuclear_norm='yes' must be True or False",
    ),
]  # fmt: skip


def having(functions, options):
    return [f for f in functions if options.keys() <= inspect.signature(f).parameters.keys()]


@pytest.mark.parametrize(
    ("functions", "options", "words"),
    [(having(functions, options), options, words) for functions, options, *words in EVERYWHERE]
    + [([function], options, words) for function, options, *words in ROWS],
)
def test_what_cannot_be_is_refused_where_it_is_given(functions, options, words):
    assert functions
    for function in functions:
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**options)
        assert [word for word in words if word not in str(caught.value)] == [], caught.value


PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
W = (4, 3)
GRADIENTS = [
    (jnp.ones(W, jnp.int32), "gradient 'w' has dtype int32", "give None"),
    (jnp.ones(W, bool), "gradient 'w' has dtype bool", "give None"),
    (np.zeros(W, jax.dtypes.float0), "gradient 'w' has dtype float0", "give None"),
    (jnp.ones(W, jnp.float8_e4m3fn), "gradient 'w' has dtype float8_e4m3fn", "cast it to bfloat16"),
    (jnp.ones(W, jnp.complex64), "parameter ['w'] is complex (complex64)", "split_real_and_imag"),
    ("a text", "gradient 'w' has dtype str", "no floating point number"),
    (jnp.ones((5, 3)), "parameter 'w' has shape (4, 3), its gradient (5, 3)", "one tree"),
    (1.0, "parameter 'w' has shape (4, 3), its gradient ()"),
    ([jnp.ones(W)], "parameter 'w' has shape (4, 3), its gradient None", "one tree"),
]


@pytest.mark.parametrize("tx", [sj.shampoo(0.1), sj.scale_by_soap()], ids=["alias", "direction"])
@pytest.mark.parametrize(("gradient", "words"), [(g, words) for g, *words in GRADIENTS])
def test_gradients_that_nothing_can_use_are_named(tx, gradient, words):
    with pytest.raises(ValueError) as caught:
        tx.update({**PARAMS, "w": gradient}, jax.eval_shape(tx.init, PARAMS), PARAMS)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize(
    ("further", "words"),
    [
        (None, ["further=NoneType: give a mapping"]),
        (jnp.ones((4, 3)), ["further=ArrayImpl: give a mapping"]),
        ({"halves": {**PARAMS, "w": jnp.ones((4, 3), int)}}, ["further['halves'] 'w' has dtype"]),
    ],
    ids=["none", "array", "integers"],
)
def test_further_trees_that_nothing_can_use_are_named(further, words):
    tx = sj.shampoo(0.1)
    with pytest.raises(ValueError) as caught:
        tx.update(PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS, further=further)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


class Filled(NamedTuple):
    """A statistic that fills in what it is made of."""

    matrices: Any

    def part(self):
        def update(stacks, state, params=None):
            new = {k: dataclasses.replace(b, matrices=self.matrices) for k, b in stacks.items()}
            return new, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


WEIGHT = {"w": jnp.ones((4, 3))}
LEFT, RIGHT = jnp.ones((1, 4, 4)), jnp.ones((1, 3, 3))


@pytest.mark.parametrize(
    "statistics",
    [
        optax.scale_by_adam(),
        optax.identity(),
        Filled((LEFT,)).part(),
        Filled((LEFT, LEFT)).part(),
        Filled((LEFT, RIGHT.astype(jnp.bfloat16))).part(),
    ],
    ids=["adam", "identity", "one", "sizes", "dtype"],
)
def test_a_statistic_that_fills_in_something_else_is_refused(statistics):
    tx = sj.scale_by_shampoo(statistics=statistics)
    words = r"roots of the stack '4x3' need one factor .*\[\(1, 4, 4\), \(1, 3, 3\)\] in float32"
    with pytest.raises(ValueError, match=words):
        tx.update(WEIGHT, jax.eval_shape(tx.init, WEIGHT), WEIGHT)


def test_a_statistic_that_leaves_out_a_stack_is_refused():
    forgets = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda stacks, state, params=None: ({}, state)
    )
    tx = sj.scale_by_shampoo(statistics=forgets)
    with pytest.raises(ValueError, match="left out the stack '4x3'"):
        tx.update(WEIGHT, jax.eval_shape(tx.init, WEIGHT), WEIGHT)


def test_gradients_in_double_precision_are_refused_by_a_state_in_single():
    with jax.enable_x64(True):
        params = {"w": jnp.ones((4, 3), jnp.float32)}
        gradients = {"w": jnp.ones((4, 3), jnp.float64)}
        tx = sj.shampoo(0.1)
        with pytest.raises(ValueError, match="gradient 'w' has dtype float64.*cast gradients to"):
            tx.update(gradients, tx.init(params), params)


@pytest.mark.parametrize("leaf", [jnp.ones(2, jnp.float8_e4m3fn), "a text", object()])
def test_parameters_that_nothing_can_use_are_named(leaf):
    with pytest.raises(ValueError, match="parameter 'layer/w' has dtype "):
        sj.shampoo(0.1).init({"layer": {"w": leaf}})


@pytest.mark.parametrize("state", [None, (), optax.adam(0.1).init(PARAMS)])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match=f"state is of type {type(state).__name__}: give what"):
        sj.shampoo(0.1).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("tx", [sj.hyperball(0.1), sj.keep_norm(), sj.scale_to_norm(jnp.sum)])
def test_norms_leave_missing_gradients_missing_and_name_other_shapes(tx):
    updates, _ = tx.update({**PARAMS, "w": None}, tx.init(PARAMS), PARAMS)
    assert updates["w"] is None and updates["b"].shape == (3,)
    with pytest.raises(ValueError, match=r"parameter 'w' has shape \(4, 3\), its update \(3, 4\)"):
        tx.update({**PARAMS, "w": jnp.ones((3, 4))}, tx.init(PARAMS), PARAMS)


def test_a_rule_of_dimension_numbers_that_gives_something_else_is_refused():
    tx = sj.scale_by_shampoo(blocking=sj.Blocking(dimension_numbers=lambda path, leaf: (0, 1)))
    with pytest.raises(ValueError, match=r"gives \(0, 1\) for parameter \['b'\]: a Dimension"):
        tx.init(PARAMS)


def test_what_is_sensible_passes():
    three, half = np.int64(3), np.float32(0.5)
    refresh = sj.Refresh(stagger=True, start=np.int32(4))
    sj.shampoo(half, b1=np.array(0.5), b2=1, every=three, refresh=refresh, monitor=three)
    sj.scale_by_soap(exponent=lambda ndim: 0.5, eps=0, rtol=np.float64(0.0))
    sj.scale_by_shampoo(every=jnp.asarray(3), b1=jnp.asarray(0.9), bias_correction=np.True_)
    sj.scale_by_kl_soap(max_scale=math.inf, first_weight=1, factor_b2=0)
    sj.soap(optax.linear_schedule(0.1, 0.0, 9), weight_decay=optax.constant_schedule(0.1))
    sj.shampoo(0.1, momentum=sj.momentum(0.9), decay=sj.Decay(mask={"w": True}), others=adam)
    sj.Decay(mask=lambda params: jax.tree.map(jnp.ndim, params))
    sj.CoupledNewton(max_residual=math.inf, damping=jnp.asarray(0.1))
    sj.inject_hyperparams(sj.shampoo, static_args="every")(0.1, every=3)
    assert sj.TruncatedEigh(0) == sj.TruncatedEigh(0.0)
