"""The device's page, from the report's JSON; only the standard library is imported."""

from nanogpt.report.tables import markdown, shown
from scripts.maintenance.device import sections
from scripts.maintenance.device.budget import PARTS
from scripts.maintenance.device.cells import Result, cell, device_of


def render(result: Result) -> str:
    """The page of a report, of whatever it holds so far.

    Args:
        result: As `scripts.maintenance.device_report` writes it.
    """
    pieces = [_head(result), _parts(result)]
    for title, section in (
        ("Device", sections.device_section),
        ("Prediction and measurement", sections.prediction_section),
        ("Numerics", sections.numerics_section),
        ("The optimizer's step", sections.steps_section),
        ("Roots alone, every step", sections.roots_section),
        ("Training", sections.training_section),
        ("Precision trials", sections.precision_section),
    ):
        text = section(result)
        if text:
            pieces.append(f"## {title}\n\n{text}")
    return "\n\n".join(pieces) + "\n"


def _head(result: Result) -> str:
    device = device_of(result)
    title = f"# {device.get('kind', 'Unknown device')}"
    commit = f", revision {device['commit'][:12]}" if device.get("commit") else ""
    text = f"Written by `python -m scripts.maintenance.device_report`{commit}."
    if result["rehearsal"]:
        return f"# A rehearsal: none of these figures means anything\n\n{text}"
    return f"{title}\n\n{text}"


def _parts(result: Result) -> str:
    """What was done in which time, and what was not."""
    lines = []
    for part in PARTS:
        found = result["parts"].get(part.name)
        if found is not None:
            times = [shown(found.get(key), ".0f") for key in ("seconds", "allotted_s")]
            lines.append([part.title, found["state"], *times, cell(found.get("error", ""))])
    whole = f"{result.get('seconds', 0):.0f} s of {60 * result['minutes']:.0f} were used."
    return whole + "\n\n" + markdown(["part", "", "s", "allotted", "error"], lines)
