"""The scaled-down board: every optimizer of preset "board", its learning rate tuned, then 3 seeds.

    make leaderboard               # at most 2.5 hours on 2 cores; can be stopped and started again
    make leaderboard ARGS=--quick  # minutes: 60 steps at the preset's rates, one seed

Rule for the rates of the matrices, the same for every entry: the preset's rate times 1/2, 1 and 2;
as long as the best of them is the lowest or the highest tried, the next one beyond it, up to 6 runs
an entry. Tuning has a seed of its own, which decides weights and order of the data and is none of
the final ones. Step times come from short runs of their own, one at a time on all cores.
"""

import dataclasses
import math
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from nanogpt.config.presets import PRESETS, is_own, preset
from nanogpt.config.settings import check
from nanogpt.lab import compile_cache
from nanogpt.lab.command import GOES_ON, command
from nanogpt.report.tables import markdown, page
from nanogpt.report.verdicts import result_at
from nanogpt.train.interrupt import exit_on_stop

if TYPE_CHECKING:
    from nanogpt.lab.trials import Trial
    from nanogpt.report.groups import Group
    from nanogpt.train.metrics import Record

RATE = "matrices.learning_rate"
TUNING_SEED = 100
UNCOUNTED = ("kl_shampoo", "kl_soap", "psgd", "sophia")  # `nanogpt.optimizers.flops` has no formula


class Plan(NamedTuple):
    """How thorough a board is."""

    name: str  # folder under runs/
    steps: int | None  # of every run; None: the preset's
    start: tuple[int, ...]  # powers of 2 by which the preset's rate is multiplied first
    most: int  # runs that tune one entry
    seeds: tuple[int, ...]  # of the final runs
    timed_steps: int  # steps of the runs that measure times; a quarter of them is one measurement


FULL = Plan("board", None, (-1, 0, 1), 6, (0, 1, 2), 80)
QUICK = Plan("board-quick", 60, (), 0, (0,), 60)


@dataclasses.dataclass(frozen=True)
class Options:
    """How thorough a board is."""

    quick: bool = False  # no tuning, one seed, 60 steps
    entries: tuple[str, ...] = PRESETS["board"]  # recipes of the preset
    jobs: int = os.cpu_count() or 1  # runs side by side; default: one a core

    def __post_init__(self):
        check(self, "at least 1", "jobs")


@command(RuntimeError, stopped=GOES_ON)
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    options = tyro.cli(Options, prog="nanogpt board", description=__doc__, args=arguments)
    entries = list(dict.fromkeys(options.entries))
    if not entries:
        raise ValueError("entries=(): a board needs at least one; leave --entries out for all.")
    plan = QUICK if options.quick else FULL
    folder = pathlib.Path("runs", plan.name)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    compile_cache.prepare()  # seeds share their programs
    import jax

    from nanogpt.lab.preset_data import prepare_data

    # It read the environment when it was imported; the runs that measure times are in this process.
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    with exit_on_stop():
        configs = [preset("board", name) for name in entries]
        prepare_data(configs[0])
        board = run_board(entries, plan, folder, options.jobs)
    print(f"{board}\nwritten to {folder}")


def run_board(entries: Sequence[str], plan: Plan, folder: pathlib.Path, jobs: int) -> str:
    """Tunes, trains and times every entry; what folder/board.jsonl already holds is kept.

    Returns:
        The page, which is also written to folder/board.md, beside the picture board.png.
    """
    from nanogpt.lab.trials import run_trials

    path = folder / "board.jsonl"

    def run(trials: "list[Trial]", jobs: int = jobs) -> "list[Record]":
        return run_trials(trials, path, jobs=jobs)

    tuned = tune(entries, plan, run)
    powers = {name: best(losses) for name, losses in tuned.items()}
    seeded = [(name, seed) for seed in plan.seeds for name in entries]
    finals = run([make_trial(name, plan, "final", powers[name], seed) for name, seed in seeded])
    times = run([time_trial(name, plan, powers[name]) for name in entries], jobs=1)
    groups = sorted(
        (make_group(*pair, finals) for pair in zip(entries, times, strict=True)),
        key=lambda group: (math.isnan(final_loss(group)), final_loss(group)),
    )
    return write_board(folder, groups, tuned, finals[0]["start"], plan.timed_steps)


def tune(entries: Sequence[str], plan: Plan, run: Any) -> dict[str, dict[int, float]]:
    """Searches the rate of every entry, all of them side by side.

    Args:
        entries: names in the preset.
        plan: rates to begin with, and how many runs an entry may take.
        run: trains trials and returns their records.

    Returns:
        {entry: {power of 2: final validation loss, inf where it diverged}}.
    """
    tuned: dict[str, dict[int, float]] = {name: {} for name in entries}
    while wanted := [
        (name, power)
        for name, losses in tuned.items()
        for power in next_powers(losses, plan.start, plan.most)
    ]:
        records = run(
            [make_trial(name, plan, "tune", power, TUNING_SEED) for name, power in wanted]
        )
        for (name, power), record in zip(wanted, records, strict=True):
            tuned[name][power] = loss_of(record)
    return tuned


def next_powers(losses: Mapping[int, float], start: Sequence[int], most: int) -> list[int]:
    """Returns which powers of 2 to try next: `start`, then beyond the edge while the best is there.

    >>> next_powers({}, (-1, 0, 1), most=6)
    [-1, 0, 1]
    >>> next_powers({-1: 3.0, 0: 2.0, 1: 1.0}, (-1, 0, 1), most=6)
    [2]
    >>> next_powers({-1: 3.0, 0: 2.0, 1: 1.0, 2: 1.5}, (-1, 0, 1), most=6)
    []
    """
    if not losses:
        return list(start)
    if len(losses) >= most:
        return []
    lowest, highest, chosen = min(losses), max(losses), best(losses)
    return [lowest - 1] * (chosen == lowest) or [highest + 1] * (chosen == highest)


def best(losses: Mapping[int, float]) -> int:
    """Returns the power of 2 of the lowest loss, the lower one of two; 0 if nothing was tuned."""
    return min(sorted(losses), key=losses.__getitem__, default=0)


def loss_of(record: "Record") -> float:
    """Returns a trial's final validation loss, inf if it diverged."""
    return record["loss"] if record["status"] == "finished" else math.inf


def make_trial(name: str, plan: Plan, role: str, power: int, seed: int) -> "Trial":
    """Returns one run of an entry.

    Args:
        name: entry of the preset.
        plan: gives the number of steps.
        role: "tune", "final" or "time".
        power: of 2, times the preset's rate.
        seed: of the weights and of the order of the data.
    """
    from nanogpt.lab.trials import Trial

    config = preset("board", name)
    rate = config.matrices.learning_rate * 2.0**power
    config = dataclasses.replace(
        config,
        name=f"{plan.name}/{name}/{role}-{rate:.4g}-seed{seed}",
        seed=seed,
        matrices=dataclasses.replace(config.matrices, learning_rate=rate),
        data=dataclasses.replace(config.data, seed=seed),
        schedule=dataclasses.replace(config.schedule, steps=plan.steps or config.schedule.steps),
    )
    settings = {"entry": name, "role": role, RATE: rate}
    return Trial(settings, config)


def time_trial(name: str, plan: Plan, power: int) -> "Trial":
    """Returns a short run whose records are means over a quarter of its steps."""
    trial = make_trial(name, plan._replace(steps=plan.timed_steps), "time", power, 0)
    output = dataclasses.replace(trial.config.output, log_every=plan.timed_steps // 4)
    never = {"val_every": plan.timed_steps, "val_every_final": plan.timed_steps}
    return trial._replace(config=dataclasses.replace(trial.config, output=output, **never))


def make_group(name: str, timed: "Record", finals: "Sequence[Record]") -> "Group":
    """Returns an entry's final runs, on the clock of the run that measured its time.

    Args:
        name: the entry.
        timed: record of `time_trial`; the fastest of its quarters counts, after the first step.
        finals: records of the final runs of all entries.
    """
    from nanogpt.lab.trials import as_run
    from nanogpt.optimizers.flops import step_flops
    from nanogpt.report.groups import Group

    optimizer = preset("board", name).optimizer
    time = min(timed["step_times_s"][1:])
    runs = [as_run(record, name) for record in finals if record["settings"]["entry"] == name]
    config = runs[0].start["config"]
    return Group(
        name,
        [run.curve._replace(seconds=[step * time for step in run.steps]) for run in runs],
        step_time_s=time,
        flops_per_step=None if optimizer in UNCOUNTED or is_own(name) else step_flops(config),
        config=config,
        family="other" if optimizer in ("psgd", "sophia") else optimizer.split("_")[0],
    )


def final_loss(group: "Group") -> float:
    """Returns the mean of the last validations, nan if a run diverged to what is no number."""
    return group.curve.losses[-1]


def write_board(
    folder: pathlib.Path,
    groups: "Sequence[Group]",
    tuned: Mapping[str, Mapping[int, float]],
    start: Mapping[str, Any],
    timed_steps: int,
) -> str:
    """Writes board.md and board.png.

    Args:
        folder: where.
        groups: the entries, in the order of the table.
        tuned: what `tune` returns.
        start: first record of a run: machine, versions, sizes.
        timed_steps: of the runs that measured times.

    Returns:
        The text of board.md.
    """
    from nanogpt.report.board import board_table, draw_board

    targets = [final_loss(group) for group in groups if group.label == "adamw"]
    target = targets[0] if targets and math.isfinite(targets[0]) else None
    machine = start["device"]["kind"]
    draw_board(groups, folder, target=target, machine=machine, name="board")
    rate = {"rate": lambda group: f"{group.config['matrices']['learning_rate']:.4g}"}
    searched, steps = any(tuned.values()), groups[0].runs[0].steps[-1]
    written = page(
        "board",
        setup=setup(groups[0].config, start),
        table=board_table(groups, target=target, extra=rate),
        noise=noise(groups),
        tuned=TUNED if searched else UNTUNED,
        timed=timed_steps // 4,
        steps=steps,
        rates=f"{RULE}\n\n{tuning_table(tuned)}" if searched else "Those of the preset, untuned.",
    )
    (folder / "board.md").write_text(written, encoding="utf-8")
    return written


def noise(groups: "Sequence[Group]") -> str:
    """Returns a paragraph on what seeds alone do to the means; empty where there is one seed."""
    results = [result_at(group.runs, group.runs[0].steps[-1]) for group in groups]
    variances = [r.std**2 for r in results if math.isfinite(r.std)]
    if not variances:
        return ""
    std = math.sqrt(math.fsum(variances) / len(variances))
    error = std * math.sqrt(2 / results[0].n)
    sentence = (
        f"Pooled over the entries the std is {std:.4f}, so a difference of two means has a "
        f"standard error of {error:.4f}: neighbours within twice that are not told apart."
    )
    return textwrap.fill(sentence, width=100) + "\n\n"


def setup(config: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """Returns what was trained, on what, with what."""
    model, data = config["model"], config["data"]
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    length, rows = model["sequence_length"], data["batch_rows"]
    bigram = start["baselines"].get("bigram")
    return textwrap.fill(
        f"The track-3 GPT with {model['num_layers']} blocks of width {model['model_dim']}, "
        f"vocabulary {model['vocab_size']:,}, {start['parameters']:,} parameters, "
        f"{model['dtype']}; {config['schedule']['steps']} steps of {rows} x {length} tokens in the "
        f"order of the seed, text in `{data['directory']}`, {data['val_tokens']:,} validation "
        "tokens"
        + (f", on which a bigram model has a loss of {bigram:.3f}. " if bigram else ". ")
        + f"Losses in nats per token. Machine: {start['device']['kind']}. Versions: {versions}. "
        "Written by `nanogpt board`; `board.jsonl` has every run.",
        width=100,
    )


TUNED = """\
Only the
rate of the matrices was tuned; not decay, momentum or the schedule, nor the rates of embedding,
head and vectors, which all entries share and which were once chosen with Muon (docs/demo.md). All
losses, also those that chose the rates, are"""
UNTUNED = "Nothing\nwas tuned: rates are those of the preset. All losses are"
RULE = """\
Same rule for every entry, one seed, none of the final ones: the preset's rate times 1/2, 1 and 2;
as long as the best is the lowest or the highest tried, the next one beyond it, up to 6 runs. In
bold the best; "edge" where 6 runs were not enough."""


def tuning_table(tuned: Mapping[str, Mapping[int, float]]) -> str:
    """Returns every entry's rates and losses in Markdown."""
    rows = []
    for name, losses in tuned.items():
        chosen, rate = best(losses), preset("board", name).matrices.learning_rate
        cells = []
        for power in sorted(losses):
            loss = f"{losses[power]:.4f}" if math.isfinite(losses[power]) else "diverged"
            cell = f"{rate * 2.0**power:.4g}: {loss}"
            cells.append(f"**{cell}**" if power == chosen else cell)
        edge = ", edge" * (chosen in (min(losses), max(losses)))
        rows.append([name, str(len(losses)), ", ".join(cells) + edge])
    return markdown(["optimizer", "runs", "rate: validation loss"], rows)
