"""The model of scale divides work where it can, sees idle owners, and agrees with the compiler."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from scripts.maintenance import scaling_model
from scripts.maintenance.scaling_model import Model, Rates, balance, predict, shapes
from scripts.maintenance.scaling_validation import block_flops, compare

RATES = Rates(1e12, 1e12, 1e12, 1e12, 1e12, 1e12, 1e11, 1e10, 8, "made up")
TINY = Model(8, 16, 64, 16, True, 32, False, 1000, 1, "made up")


def test_work_is_divided():
    one, eight, many = (predict(TINY, n, RATES) for n in (1, 8, 64))
    assert one["communication"] == 0 and one["padding"] == eight["padding"] == 0
    for part in ("statistics", "apply", "roots", "model"):
        assert eight[part] == pytest.approx(one[part] / 8)
    # A stack of 32 and one of 24, on 64 owners.
    assert many["padding"] > 0.4
    # Updates of all parameters reach every device, 7/8 of them from others.
    size = sum(x.size for x in shapes(TINY).values()) * 4
    assert eight["communication"] == pytest.approx(size * 7 / 8 / (1e11 * 0.4))
    # 32 of 16x16, 24 of 64x16: two sides each, `2 d |block|` FLOPs a side, twice for statistics.
    work = 32 * 2 * 2 * 16**3 + 24 * 2 * 64 * 16 * 80
    assert one["statistics"] == pytest.approx(2 * work / 0.4e12)
    assert one["apply"] == pytest.approx(work / 0.4e12)


def test_rows_of_parameters_cut_what_is_gathered():
    whole, rows = predict(TINY, 8, RATES), predict(TINY._replace(fsdp=4), 8, RATES)
    assert rows["communication"] < 0.7 * whole["communication"]
    assert rows["memory"] < whole["memory"]


def test_the_models_have_the_size_of_their_name():
    for name, billions in {"1B": 1.24, "8B": 8.03, "70B": 70.6}.items():
        (model,) = (m for n, m in scaling_model.MODELS.items() if n.endswith(name))
        total = sum(x.size for x in shapes(model).values())
        assert total / 1e9 == pytest.approx(billions, rel=0.005)


def test_zero_blocks_cost_what_others_cost():
    found = balance(TINY, 64)
    # On every owner a block of each stack, where no placement has more than a dear one.
    cheap, dear = 2 * 16**3, 16**3 + 64**3
    mean = (32 * cheap + 24 * dear) / 64
    assert found["padded"] == pytest.approx((cheap + dear) / mean)
    assert found["bound"] == pytest.approx(dear / mean)


def test_the_compiler_counts_what_is_predicted():
    params = {f"w{i}": jax.ShapeDtypeStruct((32, 32), jnp.float32) for i in range(4)}
    found = compare(params, 2)
    for part in ("statistics", "apply", "roots"):
        predicted, compiled = found[part]
        assert 0.8 < predicted / compiled <= 1, part
    assert found["statistics"][0] == block_flops({"32x32": 2}) == 2 * 2 * 2 * 32**3
    for part in ("gathered", "state"):
        assert found[part][0] == found[part][1] > 0


def test_the_page_is_written(tmp_path, monkeypatch):
    record = {"jax": "0", "layers": 1, "width": 2, "devices": {"1": {"roots": [2.0, 4.0]}}}
    monkeypatch.setattr(scaling_model, "validate", lambda: record)
    monkeypatch.setattr(scaling_model, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(scaling_model, "COUNTS", (1, 8))
    monkeypatch.setattr(
        sys, "argv", ["scaling_model", "--validate", "--plot", "--out", str(tmp_path)]
    )
    scaling_model.main()
    page = (tmp_path / "scaling.md").read_text()
    assert "| roots | 2 / 4 = 0.50 |" in page and "| tiny | 8 | " in page
    assert json.loads((tmp_path / "scaling.json").read_text()) == record
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_page_needs_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling_model", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        scaling_model.main()
    assert "--validate" in capsys.readouterr().err
