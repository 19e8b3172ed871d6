"""Every example of docs/gallery trains in its small form, and the page says what was measured.

Of each example the optimizers of this library alone run, one where it compares several. What AdamW
does there, and the full size, is what `make gallery` runs and docs/gallery/report.json records.
"""

import ast

import jax
import numpy as np
import pytest

from scripts.maintenance import gallery

REPORT = gallery.read_report()["examples"]


def small(name: str, *optimizers: str) -> dict[str, float]:
    """Results of an example's small form with these of its optimizers."""
    module = gallery.load(name)
    module.OPTIMIZERS = {key: module.OPTIMIZERS[key] for key in optimizers}
    return module.main(small=True)


@pytest.mark.parametrize(
    ("name", "optimizer", "most"),
    [  # and what no training gives
        ("flax_nnx", "Shampoo", 1.5),  # ln 10 = 2.3 nats
        ("haiku_lstm", "Shampoo", 2.1),
        ("flax_linen", "Shampoo", 5.9),  # ln 512 = 6.2 nats
        ("moe", "Shampoo", 5.9),
        ("equinox_terrain", "SOAP", 0.9),  # 1, the variance
        ("scan_loop", "Shampoo", 3.5),  # 4.7, the variance
    ],
)
def test_it_learns(name, optimizer, most):
    assert small(name, optimizer)[optimizer] < most


def test_a_pole_stands_longer():
    module = gallery.load("policy_gradient")
    module.OPTIMIZERS = {"none": (lambda rate: module.optax.sgd(0.0), 0.0), **module.OPTIMIZERS}
    lengths = module.main(small=True)
    assert lengths["Shampoo"] > 4 * lengths["none"]


def test_an_equation_with_fewer_waves_is_solved_sooner():
    module = gallery.load("pinn")
    module.FREQUENCIES = np.pi * np.ones(2)
    module.OPTIMIZERS = {"SOAP": module.OPTIMIZERS["SOAP"]}
    assert module.main(small=True)["SOAP"] < 0.3  # 1 is the error of u = 0


def test_adapters_learn():
    losses = small("lora", "Shampoo")
    assert losses["Shampoo"] < losses["before"] / 2


def test_members_of_an_ensemble_are_runs_of_their_own():
    module = gallery.load("ensemble")
    module.OPTIMIZERS = {"Shampoo": module.OPTIMIZERS["Shampoo"]}
    losses = module.main(small=True)
    run = jax.jit(module.train, static_argnums=(0, 1))
    alone = [run(module.shampoo_jax.shampoo, 10, module.digits(), seed, 1e-2) for seed in (0, 1)]
    assert losses["Shampoo at 0.01"] == pytest.approx(float(np.mean(alone)), rel=1e-4)
    assert losses["Shampoo at 0.03"] < losses["Shampoo at 0.003"] - 0.1  # the rates differ


def test_eight_devices_agree_with_one_and_share_the_state():
    results = small("fsdp", "Shampoo")
    assert results["Shampoo on 8"] == pytest.approx(results["Shampoo"], rel=5e-3)
    held, whole = (results[f"{n}, kB of state a device"] for n in ("Shampoo on 8", "Shampoo"))
    assert held < whole / 4  # an eighth and what fills up stacks of less than eight blocks


def test_a_resumed_run_is_the_same_bit_for_bit():
    results = small("resume_orbax", "Shampoo")
    assert results["Shampoo, differing entries"] == 0
    assert results["Shampoo"] < 5.9


@pytest.mark.gallery
def test_keras_learns():
    assert small("keras_digits", "Shampoo")["Shampoo"] < 2.0


@pytest.mark.parametrize("name", gallery.examples())
def test_an_example_is_short_and_says_what_it_printed(name):
    text = (gallery.GALLERY / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"Run it: python docs/gallery/{name}.py\n" in docstring
    assert docstring.endswith("It printed: " + "\n".join(REPORT[name]["printed"]))


def test_the_page_has_every_example_and_the_figures_of_the_report():
    page = (gallery.GALLERY / "README.md").read_text(encoding="utf-8")
    assert sorted(REPORT) == gallery.examples()
    assert [name for name in REPORT if f"]({name}.py)" not in page] == []
    assert gallery.with_tables(page, gallery.read_report()) == page
