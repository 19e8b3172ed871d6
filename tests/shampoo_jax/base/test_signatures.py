"""Signatures: short, written out, seen by tools; a misspelt keyword is told the nearest."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import shampoo_jax as sj
from shampoo_jax.base.signatures import REFRESH, ROUTED, suggests

ALIASES = [sj.shampoo, sj.soap, sj.kl_shampoo, sj.kl_soap, sj.one_sided_shampoo]
DIRECTIONS = [
    sj.scale_by_shampoo,
    sj.scale_by_soap,
    sj.scale_by_kl_shampoo,
    sj.scale_by_kl_soap,
    sj.scale_by_one_sided_shampoo,
]
OPTIMIZERS = [*ALIASES, *DIRECTIONS]
PUBLIC = {name: getattr(sj, name) for name in sj.__all__}
CALLABLES = {name: x for name, x in PUBLIC.items() if callable(x)}


def refusal(function, name):
    """What is said to a keyword that the function does not have."""
    with pytest.raises(TypeError) as refused:
        function(**{name: 1})
    return str(refused.value)


def options(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", CALLABLES)
def test_parameters_are_few_and_written_out(name):
    if name == "Solver":  # a protocol: it is inherited from, not called
        return
    parameters = inspect.signature(CALLABLES[name]).parameters.values()
    assert len(parameters) <= 23
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert not [p.name for p in parameters if p.kind in rest]


# Not given by users: `explain` makes `Report`, one field a line that it prints, `blocked` makes
# `Blocks`, one field for each thing that travels with a stack, `compile_for` makes `Compiled`.
MADE = ("Report", "Blocks", "Compiled")
OBJECTS = [n for n, x in PUBLIC.items() if dataclasses.is_dataclass(x) and n not in MADE]


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_have_few_fields(name):
    assert len(dataclasses.fields(PUBLIC[name])) <= 8


@pytest.mark.parametrize("function", [*OPTIMIZERS, sj.as_optimizer])
def test_the_signature_seen_is_the_one_written(function):
    written = function.__wrapped__
    assert inspect.signature(function) == inspect.signature(written)
    count = written.__code__.co_argcount + written.__code__.co_kwonlyargcount
    assert tuple(options(function)) == written.__code__.co_varnames[:count]
    assert (function.__name__, function.__doc__) == (written.__name__, written.__doc__)


@pytest.mark.parametrize("function", [*OPTIMIZERS, sj.as_optimizer])
def test_every_option_misspelt_is_found(function):
    for name in options(function):
        middle = len(name) // 2
        swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
        for wrong in [name + name[-1], "_" + name, *[swapped, name[:-1]][: 2 * (len(name) > 4)]]:
            if wrong in options(function):
                continue
            assert refusal(function, wrong) == (
                f"{function.__name__} has no option {wrong!r}: did you mean {name}?"
            )


# What other packages call it -> what is answered, where the function has that.
ELSEWHERE = {
    "beta1": ["b1"],
    "beta2": ["b2"],
    "betas": ["b1=..., b2=..."],
    "bta2": ["b2"],
    "beta3": ["b3"],
    "shampoo_beta": ["factor_b2", "b2"],
    "block_size": ["blocking=Blocking(size=...)"],
    "block_width": ["blocking=Blocking(size=...)"],
    "blocksize": ["blocking=Blocking(size=...)"],
    "max_preconditioner_dim": ["blocking=Blocking(size=...)"],
    "merge_dims": ["blocking=Blocking(merge=...)"],
    "merge": ["blocking=Blocking(merge=...)"],
    "dimension_numbers": ["blocking=Blocking(...)"],
    "precondition_frequency": ["every"],
    "preconditioning_compute_steps": ["every"],
    "update_freq": ["every"],
    "start_preconditioning_step": [REFRESH],
    "stagger": [REFRESH],
    "epsilon": ["eps", "solver=ShiftedEigh(damping=...)"],
    "matrix_epsilon": ["damping", "solver=ShiftedEigh(damping=...)"],
    "cutoff": ["rtol", "solver=TruncatedEigh(rtol, atol)"],
    "grafting_config": ["graft"],
    "graft_b2": ["graft=scale_by_second_moment(b2, eps)"],
    "use_nesterov": ["momentum=momentum(...)"],
    "weight_decay_kind": ["decay=Decay(...)", ROUTED],
    "peak_lr": ["decay=Decay(...)", ROUTED],
    "adamw_b1": ["others=optax.adamw(...)", ROUTED],
    "exponent_override": ["exponents", "side"],
    "cap": ["max_scale"],
    "lr": ["learning_rate", ROUTED],
}


@pytest.mark.parametrize("function", OPTIMIZERS)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_packages_are_answered_with_ours(function, name):
    own = (*options(function), ROUTED)
    has = [a for a in ELSEWHERE[name] if a.partition("=")[0] in own]
    said = refusal(function, name)
    if has:
        assert said == f"{function.__name__} has no option {name!r}: did you mean {has[0]}?"
    else:  # nothing that it does not have
        answer = said.partition(": ")[2]
        assert answer == f"it has {', '.join(options(function))}."


def test_a_name_that_a_function_has_is_no_name_of_others():
    sj.soap(0.1, eps=1e-6, rtol=1e-3)
    sj.scale_by_soap(damping=1e-6)
    sj.kl_shampoo(0.1, eps=1e-6)
    for name, answer in (("epss", "eps"), ("rtoll", "rtol"), ("rtl", "rtol")):
        assert f"did you mean {answer}?" in refusal(sj.soap, name)
    assert "did you mean damping?" in refusal(sj.scale_by_soap, "dampening")


@pytest.mark.parametrize("function", DIRECTIONS)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "momentum", "others"])
def test_directions_send_options_of_whole_optimizers_there(function, name):
    assert f"did you mean {ROUTED}?" in refusal(function, name)


def test_a_name_like_no_other_is_answered_with_all():
    @suggests
    def function(first, *, second=2):
        return first + second

    assert function(1, second=3) == 4
    assert refusal(function, "xyz") == "function has no option 'xyz': it has first, second."
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        function()  # pyrefly: ignore


def complaints(tmp_path, line):
    """Names of what the type checker finds in a file with this line."""
    file, root = tmp_path / "user.py", Path(sj.__file__).parents[1]
    file.write_text(f"import shampoo_jax\n\ntx = {line}\n")
    command = [sys.executable, "-m", "pyrefly", "check", str(file), "--output-format", "json"]
    paths = ["--search-path", str(root), "--python-interpreter-path", sys.executable]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, cwd=tmp_path)
    return [error["name"] for error in json.loads(done.stdout)["errors"]]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("shampoo_jax.shampoo(1e-3, bta2=0.9)", "shampoo_jax.shampoo(1e-3, b2=0.9)"),
        ("shampoo_jax.Blocking(block=4)", "shampoo_jax.Blocking(size=4)"),
    ],
)
def test_type_checkers_see_the_written_signature(tmp_path, wrong, right):
    assert complaints(tmp_path, wrong) == ["unexpected-keyword"]
    assert complaints(tmp_path, right) == []
