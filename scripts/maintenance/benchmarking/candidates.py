"""The optimizers that are compared, each with the shorter transformations that split its time.

A step's time is split by differences. Every optimizer comes as a series of transformations, each
doing what the one before does and one kind of work more, and each compiled and timed as a whole; a
part's time is its transformation's minus the one's before, so the parts add up to the step.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import shampoo_jax
from nanogpt.config.settings import MuonConfig
from nanogpt.optimizers.directions import DIRECTIONS

NEVER = 2**30  # interval of a refresh that no benchmark reaches
PARTS = ("rest", "statistics", "apply", "roots")
MUON = "muon_5"  # what ratios are taken to


class Stage(NamedTuple):
    """A transformation that does all that the stage before does, and `part` as well."""

    part: str  # of `PARTS`
    key: str  # stages with equal keys are the same transformation, timed once
    build: Callable[[], optax.GradientTransformation]


class Candidate(NamedTuple):
    """An optimizer to time; its last stage is the whole."""

    name: str
    every: int  # steps between refreshes: the period of its cost
    stages: tuple[Stage, ...]


def candidates(
    solvers: Sequence[str], intervals: Sequence[int], block_size: int | None
) -> Iterator[Candidate]:
    """Yields every optimizer of the comparison, the two that ratios are taken to first.

    Args:
        solvers: Names of Shampoo's inverse-root solvers.
        intervals: Steps between refreshes, for all that refresh.
        block_size: Largest edge of a block; None for whole matrices.
    """
    yield Candidate("adamw", 1, (Stage("rest", "adamw", optax.scale_by_adam),))
    yield from _muons()
    yield Candidate("psgd_kron", 1, (Stage("rest", "psgd_kron", _psgd_kron),))
    for every in intervals:
        for solver in solvers:
            yield from _shampoo(solver, every, block_size)
        yield _soap(every, block_size)
        yield _kl_shampoo(every, block_size)


def _muons() -> Iterator[Candidate]:
    momentum = Stage("rest", "momentum", lambda: optax.trace(0.95, nesterov=True))
    plain, track3 = DIRECTIONS["muon"], DIRECTIONS["muon_track3"]
    settings = {"learning_rate": 1.0, "weight_decay": 0.0}
    twelve = {"ns_steps": 12, "ns_coeffs": (2.0, -1.5, 0.5)}
    for name, direction, config in (
        (MUON, plain, MuonConfig(**settings)),
        ("muon_12", plain, MuonConfig(**settings, **twelve)),
        ("muon_12_bfloat16", track3, MuonConfig(**settings, **twelve, ns_dtype="bfloat16")),
    ):
        whole = Stage("roots", name, functools.partial(direction, config, None))
        yield Candidate(name, 1, (momentum, whole))


def _psgd_kron() -> optax.GradientTransformation:
    """The package's own defaults, with the preconditioner updated at every step."""
    try:
        psgdax = importlib.import_module("psgdax")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"not installed: pip install psgdax ({error})") from error
    return psgdax.scale_by_kron(preconditioner_update_probability=1.0)


@dataclasses.dataclass(frozen=True)
class FactorAsRoot(shampoo_jax.Solver):
    """A solver that costs nothing; what remains of a step is statistics and application."""

    def __call__(
        self, factor: jax.Array, exponent: float, state: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Returns the factor itself."""
        return factor, jnp.ones(len(factor), bool), state


def _walk(block_size: int | None, direction: optax.GradientTransformation) -> Any:
    """What `scale_by_shampoo` does around its direction: blocks, momentum and Adam's magnitude."""
    magnitude = shampoo_jax.scale_by_second_moment(0.9, 1e-15)
    inner = optax.chain(shampoo_jax.filter_gradient(0.9), shampoo_jax.graft(magnitude, direction))
    return shampoo_jax.blocked(inner, blocking=shampoo_jax.Blocking(block_size))


def _no_direction() -> Any:
    return shampoo_jax.on_updates(optax.identity())


def _shampoo(solver: str, every: int, block_size: int | None) -> Iterator[Candidate]:
    """Shampoo with one solver: all roots in one step, and spread over the interval."""
    before = (
        Stage("rest", "walk", lambda: _walk(block_size, _no_direction())),
        Stage(
            "statistics",
            "statistics",
            lambda: _walk(block_size, shampoo_jax.accumulate_factors(0.9)),
        ),
        Stage(
            "apply",
            "apply",
            lambda: shampoo_jax.scale_by_shampoo(
                blocking=shampoo_jax.Blocking(block_size), solver=FactorAsRoot()
            ),
        ),
    )
    for stagger in [False, True] if every > 1 else [False]:
        name = f"shampoo_{solver}_{every}" + "_staggered" * stagger
        whole = functools.partial(
            shampoo_jax.scale_by_shampoo,
            blocking=shampoo_jax.Blocking(block_size),
            solver=solver,
            every=every,
            refresh=shampoo_jax.Refresh(stagger=stagger),
        )
        yield Candidate(name, every, (*before, Stage("roots", name, whole)))


def _soap(every: int, block_size: int | None) -> Candidate:
    """SOAP; its "roots" are the bases."""

    def adam(*more: Any) -> Any:
        second = shampoo_jax.scale_by_second_moment(0.95, 1e-8)
        chain = optax.chain(shampoo_jax.filter_gradient(0.95), second, *more)
        return shampoo_jax.blocked(chain, blocking=shampoo_jax.Blocking(block_size))

    build = functools.partial(shampoo_jax.scale_by_soap, blocking=shampoo_jax.Blocking(block_size))
    stages = (
        Stage("rest", "blocked adam", adam),
        Stage(
            "statistics",
            "blocked adam and factors",
            lambda: adam(shampoo_jax.accumulate_factors(0.95)),
        ),
        Stage("apply", "soap", functools.partial(build, every=NEVER)),
        Stage("roots", f"soap_{every}", functools.partial(build, every=every)),
    )
    return Candidate(f"soap_{every}", every, stages)


def _kl_shampoo(every: int, block_size: int | None) -> Candidate:
    """KL-Shampoo; its statistics need the bases, so they are a share of "apply"."""
    build = functools.partial(
        shampoo_jax.scale_by_kl_shampoo, blocking=shampoo_jax.Blocking(block_size)
    )
    momentum = functools.partial(
        shampoo_jax.blocked,
        shampoo_jax.filter_gradient(0.9),
        blocking=shampoo_jax.Blocking(block_size),
    )
    stages = (
        Stage("rest", "blocked momentum", momentum),
        Stage("apply", "kl_shampoo", functools.partial(build, every=NEVER)),
        Stage("roots", f"kl_shampoo_{every}", functools.partial(build, every=every)),
    )
    return Candidate(f"kl_shampoo_{every}", every, stages)


def solver_names() -> tuple[str, ...]:
    """Every registered inverse-root solver."""
    return shampoo_jax.solver_names()
