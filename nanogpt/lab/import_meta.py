"""Turns parameters and state of Meta's DistributedShampoo into ours; nothing in the file is run.

FILE is the numpy archive of docs/migration.md, or a file of torch, which has to be installed then:
torch.save({"params": dict(model.named_parameters()), "state": optimizer.state_dict()["state"]},
FILE). OUT.npz gets the numpy archive, whatever the model. Any other OUT is a folder for a
checkpoint: "params", and "optimizer", the state of --optimizer by parameter; the model is the
benchmark's, and the settings of nanogpt train choose its size.
"""

import argparse
import importlib
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanogpt.lab.command import command
from nanogpt.lab.command_line import read_config, split_arguments

if TYPE_CHECKING:
    from nanogpt.config.run import Config

HOW_TO_SAVE = (
    'torch.save({"params": dict(model.named_parameters()), "state": '
    'optimizer.state_dict()["state"]}, FILE)'
)

# What numpy and zipfile raise for bytes that are no archive.
DAMAGED = (
    *(ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@command(stopped="stopped")
def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        "nanogpt import-meta",
        "%(prog)s FILE --out OUT [--preset P --optimizer O ...]",
        __doc__,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=pathlib.Path, help="numpy archive (.npz), or torch's file")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="OUT.npz, or a new folder")
    options, rest = parser.parse_known_args(arguments)
    if options.out.exists():
        raise ValueError(f"{options.out} exists: name another --out.")
    archive = read(options.file)
    if options.out.suffix == ".npz":
        if rest:
            raise ValueError(f"{rest[0]}: an archive depends on no settings; leave them out.")
        import numpy as np

        np.savez_compressed(options.out, **archive)
    else:
        chosen, settings = split_arguments(rest)
        if not chosen.optimizer:
            raise ValueError(
                f"--optimizer is missing: the state of which? Or --out {options.out}.npz."
            )
        write_checkpoint(
            archive, read_config(chosen, chosen.optimizer, "import", settings), options.out
        )
    states = {key.partition("/block_")[0] for key in archive if "/block_" in key}
    print(f"{options.out}: state of {len(states)} parameters")


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads an archive or a file of torch; no object in it is made.

    Args:
        path: Taken for torch's unless it ends in .npz.

    Raises:
        ValueError: No such file, torch is missing, or a file of anything but numbers.
    """
    # It imports jax, for which no help should wait.
    from shampoo_jax import meta_archive

    if path.suffix != ".npz":
        return meta_archive(_read_torch(path))
    import numpy as np

    try:
        # Opened here, since numpy leaves a damaged one open.
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return dict(file)
    except DAMAGED as error:
        raise ValueError(f"{path} is no archive of numbers ({error}): copy it anew.") from error


def _read_torch(path: pathlib.Path) -> Any:
    try:
        torch = importlib.import_module("torch")  # no dependency, its readers have it
    except ImportError as error:
        raise ValueError(
            f"{path} is taken for a file of torch, which is missing: pip install torch, or convert "
            "it where torch is."
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # What torch says recommends to run the file.
        raise ValueError(
            f"{path} is no file of torch, or holds more than numbers, as options are, which are "
            f"objects and not read: save it by {HOW_TO_SAVE}."
        ) from error


def our_name(torch_name: str) -> str:
    """Path of a parameter of the benchmark's model by its name in the torch script.

    >>> our_name("blocks.0.attn.q.weight"), our_name("proj.bias")
    ('blocks/0/attn/q/kernel', 'head/bias')
    """
    name = re.sub(r"^proj\.", "head.", torch_name).replace(".", "/")
    name = name.replace("embed/weight", "embed/embedding").replace("/weight", "/kernel")
    return name.replace("/gains", "/scale")


def write_checkpoint(archive: dict[str, Any], config: "Config", out: pathlib.Path) -> None:
    """Writes parameters and optimizer state of a run, as Orbax does it.

    Args:
        archive: Of parameters named as in the torch script, kernels (out, in).
        config: The run.
        out: New folder.

    Raises:
        ValueError: A parameter is missing or of another size, or the state is not that of the
            counterpart of this run's optimizer.
    """
    import jax
    import orbax.checkpoint as ocp

    from nanogpt.optimizers.build import build_optimizer
    from nanogpt.train.train_step import abstract_params
    from shampoo_jax import import_meta_state, state_to_tree

    given = [key.removeprefix("params/") for key in archive if key.startswith("params/")]
    names = {our_name(name): name for name in given}

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = archive[f"params/{names[name]}"] if name in names else None
        value = value.T if value is not None and name.endswith("/kernel") else value
        if value is None or value.shape != leaf.shape:
            raise ValueError(
                f"parameter {name} of shape {leaf.shape} is not in the file, which has "
                f"{sorted(given)}: give the model's size by settings, as --model.num-layers 12."
            )
        return jax.numpy.asarray(value, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, abstract_params(config.model))
    optimizer = build_optimizer(config, params)
    transposed = [name for name in names if name.endswith("/kernel")]
    state = import_meta_state(
        archive, optimizer.init(params), params, names=names, transposed=transposed
    )
    found = {"params": jax.device_get(params), "optimizer": state_to_tree(state, params)}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(out.absolute(), found)
