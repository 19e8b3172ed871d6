"""One part of the report, in a process of its own: see `scripts.maintenance.device.supervisor`.

It imports everything first and then waits for a line on standard input: the supervisor starts it
while the part before still measures, which hides the seconds that imports take. The device is
touched only after that line.
"""

import argparse
import importlib
import os
import pathlib
import sys
import threading
import traceback

import jax

from scripts.maintenance.device import records
from scripts.maintenance.device.sizes import sizes

# Parts whose name says more than the module: which optimizer is trained.
MODULES = {
    "train_adamw": "training",
    "train_muon": "training",
    "train_shampoo": "training",
    "train_recipe": "training",
}

# After its time a part is ended by the supervisor; so long after it, by itself.
ORPHAN_S = 15.0


def main() -> None:
    """Runs the part that is named, and ends at once, whatever still compiles in its threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--records", type=pathlib.Path, required=True)
    parser.add_argument("--carried", type=pathlib.Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    status = 0
    try:
        name = MODULES.get(args.part, args.part)
        module = importlib.import_module(f"scripts.maintenance.device.{name}")
        seconds = sys.stdin.readline()
        if not seconds:  # the supervisor gave up before this part's turn
            os._exit(1)
        # Should the supervisor itself be killed, nobody else would end this.
        watchdog = threading.Timer(float(seconds) + ORPHAN_S, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()
        recorder = records.Recorder(args.records, float(seconds))
        if not args.rehearse:
            refuse_cpu(args.part, recorder)
        module.run(args.part, recorder, sizes(args.rehearse), args.carried)
    except BaseException as error:
        traceback.print_exc()
        print(f"ERROR {records.describe(error)}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def refuse_cpu(part: str, recorder: records.Recorder) -> None:
    """Records the device; raises RuntimeError where hours would pass at full size."""
    device = jax.devices()[0]
    if device.platform != "gpu" or part != "probe":  # which says more of it by itself
        recorder.add("device", kind=device.device_kind, platform=device.platform)
    if device.platform != "gpu":
        raise RuntimeError(f"jax found no GPU but {device.device_kind!r}")


if __name__ == "__main__":
    main()
