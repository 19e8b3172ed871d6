"""Checks a recorded config: what the format does not have is refused, nothing is ignored.

A section is a dict; its rules give the values of every key it must or may have. A `kind` chooses
the rules of its section. Combinations that the reference refuses are refused as well.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Config = dict[str, Any]


class Values(NamedTuple):
    """What a key may be: words for the message, and the test."""

    words: str
    holds: Callable[[Any], bool]


class Section(NamedTuple):
    """The keys a section must have and those it may have."""

    required: dict[str, Values] = {}
    optional: dict[str, Values] = {}


def one_of(*values: Any) -> Values:
    """One of these values, of the same type: 1 is not True."""
    return Values(
        "one of " + ", ".join(map(repr, values)),
        lambda v: any(type(v) is type(w) and v == w for w in values),
    )


def number(words: str, holds: Callable[[float], bool]) -> Values:
    """A finite number."""
    return Values(
        words,
        lambda v: (
            isinstance(v, (int, float))
            and not isinstance(v, bool)
            and math.isfinite(v)
            and holds(v)
        ),
    )


def either(first: Values, second: Values) -> Values:
    """What one of two allows."""
    return Values(f"{first.words}, or {second.words}", lambda v: first.holds(v) or second.holds(v))


def listed(entries: Values) -> Values:
    """A list that is not empty."""
    return Values(
        f"a list of {entries.words}",
        lambda v: isinstance(v, list) and bool(v) and all(map(entries.holds, v)),
    )


def by_order(entries: Callable[[int], Values]) -> Values:
    """A dict from block order, as a string, to what `entries(order)` allows."""
    return Values(
        f"a dict from block order to {entries(2).words}",
        lambda v: (
            isinstance(v, dict)
            and all(k.isdecimal() and entries(int(k)).holds(e) for k, e in v.items())
        ),
    )


def by_dim(order: int) -> Values:
    """A dict from dimension of a block, as a string, to an exponent."""
    return Values(
        "a dict from dimension to such numbers",
        lambda v: (
            isinstance(v, dict)
            and all(k.isdecimal() and int(k) < order and FROM_0.holds(e) for k, e in v.items())
        ),
    )


def dims(order: int) -> Values:
    """Dimensions of a block, each once."""
    return Values(
        "a list of dimensions, each once",
        lambda v: (
            isinstance(v, list)
            and all(type(d) is int and 0 <= d < order for d in v)
            and len(set(v)) == len(v)
        ),
    )


ANY = Values("anything", lambda v: True)
FROM_0 = number("a number >= 0", lambda v: v >= 0)
POSITIVE = number("a number > 0", lambda v: v > 0)
BELOW_1 = number("a number in [0, 1)", lambda v: 0 <= v < 1)
UP_TO_1 = number("a number in [0, 1]", lambda v: 0 <= v <= 1)
SHARE = number("a number in (0, 1]", lambda v: 0 < v <= 1)
ZERO = number("0", lambda v: v == 0)
COUNT = number("an integer >= 1", lambda v: isinstance(v, int) and v >= 1)
FLAG, OFF, NULL, INF = one_of(True, False), one_of(False), one_of(None), one_of("inf")
NONE_GIVEN = Values("{}", lambda v: v == {})

TOP = Section(
    {
        "learning_rate": either(FROM_0, listed(FROM_0)),
        "beta1": BELOW_1,
        "beta1_output": either(NULL, BELOW_1),
        "beta2": UP_TO_1,
        "epsilon": FROM_0,
        "bias_correction": FLAG,
        "weight_decay": FROM_0,
        "weight_decay_kind": one_of("l2", "decoupled", "lr_over_peak", "over_peak"),
        "max_block_dim": either(INF, COUNT),
        "merge_target_order": either(INF, COUNT),
        "refresh_interval": COUNT,
        "first_refresh_step": either(one_of(-1), COUNT),
        "preconditioner": ANY,
        "graft": ANY,
        "momentum": ANY,
        "averaging": ANY,
        "dtype": one_of("float32", "float64"),
    },
    {"description": ANY},
)
MOMENTUM = Section(
    {
        "momentum": number("a number in (0, 1)", lambda v: 0 < v < 1),
        "dampening": BELOW_1,
        "nesterov": FLAG,
    }
)
AVERAGING = {
    "primal": Section({"eval_coeff": BELOW_1, "train_coeff": SHARE}),
    "schedule_free": Section({"train_coeff": SHARE, "lr_power": FROM_0}),
}
SECOND_MOMENT = Section({"beta2": SHARE, "epsilon": POSITIVE}, {"unweighted_update": FLAG})
GRAFTS = {
    "none": Section(),
    "sgd": Section(),
    "adagrad": Section({"epsilon": POSITIVE}, {"unweighted_update": FLAG}),
    "rmsprop": SECOND_MOMENT,
    "adam": SECOND_MOMENT,
}

PLAIN_EIGH = {"eigh": Section({}, {"tolerance": ZERO})}
STOPS = {"max_iterations": COUNT, "tolerance": FROM_0}
ROOTS = PLAIN_EIGH | {
    "newton": Section({}, STOPS),
    "newton_high_order": Section(
        {"rel_epsilon": FROM_0, "abs_epsilon": FROM_0},
        STOPS | {"order": number("an integer >= 2", lambda v: isinstance(v, int) and v >= 2)},
    ),
}
BASES = {
    "eigh": Section({}, {"tolerance": UP_TO_1}),
    "qr": Section({}, STOPS | {"tolerance": UP_TO_1}),
}
ORTHOGONAL = {
    "svd": Section(),
    "newton_schulz": Section(
        {}, {"iterations": COUNT, "coefficients": listed(number("numbers", lambda v: True))}
    ),
}

NO_RANK = {"shift": Section({"before": one_of(True)})}
SHIFT = {"shift": Section({"before": FLAG})}
RANKS = SHIFT | {"pseudo": Section({"rtol": either(NULL, FROM_0), "atol": FROM_0})}

COMMON = {"solver": ANY, "rank": ANY, "skip_basis": NONE_GIVEN}
NO_FACTORS = COMMON | {"exponents": NONE_GIVEN, "trace_scaling": NULL, "unweighted_update": OFF}
FACTORS = COMMON | {
    "exponents": by_order(lambda order: either(FROM_0, by_dim(order))),
    "trace_scaling": either(NULL, SHARE),
    "unweighted_update": FLAG,
}
EIGENBASIS = FACTORS | {"exponents": by_order(lambda order: POSITIVE), "skip_basis": by_order(dims)}
DIAGONAL = NO_FACTORS | {"epsilon": POSITIVE, "unweighted_update": FLAG}

# Of every kind of preconditioner: its keys, its solvers, its ranks.
KINDS: dict[str, tuple[Section, dict[str, Section], dict[str, Section]]] = {
    **dict.fromkeys(("kronecker_root", "kl_root"), (Section(FACTORS), ROOTS, RANKS)),
    **dict.fromkeys(("kronecker_eig", "kl_eig"), (Section(FACTORS), BASES, RANKS)),
    "eigenbasis_adam": (Section(EIGENBASIS), BASES, SHIFT),
    "identity": (Section(NO_FACTORS), PLAIN_EIGH, NO_RANK),
    "sign": (Section(NO_FACTORS, {"scale": one_of(None, "l1_norm")}), PLAIN_EIGH, NO_RANK),
    "orthogonal": (
        Section(
            NO_FACTORS,
            {"scale": one_of(None, "sqrt_max1_rows_over_cols"), "nuclear_norm": FLAG},
        ),
        ORTHOGONAL,
        NO_RANK,
    ),
    "adagrad": (Section(DIAGONAL), PLAIN_EIGH, NO_RANK),
    **dict.fromkeys(
        ("adam", "rmsprop"), (Section(DIAGONAL | {"beta2": SHARE}), PLAIN_EIGH, NO_RANK)
    ),
}


def check(config: Config) -> None:
    """Raises ValueError naming the key and its value if a config is not in the format."""
    check_section("", config, TOP)
    start, every = config["first_refresh_step"], config["refresh_interval"]
    if start != -1 and start < every:
        refuse("first_refresh_step", start, f"-1 or at least refresh_interval={every}")
    check_kind("graft", config["graft"], GRAFTS)
    if config["momentum"] is not None:
        check_section("momentum", config["momentum"], MOMENTUM)
    if config["averaging"] is not None:
        check_kind("averaging", config["averaging"], AVERAGING)
        if config["momentum"] is not None:
            refuse("averaging", config["averaging"], "null with momentum: the reference has one")
    check_preconditioner(config["preconditioner"], config["epsilon"])


def check_preconditioner(entry: Any, epsilon: float) -> None:
    """Refuses what the reference's preconditioner of this kind does not have."""
    path = "preconditioner"
    check_kind(path, entry, {kind: rules for kind, (rules, _, _) in KINDS.items()})
    _, solvers, ranks = KINDS[entry["kind"]]
    check_kind(f"{path}.solver", entry["solver"], solvers)
    solver = entry["solver"]["kind"]
    check_kind(f"{path}.rank", entry["rank"], ranks if solver in BASES else NO_RANK)
    if entry["rank"]["kind"] == "pseudo" and epsilon != 0:
        refuse("epsilon", epsilon, "0 with rank 'pseudo'")
    if entry["rank"]["kind"] == "shift" and epsilon == 0:
        refuse("epsilon", epsilon, "positive, 0 only with rank 'pseudo'")
    if entry.get("nuclear_norm") and solver != "svd":
        refuse(f"{path}.nuclear_norm", True, "false unless the solver is 'svd'")
    coefficients = entry["solver"].get("coefficients", [0] * 3)
    if len(coefficients) != 3:
        refuse(f"{path}.solver.coefficients", coefficients, "three numbers")


def check_kind(path: str, entry: Any, kinds: dict[str, Section]) -> None:
    """Checks a section by the rules of its `kind`."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    allowed = one_of(*kinds)
    if not allowed.holds(kind):
        refuse(f"{path}.kind" if isinstance(entry, dict) else path, kind or entry, allowed.words)
    required, optional = kinds[str(kind)]
    check_section(path, entry, Section({"kind": ANY, **required}, optional))


def check_section(path: str, entry: Any, rules: Section) -> None:
    """Refuses missing and unknown keys and values that a key cannot have."""
    if not isinstance(entry, dict):
        refuse(path, entry, "a dict")
    prefix = f"{path}." if path else ""
    for key in rules.required:
        if key not in entry:
            raise ValueError(f"{prefix}{key} is missing: not in the format.")
    known = rules.required | rules.optional
    for key, value in entry.items():
        if key not in known:
            refuse(prefix + key, value, f"absent, the keys are {', '.join(known)}")
        if not known[key].holds(value):
            refuse(prefix + key, value, known[key].words)


def refuse(key: str, value: Any, allowed: str) -> None:
    """Raises ValueError."""
    raise ValueError(f"{key}={value!r} is not in the format: it must be {allowed}.")
