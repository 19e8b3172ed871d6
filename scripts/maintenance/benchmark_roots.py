"""Times inverse roots by every solver, and says how well they keep the direction of the update.

    python -m scripts.maintenance.benchmark_roots --stacks 2x32 --repeats 1

Times are relative to the float32 eigendecomposition, one matrix at a time, of the same factors;
both are the least over repeats, in real time and in processor time of all threads. Cosines compare
whole updates with those of the float64 truncated reference, on gradients of a real run and on
synthetic spectra, see `scripts.maintenance.benchmarking.fidelity`. results.json is written after
every solver, table.md at the end.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import tyro

import shampoo_jax
from nanogpt.train.provenance import provenance
from scripts.maintenance.benchmarking import report
from scripts.maintenance.benchmarking.candidates import solver_names
from scripts.maintenance.benchmarking.costs import compile_function
from scripts.maintenance.benchmarking.fidelity import (
    solver_root,
    synthetic_gradients,
    update_cosines,
)
from scripts.maintenance.benchmarking.gradients import coloured_factors
from scripts.maintenance.benchmarking.timing import Times, time_calls
from scripts.maintenance.record_gradients import read_gradients

RECORDED = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "gradients" / "gpt_d128.npz"


@dataclasses.dataclass(frozen=True)
class Options:
    """Times inverse roots by every solver, and says how well they keep the update's direction."""

    stacks: tuple[str, ...] = ("12x768", "3x3072")  # COUNTxSIZE of the factors; (): no times
    exponents: tuple[float, ...] = (0.25, 0.5)  # of the inverse roots
    solvers: tuple[str, ...] = solver_names()  # which ones
    repeats: int = 3  # timed calls of each; the least counts
    gradients: pathlib.Path = RECORDED  # file of scripts.maintenance.record_gradients
    synthetic_size: int = 256  # edge of the synthetic gradients; 0: no cosines
    out: pathlib.Path = pathlib.Path("runs/benchmark_roots")  # folder of the results

    def __post_init__(self):
        for text in self.stacks:
            parse(text)
        unknown = set(self.solvers) - set(solver_names())
        if unknown:
            raise ValueError(f"solvers={sorted(unknown)}: choose from {', '.join(solver_names())}.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: must be at least 1.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    try:
        options = tyro.cli(
            Options,
            prog="python -m scripts.maintenance.benchmark_roots",
            description=__doc__,
            args=arguments,
        )
        result = run(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in tabulate(result).items())
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nresults: {options.out}")


def parse(stack: str) -> tuple[int, int]:
    """Reads "COUNTxSIZE".

    >>> parse("12x768")
    (12, 768)
    """
    count, _, size = stack.partition("x")
    if not (count.isdigit() and size.isdigit() and int(count) and int(size)):
        raise ValueError(f"stacks={stack!r}: write COUNTxSIZE, as in 12x768.")
    return int(count), int(size)


def run(options: Options) -> dict[str, Any]:
    """Measures everything that is asked for and writes results.json as it comes.

    Returns:
        {"options", "times": [...], "cosines": [...], "device", "versions", ...}. A record of times
        has "stack", "exponent", "solver", seconds and their ratios to eigh; one of cosines
        "gradients", "sides", "solver", "least", "mean" and "literal"; a failed one has "error".
    """
    result: dict[str, Any] = {
        # Folders of this machine tell a reader nothing.
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "gradients")},
        "times": [],
        "cosines": [],
        **provenance(),
    }
    path = options.out / "results.json"
    if options.synthetic_size:
        known = read_gradients(options.gradients) | synthetic_gradients(options.synthetic_size)
        for solver in options.solvers:
            print(f"cosines of {solver}", flush=True)
            result["cosines"] += _cosines(solver, known)
            report.write_json(path, result)
    for stack in options.stacks:
        count, size = parse(stack)
        factors = coloured_factors(count, size)
        for exponent in options.exponents:
            base = _time(_one_by_one(exponent), factors, options.repeats)
            for solver in options.solvers:
                print(f"{solver} of {stack}, exponent {exponent}", flush=True)
                label = {"stack": stack, "exponent": exponent, "solver": solver}
                found = _times(solver, exponent, factors, options.repeats, base)
                result["times"].append(label | found)
                report.write_json(path, result)
    return result


def _one_by_one(exponent: float) -> Any:
    """Truncated roots by eigh, one matrix at a time: what others are relative to."""
    solver = shampoo_jax.make_solver("eigh")
    one = jax.jit(lambda factor: solver(factor[None], exponent, ())[0])

    def all_roots(factors: jax.Array) -> list[jax.Array]:
        return [one(factor) for factor in factors]

    return all_roots


def _time(roots: Any, factors: jax.Array, repeats: int, warmup: int = 1) -> Times:
    def call(factors: jax.Array) -> None:
        jax.block_until_ready(roots(factors))

    return time_calls(call, lambda i: factors, rounds=repeats, warmup=warmup)


def _times(
    name: str, exponent: float, factors: jax.Array, repeats: int, base: Times
) -> dict[str, Any]:
    try:
        solver = shampoo_jax.make_solver(name)
        solver.check(exponent)
        state = solver.init(len(factors), factors.shape[-1], factors.dtype)
        compiled, costs = compile_function(lambda a, s: solver(a, exponent, s), factors, state)
        good = jax.block_until_ready(compiled(factors, state))[1]  # the warm-up, too
        times = _time(lambda a: compiled(a, state)[0], factors, repeats, warmup=0)
    except Exception as error:  # one solver's failure must not cost the others' figures
        return {"error": str(error) or type(error).__name__}
    summary = times.summary()
    return {
        "wall_s": summary["least_s"],
        "cpu_s": summary["least_cpu_s"],
        "wall_to_eigh": summary["least_s"] / min(base.wall),
        "cpu_to_eigh": summary["least_cpu_s"] / min(base.cpu),
        "ok": int(np.sum(np.asarray(good))),
        **costs,
    }


def _cosines(name: str, known: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    root = solver_root(shampoo_jax.make_solver(name))
    records = []
    for gradients, values in known.items():
        for sides in (2, 1):
            record: dict[str, Any] = {"gradients": gradients, "sides": sides, "solver": name}
            try:
                cosines = update_cosines(values, root, sides=sides)
                literal = update_cosines(values, root, sides=sides, doubt=0.0)
                if not np.isfinite(cosines).all():
                    raise FloatingPointError("a root is not finite")
                record |= {"least": float(cosines.min()), "mean": float(cosines.mean())}
                record["literal"] = float(literal.min())
            except Exception as error:  # as above
                record |= {"error": str(error) or type(error).__name__}
            records.append(record)
    return records


def tabulate(result: dict[str, Any]) -> dict[str, str]:
    """Arranges a result as markdown tables, solvers across.

    Args:
        result: From `run`.

    Returns:
        {title: table}.
    """
    titles = {
        "cpu_to_eigh": "Processor time over that of eigh, one matrix at a time",
        "wall_to_eigh": "Real time over that of eigh, one matrix at a time",
        "wall_s": "Real time (s)",
        "least": "Least cosine of the update",
        "mean": "Mean cosine of the update",
        "literal": "Least cosine of the update, eigenvalues in doubt decided by the literal cutoff",
    }
    names = {"times": ("stack", "exponent"), "cosines": ("gradients", "sides")}
    tables = {}
    for key, title in titles.items():
        kind = "cosines" if key in ("least", "mean", "literal") else "times"
        rows: dict[str, dict[str, Any]] = {}
        for record in result[kind]:
            name = _row_name(*(record[field] for field in names[kind]))
            # Not a number stands for a failure.
            value = record.get(key, float("nan"))
            rows.setdefault(name, {"name": name})[record["solver"]] = value
        if rows:
            columns = {solver: (solver, 1.0) for solver in result["options"]["solvers"]}
            digits = 5 if kind == "cosines" else 3
            tables[title] = report.table(list(rows.values()), columns, digits=digits)
    return tables


def _row_name(what: str, how: float) -> str:
    """A stack with its exponent, or gradients with the number of preconditioned sides."""
    return f"{what}, {'one side' if how == 1 else 'two sides' if how == 2 else f'{how:g}'}"


if __name__ == "__main__":
    main()
