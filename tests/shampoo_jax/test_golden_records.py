"""Recordings of the benchmark's newer records, replayed by the entries that are trained.

Compiling is what takes time: of every file some parameters are replayed, all of them by
`make golden GOLDEN=...`.
"""

import json

import numpy as np
import pytest

from scripts.maintenance import golden_records, replay_golden
from tests.oracles.recordings import FILES, changed

PMUON, MUONH, KLSOAP = "a1_pmuon_f64", "a4_muonh_bf16ns", "a4_klsoap_h_cold_f64"
WHOLE = "a3_cwd_rowfloor_tailema_f64"
PROJ = "blocks.0.attn.proj.weight"
# The gated matrix with all parts, a bias with its own second moment; a first gradient of zero.
SOME = {
    PMUON: ["wide"],
    MUONH: ["tall"],
    KLSOAP: ["zerofirst"],
    WHOLE: [PROJ, "embed.weight", "blocks.0.mlp.fc.bias"],
}


@pytest.mark.parametrize("name", SOME)
def test_replay(name):
    assert golden_records.error(FILES / f"{name}.npz", SOME[name]) <= 1


def test_schedules():
    """Rates, momentum, look ahead, gates and results of all entries at every recorded step."""
    assert golden_records.error(FILES / "schedules.json") <= 1


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        (KLSOAP, dict(shampoo_beta=0.9001)),
        (WHOLE, dict(constants__CWD=0.0251)),
    ],
)
def test_another_setting_is_a_miss(tmp_path, name, entries):
    assert golden_records.error(changed(tmp_path, name, **entries), SOME[name][:1]) > 1


def test_another_schedule_is_a_miss(tmp_path):
    path = changed(tmp_path, WHOLE, constants___MU_MAX=0.9501)
    assert golden_records.error(path, [PROJ]) == np.inf
    records = json.loads((FILES / "schedules.json").read_text())
    records["records"]["46"]["values"]["2000"]["lr"]["muon"] *= 1 + 1e-9
    (tmp_path / "other.json").write_text(json.dumps(records))
    assert golden_records.error(tmp_path / "other.json") > 1


def test_another_precision_is_refused(tmp_path):
    path = changed(tmp_path, MUONH, newton_schulz_dtype="float32")
    with pytest.raises(ValueError, match="Newton-Schulz is not in the precision"):
        golden_records.Replay(*read(path), ["tall"]).check_dtypes(narrow=True)


def read(path):
    with np.load(path) as z:
        data = dict(z)
    return json.loads(str(data["config"])), json.loads(str(data["names"])), data


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        (PMUON, dict(nesterov=False), "nesterov=False is not in the format"),
        (PMUON, dict(new=1), "new=1"),
        (PMUON, dict(floor=dict(tall=float("inf"), wide=1, proj=1)), "floor of tall is not finite"),
        (MUONH, dict(hyperball_eps=1.0), "hyperball_eps=1.0"),
        (WHOLE, dict(constants__ATTN_TRUST_POWER=2.0), "constants.ATTN_TRUST_POWER=2.0"),
        (WHOLE, dict(schedule__mu_warmup=5), "schedule.mu_warmup=5"),
        (WHOLE, dict(newton_schulz_dtype="float32"), "newton_schulz_dtype='float32'"),
    ],
)
def test_what_is_not_in_the_format_is_refused(tmp_path, name, entries, message):
    with pytest.raises(ValueError, match=message):
        replay_golden.error(changed(tmp_path, name, **entries))


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    path = changed(tmp_path, PMUON, {"spread__wide": np.zeros(3)})
    with pytest.raises(ValueError, match="spread__wide has shape"):
        replay_golden.error(path)
