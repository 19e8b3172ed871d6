"""What `scripts.maintenance.ablations` trains: families of optimizers, and one change at a time."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

import shampoo_jax
from nanogpt.config.presets import preset
from nanogpt.config.run import Config, CooldownConfig, LookaheadConfig, TailConfig
from nanogpt.config.settings import KLConfig, MatrixConfig, SoapConfig
from nanogpt.optimizers.build import register
from nanogpt.optimizers.transfer import RATES
from scripts.maintenance.ablation_complete import COMPLETE


class Point(NamedTuple):
    """An optimizer as it is trained; what differs from its family's first one, by dotted name."""

    family: str
    factor: str  # what is changed, a heading of the page
    name: str
    changes: dict[str, Any]


class Run(NamedTuple):
    """One run of a point: powers of 2 of its rates, seed, text, and which board."""

    point: str
    rate: float
    auxiliary: float
    seed: int
    corpus: str = "board"
    board: str = "board"


@dataclasses.dataclass(frozen=True)
class SoapStudy(SoapConfig):
    """SOAP with options that field reports ask about."""

    rtol: float | None = 0.0  # directions of smaller eigenvalues are dropped; None: n*eps
    eps_hat: bool = False  # whether eps is added before the bias correction


@dataclasses.dataclass(frozen=True)
class KLStudy(KLConfig):
    """KL-Shampoo likewise."""

    rtol: float | None = 0.0  # as in SoapStudy
    relative: bool = False  # whether eigenvalues are relative to the gradients


def _soap(settings: SoapStudy, placement: Any = None) -> Any:
    names = ("b1", "b2", "eps", "every", "rtol", "eps_hat")
    chosen: Any = {name: getattr(settings, name) for name in names}
    return shampoo_jax.scale_by_soap(**chosen, placement=placement)


def _kl_shampoo(settings: KLStudy, placement: Any = None) -> Any:
    names = ("b1", "b2", "eps", "every", "first_weight", "rtol")
    chosen: Any = {name: getattr(settings, name) for name in names}
    chosen["max_scale"] = "relative" if settings.relative else "size"
    direction = shampoo_jax.scale_by_kl_shampoo(**chosen, placement=placement)
    return optax.chain(optax.scale(1 / settings.tokens), direction)


STUDIES: dict[str, tuple[type[MatrixConfig], Any]] = {
    "soap": (SoapStudy, _soap),
    "kl_shampoo": (KLStudy, _kl_shampoo),
}
for family, (study, study_direction) in STUDIES.items():
    register(f"{family}_study", study_direction, study(0.02, 0.025))
TUNING, ABLATING, JUDGING = 100, range(200, 208), range(400, 408)  # seeds
AGAIN = range(500, 524)  # named after JUDGING had been seen, see docs/recipe.md
M = "matrices."
TIME = "time"  # factor of the points whose seconds are told
# Of points that change nothing: what changes are compared with, since these have their matrices'
# rate tuned once more, around their family's.
NOTHING = "nothing"
AHEAD = {"lookahead": LookaheadConfig(0.3, 31, 202)}  # of record #44, of 300 steps
# Of record #46; a rate that ends at 0 leaves nothing to average.
TAIL = {"tail": TailConfig(248, 16.0), "schedule.horizon": 1.0662}
# Muon of track 3 through the code of the recipe.
AS_MUON = {M + "orthogonalize": True, M + "exponent": None, M + "size": "aspect"}
ABLATED = ("shampoo_next", "soap", "kl_shampoo", "muon", "muon_track3")
SHORTER, IN_BLOCKS = (180, 210, 240, 255, 270), (240, 245, 255)  # steps where AdamW has 300
FEWER = {M + "every": 5, M + "stagger": True}
SMALLER = FEWER | {M + "block_size": 64}  # the width: no factor of an MLP's 256
ONE_SIDE = SMALLER | {M + "exponent": "left"}  # the inputs', the better one
BALL: dict[str, Any] = {M + "weight_decay": 0.0, M + "hyperball": True, M + "learning_rate": 0.02}
BALL |= {"model.init": "record27", "matrices_cooldown": CooldownConfig(cooldown=1.0)}


# Of every family its recipe on the board, and how its first point differs from that.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", {}),
    "shampoo_next": ("shampoo_next", {}),
    "soap": ("soap", {M + "learning_rate": 0.02}),
    "kl_shampoo": ("kl_shampoo", {M + "learning_rate": 0.08}),
    "muon_track3": ("muon_track3", {}),
    "adamw": ("adamw", {M + "learning_rate": 0.008}),
    "shampoo": ("shampoo", {}),
    "muon + tail": ("shampoo_next", {M + "learning_rate": 0.02} | AS_MUON | TAIL),
    "shampoo_next + tail": ("shampoo_next", TAIL),
    **{
        name: ("adamw", {"optimizer": name, "loss": "mean" if complete.mean else "sum"})
        for name, complete in COMPLETE.items()
    },
}


def _changed(family: str, factor: str, **values: Mapping[str, Any]) -> list[Point]:
    """Points of one factor: a name and its changes each, "__" is a blank."""
    return [Point(family, factor, n.replace("__", " "), dict(c)) for n, c in values.items()]


def _next(factor: str, field: str, *values: Any) -> list[Point]:
    """Points of the recipe's family in which one field of its settings is another."""
    name = lambda v: f"{field} {v:.3g}" if isinstance(v, float) else f"{field} {v}"  # noqa: E731
    return [Point("shampoo_next", factor, name(v), {M + field: v}) for v in values]


def make_points() -> list[Point]:
    """All points, in the order in which they are trained; each family's first one leads."""
    first = {name: Point(name, "families", name, {}) for name in FAMILIES}
    micro = {M + "squares": "microbatches", "data.microbatch_rows": 2}
    slow = {M + "learning_rate": 0.02}  # its updates have another size than its family's
    matters = {M + "eps": 0.3}  # a tenth of a gradient's usual entry
    return [
        first["muon"],
        first["shampoo_next"],
        *(Point(name, NOTHING, f"{name}, nothing changed", {}) for name in ABLATED),
        *_next("exponent", "exponent", 0.25, 0.5),
        *_next("cutoff", "rtol", 0.0, 1e-3),
        *_next("norm of an update", "size", "adam", "entries"),
        *_next("decays", "b1", 0.9, 0.98),
        *_next("decays", "b2", 0.95, 0.99),
        *_next("factors of the", "squares", "momentum"),
        *_next("one side", "exponent", "smaller", "left", "right"),
        *_next("orthogonalization", "orthogonalize", True),
        *_next("refresh", "every", 2, 5),
        *_changed(
            "shampoo_next", "refresh", every__5__staggered={M + "every": 5, M + "stagger": True}
        ),
        *_next("momentum", "momentum", "average", "two scales"),
        *_changed("shampoo_next", "momentum", EMA_Nesterov=AHEAD, average_of_the_tail=TAIL),
        first["soap"],
        *_changed("soap", "refresh", soap__every__1={M + "every": 1}),
        *_changed("soap", "truncation", soap__rtol__n__eps={M + "rtol": None}),
        first["kl_shampoo"],
        *_changed("kl_shampoo", "scale", kl__relative={M + "relative": True} | slow),
        *_changed("kl_shampoo", "truncation", kl__rtol__n__eps={M + "rtol": None}),
        *_changed(
            "soap",
            "place of eps",
            soap__eps__0_3__after=matters,
            soap__eps__0_3__before=matters | {M + "eps_hat": True},
        ),
        *_next("blocks", "block_size", 32),
        *_changed("shampoo_next", "factors of the", squares__microbatches=micro),
        *_next("decay", "weight_decay", 0.0, 0.1),
        *_next("decay", "cautious", True),
        *_next("floor", "floor", 0.3825),
        *_changed("shampoo_next", "hyperball", hyperball=BALL),
        *_changed(
            "shampoo_next",
            TIME,
            **{f"{n}__steps__every__5": FEWER | {"schedule.steps": n} for n in SHORTER},
            **{f"{n}__steps__blocks": SMALLER | {"schedule.steps": n} for n in IN_BLOCKS},
            **{"250__steps__one__side": ONE_SIDE | {"schedule.steps": 250}},
        ),
        first["muon_track3"],
        first["adamw"],
        first["shampoo"],
        first["muon + tail"],
        first["shampoo_next + tail"],
        *(first[name] for name in COMPLETE),
    ]


def make_config(point: Point, run: Run) -> Config:
    """A run as `nanogpt train` would train it."""
    entry, own = FAMILIES[point.family]
    config = preset(run.board, entry)
    if point.family in COMPLETE:
        matrices = MatrixConfig(COMPLETE[point.family].start, 0.0)
        config = dataclasses.replace(config, matrices=matrices)
    if point.family in STUDIES:
        settings, _ = STUDIES[point.family]
        matrices = settings(**dataclasses.asdict(config.matrices))
        study = f"{point.family}_study"
        config = dataclasses.replace(config, optimizer=study, matrices=matrices)
    for name, value in (own | point.changes).items():
        config = _with(config, name, value)
    config = _stretched(config, config.schedule.steps / preset("board", entry).schedule.steps)

    def times(settings: Any, power: float) -> Any:
        rates = {n: getattr(settings, n) * 2.0**power for n in RATES if hasattr(settings, n)}
        return dataclasses.replace(settings, **rates)

    return dataclasses.replace(
        config,
        name=f"recipe/{run.point.replace(' ', '-')}/{run.rate}-{run.auxiliary}-{run.seed}",
        seed=run.seed,
        data=dataclasses.replace(config.data, seed=run.seed, directory=f"data/{run.corpus}"),
        matrices=times(config.matrices, run.rate),
        auxiliary=times(config.auxiliary, run.auxiliary),
    )


def _stretched(config: Config, times: float) -> Config:
    """Steps of look ahead and tail, which are told for S, on a board of more steps."""
    ahead, tail = config.lookahead, config.tail
    if ahead is not None:
        ends = {"start": round(ahead.start * times), "end": round(ahead.end * times)}
        ahead = dataclasses.replace(ahead, **ends)
    if tail is not None:
        tail = dataclasses.replace(tail, start=round(tail.start * times), tau=tail.tau * times)
    return dataclasses.replace(config, lookahead=ahead, tail=tail)


def _with(config: Any, name: str, value: Any) -> Any:
    section, _, rest = name.partition(".")
    value = _with(getattr(config, section), rest, value) if rest else value
    return dataclasses.replace(config, **{section: value})


def loss(record: dict[str, Any]) -> float:
    """Of a run that ended above its start that of chance, of 1,024 tokens."""
    chance = math.log(1024)
    return min(record["loss"], chance) if record["status"] == "finished" else chance
