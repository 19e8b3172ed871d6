"""The page of what became of runs that something happened to."""

from scripts.maintenance.faulting.outcome import Results, table

HEAD = """\
# Faults tried

`make faults` does this to real processes of the command, or to real files, with a model of 5,000
parameters; `make faults ARGS="kill --trials 50 --seed 1"` does a part of it again. Survived is a
trial in which all came true that [running.md](running.md) promises: an end within its time, an
error in a sentence, nothing lost, nothing half-written counted, no wrong number accepted. Exact is
one after which the run went on, in another process, to the same last checkpoint and the same
metrics as a run that nothing happened to, bit for bit.

| what happened | tried | survived | went on | exact |
|-|-|-|-|-|
"""


def page(results: Results) -> str:
    """Returns the page in Markdown."""
    trials = [trial for of_part in results.trials.values() for trial in of_part]
    lines = [
        f"| {row['fault']} | {row['tried']} | {row['survived']} | {row['resumed'] or ''} | "
        f"{row['exact'] if row['resumed'] else ''} |"
        for row in table(trials)
    ]
    failed = [trial for trial in trials if trial.survived != trial.tried]
    lines += ["", "## What failed", ""]
    lines += [f"- {t.kind}, {t.name}: {t.told}" for t in failed] or ["Nothing."]
    lines += ["", "## What a trial said", ""]
    seen = {trial.kind: trial for trial in reversed(trials)}
    lines += [f"- {t.kind}, {t.name}: {t.told}" for t in reversed(seen.values()) if t.told]
    lines += ["", "## Where", ""]
    for part, machine in results.machines.items():
        told = ", ".join(f"{name} {value}" for name, value in machine.items())
        lines.append(f"- {part}: {told}")
    return HEAD + "\n".join(lines) + "\n"
