"""Keywords that a function does not have, answered with the nearest that it has."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What other packages, and earlier versions of this one, call an option.
KNOWN_AS = {
    **dict.fromkeys(("lr", "step_size"), "learning_rate"),
    **dict.fromkeys(("beta1", "momentum_decay"), "b1"),
    **dict.fromkeys(("beta2", "preconditioner_decay", "shampoo_beta"), "b2"),
    **dict.fromkeys(("beta3",), "b3"),
    **dict.fromkeys(
        ("precondition_frequency", "preconditioning_compute_steps", "update_freq")
        + ("precondition_every_k", "precond_freq", "update_preconditioner_freq"),
        "every",
    ),
    **dict.fromkeys(
        ("start_preconditioning_step", "warmup_steps", "stagger", "chunk", "start"),
        "refresh=Refresh(start=..., stagger=..., chunk=...)",
    ),
    **dict.fromkeys(
        ("block_size", "block_width", "max_preconditioner_dim", "max_precond_dim"),
        "blocking=Blocking(size=...)",
    ),
    **dict.fromkeys(("merge", "merge_dims", "merge_small_dims"), "blocking=Blocking(merge=...)"),
    "canonical": "blocking=Blocking(canonical=...)",
    "dimension_numbers": "blocking=Blocking(dimension_numbers=...)",
    "weight_dimension_numbers": "blocking=Blocking(dimension_numbers=...)",
    "cutoff": "solver=TruncatedEigh(rtol=0.0) for 'positive'",
    "rtol": "solver=TruncatedEigh(rtol=...) or basis=QRBasis(rtol=...)",
    "atol": "solver=TruncatedEigh(atol=...)",
    **dict.fromkeys(
        ("epsilon", "matrix_epsilon", "eps", "factor_eps", "damping"),
        "solver=ShiftedEigh(damping=...) or basis=QRBasis(damping=...)",
    ),
    **dict.fromkeys(("grafting_config", "graft_type", "grafting"), "graft"),
    **dict.fromkeys(
        ("graft_b2", "graft_eps", "grafting_beta2", "grafting_epsilon"),
        "graft=scale_by_second_moment(b2, eps)",
    ),
    **dict.fromkeys(("nesterov", "dampening", "use_nesterov"), "momentum=momentum(...)"),
    **dict.fromkeys(("weight_decay_kind", "peak_lr", "mask"), "decay=Decay(kind, peak_lr, mask)"),
    **dict.fromkeys(
        ("adamw_learning_rate", "adamw_b1", "adamw_b2", "adamw_eps", "adamw_weight_decay"),
        "others=optax.adamw(...)",
    ),
    "cap": "max_scale",
    "inverse_exponent_override": "exponents",
    "exponent_override": "exponents",
}


def suggests(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a keyword that the function does not have raises TypeError with the nearest.

    The signature stays the written one, for editors, type checkers and `inspect.signature`.
    """
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs.keys() - names.keys():
            near = difflib.get_close_matches(name, names, n=1)
            # Its own near names first: of "adamw_b1" nothing here is as telling as the table.
            hint = KNOWN_AS.get(name) or (near[0] if near else None)
            raise TypeError(
                f"{function.__name__} has no option {name!r}"
                + (f": did you mean {hint}?" if hint else f": it has {', '.join(names)}.")
            )
        return function(*args, **kwargs)

    return call
