"""Settings of the optimizers of the block matrices, one frozen dataclass each.

A field's trailing comment is its `--help` text. Impossible values are refused where they are set.
Every eps is on the scale of gradients summed over the tokens of a batch.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16"]
Triple = tuple[float, float, float]
Side = Literal["left", "right", "smaller"]

_RULES = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "between 0 and 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "positive and finite": lambda value: 0 < value < math.inf,
    "at least 0 and finite": lambda value: 0 <= value < math.inf,
    "at least 1 and finite": lambda value: 1 <= value < math.inf,
}
# Of fields whose name means the same for every optimizer.
_FIELD_RULES = {
    "positive and finite": (
        "learning_rate",
        "exponent",
        "moment_exponent",
        "max_scale",
        "preconditioner_rate",
        "gamma",
    ),
    "at least 0 and finite": ("weight_decay", "eps", "graft_eps", "damping", "mlp_decay", "ns_eps"),
    "at least 0 and below 1": ("b1", "b2", "graft_b2"),
    "between 0 and 1": ("first_weight", "tolerance"),
    "at least 1": ("ns_steps", "every", "block_size", "tokens", "monitor"),
    "at least 0": ("b1_warmup", "preconditioner_seed", "probe_seed", "basis_seed"),
}


def check(settings: Any, rule: str, *names: str) -> None:
    """Refuses a named number that breaks a rule; fields that may be None, or words, are free then.

    Args:
        settings: Any object with these fields.
        rule: A key of `_RULES`.
        *names: Fields.

    Raises:
        ValueError: names the field, its value and the rule.
    """
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, str | None) and not _RULES[rule](value):
            raise ValueError(f"{name}={value!r}: must be {rule}.")


def check_types(settings: Any) -> None:
    """Refuses a field whose value is not of the kind that its annotation says.

    Args:
        settings: A dataclass.

    Raises:
        ValueError: names the field, its value and the kind.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not _is(value, hint):
            raise ValueError(f"{field.name}={value!r}: must be {_words(hint)}.")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; what is no plain annotation passes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(kinds) and all(map(_is, value, kinds))
    if hint in (int, float):  # Python's own: settings are written as JSON
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _words(hint: Any) -> str:
    """What an annotation says, in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if typing.get_origin(hint) is tuple:
        return f"a tuple of which each is {_words(parts[0])}"
    known = {
        int: "a whole number (int)",
        float: "a number (float)",
        bool: "True or False",
        str: "a text",
    }
    return "None" if hint is types.NoneType else known.get(hint) or f"a {hint.__name__}"


@dataclasses.dataclass(frozen=True)
class MatrixConfig:
    """What every optimizer of the block matrices has; enough for one without settings of its own.

    A class for an optimizer of your own derives from this one and adds fields with defaults; those
    called as others here are checked like them.
    """

    learning_rate: float  # peak
    weight_decay: float  # decoupled, multiplied by the scheduled learning rate
    # Hold each matrix's norm: the learning rate is then the step's size relative to the matrix.
    hyperball: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        check_types(self)
        for rule, names in _FIELD_RULES.items():
            check(self, rule, *(name for name in names if hasattr(self, name)))
        if self.hyperball and self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} with hyperball=True, which undoes any change of "
                "a matrix's norm: set weight_decay=0."
            )

    @property
    def reads_microbatches(self) -> bool:
        """Whether the optimizer is given the gradients of all microbatches of a step."""
        return False


@dataclasses.dataclass(frozen=True)
class AdamWConfig(MatrixConfig):
    """AdamW on the block matrices; AdamH with `hyperball`."""

    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-10  # added to sqrt(second moment); on the scale of summed gradients


@dataclasses.dataclass(frozen=True)
class MuonConfig(MatrixConfig):
    """Muon on the block matrices; MuonH with `hyperball`."""

    b1: float = 0.95  # decay of the momentum
    ns_steps: int = 5  # Newton-Schulz iterations
    # Quintic's coefficients: one triple, or one for each iteration.
    ns_coeffs: Triple | tuple[Triple, ...] = (3.4445, -4.775, 2.0315)
    ns_dtype: Dtype = "float32"  # precision of the Newton-Schulz iterations; muon_track3 only
    b1_warmup: int = 0  # steps over which the momentum rises from 0.85 to b1; muon_track3 only
    mlp_decay: float = 1.0  # factor of weight_decay on the matrices of the MLPs
    # Whether 1 - rate * decay is rounded as one factor of the matrices, as in the scripts.
    factor_decay: bool = False


@dataclasses.dataclass(frozen=True)
class PMuonConfig(MatrixConfig):
    """PMuon on the block matrices: momentum between roots of its own factors, orthogonalized."""

    b1: float = 0.95  # decay of the momentum
    b2: float = 0.95  # decay of the factors, to which new squares are added with weight 1
    exponent: float = 0.3  # e of factor^-e, on each of the two sides
    damping: float = 1e-6  # added to the factors; their least eigenvalue; on the scale of squares
    ns_steps: int = 12  # Newton-Schulz iterations
    ns_coeffs: Triple = (2.0, -1.5, 0.5)  # of them
    ns_eps: float = 1e-7  # added to the norm that updates are divided by before
    ns_dtype: Dtype = "float32"  # precision of the Newton-Schulz iterations
    basis_seed: int = 0  # of the bases that the iteration starts from


@dataclasses.dataclass(frozen=True)
class SoapMuonConfig(MatrixConfig):
    """SOAP of the momentum, orthogonalized; norms and lengths of updates are held.

    `weight_decay` is cautious here, of entries that move towards 0, and so is 0 in most records.
    """

    b1: float = 0.95  # decay of the momentum
    b1_low: float = 0.85  # its value at the first step and at b1_end
    b1_warmup: int = 300  # steps over which it rises
    b1_cooldown: int = 200  # steps over which it falls again
    b1_end: int = 2900  # step at which it has fallen
    b2: float = 0.9  # decay of the factors and the second moment
    every: int = 1  # steps between refreshes of the bases
    moment_exponent: float = 0.5  # of the second moment
    moment_floor: float = 1e-16  # least second moment; on the scale of summed gradients' squares
    trust_least: float = 0.2  # cosine up to which SOAP is not trusted in attention's projections
    trust_floor: float = 0.45  # least share of SOAP there, at first
    trust_cap: float = 0.85  # largest share of SOAP there, at first
    trust_steps: int = 1375  # steps after which the floor begins to fall
    trust_end: int = 1625  # steps after which it is 0 and the cap 1
    length: float = 0.3825  # least length of an update relative to its matrix
    by_row: bool = False  # whether each of the matrix's outputs has its own
    outward: float = 0.5  # share of what lengthens the matrix that is left
    inward: float = 1.0  # share of what shortens it
    ns_steps: int = 12  # Newton-Schulz iterations
    ns_coeffs: Triple = (2.0, -1.5, 0.5)  # of them
    ns_dtype: Dtype = "float32"  # precision of these and of the updates behind them

    def __post_init__(self):
        super().__post_init__()
        check(self, "at least 0 and below 1", "b1_low", "trust_least")
        check(self, "between 0 and 1", "trust_floor", "trust_cap")
        check(self, "at least 0 and finite", "moment_floor", "length", "outward", "inward")
        check(self, "at least 1", "b1_warmup", "b1_cooldown", "b1_end")
        if not 0 <= self.trust_steps < self.trust_end:
            raise ValueError(
                f"trust_steps={self.trust_steps}: must be at least 0 and below "
                f"trust_end={self.trust_end}, between which the floor falls."
            )


@dataclasses.dataclass(frozen=True)
class FactorConfig(MatrixConfig):
    """What the optimizers with factors have in common."""

    # Or --monitor: steps between records of the factors, for nanogpt spectrum; None: no records.
    monitor: int | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class ShampooConfig(FactorConfig):
    """Shampoo on the block matrices."""

    b1: float = 0.9  # decay of the filtered gradient
    b2: float = 0.9  # decay of the factors
    # Keep eigenvalues > n*eps*max, or > 0; "shift" adds damping to all instead.
    cutoff: Literal["relative", "positive", "shift"] = "relative"
    # Of the inverse roots; polynomial: by products alone, with cutoff "relative"; polynomial_clip:
    # likewise, raising small eigenvalues to the cutoff, for fewer products.
    solver: Literal["eigh", "polynomial", "polynomial_clip"] = "eigh"
    every: int = 1  # steps between refreshes of the inverse roots
    block_size: int = 1024  # largest edge of a block
    graft_b2: float = 0.9  # decay of the grafted Adam's second moment
    graft_eps: float = 1e-15  # eps of the grafted Adam; on the scale of summed gradients
    # e of factor^-e, on each of the two sides; the name of one is ASGO: 1/2 there, none elsewhere.
    exponent: float | Side = 0.25
    size: Literal["adam", "rows"] = "adam"  # norm of an update: Adam's, or sqrt(output rows)
    damping: float = 1e-12  # shift of the factors' eigenvalues; cutoff "shift" only
    # Factors of the batch's gradient G, of G G^T, or the mean over microbatches of G_j G_j^T, with
    # "corrected" inverse roots corrected for their noise; both keep the gradients of a step's all.
    statistics: Literal["batch", "microbatches", "corrected"] = "batch"
    # Momentum and graft of the first half of a step's microbatches, factors of the others.
    cross_fit: bool = False

    def __post_init__(self):
        super().__post_init__()
        spectral = self.cutoff != "relative" or self.statistics == "corrected"
        if self.solver != "eigh" and spectral:
            raise ValueError(
                f"solver={self.solver!r} with cutoff={self.cutoff!r}, "
                f"statistics={self.statistics!r}: it knows no eigenvalues, set cutoff='relative' "
                "and other statistics."
            )
        if self.cross_fit and self.statistics == "batch":
            raise ValueError(
                "cross_fit=True with statistics='batch': factors have to be of microbatches of "
                "their own, set statistics='microbatches' or 'corrected'."
            )

    @property
    def reads_microbatches(self) -> bool:
        """See `MatrixConfig`."""
        return self.statistics != "batch"


# What the recipe's other settings are without an exponent: Muon's, or of no effect.
WITHOUT_FACTORS = dict(orthogonalize=True, squares="gradient", rtol=None, every=1, stagger=False)


@dataclasses.dataclass(frozen=True)
class ShampooNextConfig(MatrixConfig):
    """Shampoo of a momentum, at a fixed norm: the recipe and what docs/recipe.md varies of it."""

    b1: float = 0.95  # decay of the momentum
    # average: corrected, no look ahead; two scales: nesterov's mixed with a slower one.
    momentum: Literal["nesterov", "average", "two scales"] = "nesterov"
    b2: float = 0.9  # decay of the factors
    # Of which they are: the gradient, the momentum, or every microbatch's gradient.
    squares: Literal["gradient", "momentum", "microbatches"] = "gradient"
    # e of factor^-e on each of the two sides; the name of one: 1/2 there; None: no factors, Muon.
    exponent: float | Side | None = 0.3333333333333333
    rtol: float | None = None  # eigenvalues up to rtol*max are dropped; None: n*eps, 0: up to 0
    every: int = 1  # steps between refreshes of the inverse roots
    stagger: bool = False  # whether each step refreshes a share of them
    block_size: int | None = None  # largest edge of a block; None: matrices are whole
    orthogonalize: bool = False  # whether Newton-Schulz follows, as Muon's of track 3
    # Norm of an update: sqrt(outputs), 0.2 an entry, Adam's; aspect: its own, as Muon scales it.
    size: Literal["rows", "entries", "adam", "aspect"] = "rows"
    cautious: bool = False  # whether entries alone decay that the update moves towards 0
    floor: float = 0.0  # least length of an update relative to its matrix, at rate 1

    def __post_init__(self):
        super().__post_init__()
        check(self, "at least 0 and below 1", "rtol")
        check(self, "at least 0 and finite", "floor")
        for name, value in WITHOUT_FACTORS.items() if self.exponent is None else ():
            if getattr(self, name) != value:
                raise ValueError(
                    f"exponent=None with {name}={getattr(self, name)!r}: without factors it has to "
                    f"be {value!r}, or give an exponent."
                )

    @property
    def reads_microbatches(self) -> bool:
        """See `MatrixConfig`."""
        return self.squares == "microbatches"


@dataclasses.dataclass(frozen=True)
class SoapConfig(FactorConfig):
    """SOAP on the block matrices: Adam in the eigenbases of Shampoo's factors."""

    b1: float = 0.95  # decay of the first moment
    b2: float = 0.95  # decay of the second moment and the factors
    eps: float = 1e-8  # added to sqrt(second moment); on the scale of summed gradients
    every: int = 10  # steps between refreshes of the bases
    # Paper: bias correction, first step skipped, sorted bases; record27: none of these.
    form: Literal["paper", "record27"] = "paper"
    # Largest share of a factor off its diagonal with which its basis is kept, as in Purifying
    # Shampoo; refreshes that are done are counted. None: all are, and nobody counts.
    tolerance: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.tolerance is not None and self.form != "paper":
            raise ValueError(
                f"tolerance={self.tolerance} with form={self.form!r}: only form='paper' asks how "
                "stale a basis is."
            )


@dataclasses.dataclass(frozen=True)
class KLConfig(FactorConfig):
    """KL-Shampoo and KL-SOAP on the block matrices.

    Both start from eigenvalues 0.1, meant for the mean loss, so they see the summed gradients
    divided by `tokens`; every eps and max_scale is on the scale of the quotient.
    """

    b1: float = 0.9  # decay of the first moment
    b2: float = 0.98  # decay of the factors, eigenvalues and second moment
    eps: float = 1e-8  # damping; on the scale of gradients divided by tokens
    every: int = 10  # steps between refreshes of the bases
    tokens: int = 1  # gradients are divided by it; the tokens of a batch give those of the mean
    max_scale: float | None = None  # largest eigenvalue^-1/2; None: max(10, min(size, 4000))
    first_weight: float | None = None  # of the first gradient in the factors; None: 1 - b2


@dataclasses.dataclass(frozen=True)
class PsgdConfig(MatrixConfig):
    """PSGD-Kron on the block matrices: a whitening preconditioner fitted by probes."""

    b1: float = 0.95  # decay of the momentum
    preconditioner_rate: float = 1.0  # step of the preconditioner's fit, relative to its curvature
    preconditioner_seed: int = 0  # of the probes


@dataclasses.dataclass(frozen=True)
class LionConfig(MatrixConfig):
    """Lion on the block matrices."""

    b1: float = 0.9  # share of the momentum in the update
    b2: float = 0.99  # decay of the momentum


@dataclasses.dataclass(frozen=True)
class SophiaConfig(MatrixConfig):
    """Sophia-H on the block matrices: momentum over a sampled Hessian diagonal, clipped at 1.

    Every `every` steps it takes a second pass through the batch, which the benchmark forbids.
    """

    b1: float = 0.965  # decay of the momentum
    b2: float = 0.99  # decay of the Hessian diagonal
    eps: float = 1e-8  # smallest denominator; on the scale of summed gradients
    gamma: float = 0.01  # factor of the Hessian diagonal: a smaller one clips more
    every: int = 10  # steps between estimates of the Hessian diagonal
    probe_seed: int = 0  # of the random signs

    def __post_init__(self):
        super().__post_init__()
        check(self, "positive and finite", "eps")


# Of every direction of `nanogpt.optimizers.directions`; several may share a class.
SETTINGS: dict[str, type[MatrixConfig]] = {
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "muon_track3": MuonConfig,
    "pmuon": PMuonConfig,
    "soap_muon": SoapMuonConfig,
    "shampoo": ShampooConfig,
    "shampoo_next": ShampooNextConfig,
    "soap": SoapConfig,
    "kl_shampoo": KLConfig,
    "kl_soap": KLConfig,
    "psgd": PsgdConfig,
    "lion": LionConfig,
    "sophia": SophiaConfig,
}
