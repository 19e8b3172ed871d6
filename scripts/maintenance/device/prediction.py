"""What docs/scaling.md predicts of a device, and what was measured there, side by side."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from nanogpt.report.tables import markdown

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "scaling.md"
MODEL = "GPT-2 124M"
# The page's name of a device by the driver's: cards of another form or memory have other rates.
KINDS = {
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
}
TOKENS = 2**19  # of the step that the page predicts
# The page's name of a rate, its column there, its unit, and the measured row of the same work.
RATES = (
    ("float32 products", "float32", 1e12, "float32, 1 x {product}"),
    ("first products of a root (bf16x3)", "first of a root", 1e12, "bf16x3, 1 x {product}"),
    ("other products of a root (TF32)", "rest", 1e12, "TF32, 1 x {product}"),
    ("bfloat16 products", "bfloat16, TFLOP/s", 1e12, "bfloat16, 1 x {product}"),
    ("memory", "memory", 1e9, "memory"),
)


class Prediction(NamedTuple):
    """What the page says.

    Attributes:
        device: the page's name of it.
        efficiency: share of the peaks that the page assumes.
        peaks: published rates by column, in the page's units.
        source: device whose step is predicted, maybe another one of the same generation; None
            where there is none.
        step: milliseconds by column of the model's step on one device; empty without a source.
    """

    device: str
    efficiency: float
    peaks: dict[str, float]
    source: str | None
    step: dict[str, float]


def table_under(text: str, heading: str) -> list[dict[str, str]]:
    r"""The rows of the first table under a heading, by column.

    Raises:
        ValueError: there is no such heading or table.

    >>> table_under("# A\n| x | y |\n| - | - |\n| 1 | 2 |\n", "A")
    [{'x': '1', 'y': '2'}]
    """
    found = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    lines = text[found.end() :].strip().splitlines() if found else []
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|\n ").split("|")])
        elif rows or line.startswith("#"):
            break
    if len(rows) < 3:
        raise ValueError(f"no table under {heading!r}: has docs/scaling.md changed its form?")
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def predict(kind: str, text: str) -> Prediction | None:
    """What the page says of a device, None if it does not know it.

    Args:
        kind: as the driver calls it.
        text: of docs/scaling.md.
    """
    rates = {row["device"]: row for row in table_under(text, "Rates of one device")}
    name = KINDS.get(kind)
    stated = re.search(r"(\d\.\d+)\s+of the published peak", text)
    if name is None or name not in rates or stated is None:
        return None
    peaks = {k: float(v) for k, v in rates[name].items() if re.fullmatch(r"[\d.e+-]+", v)}
    # Where a device has no predictions of its own, those of the one with the same products stand.
    alike = [n for n, row in rates.items() if row["rest"] == rates[name]["rest"]]
    source = next((n for n in [name, *alike] if f"### {n}\n" in text), None)
    if source is None:
        return Prediction(name, float(stated[1]), peaks, None, {})
    rows = table_under(text, source)
    row = next(r for r in rows if r["model"] == MODEL and r["devices"] == "1")
    step = {k.removesuffix(", ms"): float(v) for k, v in row.items() if k.endswith(", ms")}
    return Prediction(name, float(stated[1]), peaks, source, step)


def compare_rates(found: Prediction, rates: Mapping[str, float], product: int) -> str:
    """A table of the published, the assumed and the measured rates.

    Args:
        found: The prediction.
        rates: Measured FLOP/s or bytes/s by name.
        product: Edge of the large products.
    """
    rows = []
    for title, column, unit, name in RATES:
        measured = rates.get(name.format(product=product))
        peak = found.peaks[column]
        share = "-" if measured is None else f"{measured / unit / peak:.2f}"
        shown = "-" if measured is None else f"{measured / unit:.4g}"
        rows.append([title, f"{peak:g}", f"{peak * found.efficiency:.4g}", shown, share])
    heads = ["", "published", "assumed", "measured", "of published"]
    return markdown(heads, rows)


def compare_step(found: Prediction, step: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """A table of the predicted and the measured parts of a step with roots every tenth step.

    Args:
        found: The prediction.
        step: The measured parts in seconds; empty where none were.
        model: "seconds" and "tokens" of forward and backward pass, or empty.
    """
    tokens = model.get("tokens", TOKENS)
    predicted = dict(found.step) | {"model": found.step["forward and backward"] * tokens / TOKENS}
    measured = {
        "statistics": step.get("statistics"),
        "application": step.get("apply"),
        "roots": step.get("roots"),
        "state": step.get("rest"),
        "model": model.get("seconds"),
    }
    titles = {
        "state": "state: read and written / all that is not products",
        "model": f"forward and backward of {tokens} tokens",
    }
    rows = []
    for name, seconds in measured.items():
        shown = "-" if seconds is None else f"{1e3 * seconds:.3g}"
        ratio = "-" if seconds is None else f"{1e3 * seconds / predicted[name]:.2f}"
        rows.append([titles.get(name, name), f"{predicted[name]:.3g}", shown, ratio])
    return markdown(["", "predicted (ms)", "measured (ms)", "ratio"], rows)
