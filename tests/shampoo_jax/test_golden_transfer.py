"""Recordings of methods whose code is public: runs of other people's programs, replayed.

Parameters do not interact but by the norm that gradients are clipped to, and compiling is what
takes time: of every file some parameters are replayed, all of them by `make golden GOLDEN=...`.
"""

import pytest

from scripts.maintenance import golden_transfer, replay_golden
from shampoo_jax.optimizers import transfer
from tests.oracles.recordings import FILES, changed

# What each has that others have not: Muon's eps beside Adam; one-sided with an absolute ridge and a
# graft, blocks that do not divide, ten QR steps, spectral normalization and SOAP's eps.
MUON, ONE_SIDED = "b1_muon_adam_f32", "b2_shampoo_quarter_graft_onesided_f64"
SPECTRAL = "b3_spectral_soap_f64"
SOME = {
    MUON: ["blocks.0.mlp.fc1", "embed"],
    ONE_SIDED: ["embed"],
    "b2_shampoo_half_graft_ragged_f32": ["blocks.0.mlp.fc1"],
    "b3_soap_qr_square_f32": ["blocks.0.attn.query_proj"],
    SPECTRAL: ["readout"],
    "b4_norm_by_spect_f32": [],
}


@pytest.mark.parametrize("name", SOME)
def test_replay(name):
    assert golden_transfer.error(FILES / f"{name}.npz", SOME[name]) <= 1


@pytest.mark.parametrize(
    ("name", "method", "field"),
    [
        (MUON, "muon", "eps"),
        (MUON, "muon", "learning_rate"),
        (ONE_SIDED, "shampoo", "damping"),
        (ONE_SIDED, "shampoo", "graft_eps"),
        (SPECTRAL, "soap", "eps"),
    ],
)
def test_another_multiplier_is_seen(monkeypatch, name, method, field):
    rule = transfer.RULES[method]

    def wrong(growth):
        m = rule(growth)
        return m._replace(**{field: 2 * getattr(m, field)})

    monkeypatch.setitem(transfer.RULES, method, wrong)
    assert golden_transfer.error(FILES / f"{name}.npz", SOME[name][:1]) > 1


def test_the_eps_of_a_graft_is_seen(monkeypatch):
    adam = transfer._adam
    monkeypatch.setattr(transfer, "_adam", lambda g: adam(g)._replace(eps=1.1 * adam(g).eps))
    assert golden_transfer.error(FILES / f"{ONE_SIDED}.npz", SOME[ONE_SIDED]) > 1


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        (MUON, dict(opt__mup=False), "opt.mup=False is not in the format"),
        (MUON, dict(opt__new=1), "opt.new=1"),
        (MUON, dict(labels__embed="lion"), "labels.embed='lion'"),
        (MUON, dict(shapes__embed=[2, 2]), "shapes.embed"),
        (MUON, dict(floor__embed=float("inf")), "floor of embed is not finite"),
        ("b4_norm_by_spect_f32", dict(routing__hidden="none"), "routing.hidden='none'"),
    ],
)
def test_what_is_not_in_the_format_is_refused(tmp_path, name, entries, message):
    with pytest.raises(ValueError, match=message):
        replay_golden.error(changed(tmp_path, name, **entries))


def test_the_script_takes_these_files(tmp_path, capsys):
    path = FILES / "b4_norm_by_spect_f32.npz"
    other = changed(tmp_path, path.stem, power_iterations=2)
    assert replay_golden.main([str(path), str(other)]) == 1
    assert ["MISS" in line for line in capsys.readouterr().out.splitlines()] == [False, True]
