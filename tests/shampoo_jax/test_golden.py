"""Trajectories of Meta's distributed_shampoo, and proof that a wrong rule would be seen.

What each file has that others have not is in its config. Parameters do not interact, and compiling
is what takes time: the files of the basic rules are replayed whole, but for what a processor's
rounding decides, those of further rules on one matrix, all of them whole by `make golden`. The
mutations show that the comparison can fail.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from scripts.maintenance import golden_adapter, replay_golden
from shampoo_jax.parts import filtering, grafting, refresh

FILES = {
    path.stem[:2]: path
    for path in sorted((Path(__file__).parents[1] / "golden" / "meta").glob("[0-6]*.npz"))
}
WHOLE = "01 05 06 09 11 12 13 14 15 20 21 22 23 28 29 30 55 60 61".split()
# A cutoff of 0 keeps what rounding made positive in a null space, which these have for longest.
DECIDED_BY_ROUNDING = {"09": ("vec", "tall")}
# Merging, decay over peak, momentum, eigenbases, KL statistics, higher-order Newton, orthogonal and
# sign directions, averaging, missing gradients, trace scaling, unweighted statistics.
ONE_MATRIX = "17 25 27 32 34 36 37 39 42 44 47 48 49 50 51 52".split()


@pytest.mark.trap("S3", "S4", "S6", "S7")
@pytest.mark.parametrize("number", WHOLE)
def test_trajectory(number):
    trajectory = replay_golden.load(FILES[number])
    names = [n for n in trajectory.params if n not in DECIDED_BY_ROUNDING.get(number, ())]
    assert replay_golden.replay(only(trajectory, names)) <= 1


@pytest.mark.parametrize("number", ONE_MATRIX)
def test_matrix_of_a_trajectory(number):
    trajectory = replay_golden.load(FILES[number])
    assert replay_golden.replay(only(trajectory, ["mat"])) <= 1


def only(trajectory, names):
    """The trajectory of some of its parameters."""
    return dataclasses.replace(
        trajectory,
        params={n: trajectory.params[n] for n in names},
        gradients=[{n: g[n] for n in names} for g in trajectory.gradients],
        expected=[{n: e[n] for n in names} for e in trajectory.expected],
        evaluated={n: e for n, e in trajectory.evaluated.items() if n in names},
    )


def mutated(number, names, change=None):
    """Error over tolerance of a file, some parameters only, with entries of its config replaced."""
    trajectory = only(replay_golden.load(FILES[number]), names.split())

    def make(config):
        config = json.loads(json.dumps(config, default=np.ndarray.tolist))
        for path, value in (change or {}).items():
            *parents, last = path.split(".")
            entry = config
            for key in parents:
                entry = entry[key]
            assert entry[last] != value
            entry[last] = value
        return golden_adapter.optimizer(config)

    return replay_golden.replay(trajectory, make)


@pytest.mark.trap("S3", "S4", "S7")
@pytest.mark.parametrize(
    ("number", "names", "change"),
    [
        ("01", "mat", {"beta2": 0.95}),  # factors summed, not averaged
        ("05", "mat", {"graft.kind": "rmsprop"}),  # the graft's bias correction
        ("05", "one", {"graft.epsilon": 1e-3}),
        ("06", "low", {"preconditioner.rank.rtol": 0.1}),  # the cutoff
        ("09", "mat", {"weight_decay": 0.0}),
        ("12", "mat", {"first_refresh_step": 6}),  # identity before the first refresh
        ("15", "low", {"max_block_dim": 20}),
        ("20", "mat", {"beta1_output": None}),
        ("22", "mat", {"weight_decay_kind": "decoupled"}),
        ("28", "ten3", {"preconditioner.exponents": {}}),
        ("29", "mat", {"preconditioner.exponents": {"2": {"0": 0.0, "1": 0.5}}}),  # other side
        ("30", "vec", {"preconditioner.exponents": {}}),  # vectors preconditioned after all
        ("55", "mix", {"merge_target_order": "inf"}),
        ("60", "mat", {"epsilon": 1.0001e-4}),
    ],
)
def test_a_changed_option_is_seen(number, names, change):
    assert mutated(number, names, change) > 1


def every_interval_only(count, every, start):
    return (count % every == 0) & (count >= every)


def one_norm_for_the_stack(x):
    return jnp.sqrt(jnp.sum(x * x)).repeat(len(x))


def one_step_late(base, count, dtype):
    return jnp.asarray(base, dtype) ** (count + 1).astype(dtype)


@pytest.mark.parametrize(
    ("number", "names", "module", "name", "wrong"),
    [
        ("13", "mat", refresh, "refresh_due", every_interval_only),
        ("15", "low", grafting, "norms", one_norm_for_the_stack),
        ("05", "mat", filtering, "power", one_step_late),
    ],
)
def test_a_wrong_rule_is_seen(monkeypatch, number, names, module, name, wrong):
    assert mutated(number, names) <= 1
    monkeypatch.setattr(module, name, wrong)
    assert mutated(number, names) > 1


def test_the_script_reports_and_fails_on_a_miss(tmp_path, capsys):
    with np.load(FILES["60"]) as z:
        arrays = {k: z[k] for k in z if k.split("__")[0] not in ("init", "grad", "param", "spread")}
        arrays |= {k: z[k] for k in z if k.endswith("__one")}
    names = json.loads(str(arrays["names"]))
    arrays["grad_present"] = arrays["grad_present"][:, [names.index("one")]]
    arrays["names"] = np.array(json.dumps(["one"]))
    np.savez(tmp_path / "same.npz", **arrays)
    assert replay_golden.main([str(tmp_path / "same.npz")]) == 0
    np.savez(tmp_path / "moved.npz", **arrays | {"param__one": arrays["param__one"] + 1e-6})
    assert replay_golden.main([str(tmp_path / f"{n}.npz") for n in ("same", "moved")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["same", "same", "moved"]
    assert ["MISS" in line for line in lines] == [False, False, True]
