"""The step of an ImageNet run, compiled for hardware that is not here: memory, products, exchanges.

    build/compilers/bin/python -m docs.gallery.images.plan --target h100:8 --optimizer sgd shampoo

`make compilers` makes the environment; docs/hardware.md says how to read a plan. Every row is one
line of JSON, docs/images/plan.jsonl those of docs/images.md. Of branches the dearest counts, so
Shampoo's step is one that refreshes its roots.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from docs.gallery.images.recipe import Settings, make_optimizer, scaled
from docs.gallery.images.training import AXIS, abstract, make_step
from nanogpt.lab.plan import start_again
from nanogpt.train.predicted import predicted
from shampoo_jax import Placement, Target, compile_for, target_devices

# Name of a row -> settings; SGD is what the others are compared with.
ROWS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "shampoo": {},
    "polynomial": {"solver": "polynomial"},
    "blocks-1024": {"block_size": 1024},
}


def compiled(settings: Settings, target: Target) -> dict[str, Any]:
    """What the compiler says of a run's step, on one device of a target.

    Args:
        settings: of the run; of its folder nothing is read.
        target: all its devices are used.
    """
    mesh = Mesh(np.array(target.devices), (AXIS,), axis_types=(AxisType.Auto,))
    placement = Placement(mesh, AXIS)
    tx = make_optimizer(settings, settings.steps(1_281_167), placement)
    state, shardings = abstract(settings.config, tx, mesh)
    step = make_step(
        settings.config, tx, smoothing=settings.label_smoothing, dtype=settings.activations,
        prepare=scaled, shardings=shardings,
    )  # fmt: skip
    rows = NamedSharding(mesh, P(AXIS))
    shape = (settings.rows, settings.size, settings.size, settings.config.channels)
    batch = {
        "images": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows),
        "labels": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=rows),
    }
    found = compile_for(target, step, (state, batch))
    held = sum(_bytes(x) for x in jax.tree.leaves(state.opt_state))
    fields = {k: v for k, v in vars(found).items() if k not in ("target", "program")}
    program = {} if found.program is None else dataclasses.asdict(found.program)
    times = predicted(found, target.name.partition(":")[0], len(target.devices))
    return fields | program | times | {"optimizer_state": held}


def _bytes(x: Any) -> int:
    """Of an array, on one device."""
    return int(np.prod(x.sharding.shard_shape(x.shape))) * jnp.dtype(x.dtype).itemsize


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="h100:8", help="as of nanogpt plan")
    parser.add_argument("--rows", type=int, default=1024, help="images of a batch, of all devices")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--optimizer", nargs="+", default=list(ROWS), choices=ROWS)
    args = parser.parse_args()
    start_again(args.target, "docs.gallery.images.plan", *sys.argv[1:])
    try:
        target = target_devices(args.target)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name in args.optimizer:
        settings = Settings(network=args.network, rows=args.rows, **ROWS[name])
        about = {"target": args.target, "row": name, "rows": args.rows, "jax": jax.__version__}
        print(json.dumps(about | compiled(settings, target)), flush=True)


if __name__ == "__main__":
    main()
