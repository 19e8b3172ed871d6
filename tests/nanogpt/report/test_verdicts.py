"""The benchmark's verdicts, from its own logs."""

import math
import pathlib

import pytest

from nanogpt.report.curves import Curve, read_curves
from nanogpt.report.verdicts import (
    MEDIUM_TARGET,
    Result,
    beats,
    claim,
    earliest_pass,
    last_result,
    pairwise_score,
    passes,
    result_at,
    score,
    verdict_line,
)

CURVES = pathlib.Path(__file__).parents[3] / "nanogpt" / "report" / "published"
# The benchmark's table of results: number, file, runs, step, mean as printed there, column.
PUBLISHED = [
    ("#4", "t3_04_adamh_4875", 5, 4875, 3.2741, "val_loss"),
    ("#5", "t3_05_muonh_3325", 10, 3325, 3.2782, "val_loss"),
    ("#6", "t3_06_muon_3375", 20, 3375, 3.2788, "val_loss"),
    ("#12", "t3_12_muon_3325", 20, 3325, 3.2790, "val_loss"),  # of 3350
    ("#19", "t3_19_klsoaph_3125", 6, 3125, 3.2780, "val_loss"),
    ("#21", "t3_21_shampoo_4100", 4, 4100, 3.2776, "val_loss"),  # of 4150
    ("#22", "t3_22_spectraldescent_8225", 4, 8225, 3.2774, "val_loss"),  # of 8500
    ("#27", "t3_27_soaph_3125", 6, 3125, 3.2782, "val_loss"),
    ("#33", "t3_33_psgd_3375", 5, 3375, 3.2779, "val_loss"),  # of 3400
    ("#35", "t3_35_shampoo_pinv_3375", 2, 3375, 3.2767, "val_loss"),
    ("#36", "t3_36_muon_tuned_3250", 10, 3250, 3.2787, "val_loss"),
    ("#37", "t3_37_muonh_tuned_3250", 10, 3250, 3.2786, "val_loss"),
    ("#44", "t3_44_soapmuon_2750_h100", 20, 2750, 3.2789, "val_loss"),  # of 2900
    ("#45", "t3_45_tailema_2720", 10, 2720, 3.2786, "val_loss"),
    ("#46", "t3_46_cwd_rowfloor_2690", 8, 2690, 3.2783, "val_ema_loss"),  # of 2765
    ("#353", "t3_pr353_adamw_finals_4950", 10, 4950, 3.2776, "val_loss"),
]
# What the table prints is off by more than rounding: the mean is 3.27893, and passes either way.
MISPRINTED = {"#6": 3.2789}
HALF_A_DIGIT = 5.1e-5
SINGLE = [  # from before the rule: one run, which reaches the target
    ("t3_01_muon_3600", 3600, 3.2777, 3.28),
    ("t3_02_adamw_5625", 5625, 3.2790, 3.28),
    ("t3_03_muon_3500", 3500, 3.2767, 3.28),
    ("t2_r02_2025-01-18", 7500, 2.9166, MEDIUM_TARGET),
    ("t2_r03_weightdecay", 7150, 2.9182, MEDIUM_TARGET),
    ("t2_r04_optcoeffs", 7050, 2.9193, MEDIUM_TARGET),
    ("t2_r05_longercooldown", 6950, 2.9184, MEDIUM_TARGET),
    ("t2_r06_archopt", 6710, 2.9194, MEDIUM_TARGET),
    ("t2_r07_2025-04-16", 6450, 2.9194, MEDIUM_TARGET),
    ("t2_r08_2025-04-22_muon_5960", 5960, 2.9198, MEDIUM_TARGET),
]


def read(name, column="val_loss"):
    return read_curves(CURVES / f"{name}.csv", column)


@pytest.mark.parametrize(
    ("number", "name", "n", "step", "mean", "column"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_published_results_pass_at_their_step_and_at_none_before(
    number, name, n, step, mean, column
):
    result = earliest_pass(read(name, column), 3.28)
    assert result is not None
    assert (result.n, result.step) == (n, step)
    assert result.mean == pytest.approx(MISPRINTED.get(number, mean), abs=HALF_A_DIGIT)


@pytest.mark.parametrize(("name", "step", "loss", "target"), SINGLE, ids=[r[0] for r in SINGLE])
def test_single_runs_reach_the_target_and_prove_nothing_more(name, step, loss, target):
    runs = read(name)
    result = last_result(runs)
    assert (result.step, result.n) == (step, 1)
    assert result.mean == pytest.approx(loss, abs=HALF_A_DIGIT)
    assert math.isnan(result.std) and 0 < score(result, target) < 0.004
    # The medium track asks for no proof.
    assert passes(result, target) == (target == MEDIUM_TARGET)


def test_results_that_are_no_claim():
    assert earliest_pass(read("t3_12b_muon_3150_ablation")) is None
    assert earliest_pass(read("t3_46_cwd_rowfloor_2690")).step == 2735  # without averaged weights
    assert earliest_pass(read("t3_44_soapmuon_2750_a40")).step == 2755
    shampoo = read("t3_35_shampoo_pinv_3375")
    assert [passes(result_at(shampoo, step)) for step in (3325, 3350, 3375)] == [0, 0, 1]


def test_published_results_against_each_other():
    muon36, muon12, muon6, shampoo35, shampoo21 = (
        claim(read(f"t3_{name}"))
        for name in (
            *("36_muon_tuned_3250", "12_muon_3325", "06_muon_3375"),
            *("35_shampoo_pinv_3375", "21_shampoo_4100"),
        )
    )
    # By hand: (3.279047 - 3.278659 + 75 * .000045) / sqrt(1/20 + 1/10).
    assert pairwise_score(muon36, muon12) == pytest.approx(0.009716, abs=1e-6)
    assert beats(muon36, muon12) and not beats(muon12, muon36)
    assert beats(muon12, muon6)
    assert beats(shampoo35, shampoo21)
    assert not beats(shampoo35, muon12) and not beats(muon12, shampoo35)


def runs_of(*losses, steps=(0, 25)):
    return [Curve(f"seed{i}", steps, loss, [0.0] * len(steps)) for i, loss in enumerate(losses)]


def test_a_score_of_exactly_the_threshold_passes():
    assert passes(Result(25, 3.278, 0.0, 4)) and not passes(Result(25, 3.27801, 0.0, 4))
    assert beats(Result(25, 3.0, 0.0, 2), Result(25, 3.004, 0.0, 2))
    assert not beats(Result(25, 3.0, 0.0, 2), Result(25, 3.00399, 0.0, 2))


def test_saved_steps_count_as_loss():
    old = Result(3000, 3.27, 0.0, 2)
    assert pairwise_score(Result(2900, 3.27, 0.0, 2), old) == pytest.approx(0.0045)


def test_only_steps_of_all_runs_count():
    runs = runs_of((4.0, 3.0, 3.0), steps=(0, 25, 50)) + runs_of((4.0, 3.0), steps=(0, 50))
    assert earliest_pass(runs).step == 50


def test_a_diverged_run_is_not_left_out():
    runs = runs_of((4.0, 3.0), (4.0, math.nan))
    assert earliest_pass(runs) is None
    assert math.isnan(claim(runs).mean) and claim(runs).n == 2
    assert verdict_line([3.0, math.nan]).startswith("not accepted: mean nan")


def test_verdict_in_words():
    assert verdict_line([3.2784]) == (
        "not accepted: mean 3.27840, n=1: (3.28 - mean) * sqrt(n) = 0.00160 < 0.004"
    )
    line = verdict_line([2.91, 2.912], target=MEDIUM_TARGET)
    assert line.startswith("accepted: mean 2.91100, std 0.00141, n=2: (2.92 - mean)")
    assert verdict_line([2.91975], target=MEDIUM_TARGET).endswith(" = 0.00025 >= 0")
    assert verdict_line([2.9201], target=MEDIUM_TARGET).startswith("not accepted")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: result_at([], 25), "no losses"),
        (lambda: result_at(runs_of((4.0, 3.0)), 30), r"'seed0' was not validated at step 30.*25"),
        (lambda: claim([]), "no step at which all runs were validated; runs: none"),
        (lambda: verdict_line([]), "no losses"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
