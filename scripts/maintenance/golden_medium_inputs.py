"""Masks, batches and schedules of the medium track against recorded ones; all but rates exact."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import data_pipeline
from nanogpt.config.presets import preset
from nanogpt.config.run import Config
from nanogpt.model import medium, windows
from nanogpt.optimizers.directions import momentum_schedule
from nanogpt.optimizers.schedules import eta, window_schedule
from nanogpt.train.loop import validation_due
from nanogpt.train.train_step import abstract_params
from scripts.maintenance.golden_format import refuse
from scripts.maintenance.parity.measurement import Measurement, largest

Data = Mapping[str, np.ndarray]
EXACT = 1e-12  # of rates and momenta
MEANS = 1e-5  # of normal values over keys: one key more among 3456 changes them by 3e-4


def masks(_: Path, z: Data, only: Sequence[str] = ()) -> Iterator[Measurement]:
    """First key of every query, which keys are in between, the script's counts and lists of blocks.

    Attention by blocks has no mask to compare: it is given equal scores and random values, whose
    means over the recorded keys it has to return.

    Args:
        z: the file.
        only: sequences; none for all.
    """
    config = json.loads(str(z["config"]))
    block = config["block"]
    found = {key.partition("__")[0]: None for key in z if key.endswith("__first_key")}
    for name in only or found:
        tokens = jnp.asarray(z[f"{name}__tokens"].astype(np.int32))[None]
        owners = windows.documents(tokens, config["eot"])
        sizes = config["windows" if name in config["sequences"] else "big_windows"]
        keep = jax.jit(lambda owners, size: windows.allowed(owners, size, block)[0])
        values, means = _means(owners, block, max(sizes))
        wrong, off = 0, 0.0
        for case in itertools.product(range(len(sizes)), (0, 1)):
            size = sizes[case[0]] // (1 + case[1])
            ours = np.asarray(keep(owners, size))
            wrong += _wrong(ours, z, name, case, block)
            sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
            first, at = z[f"{name}__first_key"][case].astype(int), np.arange(len(values))
            theirs = (sums[at + 1] - sums[first]) / (at + 1 - first)[:, None]
            off = max(off, largest(means(size), theirs))
        if f"{name}__partial_order" in z:
            wrong += _wrong_lists(np.asarray(keep(owners, owners.shape[1] // block)), z, name)
        yield Measurement(f"masks {name}", "entries that differ", float(wrong), 0)
        yield Measurement(f"masks {name}", "means over keys by blocks", off, MEANS)


def _means(
    owners: jax.Array, block: int, most: int
) -> tuple[np.ndarray, Callable[[int], jax.Array]]:
    """Random values, and what attention by blocks makes of them where all scores are equal."""
    values = np.random.default_rng(0).normal(size=(owners.shape[1], 8))
    heads = jnp.asarray(values, jnp.float32)[None, :, None]
    attend = jax.jit(
        lambda size: windows.attend_banded(
            0 * heads, 0 * heads, heads, owners, size, block=block, most=most, scale=1.0
        )[0, :, 0]
    )
    return values, attend


def _wrong(ours: np.ndarray, z: Data, name: str, case: tuple[int, int], block: int) -> int:
    """Entries of a mask, and blocks, that are not the recorded ones."""
    at, first = np.arange(len(ours)), z[f"{name}__first_key"][case]
    theirs = (at >= first[:, None]) & (at <= at[:, None])
    wrong = (ours != theirs).sum()
    if f"{name}__dense_bits" in z:
        bits = np.unpackbits(z[f"{name}__dense_bits"][case], axis=1, count=len(ours))
        wrong += (ours != bits).sum()
    # The script counts blocks with some keys and with all keys apart; less than none is none.
    blocks = ours.reshape(len(ours) // block, block, -1, block).any((1, 3)).sum(1)
    counted = (np.maximum(z[f"{name}__{kind}_num"][case], 0) for kind in ("partial", "full"))
    return int(wrong + (blocks != sum(counted)).sum())


def _wrong_lists(ours: np.ndarray, z: Data, name: str) -> int:
    """Blocks that the whole sequence sees in part or in whole, nearest first, then the others."""
    count = len(z[f"{name}__partial_order"])
    pairs = ours.reshape(count, len(ours) // count, count, -1)
    some, every = np.any(pairs, (1, 3)), np.all(pairs, (1, 3))
    wrong = 0
    for kind, seen in (("partial", some & ~every), ("full", every)):
        order = count - 1 - np.argsort(~seen[:, ::-1], axis=1, kind="stable")
        wrong += (order != z[f"{name}__{kind}_order"]).sum()
        wrong += (seen.sum(1) != z[f"{name}__{kind}_num_all"]).sum()
    return int(wrong)


def loader(path: Path, z: Data) -> Iterator[Measurement]:
    """Batches of every rank, read by one process for each and by one process for all."""
    meta = json.loads(str(z["meta"]))
    folder, world = path.parent / "loader_shards", meta["world_size"]
    paths = [folder / name for name in meta["train_files"]]
    for file in paths:
        if not file.exists():
            raise ValueError(f"{file} is missing: the shards have to lie beside the recording.")
    order: Any = {"sequence_length": meta["seq"], "batch_rows": world, "mode": "sequential"}
    places: list[Any] = [
        {"rank": 0, "world": 1},
        *({"rank": r, "world": world} for r in range(world)),
    ]
    for place in places:
        iterator = data_pipeline.train_batches(paths, **order, **place)
        batches = [dict(batch) for batch in iterator]
        iterator.close()
        ranks = slice(None) if place["world"] == 1 else slice(place["rank"], place["rank"] + 1)
        yield from _batches(f"loader {place}", batches, z, "train", ranks)
    spans = [
        data_pipeline.open_tokens(paths[shard - 1])[at : at + meta["batch"] + 1]
        for shard, at in z["train_positions"]
    ]
    wrong = sum((s[:-1] != x.ravel()).sum() for s, x in zip(spans, z["train_inputs"], strict=True))
    yield Measurement("loader", "positions that hold other tokens", float(wrong), 0)
    scored = data_pipeline.shard_paths(folder, "val")[0]
    sizes = {"sequence_length": meta["val_seq"], "val_tokens": z["val_inputs"].size, "rows": world}
    yield from _batches(
        "loader", list(data_pipeline.val_batches(scored, **sizes)), z, "val", slice(None)
    )


def _batches(name: str, batches: Any, z: Data, kind: str, ranks: slice) -> Iterator[Measurement]:
    missing = abs(len(batches) - len(z[f"{kind}_inputs"]))
    yield Measurement(name, f"{kind} batches too many or too few", missing, 0)
    for key in ("inputs", "targets"):
        pairs = zip(batches, z[f"{kind}_{key}"], strict=False)
        wrong = sum((np.asarray(batch[key]) != theirs[ranks]).sum() for batch, theirs in pairs)
        yield Measurement(name, f"{kind} {key} that differ", float(wrong), 0)


def schedules(table: Mapping[str, Any]) -> Iterator[Measurement]:
    """Rates, momenta, windows, validations by length of the run, and what full size means."""
    run = preset("medium", "muon_mlp_decay")
    for steps, recorded in table["schedules"].items():
        yield from schedule(run, int(steps), recorded)
    yield from layers(table)
    yield from _sizes(run, table)
    yield from _groups(table["groups"])


def schedule(run: Config, steps: int, recorded: Mapping[str, Any]) -> Iterator[Measurement]:
    """Rates, momenta, windows and validations of one length.

    Args:
        run: of the preset.
        steps: the length.
        recorded: of the file.
    """
    name = f"schedule {steps}"
    at = np.array(recorded["steps"])
    run = dataclasses.replace(run, schedule=dataclasses.replace(run.schedule, steps=steps))
    warm = dataclasses.replace(
        run.schedule, warmup_steps=recorded["adamw_warmup_steps"], warmup_from=0.0
    )
    with jax.enable_x64(True):
        rates = {
            "eta": eta(at, run.schedule),
            "adamw_eta": eta(at, warm),
            "momentum": momentum_schedule(run.matrices)(at),  # type: ignore[arg-type]
        }
        for key, ours in rates.items():
            error = np.abs(np.asarray(ours) - recorded[key]).max()
            yield Measurement(name, key, float(error), EXACT)
    every = np.asarray(window_schedule(run)(np.arange(steps + 1)))
    grows = {str(w): int(np.flatnonzero(every == w)[0]) for w in np.unique(every)}
    due = [s for s in range(steps + 1) if validation_due(s, run)]
    told = {
        "windows": (every[at].tolist(), recorded["window_blocks"]),
        "window at the end": (int(every[-1]), recorded["window_blocks_at_K"]),
        "first steps of windows": (grows, recorded["first_step_of_window"]),
        "validation steps": (due, recorded["val_steps"]),
    }
    for what, (ours, theirs) in told.items():
        yield Measurement(name, what, float(ours != theirs), 0)


def layers(table: Mapping[str, Any]) -> Iterator[Measurement]:
    """Which layers have what.

    Args:
        table: of the file.
    """
    rule = table["window_rule"]
    pairs = {
        "long_layers": (list(medium.LONG), rule["long_layers"]),
        "no_attention": ([medium.WITHOUT_ATTENTION], rule["no_attention"]),
        "skips": (medium.SKIPS, {int(k): v for k, v in rule["skips"].items()}),
        "value_embeds": (medium.VALUES, {int(k): v for k, v in rule["value_embeds"].items()}),
        "unused_scalars": (medium.unused_scalars(), table["unused_scalars"]),
    }
    for what, (ours, theirs) in pairs.items():
        yield Measurement("schedule", what, float(ours != theirs), 0)


def _sizes(run: Config, table: Mapping[str, Any]) -> Iterator[Measurement]:
    """Shapes and numbers of parameters at full size, and the distribution of the start."""
    params = abstract_params(run.model)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    blocks = [params["blocks"][i] for i in sorted(params["blocks"])]
    ours = {
        "head": count(params["head"]),
        "embeds": count([params["embed"], params["value_embeds"]]),
        "scalars": count(params["scalars"]),
        "hidden": count(blocks),
        "attention": count([block.get("attn", {}) for block in blocks]),
        "mlp": count([block["mlp"] for block in blocks]),
        "total": count(params),
    }
    theirs = {k: v for k, v in table["parameter_counts_full_size"].items() if k != "tensors"}
    yield Measurement("schedule", "numbers of parameters", float(ours != theirs), 0)
    d, init = run.model.model_dim, table["init"]
    small = dataclasses.replace(run.model, mlp_dim=d)
    drawn: Any = nnx.to_pure_dict(nnx.state(medium.MediumBlock(small, nnx.Rngs(0), 0), nnx.Param))
    expected = init["mlp.fc_w"]
    for kernel in (drawn["attn"]["q"], drawn["mlp"]["fc"]):
        x = np.asarray(kernel["kernel"])
        # A bound of bfloat16 values is rounded to the next of them.
        above = max(0.0, float(np.abs(x).max()) / expected["measured_max"] - 1)
        yield Measurement("schedule", "start beyond its bound, relative", above, 1e-6)
        yield Measurement("schedule", "std of the start", abs(x.std() / expected["std"] - 1), 5e-3)
    zero = (drawn["attn"]["proj"]["kernel"], drawn["mlp"]["proj"]["kernel"])
    yield Measurement("schedule", "projections' start", float(any(x.any() for x in zero)), 0)


def _groups(groups: Mapping[str, Any]) -> Iterator[Measurement]:
    """Rates, decays, factors and eps of the published recipes."""
    for key, name in (("record_8", "muon_mlp_decay"), ("adamw_leaderboard", "adamw")):
        run, wrong = preset("medium", name), []
        auxiliary = run.auxiliary
        rates = {n: getattr(auxiliary, f"{n}_learning_rate") for n in ("head", "embed", "vector")}
        for theirs, ours in (("head", "head"), ("embeds", "embed"), ("scalars", "vector")):
            told = groups["record_8"][theirs]
            own = [rates[ours], [auxiliary.b1, auxiliary.b2], auxiliary.eps, auxiliary.weight_decay]
            wrong.append(own != [told[k] for k in ("lr", "betas", "eps", "wd")])
        matrices: Any = run.matrices
        if name == "adamw":
            told = groups[key]["hidden"]
            own = [matrices.learning_rate, [matrices.b1, matrices.b2], matrices.eps]
            wrong.append(own != [told[k] for k in ("lr", "betas", "eps")])
            wrong.append(matrices.weight_decay != told["wd"])
            wrong.append(run.schedule.warmup_steps != told["warmup"])
            wrong.append(run.schedule.steps != groups[key]["K"])
        else:
            for kind in ("qkvo_w", "mlp.fc_w", "mlp.proj_w"):
                told, factor = groups[key][kind], matrices.mlp_decay if "mlp" in kind else 1.0
                own = [matrices.learning_rate, matrices.weight_decay, factor]
                wrong.append(own != [told["lr"], told["wd"], told["wd_factor"]])
        yield Measurement(f"schedule {key}", "settings that differ", float(sum(wrong)), 0)


def check_fixed(config: Mapping[str, Any]) -> None:
    """Refuses a model that differs in what this code fixes.

    Args:
        config: of a recording.

    Raises:
        ValueError: names the key.
    """
    from nanogpt.config.run import MEDIUM_LAYERS
    from nanogpt.model.gpt import ATTENTION_SCALE, RMS_EPS

    fixed = {"layers": MEDIUM_LAYERS, "attn_scale": ATTENTION_SCALE, "rms_eps": RMS_EPS}
    for key, wanted in fixed.items():
        if config.get(key, wanted) != wanted:
            refuse(key, config[key], f"{wanted}, which the model fixes")
