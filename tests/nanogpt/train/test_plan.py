"""A run compiled for hardware that is not here; the one target that is everywhere is the CPU."""

import dataclasses

import pytest

from nanogpt.train import plan, predicted
from nanogpt.train.mesh import make_layout
from nanogpt.train.rates import DEVICES, Rates
from shampoo_jax import Compiled, Program, Target, target_devices
from tests.nanogpt.train.test_loop import tiny

TARGET = target_devices("cpu:4")


@pytest.fixture(scope="module")
def record():
    return plan.plan_run(
        dataclasses.replace(
            tiny("nowhere", "nowhere", optimizer="shampoo"),
            data=dataclasses.replace(tiny("nowhere", "").data, batch_rows=16, microbatch_rows=4),
        ),
        TARGET,
    )


def test_a_plan_says_what_each_device_holds_and_does(record):
    assert record["devices"] == 4 and record["mesh"] == "data=-1"
    config = tiny("nowhere", "")
    layers = 4 * 16 * 16 + 2 * 16 * 32
    embedding = config.model.vocab_size * 16
    held = 4 * layers + (4 + 2) * embedding  # the head in float32, the embedding in bfloat16
    assert held <= record["parameters"] < 1.1 * held
    train, evaluation = record["programs"]["train"], record["programs"]["evaluation"]
    assert train["exchanges"] and train["calls"]["lapack_ssyevd_ffi"] > 0
    # Forward and backward are three times forward; a device has a row of each of 4 microbatches.
    one = sum(evaluation["flops"].values())
    assert sum(train["flops"].values()) > 4 * 2.9 * one > 0
    assert train["peak"] > record["parameters"] and train["short"] == 0
    assert "best_s" not in train  # a CPU's rates are not known
    # What evaluation reports is halved on every device, not between devices.
    assert evaluation["exchanges"].keys() == {"all-gather"}


def program(flops=(), exchanges=(), overlapped=()):
    target = Target("h100:8", "cuda", (), 80 << 30)
    done = Program(dict(flops), dict(exchanges), {}, dict(overlapped))
    return Compiled(target, 1.0, 2.0, 2.0, 300, 100, 50, done)


RATES = Rates(full=1.0, first=8.0, rest=4.0, bfloat16=24.0, plain=2.0, memory=10.0, near=5.0,
              far=1.0, node=8, source="")  # fmt: skip


def test_time_is_counted_at_the_rate_of_each_arithmetic():
    flops = {
        **{"bf16": 24.0, "tf32_tf32_f32": 4.0, "bf16_bf16_f32_x3": 8.0, "f32 highest": 1.0},
        **{"f32": 2.0, "f32 high": 4.0},
    }
    # In a ring of 8 a device sends 7/8 of what is gathered, twice that of what is summed.
    found = program(flops, {"all-gather": (2, 40), "all-reduce": (1, 20)}, {"all-gather": (1, 8)})
    near = predicted.parts(found, RATES, 8)
    assert near == {"products": 6.0, "memory": 50.0, "links": 14.0, "waits": 12.6}
    assert predicted.parts(found, RATES, 16)["links"] == 75.0


H100 = 9.894e14  # products of bfloat16 numbers a second


@pytest.mark.parametrize(("beside", "best"), [(0, 0.6), (1, 0.5)])
def test_the_best_time_waits_for_what_nothing_overlaps_with(beside, best):
    sent = {"collective-permute": (1, round(0.1 * 450e9))}
    found = program({"bf16": 0.5 * H100}, sent, sent if beside else {})
    record = plan._record(found, dataclasses.replace(found.target, devices=tuple(range(8))))
    assert record["best_s"] == pytest.approx(best)
    assert record["worst_s"] == pytest.approx(0.6 / 0.4, rel=1e-3)  # whatever overlaps


def test_a_record_of_what_does_not_fit_has_no_times():
    short = dataclasses.replace(program(), program=None, short=7)
    assert plan._record(short, short.target)["short"] == 7
    assert "best_s" not in plan._record(short, short.target)


def test_activations_grow_with_the_microbatch_and_sums_do_not(record):
    data = dataclasses.replace(tiny("nowhere", "").data, batch_rows=16, microbatch_rows=8)
    twice = dataclasses.replace(tiny("nowhere", "nowhere", optimizer="adamw"), data=data)
    found, before = plan.plan_run(twice, TARGET, ("gradients",))["temporary"], record["temporary"]
    assert found["gradient_sums"] == before["gradient_sums"] > record["parameters"] * 0.9
    assert 1.4 < found["activations"] / before["activations"] < 2.2
    assert before.keys() == {"activations", "gradient_sums", "optimizer"}


@pytest.mark.parametrize(("fits", "largest"), [(3, 0), (4, 4), (11, 8), (99, 16)])
def test_the_largest_microbatch_divides_the_batch_and_fits(fits, largest, monkeypatch):
    config = tiny("nowhere", "nowhere", optimizer="adamw")
    data = dataclasses.replace(config.data, batch_rows=16, microbatch_rows=4)
    config, tried = dataclasses.replace(config, data=data, mesh="data=-1"), []

    def compiled(config, layout, target):
        rows = config.data.microbatch_rows
        tried.append(rows)
        return dataclasses.replace(program(), short=max(rows - fits, 0))

    monkeypatch.setattr(plan, "compile_train", compiled)
    layout = make_layout(config, TARGET.devices)
    assert plan.largest_microbatch(config, layout, TARGET) == largest
    assert set(tried) <= {4, 8, 16} and len(tried) <= 2


def test_every_target_but_the_cpu_has_rates():
    assert all(name in DEVICES for name in predicted.RATES.values())
