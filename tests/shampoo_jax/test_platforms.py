"""Optimizers are lowered for platforms that are not here: the target chooses, not this machine."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax as sj

PARAMS = {"w": jax.ShapeDtypeStruct((130, 3), jnp.float32)}
# Decompositions by platform: LAPACK's, of which many at once are ours; cuSOLVER's and XLA's own.
PREFIX = {
    "cpu": ("lapack_", "shampoo_jax_"),
    "cuda": "cusolver_",
    "tpu": ("Eigh", "Qr", "ProductOf"),
}


def lowered(monkeypatch, tx):
    """Programs of one update by platform, traced once, where nobody may ask what is here."""

    def nobody_asks():
        raise AssertionError("a program was made to depend on this machine")

    monkeypatch.setattr(jax, "default_backend", nobody_asks)
    traced = jax.jit(tx.update).trace(PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS)
    return {name: traced.lower(lowering_platforms=(name,)).as_text() for name in PREFIX}


@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_decompositions_are_those_of_the_target(name, monkeypatch):
    for platform, text in lowered(monkeypatch, getattr(sj, name)(0.1)).items():
        calls = set(re.findall(r"custom_call @(\w+)", text))
        assert calls and all(call.startswith(PREFIX[platform]) for call in calls), calls


def test_auto_solves_by_products_on_accelerators_alone(monkeypatch):
    programs = lowered(monkeypatch, sj.shampoo(0.1, solver="auto"))
    products = {platform: text.count("dot_general") for platform, text in programs.items()}
    # A TPU's are in loops, a GPU's are spelt out.
    assert products["cpu"] < products["tpu"] < 24 < products["cuda"]
    # Roots of a single matrix; everywhere the two of their application are so.
    rough = {platform: text.count("[HIGH, HIGH]") for platform, text in programs.items()}
    assert rough["cpu"] == rough["tpu"] == 2 and rough["cuda"] > 10


PRECISE = {
    "soap": sj.scale_by_soap,
    "kl_shampoo": sj.scale_by_kl_shampoo,
    "kl_soap": sj.scale_by_kl_soap,
    # The others choose the precision of each product.
    **{
        name: functools.partial(sj.scale_by_shampoo, solver=sj.make_solver(name))
        for name in ("eigh", "shifted_eigh", "coupled_newton", "higher_order_newton")
    },
    "carried": functools.partial(sj.scale_by_shampoo, solver=sj.CarriedBasis(sj.QRBasis())),
}


@pytest.mark.parametrize("name", PRECISE)
def test_no_product_is_left_to_the_precision_of_a_platform(name, monkeypatch):
    """On recent GPUs that is TF32, which makes eigenvalues below 2^-11 of the largest noise.

    Statistics are two products of bfloat16 numbers each, and applied roots are TF32 by intention.
    """
    tx = PRECISE[name](monitor=1)
    chosen = re.compile(r"\[HIGHEST, HIGHEST\]|\[HIGH, HIGH\]|bf16>, tensor<\S+bf16>\) -> \S+xf32>")
    products = products_of(lowered(monkeypatch, tx)["cuda"])
    assert products and all(chosen.search(line) for line in products)
    applied = [line for line in products if "[HIGH, HIGH]" in line]
    halves = [line for line in products if "HIGH" not in line]
    # Where roots cut off what such products make noise.
    assert (len(applied), len(halves)) == ((2, 4) if name == "eigh" else (0, 0))
    with jax.default_matmul_precision("highest"):
        products = products_of(lowered(monkeypatch, tx)["cuda"])
    assert products and all("[HIGHEST, HIGHEST]" in line for line in products)


def products_of(program):
    return [line for line in program.splitlines() if "stablehlo.dot_general" in line]
