"""What faster products of statistics and application cost an update: cosines and eigenvalues.

    python -m scripts.maintenance.precision_table [FILE ...]

FILE is one of `scripts.maintenance.record_gradients`, by default that of the tests. Products are
simulated: operands are rounded, or split into two bfloat16 numbers each, and multiplied in float64,
so that a CPU says what a GPU or a TPU would compute. Compared are updates of Shampoo,
`L^(-1/4) M R^(-1/4)` or `L^(-1/2) M`, with truncated roots in float64, on the last six steps.
Errors of kept eigenvalues are in units of the default cutoff, `d eps` of the largest one. Prints a
table, in which a cosine is its difference from 1.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from scripts.maintenance.benchmark_roots import RECORDED
from scripts.maintenance.benchmarking.fidelity import DOUBT, cosine, truncated_root
from scripts.maintenance.record_gradients import read_gradients

Array = np.ndarray
Product = Callable[[Array, Array], Array]
LAST, DECAY = 6, 0.9
EXPONENTS = {"both": (0.25, 0.25), "left": (0.5, 0.0)}


def rounded(x: Array, bits: int) -> Array:
    """Entries with so many significant bits.

    >>> rounded(np.array([1 + 2.0**-10, 1 + 2.0**-12]), 11).tolist()
    [1.0009765625, 1.0]
    """
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def once(bits: int, a: Array, b: Array) -> Array:
    """A product of rounded operands."""
    return rounded(a, bits) @ rounded(b, bits)


def thrice(a: Array, b: Array) -> Array:
    """Three products of bfloat16 numbers: all but the one of both rests."""
    (a, a_rest), (b, b_rest) = (
        (head, rounded(x - head, 8)) for x in (a, b) for head in [rounded(x, 8)]
    )
    return a @ b + a @ b_rest + a_rest @ b


ARITHMETICS: dict[str, Product] = {
    "float32": functools.partial(once, 24),
    "bfloat16 x 3": thrice,
    "TF32": functools.partial(once, 11),
    "bfloat16": functools.partial(once, 8),
}


class Row(NamedTuple):
    """What an arithmetic makes of a matrix's updates.

    Attributes:
        statistics: Least cosine where it computes `G G^T` and `G^T G` alone.
        application: Where it applies the roots alone.
        both: Where it does both.
        eigenvalues: Largest error of one that is kept, over the cutoff.
    """

    statistics: float
    application: float
    both: float
    eigenvalues: float


def compare(gradients: Array, product: Product, exponents: tuple[float, ...]) -> Row:
    """Updates and eigenvalues by an arithmetic against those of float64.

    Args:
        gradients: Consecutive ones of a matrix, [steps, m, n].
        product: The arithmetic.
        exponents: Of the roots on both sides; 0 leaves a side alone.
    """
    sides = [i for i in (0, 1) if exponents[i]]
    exact = list(_states(gradients, np.matmul))[-LAST:]
    rough = list(_states(gradients, product))[-LAST:]
    least = [1.0] * 3
    for (momentum, *factors), (_, *others) in zip(exact, rough, strict=True):
        # An eigenvalue at the cutoff counts as the arithmetic takes it.
        tested = {i: _root(others[i], exponents[i], np.zeros_like(others[i]), 0.0) for i in sides}
        roots = {i: _root(factors[i], exponents[i], tested[i], DOUBT) for i in sides}
        reference, *updates = (
            _applied(use, to, momentum)
            for use, to in (
                *((np.matmul, roots), (np.matmul, tested)),
                *((product, roots), (product, tested)),
            )
        )
        found = [float(cosine(u[None], reference[None])[0]) for u in updates]
        least = list(map(min, least, found))
    pairs = [(e[1 + i], f[1 + i]) for e, f in zip(exact, rough, strict=True) for i in sides]
    return Row(least[0], least[1], least[2], max(_error(*pair) for pair in pairs))


def _applied(product: Product, roots: Mapping[int, Array], momentum: Array) -> Array:
    left, right = roots.get(0), roots.get(1)
    momentum = momentum if left is None else product(left, momentum)
    return momentum if right is None else product(momentum, right)


def _states(gradients: Array, product: Product) -> Iterator[tuple[Array, ...]]:
    """Momentum, left and right factor after each step."""
    averages: list[Any] = [0.0] * 3
    for t, g in enumerate(gradients.astype(np.float64), 1):
        new = g, product(g, g.T), product(g.T, g)
        averages = [DECAY * a + (1 - DECAY) * x for a, x in zip(averages, new, strict=True)]
        yield tuple(a / (1 - DECAY**t) for a in averages)


def _root(factor: Array, exponent: float, tested: Array, doubt: float) -> Array:
    return truncated_root(factor[None], exponent, tested[None], doubt)[0]


def _error(exact: Array, found: Array) -> float:
    values, others = np.linalg.eigvalsh(exact), np.linalg.eigvalsh(found)
    cutoff = len(values) * np.finfo(np.float32).eps * values[-1]
    return float(np.abs(values - others)[values > cutoff].max() / cutoff)


def main() -> None:
    """Prints a row for each matrix and arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path, default=[RECORDED], metavar="FILE")
    parser.add_argument("--side", choices=EXPONENTS, default="both", help="has a factor")
    args = parser.parse_args()
    print("| matrix | products | statistics | application | both | eigenvalues |")
    print("|-|-|-|-|-|-|")
    for path in args.files:
        for name, gradients in read_gradients(path).items():
            shape = "x".join(map(str, gradients.shape[1:]))
            for arithmetic, product in ARITHMETICS.items():
                row = compare(gradients, product, EXPONENTS[args.side])
                cells = [f"{1 - x:.0e}" for x in row[:3]] + [f"{row.eigenvalues:.0e}"]
                print(f"| {name} {shape} | {arithmetic} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
