"""Hyperparameters that transfer: what a base model's are multiplied by in a wider or deeper one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from shampoo_jax.base.options import POSITIVE, check_choice, check_flag, check_kind
from shampoo_jax.base.paths import KeyPath, as_written, name_of
from shampoo_jax.base.signatures import suggests
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.dimension_numbers import resolve_dimension_numbers
from shampoo_jax.blocks.exponents import (
    AutoExponents,
    Exponents,
    chosen_exponents,
    resolve_exponents,
)
from shampoo_jax.blocks.plan import make_plan
from shampoo_jax.optimizers.kernels import Kernel, read_kernel
from shampoo_jax.optimizers.routing import Rule, is_hidden_matrix
from shampoo_jax.stacks.guard import Guarded, guard, unguarded

Method = Literal["adam", "sgd", "muon", "shampoo", "soap"]
METHODS = ("adam", "sgd", "muon", "shampoo", "soap")
GRAFTS = ("adam", "rmsprop", "adagrad", "sgd", None)


class Multipliers(NamedTuple):
    """What the hyperparameters of one parameter are multiplied by; all 1 at the base.

    Attributes:
      learning_rate: Of the update.
      eps: Of what is added to a root of second moments (Adam's, that of a graft, SOAP's in its
        basis), or to the norm of Muon's update.
      damping: Of what is added to factors, in the units of the factors. A damping relative to the
        largest eigenvalue needs none.
      graft_eps: Of what a graft adds to the norm that it divides by. `graft` adds nothing.
      decay: Of a decay that the multiplied learning rate does not scale: 1 / width.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> narrow, wide = {"mlp": jnp.ones((8, 32))}, {"mlp": jnp.ones((16, 64))}
      >>> m = shampoo_jax.transfer_rules(narrow, wide, "adam").multipliers["mlp"]
      >>> m.learning_rate, m.eps
      (0.5, 0.5)
    """

    learning_rate: float = 1.0
    eps: float = 1.0
    damping: float = 1.0
    graft_eps: float = 1.0
    decay: float = 1.0


@dataclasses.dataclass(frozen=True)
class TransferRules:
    """What `transfer_rules` gives: multipliers by parameter.

    Attributes:
      multipliers: By name, the path joined by slashes.
      residual: Of the output of every residual branch, `1 / depth`.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> same = {"mlp": jnp.ones((8, 32))}
      >>> shampoo_jax.transfer_rules(same, same, "adam", depth=4.0).residual
      0.25
    """

    multipliers: dict[str, Multipliers]
    residual: float

    def __call__(self, path: KeyPath, leaf: Any = None) -> Multipliers:
        """Those of a parameter by its key path; ValueError for an unknown one."""
        del leaf  # rules of parameters are functions of both
        name = _name(path)
        if name not in self.multipliers:
            raise ValueError(
                f"parameter {name!r} was not among params: these are "
                f"{', '.join(list(self.multipliers)[:4])}, ...; make the rules of this tree."
            )
        return self.multipliers[name]

    def learning_rate(self, path: KeyPath, leaf: Any = None) -> float:
        """The rule that `scale_per_parameter` takes."""
        return self(path, leaf).learning_rate

    def partition(self, make: Callable[[Multipliers], optax.GradientTransformation]) -> Guarded:
        """One transformation for all parameters that have the same multipliers.

        Args:
          make: Function of multipliers giving any Optax transformation. A stack of Transformer
            blocks has two or three different ones.

        Returns:
          The transformation of the whole tree, gradients dealt with by `guard`.
        """
        groups = {_label(m): m for m in self.multipliers.values()}

        def labels(params: Any) -> Any:
            label = lambda path, leaf: _label(self(path, leaf))  # noqa: E731
            return jax.tree_util.tree_map_with_path(label, params)

        made = {label: unguarded(make(m)) for label, m in groups.items()}
        return guard(optax.partition(made, labels))


@suggests
def transfer_rules(
    base_params: Any,
    params: Any,
    method: Method,
    *,
    depth: float = 1.0,
    batch: float = 1.0,
    exponents: AutoExponents = "auto",
    graft: str | None = "adam",
    blocking: Blocking | None = None,
    normalized: bool = False,
    preconditioned: Rule | None = None,
    others: Method = "adam",
) -> TransferRules:
    """Rules by which the hyperparameters of a small base model serve a wider and deeper one.

    With `din`, `dout` the ratios of a kernel's inputs and outputs to those of the base, N that of
    depths, B that of batches, `nin`, `nout` those of the numbers of blocks along a side, and E the
    sum of the exponents:

    ================  =================  ====================  ===========================
    method            learning rate      eps                   damping
    ================  =================  ====================  ===========================
    adam              1 / din            1 / (dout N sqrt(B))
    sgd               N dout / din
    muon              sqrt(dout / din)   sqrt(din / dout) / N
    shampoo           S                                        din / (dout N^2 B nin nout)
    shampoo, grafted  that of the graft  Adam's                the same
    soap              P / din            P / (dout N)          din / (dout N^2 nin nout)
    ================  =================  ====================  ===========================

    with `S = N^(1-2E) (dout / din)^(1-E) (nin nout)^-E`, P the product of `sqrt(ratio / blocks)`
    over the sides that have a basis: `sqrt(din dout / (nin nout))` for both. Decay is 1 / width for
    all, the larger one of `din` and `dout`. The norm that a graft divides by scales by
    `sqrt(dout / din) B^(E-1) / S`.

    Which dimensions grow with the width is read off the two trees: vocabularies do not. Parameters
    outside of the repeated layers, to which `others` applies, have N = 1.

    Source: "Hyperparameter transfer enables consistent gains of matrix-preconditioned optimizers
    across scales" (arXiv:2512.05620) and its code, charliezchen/scaling-matrix-preconditioning
    5a02d4f. Ungrafted Shampoo is as in that code's main branch and in the paper; the branch of the
    paper's experiments (fineweb, a5be0b1) leaves out blocks there, which is `blocking=None` here.

    Args:
      base_params: Parameters of the model at the base width, as deep as `params`, or their shapes.
      params: Those of the model that is to be trained, or their shapes.
      method: `"adam"`, `"sgd"`, `"muon"`, `"shampoo"` or `"soap"`.
      depth: Number of residual layers as a multiple of the base's.
      batch: Batch size as a multiple of the base's.
      exponents: Of Shampoo and SOAP as given to the direction: None is 1/4 and 1/4, 0.5 the paper's
        1/2 and 1/2, `"right"` one-sided; 0 for a side that is left alone; `"auto"` as for
        `scale_by_shampoo`.
      graft: Of Shampoo as given to the direction; None for none.
      blocking: Of Shampoo and SOAP as given to the direction; None means whole matrices.
      normalized: Whether `normalize_spectrum` stands behind the direction: it takes the place of
        all learning rates here.
      preconditioned: Callable of (path, leaf): whether `method` takes this parameter, which lies in
        one of the repeated layers. None means `is_hidden_matrix`.
      others: Method of all other parameters.

    Returns:
      The rules. `scale_per_parameter(rules.learning_rate)` chains behind any direction,
      `rules.partition(make)` builds optimizers with an eps and a decay of their own.

    Raises:
      ValueError: A method or graft that is none of these, a ratio that is not positive, trees that
        are not of one model.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> shapes = lambda d: {"embed": (100, d), "mlp": (d, 4 * d), "head": (d, 100)}
      >>> tree = lambda d: {name: jnp.ones(shape) for name, shape in shapes(d).items()}
      >>> rules = shampoo_jax.transfer_rules(tree(8), tree(32), "muon", depth=2.0)
      >>> {name: m.learning_rate for name, m in rules.multipliers.items()}
      {'embed': 1.0, 'head': 0.25, 'mlp': 1.0}
      >>> adamw = lambda m: optax.chain(
      ...     optax.scale_by_adam(eps=1e-8 * m.eps),
      ...     optax.scale(m.learning_rate),
      ...     optax.add_decayed_weights(0.1 * m.decay),
      ...     optax.scale_by_learning_rate(0.01),
      ... )
      >>> rules = shampoo_jax.transfer_rules(tree(8), tree(32), "adam")
      >>> tx = rules.partition(adamw)
      >>> updates, state = tx.update(tree(32), tx.init(tree(32)), tree(32))
    """
    _check(method, others, graft, normalized, blocking, {"depth": depth, "batch": batch})
    blocking = Blocking(size=None) if blocking is None else blocking
    resolved, rule = (
        resolve_exponents(chosen_exponents(exponents, graft if method == "shampoo" else None)),
        resolve_dimension_numbers(blocking.dimension_numbers),
    )
    taken = is_hidden_matrix if preconditioned is None else preconditioned
    base = {_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(base_params)}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, own = _name(path), taken(as_written(path), leaf)
        _check_base(name, leaf, base)
        new, old = (read_kernel(path, x, rule) for x in (leaf, base[name]))
        growth = _growth(new, old, blocking, resolved)
        growth = growth._replace(depth=float(depth) if own else 1.0, batch=float(batch))
        chosen = method if own else others
        m = RULES[chosen](growth)
        if chosen == "shampoo" and graft is not None:
            lent = _sgd(growth) if graft == "sgd" else _adam(growth)
            m = m._replace(learning_rate=lent.learning_rate, eps=lent.eps)
        m = m._replace(decay=1 / max(growth.din, growth.dout))
        found[name] = m._replace(learning_rate=1.0) if normalized else m
    return TransferRules(found, 1 / float(depth))


class Growth(NamedTuple):
    """A parameter's ratios to its base."""

    din: float
    dout: float
    blocks: float  # ratio of their number
    basis: float  # product of sqrt(ratio / blocks) over sides with an exponent
    exponent: float  # sum over both sides
    exponent_of_all: float  # also of sides that are left alone for their size
    depth: float = 1.0
    batch: float = 1.0


def _growth(new: Kernel, old: Kernel, blocking: Blocking, exponents: Exponents) -> Growth:
    din, dout = new.inputs / old.inputs, new.outputs / old.outputs
    cut = dataclasses.replace(blocking, merge=None, dimension_numbers=None)
    counts = (_counts((k.inputs, k.outputs), cut, exponents) for k in (new, old))
    nin, nout = (n / o for n, o in zip(*counts, strict=True))
    left, right = exponents((new.inputs, new.outputs))
    basis = (din / nin if left else 1.0) * (dout / nout if right else 1.0)
    return Growth(din, dout, nin * nout, basis**0.5, left + right, sum(exponents((1, 1))))


def _counts(shape: tuple[int, int], blocking: Blocking, exponents: Exponents) -> list[int]:
    """Number of blocks along each side."""
    tree = {"w": jax.ShapeDtypeStruct(shape, np.float32)}
    cells = make_plan(tree, blocking, exponents).leaves[0].cells
    return [len({cell.start[side] for cell in cells}) for side in (0, 1)]


def _adam(g: Growth) -> Multipliers:
    return Multipliers(1 / g.din, 1 / (g.dout * g.depth * math.sqrt(g.batch)))


def _sgd(g: Growth) -> Multipliers:
    return Multipliers(g.depth * g.dout / g.din)


def _muon(g: Growth) -> Multipliers:
    return Multipliers(math.sqrt(g.dout / g.din), math.sqrt(g.din / g.dout) / g.depth)


def _shampoo(g: Growth) -> Multipliers:
    e, square = g.exponent, g.dout / g.din
    rate = g.depth ** (1 - 2 * e) * square ** (1 - e) * g.blocks**-e
    damping = 1 / (square * g.depth**2 * g.batch * g.blocks)
    size = math.sqrt(square) * g.batch ** (g.exponent_of_all - 1) / rate
    return Multipliers(rate, 1.0, damping, size)


def _soap(g: Growth) -> Multipliers:
    damping = g.din / (g.dout * g.depth**2 * g.blocks)
    return Multipliers(g.basis / g.din, g.basis / (g.dout * g.depth), damping)


RULES = {"adam": _adam, "sgd": _sgd, "muon": _muon, "shampoo": _shampoo, "soap": _soap}


def _name(path: KeyPath) -> str:
    return name_of(as_written(path))


def _label(m: Multipliers) -> str:
    """A name of a group for the state of its optimizer."""
    return " ".join(f"{field}={value:.9g}" for field, value in m._asdict().items() if value != 1)


def _check(
    method: str, others: str, graft: Any, normalized: bool, blocking: Any, ratios: dict[str, Any]
) -> None:
    check_choice("method", method, METHODS)
    check_choice("others", others, METHODS)
    check_choice("graft", graft, GRAFTS)
    check_flag("normalized", normalized)
    check_kind("blocking", blocking, Blocking, "Blocking(512)")
    for name, ratio in ratios.items():
        POSITIVE.but("it is the ratio to the base's, 1 for the same")(name, ratio)


def _check_base(name: str, leaf: Any, base: dict[str, Any]) -> None:
    """Raises ValueError for a parameter that its base is not of."""
    shape = np.shape(leaf)
    if name not in base:
        raise ValueError(
            f"parameter {name!r} is not in base_params: give the parameters of the same model, as "
            "deep, at the base width; jax.eval_shape gives their shapes."
        )
    if len(np.shape(base[name])) != len(shape) or 0 in (*np.shape(base[name]), *shape):
        raise ValueError(
            f"parameter {name!r} has shape {shape}, and {np.shape(base[name])} in base_params: "
            "both must have the same axes, none of them empty."
        )
