"""A state of Meta's package becomes a checkpoint for the benchmark's model; files run nothing."""

import pickle
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nanogpt.lab import import_meta
from nanogpt.lab.command_line import read_config, split_arguments
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.train_step import abstract_params
from shampoo_jax import tree_to_state

SIZES = "--model.num-layers 1 --model.model-dim 8 --model.head-dim 8 --model.mlp-dim 16"
RUN = f"--optimizer shampoo {SIZES} --model.vocab-size 257".split()


def config():
    options, rest = split_arguments(RUN)
    return read_config(options, "shampoo", "x", rest)


@pytest.fixture
def saved():
    """Parameters as in the torch script, and the state of its matrices after 5 steps."""
    rng, params, state = np.random.default_rng(0), {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config().model)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        kernel = name.endswith("kernel")
        for ours, theirs in (("kernel", "weight"), ("embedding", "weight"), ("scale", "gains")):
            name = name.replace(ours, theirs)
        shape = leaf.shape[::-1] if kernel else leaf.shape
        params[name.replace("head.", "proj.")] = rng.normal(size=shape).astype(np.float32)
        if kernel and name.startswith("blocks"):
            factors = {k: np.eye(d, dtype=np.float32) for k, d in enumerate(shape)}
            block = {"filtered_grad": params[name] + 1, "adagrad": params[name] ** 2}
            block["shampoo"] = {"factor_matrices": factors, "inv_factor_matrices": factors}
            state[name] = {"step": np.array(5), "block_0": block}
    return {"params": params, "state": state}


@pytest.fixture
def torch(monkeypatch, saved):
    """Stands for torch: what its safe reader gives, and how it was asked."""
    asked = {}

    def load(path, **options):
        asked.update(options, path=path)
        if "bad" in path.name:
            raise pickle.UnpicklingError("run it anyway")
        return saved

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    return asked


def test_a_file_of_torch_becomes_an_archive_and_a_checkpoint(torch, saved, tmp_path, capsys):
    import_meta.main([str(tmp_path / "meta.pt"), "--out", str(tmp_path / "meta.npz")])
    assert torch["weights_only"] is True
    import_meta.main([str(tmp_path / "meta.npz"), "--out", str(tmp_path / "ours"), *RUN])
    assert capsys.readouterr().out.count("state of 6 parameters") == 2
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(tmp_path / "ours")
    kernel = found["params"]["blocks"]["0"]["mlp"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernel, saved["params"]["blocks.0.mlp.fc.weight"].T)
    params = abstract_params(config().model)
    optimizer = build_optimizer(config(), params)
    fresh = jax.jit(optimizer.init)(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params))
    state = tree_to_state(found["optimizer"], fresh, params)
    matrices = state.inner_state.inner_states["matrices"].inner_state
    assert int(matrices[0].inner[0].count) == 5 and int(matrices[-1].count) == 5
    moments = matrices[0].inner[0].mu  # 16x8 also holds the transposed 8x16
    expected = [saved["params"][f"blocks.0.mlp.{n}.weight"] + 1 for n in ("fc", "proj")]
    # fc.weight is (16, 8), its kernel (8, 16) is stored longer side first: as theirs.
    np.testing.assert_array_equal(moments["16x8"], [expected[0], expected[1].T])


def refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        import_meta.main([*map(str, arguments)])


def test_what_is_no_file_of_numbers_is_refused(torch, tmp_path, monkeypatch):
    out = ["--out", tmp_path / "out.npz"]
    refused([tmp_path / "bad.pt", *out], "error: .*bad.pt is no file of torch, .*save it by torch")
    broken = tmp_path / "broken.npz"
    for content in (b"", b"PK", pickle.dumps([1])):
        broken.write_bytes(content)
        refused([broken, *out], "error: .*broken.npz is no archive of numbers")
    np.savez(broken, x=np.array([{}], object))
    refused([broken, *out], "error: .*broken.npz is no archive of numbers")
    np.save(tmp_path / "one.npy", np.ones(2))
    (tmp_path / "one.npy").rename(broken)
    refused([broken, *out], "error: .*broken.npz is no archive of numbers")
    refused([tmp_path / "none.npz", *out], "error: .*No such file")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused([tmp_path / "meta.pt", *out], "error: .*meta.pt is taken .* pip install torch")


def test_a_damaged_archive_is_refused_or_read_as_it_was(tmp_path):
    whole = {f"state/w/block_{i}/adagrad": np.arange(8.0) + i for i in range(2)}
    np.savez(tmp_path / "whole.npz", **whole)
    content, rng = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(0)
    refusals, file = 0, tmp_path / "damaged.npz"
    for trial in range(50):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged[: rng.integers(len(content))] if trial % 5 == 0 else damaged)
        try:
            found = import_meta.read(file)
        except ValueError as error:
            assert str(file) in str(error)
            refusals += 1
            continue
        # A name may have changed; the import knows every name.
        assert all(np.array_equal(found[key], whole[key]) for key in whole.keys() & found.keys())
    assert refusals > 25


def test_a_command_line_that_makes_no_sense_is_refused(torch, tmp_path):
    file = tmp_path / "meta.pt"
    refused([file, "--out", tmp_path], "error: .* exists: name another --out")
    refused([file, "--out", tmp_path / "x"], "error: --optimizer is missing")
    refused([file, "--out", tmp_path / "x.npz", "--seed", "1"], "error: --seed: .* no settings")
    refused(
        [file, "--out", tmp_path / "x", *RUN, "--model.num-layers", "2"],
        r"error: parameter blocks/1/attn/k/bias of shape \(8,\) is not in the file",
    )
    assert not (tmp_path / "x").exists()
