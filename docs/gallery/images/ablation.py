"""The ablation of Meta's Distributed Shampoo paper on ImageNet, as one command.

    python -m docs.gallery.images.ablation --data data/imagenet --out runs/ablation

ResNet-50 with SGD and Nesterov momentum, then with Shampoo, then Shampoo with one thing changed at
a time: the grafted norm, the steps between inverse roots, the size of blocks (Shi et al. 2023,
arXiv:2309.06497). Every arm is a run of `docs.gallery.images.train` in a folder of its own; stopped
and started again, this goes on. Then `ablation.md` has a row for each arm that has got anywhere.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import tyro

from docs.gallery.images.recipe import Settings
from docs.gallery.images.train import last_record, make_run, train
from nanogpt.report.tables import markdown, shown
from nanogpt.train import distributed

# Name of an arm -> what it changes. Whatever else the command line says holds for all of them.
ARMS: dict[str, dict[str, Any]] = {
    "nesterov": {"optimizer": "sgd"},
    "shampoo": {},
    "graft-adam": {"graft": "adam"},
    "graft-none": {"graft": "none"},
    "every-1": {"every": 1},
    "every-10": {"every": 10},
    "every-100": {"every": 100},
    "every-500": {"every": 500},
    "block-512": {"block_size": 512},
    "block-1024": {"block_size": 1024},
    "block-4096": {"block_size": 4096},
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Which arms, and what holds for all of them; the arms change it."""

    arms: tuple[str, ...] = tuple(ARMS)
    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(
        default_factory=lambda: Settings(out=Path("runs/ablation"))
    )


def arm(name: str, settings: Settings) -> Settings:
    """The settings of an arm.

    Args:
        name: of `ARMS`.
        settings: that hold for all; `out` is the folder of all.

    Raises:
        ValueError: no such arm.
    """
    if name not in ARMS:
        raise ValueError(f"arms={name!r}: choose from {', '.join(ARMS)}.")
    return dataclasses.replace(settings, out=settings.out / name, **ARMS[name])


def write_table(settings: Settings) -> Path:
    """Writes `ablation.md` of the arms whose folders have a line of metrics.

    Args:
        settings: whose `out` is the folder of all.
    """
    rows = []
    base = last_record(settings.out / "nesterov").get("step_s")
    for name in ARMS:
        found = last_record(settings.out / name)
        if not found:
            continue
        told = json.loads((settings.out / name / "settings.json").read_text(encoding="utf-8"))
        sgd = told["optimizer"] == "sgd"
        about = ["-"] * 3 if sgd else [told["graft"], str(told["every"]), str(told["block_size"])]
        rows.append([
            name, *about, str(found["step"]), shown(found["val_accuracy"], ".2f", 100),
            shown(found["val_loss"], ".4f"), shown(found["step_s"], ".1f", 1e3),
            shown(base and found["step_s"] / base, ".2f"),
        ])  # fmt: skip
    head = ["arm", "grafted norm", "every", "blocks", "steps", "top-1 (%)", "loss (nats)"]
    head += ["step (ms)", "of SGD's"]
    path = settings.out / "ablation.md"
    path.write_text(markdown(head, rows, texts=2) + "\n", encoding="utf-8")
    return path


def run(ablation: Ablation) -> Path:
    """Trains the arms one after the other and writes the table after each.

    Args:
        ablation: which.
    """
    chosen = [arm(name, ablation.settings) for name in ablation.arms]
    for settings in chosen:
        train(make_run(settings))
        write_table(ablation.settings)
    return write_table(ablation.settings)


def main() -> None:
    """Runs the command line."""
    try:
        ablation = tyro.cli(Ablation, description=__doc__)
        distributed.start({})
        print(run(ablation).read_text(encoding="utf-8"))
    except ValueError as error:  # of settings, or of the folder
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
