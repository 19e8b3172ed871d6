"""Searches the learning rate of the matrices: every optimizer gets the same number of runs.

    python -m scripts.search_rates --preset cpu --optimizers adamw muon shampoo

Each run is one `scripts.speedrun --optimizer ...` with the preset's rate times a factor. Finished
runs with the same settings are kept, so the search can be stopped and started again. Prints the
final losses as a table.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from nanogpt.metrics import read_records
from nanogpt.presets import preset


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="cpu", help="which preset's rates to vary")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon", "shampoo"])
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--name", default="search", help="folder of the runs under runs/")
    parser.add_argument("settings", nargs="*", help="further settings, after --")
    options = parser.parse_args()
    losses = {
        (optimizer, factor): final_loss(options, optimizer, factor)
        for optimizer in options.optimizers
        for factor in options.factors
    }
    for optimizer in options.optimizers:
        rate = preset(options.preset, optimizer).matrices.learning_rate
        row = [f"{rate * f:g}: {losses[optimizer, f]:.4f}" for f in options.factors]
        print(f"{optimizer:12s} " + "   ".join(row))


def final_loss(options: argparse.Namespace, optimizer: str, factor: float) -> float:
    """Validation loss after the last step of one run, trained now unless it is there already."""
    rate = preset(options.preset, optimizer).matrices.learning_rate * factor
    name = f"{options.name}/{optimizer}-{rate:g}"
    metrics, done = Path("runs", name, "metrics.jsonl"), Path("runs", name, "command.txt")
    command = ["-m", "scripts.speedrun", "--preset", options.preset, "--optimizer", optimizer]
    command += ["--name", name, "--overwrite", "--matrices.learning-rate", repr(rate)]
    command += options.settings
    # A run with other settings is no point of this search.
    if not done.exists() or done.read_text() != " ".join(command):
        subprocess.run([sys.executable, *command], check=True)
        done.write_text(" ".join(command))
    return [r["loss"] for r in read_records(metrics) if r["kind"] == "val"][-1]


if __name__ == "__main__":
    main()
