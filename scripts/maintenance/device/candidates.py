"""All that is built of the library: optimizers, solvers and products. Nothing is measured here.

The only file of the report that names options of `shampoo_jax` and `nanogpt.optimizers`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_jax
from nanogpt.config.presets import preset
from nanogpt.config.run import Config, ModelConfig
from nanogpt.config.settings import ShampooConfig, ShampooNextConfig
from nanogpt.optimizers.build import build_optimizer, register
from nanogpt.train.train_step import abstract_params
from scripts.maintenance import replay_golden
from scripts.maintenance.benchmarking.candidates import Candidate, FactorAsRoot, Stage, candidates
from scripts.maintenance.device.sizes import Sizes

Array = jax.Array
Product = Callable[[Array, Array], Array]
Roots = Callable[[Array, float], tuple[Array, Array]]

HIGHEST = jax.lax.Precision.HIGHEST
PRESETS = jax.lax.DotAlgorithmPreset
# Arithmetic of a float32 product; each name is the column of a trial.
PRECISIONS: dict[str, Any] = {
    "float32": HIGHEST,
    "TF32": PRESETS.TF32_TF32_F32,
    "bf16x3": PRESETS.BF16_BF16_F32_X3,
    "fp16": PRESETS.F16_F16_F32,
}
RECORDED = pathlib.Path(__file__).parents[3] / "tests" / "golden" / "meta"
# The exponent of two-sided Shampoo on matrices.
EXPONENT = 0.25


def product(name: str) -> Product:
    """The stacked product of float32 matrices in an arithmetic of `PRECISIONS`."""
    return functools.partial(jnp.matmul, precision=PRECISIONS[name])


def solver_roots(solver: shampoo_jax.Solver) -> Roots:
    """A solver as a function of factors and exponent that gives roots and which are its own.

    A root that is not is one that a polynomial left to eigh, or that failed altogether.
    """

    def roots(factors: Array, exponent: float) -> tuple[Array, Array]:
        count, edge, _ = factors.shape
        state = solver.init(count, edge, factors.dtype)
        root, good, state = solver(factors, exponent, state)
        fallbacks = solver.figures(state).get("fallbacks", jnp.zeros(count, jnp.int32))
        return root, good & (fallbacks == 0)

    return roots


def solvers() -> dict[str, Roots]:
    """The solvers whose roots are timed and compared with float64."""
    return {
        "polynomial": solver_roots(shampoo_jax.Polynomial()),
        "polynomial_clip": solver_roots(shampoo_jax.Polynomial(semantics="clip")),
        "eigh": solver_roots(shampoo_jax.TruncatedEigh()),
    }


def precise_roots() -> dict[str, Roots]:
    """The polynomial root with all products in one arithmetic, and as the backend has it."""
    policies = {name: shampoo_jax.PrecisionPolicy(p, p) for name, p in PRECISIONS.items()}
    chosen = {name: shampoo_jax.Polynomial(precision=policy) for name, policy in policies.items()}
    roots = {name: solver_roots(solver) for name, solver in chosen.items()}
    return roots | {"the default": solver_roots(shampoo_jax.Polynomial())}


def choices(edge: int, backend: str) -> dict[str, str]:
    """What `solver="auto"` and the polynomial's default precision mean for factors of an edge."""
    factor = jax.ShapeDtypeStruct((1, edge, edge), jnp.float32)
    solver = type(shampoo_jax.Auto().choice(factor, EXPONENT, backend)).__name__
    policy = shampoo_jax.Polynomial().policy(edge, jnp.float32, backend)
    return {
        "solver": solver,
        "first_products": policy.first.name,
        "other_products": policy.rest.name,
    }


def replay(name: str) -> float:
    """The largest error over tolerance of a recorded trajectory; at most 1 is agreement."""
    return replay_golden.error(RECORDED / f"{name}.npz")


def step_groups(sizes: Sizes) -> tuple[tuple[Candidate, ...], ...]:
    """The optimizers whose steps are timed, the most wanted first; a group is compiled at once."""
    n = sizes.every
    solvers = ("polynomial", "polynomial_clip", "eigh")
    built = [*candidates(solvers, (1, n), sizes.block), _one_sided(1), _one_sided(n)]
    known = {candidate.name: candidate for candidate in built}
    names = (
        ("adamw", "muon_5", "muon_12_bfloat16", "shampoo_polynomial_1"),
        (f"shampoo_polynomial_{n}", "shampoo_polynomial_clip_1", "one_sided_polynomial_1"),
        ("soap_1", "kl_shampoo_1", f"soap_{n}", f"kl_shampoo_{n}"),
        (f"shampoo_polynomial_clip_{n}", f"one_sided_polynomial_{n}"),
        # Last, since a step may take seconds.
        ("shampoo_eigh_1", f"shampoo_eigh_{n}"),
    )
    return tuple(tuple(known[name] for name in group) for group in names)


def _one_sided(every: int) -> Candidate:
    """One-sided Shampoo of the smaller side, which needs no blocks here: no such side is cut."""
    graft = shampoo_jax.scale_by_second_moment(0.9, 1e-15)

    def walk(direction: Any) -> Any:
        inner = shampoo_jax.graft(graft, direction)
        chain = optax.chain(shampoo_jax.filter_gradient(0.9), inner)
        return shampoo_jax.blocked(chain, blocking=shampoo_jax.Blocking(None), exponents="smaller")

    build = functools.partial(
        shampoo_jax.scale_by_one_sided_shampoo, 0.9, 0.9, side="smaller", graft="adam"
    )
    name = f"one_sided_polynomial_{every}"
    stages = (
        Stage("rest", "one_sided rest", lambda: walk(shampoo_jax.on_updates(optax.identity()))),
        Stage(
            "statistics",
            "one_sided statistics",
            lambda: walk(shampoo_jax.accumulate_factors(0.9)),
        ),
        Stage("apply", "one_sided apply", lambda: build(solver=FactorAsRoot())),
        Stage("roots", name, lambda: build(solver="polynomial", every=every)),
    )
    return Candidate(name, every, stages)


def dash_step(sizes: Sizes, solver: str) -> optax.GradientTransformation:
    """Shampoo's direction on DASH's stacks, whose leading axis counts blocks."""
    return shampoo_jax.scale_by_shampoo(
        blocking=shampoo_jax.Blocking(
            sizes.block,
            dimension_numbers=shampoo_jax.batch_axes({str(i): 0 for i in range(len(sizes.dash))}),
        ),
        solver=solver,
    )


def model_config(sizes: Sizes, *, bfloat16: bool) -> ModelConfig:
    """The GPT of the sizes; bfloat16 where the device has products for it."""
    return ModelConfig(
        sizes.vocabulary,
        sizes.layers,
        sizes.width,
        sizes.head,
        4 * sizes.width,
        sizes.length,
        "bfloat16" if bfloat16 else "float32",
    )


def timed_config(sizes: Sizes, *, bfloat16: bool) -> Config:
    """A run to time forward and backward pass with."""
    config = preset("track3", "adamw")
    data = dataclasses.replace(config.data, batch_rows=sizes.rows, microbatch_rows=sizes.microbatch)
    return dataclasses.replace(config, model=model_config(sizes, bfloat16=bfloat16), data=data)


RECIPES = {
    "train_adamw": "adamw",
    "train_muon": "muon_track3",
    "train_shampoo": "shampoo",
    "train_recipe": "shampoo_next",
}


def training(part: str, sizes: Sizes, *, bfloat16: bool) -> tuple[Config, Any, str]:
    """A training run: its configuration, its optimizer, and what it is in words.

    Rates, decays and auxiliary settings are track 3's, published for rows 16 times as many.
    """
    recipe = RECIPES[part]
    config = preset("track3", recipe)
    if recipe == "shampoo":
        config = dataclasses.replace(
            config, optimizer=_register_polynomial(), matrices=ShampooConfig(0.01, weight_decay=0.1)
        )
    if isinstance(config.matrices, ShampooNextConfig):
        matrices = dataclasses.replace(config.matrices, block_size=sizes.block)
        config = dataclasses.replace(config, matrices=matrices)
    schedule = dataclasses.replace(config.schedule, steps=sizes.steps)
    data = dataclasses.replace(
        config.data,
        batch_rows=sizes.train_rows,
        microbatch_rows=min(sizes.microbatch, sizes.train_rows),
    )
    config = dataclasses.replace(
        config, model=model_config(sizes, bfloat16=bfloat16), data=data, schedule=schedule
    )
    words = {
        "adamw": "AdamW, pull request 353",
        "muon_track3": "the benchmark's Muon, #36",
        "shampoo": f"Shampoo, rates of #35, polynomial roots every step, blocks of {sizes.block}",
        "shampoo_next": f"the recipe of docs/recipe.md, roots every step, blocks of {sizes.block}",
    }[recipe]
    return config, build_optimizer(config, abstract_params(config.model)), words


def _register_polynomial() -> str:
    """Names a direction of `nanogpt` that is Shampoo with roots by products."""
    name = "shampoo_polynomial"

    def direction(settings: ShampooConfig, _: Any) -> optax.GradientTransformation:
        return shampoo_jax.scale_by_shampoo(
            settings.b1,
            settings.b2,
            blocking=shampoo_jax.Blocking(settings.block_size),
            solver="polynomial",
        )

    register(name, direction, ShampooConfig(0.01, weight_decay=0.1))
    return name
