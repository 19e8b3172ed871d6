"""Four optimizers on scikit-learn's handwritten digits: docs/images.md, docs/images/digits.jsonl.

    make images                                # six minutes of processor time
    python -m docs.gallery.images.digits       # the same, where scikit-learn is installed

A small residual network on 1,797 real images of 8 x 8. Every optimizer is tuned by one rule: rates
a factor 2 apart, first five, then the next beyond an edge as long as the best one is at an edge;
the best by validation loss of a seed that is not judged. Then three seeds are trained at that rate
and scored on the test images. What the file of runs holds is kept: stopped and started again, this
goes on. Started with `--page` it writes table and pictures alone.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_jax
from docs.gallery.images.resnet import DIGITS
from docs.gallery.images.training import initial, kernels, make_evaluation, make_step

STEPS, ROWS, WARMUP = 300, 128, 20
DECAY = 1e-3  # of a step's kernels at the peak of the schedule, whatever the rate
EVERY = 10  # steps between roots of Shampoo, and bases of SOAP
SPLIT = (897, 300, 600)  # training, validation and test images
TUNING, SEEDS = 100, (0, 1, 2)
POWERS = range(-2, 3)
MOST = 9  # rates of one optimizer
FIRST = {"SGD": 0.1, "AdamW": 0.004, "Shampoo": 0.004, "SOAP": 0.004}  # middle of the rates
FILE = pathlib.Path("docs/images/digits.jsonl")

Images = dict[str, dict[str, np.ndarray]]


def optimizer(name: str) -> optax.GradientTransformation:
    """A direction with learning rate 1, then the schedule, the rate, and decay of kernels.

    The rate is the extra argument `peak` of `update`, so that one program serves all rates.
    """
    adam = dict(b1=0.9, b2=0.99)
    rest = optax.adam(1.0, **adam)
    direction = {
        "SGD": lambda: optax.sgd(1.0, 0.9, nesterov=True),
        "AdamW": lambda: optax.adam(1.0, **adam),
        "Shampoo": lambda: shampoo_jax.shampoo(
            1.0, **adam, exponents=None, every=EVERY, others=rest
        ),
        "SOAP": lambda: shampoo_jax.soap(1.0, **adam, every=EVERY, others=rest),
    }[name]()
    return optax.chain(direction, at_peak())


def schedule(count: jax.Array) -> jax.Array:
    """Linear warmup, then half a cosine to zero; at most 1."""
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, WARMUP, STEPS)(count + 1)


def at_peak() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `peak` and the schedule, and lets kernels decay beside them."""

    def update(
        updates: Any, count: jax.Array, params: Any = None, *, peak: jax.Array, **_: Any
    ) -> tuple[Any, jax.Array]:
        now = schedule(count)
        decayed = jax.tree.map(
            lambda u, p, kernel: now * (peak * u - DECAY * p * kernel),
            updates, params, kernels(params),
        )  # fmt: skip
        return decayed, count + 1

    return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros((), jnp.int32), update)


@functools.cache
def images() -> Images:
    """Training, validation and test images, (B, 8, 8, 1) about mean 0, deviation 1, and labels."""
    from sklearn.datasets import load_digits  # `make images` installs it

    loaded = load_digits()
    pixels = loaded.images.astype(np.float32)[..., None]
    order = np.random.default_rng(0).permutation(len(pixels))
    parts = np.split(order, np.cumsum(SPLIT)[:-1])
    known = pixels[parts[0]]
    scaled = (pixels - known.mean()) / known.std()
    labels = loaded.target.astype(np.int32)
    return {
        name: {"images": scaled[at], "labels": labels[at], "weights": np.ones(len(at), np.float32)}
        for name, at in zip(("train", "validation", "test"), parts, strict=True)
    }


def batches(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Training batches in an order of the seed's, each image moved by up to a pixel each way."""
    rng, train = np.random.default_rng(seed), images()["train"]
    low = train["images"].min()
    padded = np.pad(train["images"], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=low)
    while True:
        order = rng.permutation(len(padded))
        for start in range(0, len(order) - ROWS + 1, ROWS):
            at = order[start : start + ROWS]
            down, right = rng.integers(0, 3, (2, ROWS))
            rows, columns = (np.arange(8) + move[:, None] for move in (down, right))
            moved = padded[at[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield {"images": moved, "labels": train["labels"][at]}


def trainer(name: str) -> Callable[[float, int], dict[str, Any]]:
    """A function (rate, seed) -> what a run gives, which compiles once."""
    tx = optimizer(name)
    step, evaluate = make_step(DIGITS, tx), make_evaluation(DIGITS)
    warm = initial(DIGITS, tx, 0)
    step(warm, next(batches(0)), peak=jnp.float32(0.1))  # compiles

    def train(rate: float, seed: int) -> dict[str, Any]:
        state, stream, peak = initial(DIGITS, tx, seed), batches(seed), jnp.float32(rate)
        spent, curve = [], []
        for at in range(1, STEPS + 1):
            batch = next(stream)
            begin = np.array([time.perf_counter(), time.process_time()])
            state, _ = jax.block_until_ready(step(state, batch, peak=peak))
            spent.append([time.perf_counter(), time.process_time()] - begin)
            if at % EVERY == 0:
                curve.append([at, *score(evaluate, state, "validation")])
        # The least of stretches with one refresh each: other programs make the others longer.
        stretches = np.reshape(spent, (-1, EVERY, 2)).mean(1)
        times = dict(zip(("step_s", "step_processor_s"), stretches.min(0).tolist(), strict=True))
        found: dict[str, Any] = {"curve": curve, **times}
        for part in ("validation", "test"):
            found[f"{part}_loss"], found[f"{part}_accuracy"] = score(evaluate, state, part)
        return found

    return train


def score(evaluate: Callable[..., jax.Array], state: Any, part: str) -> list[float]:
    """Mean loss and share of correct answers on a part of the images."""
    sums = np.asarray(evaluate(state.params, state.stats, images()[part]))
    return [float(x) for x in sums[:2] / sums[2]]


def identity(name: str, rate: float, seed: int) -> str:
    """Of a run: everything that its result follows from, but for versions of packages."""
    about = [name, rate, seed, STEPS, ROWS, WARMUP, DECAY, EVERY, SPLIT, str(DIGITS)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def read_runs(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Runs of a file by identity; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {run["identity"]: run for run in map(json.loads, lines)}


class Runs:
    """Runs of one optimizer: those of the file, and what is trained and added to it.

    Args:
        name: of the optimizer.
        path: of the file.
    """

    def __init__(self, name: str, path: pathlib.Path):
        self.name, self.path, self.known = name, path, read_runs(path)

    @functools.cached_property
    def _train(self) -> Callable[[float, int], dict[str, Any]]:
        return trainer(self.name)

    def __call__(self, power: int, seed: int) -> dict[str, Any]:
        """The run at the middle rate times 2^power, of this seed."""
        rate = FIRST[self.name] * 2.0**power
        key = identity(self.name, rate, seed)
        if key not in self.known:
            begin, processor = time.perf_counter(), time.process_time()
            found = self._train(rate, seed)
            spent = [time.perf_counter() - begin, time.process_time() - processor]
            about = {"identity": key, "optimizer": self.name, "rate": rate, "seed": seed}
            record = about | found | {"seconds": spent[0], "processor_seconds": spent[1]}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_short(record)) + "\n")
            self.known[key] = record
            print(f"{self.name} {rate:g} seed {seed}: {found['validation_loss']:.4f}", flush=True)
        return self.known[key]


def _short(x: Any) -> Any:
    """Numbers with six digits."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {k: _short(v) for k, v in x.items()}
    return [_short(v) for v in x] if isinstance(x, list) else x


def tuned(run: Callable[[int, int], dict[str, Any]]) -> int:
    """The power of 2 of the best rate; tries the next one while the best is at an edge."""
    found: dict[int, float] = {}
    wanted, best = list(POWERS), 0
    while wanted:
        for power in wanted:
            loss = run(power, TUNING)["validation_loss"]
            found[power] = loss if np.isfinite(loss) else np.inf
        best = min(found, key=found.__getitem__)
        beyond = {min(found): best - 1, max(found): best + 1}
        wanted = [beyond[best]] if best in beyond and len(found) < MOST else []
    return best


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="train nothing, write the page's parts")
    args = parser.parse_args()
    if not args.page:
        for name in FIRST:
            runs = Runs(name, FILE)
            power = tuned(runs)
            for seed in SEEDS:
                runs(power, seed)
    from docs.gallery.images.digits_page import write

    write(FILE.parent, read_runs(FILE), pathlib.Path("docs/images.md"))


if __name__ == "__main__":
    main()
