"""A run that is stopped, saved by Orbax and resumed: bit for bit the run that never stopped.

Parameters, state and step are one tree. Restored into a tree of shapes the state is the optimizer's
own again; `check_state` says whether it fits. Task: the next token of presidents' messages.

Run it: python docs/gallery/resume_orbax.py
It printed: AdamW 4.754, AdamW, differing entries 0, Shampoo 4.326, Shampoo, differing entries 0
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

import shampoo_jax
from data_pipeline import gpt2, sotu

OPTIMIZERS = {"AdamW": (optax.adamw, 3e-2), "Shampoo": (shampoo_jax.shampoo, 3e-2)}
VOCABULARY, CONTEXT, WIDTH = 512, 8, 8
SIZES = {"up": (CONTEXT * WIDTH, 64), "down": (64, WIDTH), "head": (WIDTH, VOCABULARY)}


def init(key):
    keys, normal = iter(jax.random.split(key, 4)), jax.nn.initializers.lecun_normal()
    params = {name: normal(next(keys), size) for name, size in SIZES.items()}
    return {"embed": jax.random.normal(next(keys), (VOCABULARY, WIDTH)), **params}


def mean_loss(params, rows):
    x = params["embed"][rows[:, :-1]].reshape(len(rows), -1)
    logits = jax.nn.gelu(x @ params["up"]) @ params["down"] @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, -1]).mean()


def windows(split, count, rng):
    """Random stretches of CONTEXT + 1 tokens from the first documents of a split."""
    texts = [document.text for document in sotu().documents() if document.split == split][:20]
    tokens = np.concatenate([gpt2(VOCABULARY).encode(text) for text in texts])
    return tokens[rng.integers(len(tokens) - CONTEXT, size=(count, 1)) + np.arange(CONTEXT + 1)]


def main(small=False, seed=0):
    steps, rng, results = 30 if small else 200, np.random.default_rng(seed), {}
    batches = windows("train", steps * 256, rng).reshape(steps, 256, -1)
    held_out = windows("val", 4096, rng)
    for name, (make, rate) in OPTIMIZERS.items():
        tx = make(optax.cosine_decay_schedule(rate, steps))

        @jax.jit
        def step(run, rows, tx=tx):
            gradients = jax.grad(mean_loss)(run["params"], rows)
            updates, state = tx.update(gradients, run["state"], run["params"])
            params = optax.apply_updates(run["params"], updates)
            return {"params": params, "state": state, "step": run["step"] + 1}

        params = init(jax.random.key(seed))
        run = {"params": params, "state": tx.init(params), "step": 0}
        with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
            for k, rows in enumerate(batches):
                run = step(run, rows)
                if k == steps // 2:
                    checkpointer.save(Path(folder) / "middle", run)
            resumed = checkpointer.restore(Path(folder) / "middle", jax.eval_shape(step, run, rows))
        if name != "AdamW":  # which has no blocks that could lie otherwise
            shampoo_jax.check_state(resumed["state"], resumed["params"], tx)
        for rows in batches[int(resumed["step"]) :]:
            resumed = step(resumed, rows)
        differing = jax.tree.map(lambda a, b: int((a != b).sum()), run, resumed)
        results[name] = float(mean_loss(run["params"], held_out))
        results[f"{name}, differing entries"] = sum(jax.tree.leaves(differing))
    print(", ".join(f"{name} {x:.4g}" for name, x in results.items()))
    return results


if __name__ == "__main__":
    main()
