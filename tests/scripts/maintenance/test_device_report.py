"""The whole report, rehearsed as a user runs it; and what must hold before a part may begin."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from scripts.maintenance import device_report
from scripts.maintenance.device import budget
from scripts.maintenance.device.child import MODULES

ROOT = pathlib.Path(__file__).parents[3]
SHARDS = ROOT / "tests" / "golden" / "loader" / "shards"


def test_a_machine_without_gpu_is_refused_and_told_the_remedy(tmp_path):
    out = tmp_path / "out"
    words = ["--out", str(out), "--carried", str(tmp_path), "--parts", "step"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.maintenance.device_report", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not out.exists()
    assert "error: jax found no GPU but" in done.stderr and "add --rehearse" in done.stderr


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--parts", "steps"], "parts=['steps']: choose from probe"),
        (["--minutes", "0"], "--minutes 0.0: must be finite and at least 0.25."),
        (["--minutes", "inf"], "--minutes inf: must be finite"),
        (["--minutes", "nan"], "--minutes nan: must be finite"),
        (["--page", "none.json"], "--page none.json: "),
        (["--page", "pyproject.toml"], "--page pyproject.toml: "),
        (["--page", "tests/x.json"], "--page tests/x.json: "),
        (["--carried", "none"], "--carried none: no such folder"),
        (["--out", "pyproject.toml"], "--out pyproject.toml: cannot be written"),
        (["--out", "pyproject.toml/x"], "--out pyproject.toml/x: cannot be written"),
    ],
)
def test_bad_flags_are_refused(flags, error, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(device_report.supervisor, "run_parts", lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit) as raised:
        device_report.main(["--carried", "docs", *flags])
    assert error in f"{raised.value} {capsys.readouterr().err}"


def test_wheels_that_pip_refuses_are_named_with_the_remedy(tmp_path):
    (tmp_path / "x-1-cp30-cp30-manylinux_2_17_x86_64.whl").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"cp30.*name another folder by --carried"):
        device_report.install(tmp_path, tmp_path / "site")
    assert device_report.install(tmp_path / "none", tmp_path / "site") is None


def test_a_page_that_fails_costs_no_figures(tmp_path):
    written = device_report.Report(tmp_path, 9.0, rehearse=True)
    figures = {"trials": [{"name": "x", "cosine": 1.0}]}  # no stage: the page does not expect that
    written.add("precision", {"state": "done", "figures": figures})
    saved = json.loads(written.path(".json").read_text())
    assert saved["parts"]["precision"]["figures"] == figures
    assert "No page: KeyError: 'stage'" in written.path(".md").read_text()


def test_the_logs_of_the_parts_are_joined_in_their_order(tmp_path):
    for name in ("step", "probe"):
        (tmp_path / f"{name}.log").write_text(f"of {name}")
    written = device_report.Report(tmp_path / "out", 9.0, rehearse=True)
    written.add("probe", {"state": "done", "figures": {}})
    written.finish(tmp_path)
    text = written.path(".log").read_text()
    assert text == "== probe\nof probe\n== step\nof step\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_interrupted_report_keeps_its_figures_and_logs(tmp_path, monkeypatch, number):
    def interrupted(parts, deadline, start, folder, add):
        (folder / "probe.log").write_text("of probe")
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            add("probe", {"state": "ended", "figures": {}})

    before = {n: signal.getsignal(n) for n in device_report.SIGNALS}
    monkeypatch.setattr(device_report.supervisor, "run_parts", interrupted)
    flags = ["--rehearse", "--out", str(tmp_path), "--carried", str(tmp_path)]
    try:
        with pytest.raises(SystemExit) as raised:
            device_report.main(flags)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert raised.value.code == 128 + number
    assert "of probe" in (tmp_path / "rehearsal.log").read_text()
    assert "probe" in json.loads((tmp_path / "rehearsal.json").read_text())["parts"]


def test_json_that_is_no_report_has_no_page(tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"parts": {}}')
    with pytest.raises(SystemExit):
        device_report.main(["--page", str(tmp_path / "x.json")])
    assert "is no report" in capsys.readouterr().err and not (tmp_path / "x.md").exists()


def of_gpu(kind, **figures):
    return {"state": "done", "figures": {"device": [{"kind": kind, "platform": "gpu"}], **figures}}


def test_a_second_run_keeps_the_parts_that_it_does_not_take(tmp_path):
    first = device_report.Report(tmp_path, 9.0, rehearse=False)
    first.add("probe", of_gpu("GPU a", clock=[]))
    first.add("step", {"state": "failed", "error": "x", "figures": {}})
    second = device_report.Report(tmp_path, 9.0, rehearse=False, keep=True)
    second.add("roots", {"state": "failed", "error": "early", "figures": {}})
    second.add("step", of_gpu("GPU a"))
    assert {path.stem for path in tmp_path.iterdir()} == {"gpu-a"}
    parts = json.loads((tmp_path / "gpu-a.json").read_text())["parts"]
    assert {k: part["state"] for k, part in parts.items()} == {
        **{"probe": "done", "step": "done", "roots": "failed"}
    }
    assert list(parts) == ["probe", "step", "roots"] and list(second.ran) == ["roots", "step"]
    other = device_report.Report(tmp_path, 9.0, rehearse=False, keep=True)
    other.add("step", of_gpu("GPU b"))
    assert list(other.result["parts"]) == ["step"]
    assert (tmp_path / "gpu-b.md").read_text().startswith("# GPU b\n")
    whole = device_report.Report(tmp_path, 9.0, rehearse=False)
    whole.add("probe", of_gpu("GPU a"))
    assert list(whole.result["parts"]) == ["probe"]


@pytest.mark.parametrize(
    ("state", "rehearse", "code"),
    [("done", False, 0), ("partial", False, 1), ("partial", True, 0), ("ended", True, 1)],
)
def test_what_is_partial_is_told_by_the_exit_code(tmp_path, monkeypatch, state, rehearse, code):
    def parts(parts, deadline, start, folder, add):
        add("step", of_gpu("GPU a") | {"state": state})

    monkeypatch.setattr(device_report.supervisor, "run_parts", parts)
    monkeypatch.setattr(device_report.signal, "signal", lambda *_: None)
    flags = ["--out", str(tmp_path), "--carried", str(tmp_path), *["--rehearse"] * rehearse]
    with pytest.raises(SystemExit) as raised:
        device_report.main(flags)
    assert raised.value.code == code


def test_a_waiting_part_does_not_touch_the_device():
    """It is imported while another part measures: a second user of the memory would break that."""
    modules = {MODULES.get(part.name, part.name) for part in budget.PARTS}
    imports = "; ".join(f"import scripts.maintenance.device.{name}" for name in sorted(modules))
    # Asking for any device fails there.
    done = subprocess.run(
        [sys.executable, "-c", imports],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_reports_own_process_imports_neither_jax_nor_numpy():
    script = (
        "import sys; from scripts.maintenance import device_report; "
        "sys.exit(str([m for m in ('jax', 'numpy', 'optax', 'flax') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr
