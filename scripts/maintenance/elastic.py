"""Checkpoints that go on on other devices: how far from never having moved. Writes docs/elastic.md.

    python -m scripts.maintenance.elastic               all optimizers, half an hour of two cores
    python -m scripts.maintenance.elastic soap muon     those whose names have one of these in them

Every optimizer of `elastic_cases` takes steps with recorded gradients on fake CPU devices. The
state after `SAVED` of them, in the middle of an interval and of an accumulation, goes through a
run's own checkpoint code to every other layout, and takes the rest there. Compared with the
undisturbed steps of the layout that saved: in float64 all of them, in float32 the first. Beside it
stands what the same steps make of gradients whose entries are one unit in the last place off.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__":
    flags = (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    defaults = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "NPROC": "32"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from nanogpt.config.presets import preset
from nanogpt.train.checkpoint import Checkpoints
from nanogpt.train.mesh import AXES
from nanogpt.train.mesh import Layout as MeshLayout
from nanogpt.train.provenance import provenance
from nanogpt.train.train_step import TrainState
from scripts.maintenance.elastic_cases import CASES, Case, loss, recorded
from scripts.maintenance.sharding_equality import place, worst_errors

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
SAVED, STEPS = 4, 24  # 20 steps after a restore
# Devices along data and fsdp; None: one device without a mesh.
LAYOUTS: dict[str, tuple[int, int] | None] = {
    **{f"{n}": (n, 1) for n in (8, 4, 2, 1)},
    **{"2x4": (2, 4), "no mesh": None},
}
# Layouts that a state goes through; the first one saves it.
WAYS = (
    *(("8", other) for other in LAYOUTS if other != "8"),
    ("no mesh", "8"),
    ("8", "4", "2", "1", "2x4", "8"),
)
ULP = "last bit"
# Largest differences in float64 and float32; or that of other last bits times what one draw of them
# may lack.
PROMISED, PROMISED_FLOAT32, SPREAD = 1e-8, 1e-5, 10
FLOAT32_WAYS = (("8", "2x4"), ("8", "no mesh"), ("no mesh", "8"))


class Trainer:
    """An optimizer on one layout, compiled.

    Args:
        case: the optimizer and its parameters.
        layout: one of `LAYOUTS`.
    """

    def __init__(self, case: Case, layout: str):
        self._shapes, self._placement, sizes = case.shapes, None, LAYOUTS[layout]
        if sizes is not None:
            devices = jax.devices()[: sizes[0] * sizes[1]]
            mesh = jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 2, devices=devices)
            self._placement = MeshLayout(mesh).placement
        tx = optax.with_extra_args_support(case.make(self._placement))

        def init(params: Any) -> TrainState:
            return TrainState(jnp.int32(0), params, tx.init(params))

        def step(state: TrainState, grads: Any) -> tuple[Any, TrainState]:
            objective = functools.partial(loss, gradients=grads)
            updates, opt_state = tx.update(grads, state.opt_state, state.params, obj_fn=objective)
            params = optax.apply_updates(state.params, updates)
            return updates, TrainState(state.step + 1, params, opt_state)

        self.fresh = jax.jit(init)(self._gradients(0))
        where = None if sizes is None else (None, jax.tree.map(lambda x: x.sharding, self.fresh))
        # Values are compared, not times, and most of the time here is the compiler's.
        quick: dict[str, bool | str] = {"xla_backend_optimization_level": "0"}
        lowered = jax.jit(step, out_shardings=where).lower(self.fresh, self._gradients(0))
        self._step = lowered.compile(compiler_options=quick)

    def train(
        self, state: TrainState, steps: int, *, nudged: bool = False
    ) -> tuple[list[Any], TrainState]:
        """Takes steps; returns the updates of each, and the last state.

        Args:
            state: before them.
            steps: how many.
            nudged: every entry of their gradients is one unit in the last place off.
        """
        history = []
        for _ in range(steps):
            updates, state = self._step(state, self._gradients(int(state.step) + 1, nudged))
            history.append(jax.tree.map(np.asarray, updates))
        return history, state

    def _gradients(self, step: int, nudged: bool = False) -> Any:
        def made(values: np.ndarray) -> jax.Array:
            values = values.astype(jnp.result_type(float))
            return jnp.asarray(_nudged(values, step) if nudged else values)

        return place(jax.tree.map(made, recorded(step, self._shapes)), self._placement)


def _nudged(values: Any, seed: int) -> np.ndarray:
    """Every entry up or down by one unit in the last place."""
    values = np.asarray(values)
    aside = np.random.default_rng(seed).choice([-np.inf, np.inf], values.shape)
    return np.nextafter(values, aside.astype(values.dtype))


class Folder:
    """A run's checkpoints, with data that are only counted."""

    def __init__(self, path: str):
        self._checkpoints = Checkpoints(pathlib.Path(path), preset("cpu", "shampoo"), "no data")

    def save(self, state: TrainState) -> None:
        """Saves, and waits for it."""
        data = iter(grain.MapDataset.range(1000).to_iter_dataset())
        grain.experimental.set_next_index(data, int(state.step))
        self._checkpoints.save(int(state.step), state, data, 0.0)
        self._checkpoints.wait()
        data.close()

    def restore(self, like: TrainState) -> TrainState:
        """The newest one, on the devices of another state."""
        data = iter(grain.MapDataset.range(1000).to_iter_dataset())
        step = self._checkpoints.newest()[0]
        state, _ = self._checkpoints.restore(step or 0, like, data)
        data.close()
        return state

    def close(self) -> None:
        """Frees the threads."""
        self._checkpoints.close()


def moved(trainer: Callable[[str], Trainer], way: Sequence[str], steps: int) -> float:
    """Takes steps on one layout after the other, with a checkpoint between two.

    Args:
        trainer: makes that of a layout.
        way: layouts; the first saves after `SAVED` steps, the others share those that are left.
        steps: in all.

    Returns:
        The largest difference of any update from the undisturbed steps of the first layout, over
        the largest entry of that update.
    """
    first = trainer(way[0])
    expected, _ = first.train(first.fresh, steps)
    got, state = first.train(first.fresh, SAVED)
    share = -(-(steps - SAVED) // (len(way) - 1))
    for name in way[1:]:
        with tempfile.TemporaryDirectory() as path, contextlib.closing(Folder(path)) as folder:
            folder.save(state)
            state = folder.restore(trainer(name).fresh)
        more, state = trainer(name).train(state, min(share, steps - len(got)))
        got += more
    both = ([{"": one} for one in of[SAVED:]] for of in (got, expected))
    return worst_errors(*both)[""]


def nudged(trainer: Trainer, steps: int) -> float:
    """As `moved`, of steps that stay where they are, with other last bits of their gradients."""
    _, state = trainer.train(trainer.fresh, SAVED)
    both = [trainer.train(state, steps - SAVED, nudged=one)[0] for one in (True, False)]
    return worst_errors(*([{"": one} for one in history] for history in both))[""]


def measure(case: Case) -> dict[str, float]:
    """Differences of an optimizer by way in float64, and those of the first step in float32."""
    found = {}
    with jax.enable_x64(True):
        trainer = functools.cache(functools.partial(Trainer, case))
        for way in WAYS:
            found[" to ".join(way)] = moved(trainer, way, STEPS)
        found[ULP] = nudged(trainer("no mesh"), STEPS)
    trainer = functools.cache(functools.partial(Trainer, case))
    found["float32"] = max(moved(trainer, way, SAVED + 1) for way in FLOAT32_WAYS)
    found[f"float32, {ULP}"] = nudged(trainer("no mesh"), SAVED + 1)
    return found


def beyond(errors: dict[str, float]) -> list[str]:
    """Columns that are beyond what is promised, and beyond what a last bit does as well."""
    found = {" to ".join(way): (PROMISED, ULP) for way in WAYS}
    found["float32"] = (PROMISED_FLOAT32, f"float32, {ULP}")
    return [
        name
        for name, (most, alone) in found.items()
        if errors[name] > max(most, SPREAD * errors[alone])
    ]


TEXT = """\
# Checkpoints on other devices

`python -m scripts.maintenance.elastic` saves the state of every optimizer after {saved} steps on
one layout of fake CPU devices, restores it on another by a run's own checkpoint code, and takes
{rest} more steps there with recorded gradients. The figures are the largest difference of any entry
of any update from the run that never moved, over the largest entry of that update, in float64;
"float32" is the first step after the restore in float32, the worst of all ways. `8` is a mesh of
eight devices, `2x4` one of data=2 and fsdp=4, with parameters in parts. nanogpt's are the recipes
of track 3, the whole chain on all parameters of a small GPT. ({versions})

"last bit" is the run that never moved beside itself with gradients whose entries are one unit in
the last place off: what the steps do with rounding, without any checkpoint. Steps that keep small
eigenvalues do much. Promised are {promised:.0e} and {promised_float32:.0e}; or, where other last
bits move the steps further, at most {spread} times as far as they do. Two things round more than a
gradient: sums of products, which other devices take in another order (`one-sided`), and, on a
hyperball (`adamh`, `muonh`, `soap_h`, `kl_soap_h`), an update as the difference of two weights that
are hundreds or thousands of times as large.

{verdict}
"""


def verdict(found: dict[str, dict[str, float]]) -> str:
    """How many rows keep the promise, and which do not."""
    wrong = [f"{name} ({', '.join(beyond(row))})" for name, row in found.items() if beyond(row)]
    plain = sum(
        max(row[" to ".join(way)] for way in WAYS) <= PROMISED
        and row["float32"] <= PROMISED_FLOAT32
        for row in found.values()
    )
    told = f"{plain} of {len(found)} rows are within the figures"
    return f"{told}, {len(found) - plain - len(wrong)} within what a last bit does. " + (
        f"Beyond both: {'; '.join(wrong)}." if wrong else "None is beyond both."
    )


def page(found: dict[str, dict[str, float]]) -> str:
    """Returns the report in Markdown."""
    columns = list(next(iter(found.values())))
    versions = ", ".join(f"{name} {value}" for name, value in provenance()["versions"].items())
    head = TEXT.format(
        saved=SAVED,
        rest=STEPS - SAVED,
        promised=PROMISED,
        promised_float32=PROMISED_FLOAT32,
        spread=SPREAD,
        versions=versions,
        verdict=verdict(found),
    )
    lines = [head, f"| optimizer | {' | '.join(columns)} |", f"|-{'|-' * len(columns)}|"]
    for name, errors in found.items():
        lines.append(f"| {name} | {' | '.join(f'{error:.0e}' for error in errors.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the command line; what was measured before stays in the table."""
    parser = argparse.ArgumentParser("elastic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all optimizers")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder of the report")
    options = parser.parse_args()
    kept = options.docs / "elastic.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for name, case in CASES.items():
        if not options.names or any(part in name for part in options.names):
            before[name] = measure(case)
            print(name, {way: f"{error:.1e}" for way, error in before[name].items()}, flush=True)
            found = {name: before[name] for name in CASES if name in before}
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (options.docs / "elastic.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
