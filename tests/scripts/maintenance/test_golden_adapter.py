"""Rules of the recorded format that no recorded file has, against their numpy re-derivation."""

import copy
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.maintenance import golden_adapter, replay_golden

FILE = Path(__file__).parents[2] / "golden" / "meta" / "62_f64_eigenbasis_adam.npz"
B1, B2, EPS, STEPS = 0.9, 0.95, 0.1, 7
ADAM = {"kind": "adam", "beta2": 0.95, "epsilon": 1e-8}


def config(kind, rank=None, solver=None, **changes):
    """A config of one preconditioner; changes of the preconditioner are prefixed by `p_`."""
    with np.load(FILE) as z:
        base = json.loads(str(z["config"]))
    base = copy.deepcopy(base) | {"epsilon": EPS, "first_refresh_step": -1}
    base["preconditioner"] |= {"kind": kind}
    base["preconditioner"] |= {"rank": rank} if rank else {}
    base["preconditioner"] |= {"solver": solver} if solver else {}
    base["preconditioner"] |= {k[2:]: v for k, v in changes.items() if k.startswith("p_")}
    return base | {k: v for k, v in changes.items() if not k.startswith("p_")}


def gradients():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(5, 4)) for _ in range(STEPS)]


def directions(config):
    """Directions of a single matrix."""
    with jax.enable_x64(True):
        tx = golden_adapter.direction(config)
        state, update, found = tx.init({"w": jnp.zeros((5, 4))}), jax.jit(tx.update), []
        for g in gradients():
            u, state = update({"w": jnp.asarray(g)}, state)
            found.append(np.asarray(u["w"]))
        return found


def filtered():
    """Bias-corrected first moments."""
    m, found = np.zeros((5, 4)), []
    for t, g in enumerate(gradients(), start=1):
        m = B1 * m + (1 - B1) * g
        found.append(m / (1 - B1**t))
    return found


def roots(rule, *, kl, initial=1.0, start=1, trace=None):
    """Directions `P0 F P1`, `P = rule(eigenvalues)` of factors that may be whitened and scaled."""
    statistics = [np.zeros((5, 5)), np.zeros((4, 4))]
    p, found = [initial * np.eye(5), initial * np.eye(4)], []
    for t, (g, f) in enumerate(zip(gradients(), filtered(), strict=True), start=1):
        seen = (g @ p[1], g.T @ p[0]) if kl else (g, g.T)
        statistics = [B2 * s + (1 - B2) * h @ h.T for s, h in zip(statistics, seen, strict=True)]
        if t >= start:
            for k, s in enumerate(statistics):
                a = s / (1 - B2**t)
                a = a if trace is None else a * max(np.trace(a), EPS) ** -trace
                values, q = np.linalg.eigh(a)
                p[k] = q * rule(values) @ q.T
        found.append(p[0] @ f @ p[1])
    return found


def shift_after(values):
    return (values - min(values.min(), 0) + EPS) ** -0.25


def shift_before(values):
    values = values + EPS
    return (values if values.min() >= EPS else values - values.min() + EPS) ** -0.25


def keep_above_one(values):
    return np.where(values > 1, np.maximum(values, 1.0) ** -0.25, 0.0)


AFTER = {"kind": "shift", "before": False}
PSEUDO = {"kind": "pseudo", "rtol": 0.0, "atol": 1.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config("kl_root", p_trace_scaling=0.5), roots(shift_before, kl=True, trace=0.5)),
        # The reference keeps Q = I, L = 1 until the first refresh and applies its rule to them.
        (
            config("kronecker_eig", AFTER, first_refresh_step=4),
            roots(shift_after, kl=False, start=4, initial=(1 + EPS) ** -0.25),
        ),
        (
            config("kl_eig", AFTER, first_refresh_step=4),
            roots(shift_after, kl=True, start=4, initial=(1 + EPS) ** -0.25),
        ),
        (
            config("kronecker_eig", PSEUDO, first_refresh_step=3, epsilon=0.0),
            roots(keep_above_one, kl=False, start=3, initial=0.0),
        ),
        (
            config("kronecker_eig", first_refresh_step=4),
            roots(shift_before, kl=False, start=4),
        ),
    ],
    ids=["kl_trace", "eig_after", "kl_eig_after", "eig_pseudo", "eig_before"],
)
def test_roots(config, expected):
    for ours, theirs in zip(directions(config), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def soap(trace):
    """Adam in eigenbases of one QR step, first refreshed at step 3."""
    statistics, q = [np.zeros((5, 5)), np.zeros((4, 4))], [np.eye(5), np.eye(4)]
    c, found = np.zeros((5, 4)), []
    for t, (g, f) in enumerate(zip(gradients(), filtered(), strict=True), start=1):
        for k, h in enumerate((g, g.T)):
            statistics[k] = B2 * statistics[k] + (1 - B2) * h @ h.T
            if t >= 3:
                a = statistics[k] / (1 - B2**t)
                a = a * np.trace(a) ** -trace + EPS * np.eye(len(a))
                turn, r = np.linalg.qr(q[k].T @ a @ q[k])
                order = np.argsort(np.diag(r @ turn), kind="stable")
                q[k] = (q[k] @ turn)[:, order]
        c = B2 * c + (1 - B2) * (q[0].T @ g @ q[1]) ** 2
        rotated = (q[0].T @ f @ q[1]) / (np.sqrt(c / (1 - B2**t)) + EPS)
        found.append(q[0] @ rotated @ q[1].T)
    return found


def test_trace_scaling_of_the_eigenbasis():
    qr = {"kind": "qr"}
    scaled = config("eigenbasis_adam", None, qr, first_refresh_step=3, p_trace_scaling=0.5)
    for ours, theirs in zip(directions(scaled), soap(0.5), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["sign", "identity"])
def test_until_the_first_refresh_the_graft_steps_alone(kind):
    nu = np.zeros((5, 4))
    ours = directions(config(kind, first_refresh_step=4, graft=ADAM))
    for t, (g, f, u) in enumerate(zip(gradients(), filtered(), ours, strict=True), start=1):
        nu = 0.95 * nu + 0.05 * g**2
        expected = f / (np.sqrt(nu / (1 - 0.95**t)) + 1e-8)
        if t >= 4:
            d = np.sign(f) if kind == "sign" else f
            expected = d * np.linalg.norm(expected) / np.linalg.norm(d)
        np.testing.assert_allclose(u, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "refused",
    [
        config("kronecker_root", graft={"kind": "rmsprop", "beta2": 1.0, "epsilon": 1e-2}),
        config("kronecker_root", graft=ADAM | {"beta2": 1.0}),
        config("kronecker_root", None, {"kind": "newton"}, p_exponents={"2": 0.75}),
        config("kl_root", None, {"kind": "newton"}, p_exponents={"2": {"1": 0.4}}),
    ],
)
def test_what_the_reference_cannot_do_is_refused(refused):
    with pytest.raises(ValueError, match="not in the format"):
        golden_adapter.direction(refused)


def other(number="05", **changes):
    """The config of a file with entries replaced; a dict replaces entries of a section."""
    with np.load(next(FILE.parent.glob(f"{number}_*.npz"))) as z:
        found = json.loads(str(z["config"]))
    for key, value in changes.items():
        found[key] = (found[key] or {}) | value if isinstance(value, dict) else value
    return found | {"learning_rates": [0.01]}


PRIMAL = {"kind": "primal", "eval_coeff": 0.9, "train_coeff": 0.8}
HEAVY = {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
CUT = {"kind": "pseudo", "rtol": None, "atol": 0.0}
HIGH = {"kind": "newton_high_order", "rel_epsilon": 1e-3, "abs_epsilon": 0.0}


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("averaging", other(averaging=PRIMAL, momentum=HEAVY)),
        ("averaging.lr_power", other(averaging=PRIMAL | {"lr_power": 2})),
        ("momentum.damping", other(momentum=HEAVY | {"damping": 0.0})),
        ("preconditioner.solver.kind", other(preconditioner={"solver": {"kind": "qr"}})),
        ("preconditioner.solver.kind", other(preconditioner={"solver": {"kind": "eihg"}})),
        ("preconditioner.solver.kind", other("35", preconditioner={"solver": {"kind": "newton"}})),
        ("preconditioner.solver.kind", other("31", preconditioner={"solver": {"kind": "newton"}})),
        (
            "preconditioner.solver.tolerance",
            other(preconditioner={"solver": {"kind": "eigh", "tolerance": 0.3}}),
        ),
        (
            "preconditioner.rank.kind",
            other(preconditioner={"rank": {"kind": "psuedo", "before": True}}),
        ),
        ("preconditioner.rank.kind", other("41", epsilon=0.0, preconditioner={"rank": CUT})),
        ("preconditioner.rank.kind", other("31", epsilon=0.0, preconditioner={"rank": CUT})),
        (
            "preconditioner.exponents",
            other(preconditioner={"solver": HIGH, "exponents": {"2": 0.75}}),
        ),
        ("preconditioner.exponents", other(preconditioner={"exponents": {"2": {"2": 0.5}}})),
        ("preconditioner.skip_basis", other(preconditioner={"skip_basis": {"2": [0]}})),
        ("preconditioner.kind", other(preconditioner={"kind": "kl_rot"})),
        ("preconditioner.scale", other("47", preconditioner={"scale": "l1norm"})),
        ("preconditioner.nuclear_norm", other("44", preconditioner={"nuclear_norm": True})),
        ("preconditioner.foo", other(preconditioner={"foo": 1})),
        ("epsilon", other(preconditioner={"rank": CUT})),
        ("epsilon", other(epsilon=0.0)),
        ("weight_decay_kind", other(weight_decay_kind="decopled")),
        ("graft.kind", other(graft={"kind": "adm"})),
        ("graft.eps", other(graft={"eps": 1e-8})),
        ("first_refresh_step", other(refresh_interval=5, first_refresh_step=3)),
        ("dtype", other(dtype="bfloat16")),
        ("nesterov", other(nesterov=True)),
    ],
)
def test_nothing_is_ignored(key, refused):
    with pytest.raises(ValueError, match=rf"^{key}\b.*not in the format"):
        golden_adapter.optimizer(refused)


def test_a_missing_key_is_named():
    found = other()
    del found["graft"]["beta2"]
    with pytest.raises(ValueError, match="^graft.beta2 is missing"):
        golden_adapter.optimizer(found)


def rewritten(path, number, **changes):
    """A copy of a file with arrays replaced; the changes are functions of the arrays."""
    with np.load(next(FILE.parent.glob(f"{number}_*.npz"))) as z:
        arrays = dict(z)
    np.savez(path, **arrays | {key: change(arrays[key]) for key, change in changes.items()})
    return path


def changed_json(text, change):
    """JSON in an array, changed in place."""
    entry = json.loads(str(text))
    change(entry)
    return np.array(json.dumps(entry))


@pytest.mark.parametrize(
    ("number", "key", "change"),
    [
        ("62", "config", lambda a: changed_json(a, lambda c: c.update(bar=2))),
        ("62", "lr", lambda a: a[:0]),
        ("62", "lr", lambda a: a[:5]),
        ("62", "spread__mat", lambda a: a + np.inf),
        ("44", "names", lambda a: np.array('["mat", "gone"]')),
        ("70", "cases", lambda a: np.array("[]")),
        ("70", "cases", lambda a: changed_json(a, lambda c: c[0].update(foo=1))),
        ("70", "cases", lambda a: changed_json(a, lambda c: c[0]["solver"].update(kind="eihg"))),
        ("70", "cases", lambda a: changed_json(a, lambda c: c[0]["rank"].update(kind="psuedo"))),
    ],
)
def test_a_refused_file_is_named_and_fails(tmp_path, capsys, number, key, change):
    path = rewritten(tmp_path / "file.npz", number, **{key: change})
    assert replay_golden.main([str(path)]) == 1
    assert f"REFUSED {path}: " in capsys.readouterr().out


def test_orders_and_none_gradients():
    shapes = [(), (3,), (2, 3, 4), (2, 1, 3, 2), (0, 3)]
    with jax.enable_x64(True):
        tx = golden_adapter.optimizer(other("60"))
        params = {"w": [jnp.ones(shape) for shape in shapes], "left": jnp.ones(3)}
        gradients = {**params, "left": None}
        updates, _ = jax.jit(tx.update)(gradients, jax.jit(tx.init)(params), params)
        assert updates["left"] is None and [u.shape for u in updates["w"]] == shapes
        assert all(np.isfinite(u).all() for u in updates["w"])
