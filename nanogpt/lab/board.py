"""The scaled-down board: its plan, its runs, its page. See `nanogpt.lab.search.board`."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nanogpt.config.presets import is_own, preset
from nanogpt.lab.preset_data import prepare_data
from nanogpt.lab.trials import Trial, as_run, run_trials
from nanogpt.optimizers.flops import step_flops
from nanogpt.report.board import board_table, draw_board
from nanogpt.report.comparable import same_clock
from nanogpt.report.groups import Group
from nanogpt.report.runs import subject
from nanogpt.report.tables import markdown, page
from nanogpt.train.metrics import Record

BASELINE = "adamw"
RATE = "matrices.learning_rate"
TUNING_SEED = 100
UNCOUNTED = ("kl_shampoo", "kl_soap", "psgd", "sophia")  # `nanogpt.optimizers.flops` has no formula
Train = Callable[[Sequence[Trial]], Sequence[Record]]


class Plan(NamedTuple):
    """How thorough a board is."""

    name: str  # folder under runs/
    steps: int | None  # of every run; None: the preset's
    start: tuple[int, ...]  # powers of 2 by which the preset's rate is multiplied first
    most: int  # runs that tune one entry
    seeds: tuple[int, ...]  # of the final runs
    timed_steps: int  # steps of the runs that measure times; a quarter of them is one measurement
    preset: str = "board"  # whose recipes


FULL = Plan("board", None, (-1, 0, 1), 6, (0, 1, 2), 80)
QUICK = Plan("board-quick", 60, (), 0, (0,), 60)


def run_board(entries: Sequence[str], plan: Plan, jobs: int) -> str:
    """Tunes, trains and times every entry; what board.jsonl already holds is kept.

    Returns:
        The page, and where it is written, beside board.jsonl and the picture board.png.
    """
    folder = pathlib.Path("runs", plan.name)
    path = folder / "board.jsonl"
    prepare_data(preset("board", entries[0]))
    tuned = tune(entries, plan, lambda trials: run_trials(trials, path, jobs=jobs))
    powers = {name: best(losses) for name, losses in tuned.items()}
    seeded = [(name, seed) for seed in plan.seeds for name in entries]
    trials = [make_trial(name, plan, "final", powers[name], seed) for name, seed in seeded]
    finals = run_trials(trials, path, jobs=jobs)
    timed = run_trials([time_trial(name, plan, powers[name]) for name in entries], path)
    groups = make_groups(entries, timed, finals)
    return f"{write_board(folder, groups, tuned, plan.timed_steps)}\nwritten to {folder}"


def tune(entries: Sequence[str], plan: Plan, run: Train) -> dict[str, dict[int, float]]:
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


def loss_of(record: Record) -> float:
    """Returns a trial's final validation loss, inf if it diverged."""
    return record["loss"] if record["status"] == "finished" else math.inf


def make_trial(name: str, plan: Plan, role: str, power: int, seed: int) -> Trial:
    """Returns one run of an entry.

    Args:
        name: entry of the preset.
        plan: gives preset and number of steps.
        role: "tune", "final" or "time".
        power: of 2, times the preset's rate.
        seed: of the weights and of the order of the data.
    """
    config = preset(plan.preset, name)
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


def time_trial(name: str, plan: Plan, power: int) -> Trial:
    """Returns a short run whose records are means over a quarter of its steps."""
    trial = make_trial(name, plan._replace(steps=plan.timed_steps), "time", power, 0)
    output = dataclasses.replace(trial.config.output, log_every=plan.timed_steps // 4)
    never = {"val_every": plan.timed_steps, "val_every_final": plan.timed_steps}
    return trial._replace(config=dataclasses.replace(trial.config, output=output, **never))


def make_groups(
    entries: Sequence[str], timed: Sequence[Record], finals: Sequence[Record]
) -> list[Group]:
    """Returns every entry's final runs, on the clock of its run that measured times; best first.

    Args:
        entries: names in the preset.
        timed: record of `time_trial` of each; the fastest of its quarters counts, after the first
            step. Those of several machines, as after a move, say nothing: then there are no times.
        finals: records of the final runs of all entries.
    """
    groups, timed_here = [], same_clock([record["start"] for record in timed])
    for name, record in zip(entries, timed, strict=True):
        optimizer = preset("board", name).optimizer
        time = min(record["step_times_s"][1:]) if timed_here else math.nan
        runs = [as_run(final, name) for final in finals if final["settings"]["entry"] == name]
        start = runs[0].start
        group = Group(
            name,
            [run.curve._replace(seconds=[step * time for step in run.curve.steps]) for run in runs],
            step_time_s=time,
            flops_per_step=None
            if optimizer in UNCOUNTED or is_own(name)
            else step_flops(start["config"]),
            start=start,
        )
        groups.append(group)
    return sorted(groups, key=lambda group: (math.isnan(group.result.mean), group.result.mean))


def write_board(
    folder: pathlib.Path,
    groups: Sequence[Group],
    tuned: Mapping[str, Mapping[int, float]],
    timed_steps: int,
) -> str:
    """Writes board.md, board.png and board-dark.png.

    Args:
        folder: where.
        groups: the entries, in the order of the table.
        tuned: what `tune` returns.
        timed_steps: of the runs that measured times.

    Returns:
        The text of board.md.
    """
    target, start = draw(folder, groups), groups[0].start
    rate = {"rate": lambda group: f"{group.start['config']['matrices']['learning_rate']:.4g}"}
    bigram, searched = start["baselines"].get("bigram"), any(tuned.values())
    written = page(
        "board",
        **start,
        bigram=f", on which a bigram model has a loss of {bigram:.3f}" if bigram else "",
        listed=", ".join(f"{name} {version}" for name, version in start["versions"].items()),
        table=board_table(groups, target=target, extra=rate),
        noise=noise(groups),
        timed=timed_steps // 4,
        steps=groups[0].result.step,
        rates=page("board_tuned", table=tuning_table(tuned)) if searched else page("board_untuned"),
    )
    (folder / "board.md").write_text(written, encoding="utf-8")
    return written


def draw(folder: pathlib.Path, groups: Sequence[Group]) -> float | None:
    """Draws the board beside AdamW; returns AdamW's loss, None where it is not finite."""
    means = (group.result.mean for group in groups if group.label == BASELINE)
    target = next(filter(math.isfinite, means), None)
    starts, n = [group.start for group in groups], len(groups[0].runs)
    lines = subject(starts, f"{n} seeds each" if n > 1 else "")
    draw_board(
        groups, folder, target=target, baseline=BASELINE, name="board",
        heading=(f"{len(groups)} optimizers at a small size", lines),
        machine=starts[0]["device"]["kind"],
    )  # fmt: skip
    return target


def noise(groups: Sequence[Group]) -> str:
    """Returns a paragraph on what seeds alone do to the means; empty where there is one seed."""
    variances = [group.result.std**2 for group in groups if math.isfinite(group.result.std)]
    if not variances:
        return ""
    std = math.sqrt(math.fsum(variances) / len(variances))
    error = std * math.sqrt(2 / groups[0].result.n)
    return (
        f"Pooled over the entries the std is {std:.4f}, so a difference of two means has a "
        f"standard error of {error:.4f}: neighbours within twice that "
        "are not told apart.\n\n"
    )


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
