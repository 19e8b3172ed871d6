"""Which part gets how many seconds: shares of what is left, so that nothing saved is lost."""

from typing import NamedTuple

# A part that gets less than this would spend it on its imports.
LEAST_S = 10.0
# Kept back at the end for the report itself.
RESERVE_S = 5.0
# A part stops by itself this long before it is ended, so that its last figures are whole.
GRACE_S = 4.0


class Part(NamedTuple):
    """A part of the report.

    Attributes:
        name: of its figures in the JSON, and of the child process that takes them.
        weight: its share of the time, relative to the parts after it.
        title: its heading on the page.
    """

    name: str
    weight: float
    title: str


# The most valuable first. Weights are seconds of nine minutes, starts and compilation included.
PARTS = (
    Part("probe", 35, "Device"),
    Part("numerics", 60, "Numerics"),
    Part("step", 160, "The optimizer's step on the matrices of GPT-2 124M"),
    Part("roots", 80, "Roots alone, every step"),
    Part("train_adamw", 50, "Training: AdamW"),
    Part("train_muon", 55, "Training: Muon"),
    Part("train_shampoo", 70, "Training: Shampoo"),
    Part("train_recipe", 70, "Training: the recipe"),
    Part("precision", 45, "Precision trials"),
)


def select(names: tuple[str, ...]) -> tuple[Part, ...]:
    """The parts of these names in the report's order; all of them for none.

    Raises:
        ValueError: a name that no part has.

    >>> [part.name for part in select(("roots", "probe"))]
    ['probe', 'roots']
    """
    known = [part.name for part in PARTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"parts={unknown}: choose from {', '.join(known)}.")
    return tuple(part for part in PARTS if part.name in names or not names)


def allot(parts: tuple[Part, ...], remaining_s: float) -> float:
    """Seconds for the first of the parts that are left.

    It gets its share of what remains, so time that earlier parts left over is spread over all that
    follow, and a part that took too long takes from them evenly.

    Args:
        parts: those that have not run yet, in order.
        remaining_s: until the report must be done.

    Returns:
        The seconds after which the part is ended; 0 if that is too little to begin.

    >>> allot((Part("a", 1, "A"), Part("b", 3, "B")), 405.0)
    100.0
    """
    usable = remaining_s - RESERVE_S
    share = usable * parts[0].weight / sum(part.weight for part in parts)
    # Where time is short the last parts get none, not the first ones.
    share = max(share, min(LEAST_S, usable))
    return share if share >= LEAST_S else 0.0
