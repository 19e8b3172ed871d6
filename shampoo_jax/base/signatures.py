"""Keywords that a function does not have, answered with the nearest that it has."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

ROUTED = "as_optimizer(direction, learning_rate, ...)"  # what directions leave to it

REFRESH = "refresh=Refresh(...), for bases BasisRefresh(...)"

# What other packages, and earlier versions of this one, call an option; then what does it here, of
# which the first counts that the function has.
ANSWERS = (
    ("lr step_size learning_rate", "learning_rate", ROUTED),
    ("momentum decay weight_decay preconditioned others", ROUTED),
    ("betas beta", "b1=..., b2=..."),
    ("beta1 momentum_decay", "b1"),
    ("beta2 preconditioner_decay", "b2"),
    ("shampoo_beta", "factor_b2", "b2"),
    ("beta3", "b3"),
    ("epsilon eps diagonal_epsilon", "eps", "solver=ShiftedEigh(damping=...)"),
    ("matrix_epsilon factor_eps damping", "damping", "solver=ShiftedEigh(damping=...)"),
    ("cutoff rtol atol", "rtol", "solver=TruncatedEigh(rtol, atol)"),
    ("solver basis", "basis=EighBasis(...)", "solver=CarriedBasis(...)"),
    ("precondition_frequency precond_freq update_freq preconditioning_compute_steps", "every"),
    ("interval update_interval update_every frequency", "every"),
    ("start start_preconditioning_step stagger chunk when skip_first reorder", REFRESH),
    (
        "block_size block_width max_preconditioner_dim max_precond_dim",
        "blocking=Blocking(size=...)",
    ),
    ("merge merge_dims merge_small_dims use_merge_dims", "blocking=Blocking(merge=...)"),
    ("canonical dimension_numbers weight_dimension_numbers", "blocking=Blocking(...)"),
    ("grafting_config graft_type grafting", "graft"),
    ("graft_b2 graft_eps grafting_beta2 grafting_epsilon", "graft=scale_by_second_moment(b2, eps)"),
    ("nesterov use_nesterov dampening", "momentum=momentum(...)"),
    ("weight_decay_kind use_decoupled_weight_decay peak_lr mask", "decay=Decay(...)", ROUTED),
    ("adamw_learning_rate adamw_b1 adamw_b2 adamw_eps", "others=optax.adamw(...)", ROUTED),
    (
        "exponent_override inverse_exponent_override inv_root_override exponents",
        "exponents",
        "side",
    ),
    ("cap", "max_scale"),
)


def suggests(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a keyword that the function does not have raises TypeError with the nearest.

    The signature stays the written one, for editors, type checkers and `inspect.signature`.
    """
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs.keys() - names.keys():
            hint = _nearest(name, names)
            raise TypeError(
                f"{function.__name__} has no option {name!r}"
                + (f": did you mean {hint}?" if hint else f": it has {', '.join(names)}.")
            )
        return function(*args, **kwargs)

    return call


def _nearest(name: str, names: Collection[str]) -> str | None:
    """What of a function's options is meant, misspelt names of other packages included."""
    answers = {own: own for own in names}
    for others, *hints in ANSWERS:
        # Every hint begins with an option that it needs, but for the one of another function.
        fitting = [h for h in hints if h == ROUTED or h.partition("=")[0] in names]
        if name in others.split() and not fitting:
            # Well spelt, of no use here: only what is almost the same can be meant.
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
            return near[0] if near else None
        if fitting:
            answers = dict.fromkeys(others.split(), fitting[0]) | answers
    near = difflib.get_close_matches(name, answers, n=1)
    return answers[near[0]] if near else None
