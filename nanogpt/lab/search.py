"""Commands that train many runs; they import jax only when they begin."""

import inspect
import os
from collections.abc import Sequence

import tyro

from nanogpt.config.presets import PRESETS, preset
from nanogpt.lab import compile_cache, run_file
from nanogpt.lab.command import GOES_ON, command, flags
from nanogpt.lab.command_line import DEMO
from nanogpt.lab.search_space import Sweep
from nanogpt.train.interrupt import exit_on_stop


def read_sweep(words: Sequence[str]) -> tuple[Sweep, list[str]]:
    """Separates the flags of a sweep from the settings of all its trials.

    Preset and optimizer of a file of settings are those of the trials, unless flags say others.
    """

    def read(default: Sweep) -> tuple[Sweep, list[str]]:
        return tyro.cli(
            Sweep, prog="nanogpt sweep", description=inspect.getdoc(sweep), args=words,
            default=default, return_unknown_args=True,
        )  # fmt: skip

    options, rest = read(Sweep())
    if options.config is None:
        return options, rest
    chosen = run_file.chosen(options.config)
    optimizers = (chosen["optimizer"],) if "optimizer" in chosen else DEMO
    return read(Sweep(preset=chosen.get("preset", "cpu"), optimizers=optimizers))


@command(RuntimeError, stopped=GOES_ON)
def sweep(words: Sequence[str]) -> None:
    """Trains many runs that differ in a few settings, and records what came out of each.

        nanogpt sweep --optimizers adamw muon --grid matrices.learning_rate=x0.5,x1,x2
        nanogpt sweep --optimizers shampoo --random matrices.b2=lin:0.8:0.99 --runs 12

    A value such as x2 is the preset's times 2. Without --random, every combination of the grid is
    a trial, or --runs of them; with it, --runs draws, and the combinations of the grid take turns.
    Every optimizer gets the same number of trials. What is finished is kept, so that a sweep can be
    stopped and started again, or widened; a trial that was stopped goes on from its checkpoint.
    runs/NAME/trials.jsonl holds a record a trial; one whose loss diverged is recorded as such.
    Any other flag is a setting of all trials, as of `nanogpt train`.
    """
    compile_cache.prepare()
    options, rest = read_sweep(words)
    from nanogpt.lab.sweep import run_sweep  # jax, which must see the environment

    with exit_on_stop():
        print(run_sweep(options, rest))


@command(RuntimeError, stopped=GOES_ON)
@flags
def board(
    quick: bool = False,
    entries: tuple[str, ...] = PRESETS["board"],
    jobs: int = os.cpu_count() or 1,
) -> None:
    """The scaled-down board: every optimizer of preset "board", its rate tuned, then 3 seeds.

    At most 2.5 hours on 2 cores; stopped and started again, it goes on. With --quick minutes.

    Rule for the rates of the matrices, the same for every entry: the preset's rate times 1/2, 1 and
    2; as long as the best of them is the lowest or the highest tried, the next one beyond it, up to
    6 runs an entry. Tuning has a seed of its own, which decides weights and order of the data and
    is none of the final ones. Step times come from short runs of their own, one at a time on all
    cores.

    Args:
        quick: no tuning, one seed, 60 steps at the preset's rates
        entries: recipes of the preset
        jobs: runs side by side; default: one a core
    """
    if not entries or jobs < 1:
        raise ValueError(
            f"entries={entries}, jobs={jobs}: a board needs at least one entry and one job; leave "
            "--entries out for all."
        )
    for name in entries:
        preset("board", name)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    compile_cache.prepare()  # seeds share their programs
    import jax

    from nanogpt.lab.board import FULL, QUICK, run_board

    # It read the environment when it was imported; the runs that measure times are in this process.
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    with exit_on_stop():
        print(run_board(list(dict.fromkeys(entries)), QUICK if quick else FULL, jobs))
