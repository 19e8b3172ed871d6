"""The sections of the report's page, each from what its part measured; empty if that is nothing."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nanogpt.report.paired import paired
from nanogpt.report.tables import markdown, shown
from scripts.maintenance.device import prediction
from scripts.maintenance.device.budget import PARTS
from scripts.maintenance.device.cells import Result, device_of, errors, join, named, rows
from scripts.maintenance.device.sizes import sizes

# Steps of a training run whose losses the page shows.
SHOWN = (10, 20, 50, 100, 150, 200, 250, 300)
DASH = (
    "DASH publishes 119 ms (float16) and 136 ms (float32) for a whole optimizer step, coupled "
    "Newton every step in blocks of 1024, on 8 H100 (IST-DASLab/DASH, README): the slowest "
    "device's statistics, roots, application and the exchange of parameters. Ours are of one "
    "device with the blocks that its repository gives for the first of the eight, without an "
    "exchange."
)


def device_section(result: Result) -> str:
    """Versions, clocks, what is chosen by default, and the measured rates."""
    device = next(iter(rows(result, "probe", "device")), None)
    if device is None:
        return ""
    lines = [f"* {name} {version}" for name, version in device["versions"].items()]
    if device.get("memory_bytes"):
        lines.append(f"* {device['memory_bytes'] / 1e9:.1f} GB of memory for jax")
    for clock in rows(result, "probe", "clock"):
        lines += [f"* {k}: {v}" for k, v in clock.items() if k not in ("name", "error")]
    chosen = [
        f"* {r['name']}: " + ", ".join(f"{k} {v}" for k, v in r.items() if k != "name")
        for r in rows(result, "probe", "choices")
    ]
    rates = rows(result, "probe", "rates")
    good = [r for r in rates if "error" not in r]
    table = markdown(
        ["rates", "TFLOP/s", "GB/s"],
        [
            [
                r["name"],
                shown(r.get("flops_per_s"), ".4g", 1e-12),
                shown(r.get("bytes_per_s"), ".4g", 1e-9),
            ]
            for r in good
        ],
    )
    return join(
        "\n".join(lines),
        "`auto` and the defaults choose:\n\n" + "\n".join(chosen),
        table if good else "",
        errors(rates),
    )


def prediction_section(result: Result) -> str:
    """The rates and times of docs/scaling.md beside the measured ones, where both are there."""
    device = device_of(result)
    found = prediction.predict(device.get("kind", ""), prediction.PAGE.read_text(encoding="utf-8"))
    if not device or result["rehearsal"]:
        return ""
    if found is None:
        return f"[docs/scaling.md](../scaling.md) has no prediction for {device['kind']}."
    rates = {
        r["name"]: r.get("flops_per_s", r.get("bytes_per_s"))
        for r in rows(result, "probe", "rates")
        if "error" not in r
    }
    step = named(result, "step", "steps", "shampoo_polynomial_10")
    model = named(result, "step", "model", "forward and backward")
    other = {found.device: "", None: " It predicts no step there."}.get(
        found.source, f" Times are those predicted for {found.source}."
    )
    return join(
        f"[docs/scaling.md](../scaling.md) divides FLOPs and bytes by {found.efficiency:g} of the "
        f"published rates of {found.device}.{other} Rates in TFLOP/s, memory in GB/s.",
        prediction.compare_rates(found, rates, sizes(False).product),
        "Shampoo with roots by products every tenth step, averaged over steps:"
        if found.step
        else "",
        prediction.compare_step(found, step, model) if found.step else "",
    )


def numerics_section(result: Result) -> str:
    """Roots and attention against references, and the recordings."""
    recordings, roots = rows(result, "numerics", "recordings"), rows(result, "numerics", "roots")
    replayed = [
        [r["name"], f"{r['error_over_tolerance']:.3g}"]
        for r in recordings
        if "error_over_tolerance" in r
    ]
    lines = []
    for r in roots:
        for spectrum, figures in r.items():
            if isinstance(figures, dict):
                cells = [f"{figures['cosine']:.6f}", f"{figures['error']:.2g}"]
                lines.append([f"{r['name']}, {spectrum}", *cells, str(figures["passed"])])
    heads = ["kernel", "output", "dq", "dk", "dv"]
    attention = [
        [r["name"], *(f"{r[key]:.2g}" for key in heads[1:])]
        for r in rows(result, "numerics", "attention")
        if "output" in r
    ]
    return join(
        "Roots of exponent 1/4 against float64: cosine of `root M` with M in the factor's range, "
        "and relative error of the root.\n\n"
        + markdown(["solver, edge, spectrum", "cosine", "error", "passes"], lines)
        if lines
        else "",
        "Attention in bfloat16 against float32, relative errors:\n\n" + markdown(heads, attention)
        if attention
        else "",
        "Recordings of Meta's package, error over tolerance; at most 1 is agreement.\n\n"
        + markdown(["recording", "error"], replayed)
        if replayed
        else "",
        errors([*roots, *rows(result, "numerics", "attention"), *recordings]),
    )


def steps_section(result: Result) -> str:
    """The optimizers' steps, split into parts, beside forward and backward pass."""
    steps = rows(result, "step", "steps")
    good = [r for r in steps if "step_s" in r]
    model = named(result, "step", "model", "forward and backward")
    muon = named(result, "step", "steps", "muon_12_bfloat16").get("step_s")
    lines = []
    for r in good:
        total = model["seconds"] + r["step_s"] if model else None
        cells = [shown(r.get(k), ".3g", 1e3) for k in ("step_s", "roots", "apply", "statistics")]
        cells += [shown(r.get("rest"), ".3g", 1e3)]
        cells += [shown(r["step_s"] / muon if muon else None, ".3g")]
        cells += [shown(r["step_s"] / total if total else None, ".3g", 100)]
        memory = r.get("peak_memory_bytes")
        cells += [shown(memory, ".3g", 1e-9), shown(r.get("compile_s"), ".3g")]
        lines.append([f"{r['name']}", *cells])
    heads = ["name_interval", "step (ms)", "roots", "apply", "statistics", "rest"]
    heads += ["x Muon (track 3)", "% of step", "peak (GB)", "compile (s)"]
    return join(
        _model(result, model),
        markdown(heads, lines) if lines else "",
        "Parts are differences of programs, so a small one may come out below 0. KL-Shampoo's "
        "statistics are part of its application. `muon_12_bfloat16` is track 3's Muon."
        if lines
        else "",
        errors([*rows(result, "step", "model"), *steps]),
    )


def _model(result: Result, model: Mapping[str, Any]) -> str:
    if not model:
        return ""
    rate = model["flops"] / model["seconds"]
    text = (
        f"Forward and backward of {model['tokens']} tokens: {1e3 * model['seconds']:.4g} ms, "
        f"{rate / 1e12:.4g} TFLOP/s"
    )
    device = device_of(result)
    found = prediction.predict(device.get("kind", ""), prediction.PAGE.read_text(encoding="utf-8"))
    if found is not None:
        peak = 1e12 * found.peaks["bfloat16, TFLOP/s"]
        text += f", {rate / peak:.1%} of the published bfloat16 rate (MFU)"
    large = named(result, "probe", "rates", f"bfloat16, 1 x {sizes(result['rehearsal']).product}")
    if large:
        text += f", {rate / large['flops_per_s']:.1%} of a large product's measured rate"
    return text + "."


def roots_section(result: Result) -> str:
    """Roots of whole stacks, and whole steps on DASH's blocks."""
    roots, steps = rows(result, "roots", "roots"), rows(result, "roots", "dash_step")
    lines = [
        [
            r["name"],
            " and ".join(r["stacks"]),
            f"{1e3 * r['seconds']:.4g}",
            f"{r['passed']} of {r['factors']}",
            shown(r.get("compile_s"), ".3g"),
        ]
        for r in roots
        if "seconds" in r
    ]
    whole = [[r["name"], f"{1e3 * r['step_s']:.4g}"] for r in steps if "step_s" in r]
    return join(
        "Roots that do not pass are left to eigh, in the time that is given.\n\n"
        + markdown(["solver, model", "factors", "ms", "pass", "compile (s)"], lines)
        if lines
        else "",
        DASH if whole else "",
        markdown(["whole step on DASH's blocks", "ms"], whole) if whole else "",
        errors([*roots, *steps]),
    )


def training_section(result: Result) -> str:
    """Losses, time per step and peak memory of the runs."""
    names = [part.name for part in PARTS if part.name.startswith("train_")]
    runs = {name: rows(result, name, "window") for name in names}
    runs = {name: windows for name, windows in runs.items() if windows}
    if not runs:
        return ""
    steps = sorted({w["step"] for windows in runs.values() for w in windows})
    chosen = [s for s in steps if s in SHOWN] or steps
    lines, words = [], []
    for name, windows in runs.items():
        means = {w["step"]: statistics.fmean(w["losses"]) for w in windows}
        # The first window holds the first call's set-up.
        seconds = statistics.median(w["step_s"] for w in windows[1:] or windows)
        memory = next((r["peak_bytes"] for r in rows(result, name, "memory")), None)
        run = next(iter(rows(result, name, "run")), {})
        words.append(f"* {name.removeprefix('train_')}: {run.get('optimizer', '')}")
        losses = [shown(means.get(step), ".4f") for step in chosen]
        figures = [f"{1e3 * seconds:.4g}", shown(memory, ".3g", 1e-9)]
        lines.append([name.removeprefix("train_"), *losses, *figures])
    run = next(iter(rows(result, next(iter(runs)), "run")), {})
    heads = ["mean loss of 10 steps to", *map(str, chosen), "ms a step", "peak (GB)"]
    return join(
        f"{run.get('steps')} steps of {run.get('rows')} rows, the same rows and initial weights "
        "for all, rates as published for the track's larger batch.\n\n" + "\n".join(words),
        markdown(heads, lines),
        _less_muon(runs),
        errors([row for name in runs for row in rows(result, name, "cut")]),
    )


def _less_muon(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The recipe against Muon on the same batches."""
    if not {"train_muon", "train_recipe"} <= runs.keys():
        return ""
    recipe, muon = (_second_half(runs[name]) for name in ("train_recipe", "train_muon"))
    found = paired(recipe, muon)
    return (
        f"The recipe's loss less Muon's, batch by batch in the second half: {found.mean:+.4f} ± "
        f"{found.error:.4f} over {found.n} batches of one run each, which says nothing of what "
        "another seed would do."
    )


def _second_half(windows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Losses by step."""
    half = windows[-1]["step"] // 2
    steps = {w["step"] - i: v for w in windows for i, v in enumerate(reversed(w["losses"]))}
    return {step: value for step, value in steps.items() if step > half}


def precision_section(result: Result) -> str:
    """What narrower products save, and what they do to the update."""
    trials = rows(result, "precision", "trials")
    lines = [
        [
            f"{r['stage']} in {r['precision']}",
            f"{1e3 * r['seconds']:.3g}",
            f"{r['cosine']:.6f}",
            f"{r['passed']} of {r['of']}" if "passed" in r else "-",
        ]
        for r in sorted(trials, key=lambda r: r.get("stage", ""))
        if "cosine" in r
    ]
    reference = named(result, "precision", "reference", "float32")
    text = (
        "Time of the stage alone on its whole stack, and least cosine of the update with all "
        "other stages in float32. Roots that do not pass their checks are left to eigh, whose time "
        "and accuracy theirs then are."
    )
    if reference:
        text += f" The float32 update has {reference['cosine']:.6f} with float64."
    return join(
        text + "\n\n" + markdown(["stage", "ms", "cosine", "roots that pass"], lines)
        if lines
        else "",
        errors([*trials, *rows(result, "precision", "reference")]),
    )
