"""Pictures and table of recorded spectra."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from nanogpt import cli
from nanogpt.report.spectra import EPS, _map, _panel, draw_spectra, read_spectra, table

CONFIG = {
    "name": "run",
    "optimizer": "shampoo",
    "matrices": {"cutoff": "relative"},
    "model": {"num_layers": 11, "model_dim": 16, "sequence_length": 8},
    "data": {"batch_rows": 4},
}


def side(kept):
    figures = {"effective_rank": 2.5, "dropped_energy": 1e-4, "root_residual": 1e-3}
    return figures | {"dimension": 16, "kept_rank": kept, "eigenvalues": [1.0, 0.1, 1e-7, -1e-9]}


def record(kept):
    return {"graft_ratio": 3.0, "failures": 0.0, "0": side(kept), "1": side(16)}


@pytest.fixture
def run(tmp_path):
    names = ("blocks/10/attn/q", "blocks/9/attn/q#1", "blocks/9/attn/q#0")
    spectra = [
        {"kind": "spectra", "step": step, "matrices": dict.fromkeys(names, record(step))}
        for step in (4, 8)
    ]
    lines = [{"kind": "start", "config": CONFIG}, *spectra, {"kind": "end", "step": 8}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def test_what_is_read(run):
    found = read_spectra(run)
    assert list(found.matrices) == ["blocks/9/attn/q#0", "blocks/9/attn/q#1", "blocks/10/attn/q"]
    assert found.kept("blocks/10/attn/q", "0") == [0.25, 0.5]
    assert found.cutoff(16) == 16 * EPS == 16 * np.finfo(np.float32).eps
    assert found.choose(["blocks/9/*"]) == ["blocks/9/attn/q#0", "blocks/9/attn/q#1"]
    assert len(found.choose([])) == 3
    with pytest.raises(ValueError, match="matrices='q': matches none of blocks/9"):
        found.choose(["q"])
    assert "| blocks/10/attn/q | inputs | 8 of 16 | 2.5 | 1.0e-04 | 1.0e-03 | 3 |" in table(found)
    last = found.matrices["blocks/10/attn/q"][8]
    last["0"] |= {"kept_rank": None, "root_residual": None}
    assert "| no number of 16 | 2.5 | 1.0e-04 | no number | 3 |" in table(found)


def test_pictures_have_what_was_recorded(run, tmp_path):
    for path in draw_spectra(read_spectra(run), ["blocks/10/*"], tmp_path / "out"):
        picture = matplotlib.image.imread(path)
        colours = (picture[..., :3] * 255).astype(np.uint32) @ [1 << 16, 1 << 8, 1]
        assert len(np.unique(colours)) > 50
    CONFIG_NONE = CONFIG | {"matrices": {"cutoff": "positive"}}
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace(json.dumps(CONFIG), json.dumps(CONFIG_NONE)))
    assert read_spectra(run).cutoff(16) is None


def test_one_record_has_a_picture(run):
    """A run that has just begun: a point a line, a column in the map."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    found, figure = read_spectra(run), Figure()
    left, right = figure.subplots(1, 2)
    _panel(left, found, "blocks/10/attn/q", "0")
    assert all(line.get_marker() == "." for line in left.lines[:4])
    _map(figure, right, found, np.full((3, 1), 0.5), (0, 1), False)
    corners = right.collections[0].get_coordinates()
    assert np.ptp(corners[..., 0]) > 0


def test_changed_records_are_refused(run, tmp_path):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"root_residual"', '"residual"'))
    with pytest.raises(SystemExit, match="error: .*metrics.jsonl is not as this version writes it"):
        cli.main(["spectrum", str(run), "--out", str(tmp_path / "out")])


def test_runs_without_spectra_are_told_how_to_have_some(run, tmp_path):
    with pytest.raises(SystemExit, match="error: .*holds no run"):
        cli.main(["spectrum", str(tmp_path / "nowhere")])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0])
    with pytest.raises(SystemExit, match="error: .*recorded no spectra: train with --monitor 10"):
        cli.main(["spectrum", str(run)])
