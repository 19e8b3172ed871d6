"""Commands that use a trained model. They import jax when they run: no help waits for it."""

import codecs
from pathlib import Path

import tyro

from nanogpt.config.run import check_folders
from nanogpt.lab.command import command, flags


@command()
@flags
def sample(
    run: tyro.conf.Positional[str],
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    step: int | None = None,
) -> None:
    """Prints text that the model of a run goes on with, as it comes, up to its end of a text.

    Args:
        run: folder that has metrics.jsonl and checkpoints/, here or in gs://
        prompt: what it goes on from; empty: the beginning of a text
        tokens: at most so many
        temperature: 0: the likeliest token every time; 1: the model's distribution
        top_k: draw one of so many likeliest tokens; None: of all
        seed: of the draws; the same seed gives the same text
        step: of which checkpoint; None: the newest
    """
    if not (tokens >= 1 and 0 <= temperature < float("inf")):
        raise ValueError(
            f"tokens={tokens}, temperature={temperature}: at least 1, and at least 0 and finite."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: at least 0 and below 2**63.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt={prompt!r}: is no UTF-8 ({error}).") from error
    from nanogpt.model.decode import generate
    from nanogpt.train.train_step import model_structure
    from nanogpt.train.trained import read_trained

    trained = read_trained(run, step)
    tokenizer, model = trained.tokenizer, trained.config.model
    drawn = generate(
        model_structure(model), trained.params,
        [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()],
        length=model.sequence_length, vocab_size=tokenizer.vocab_size,
        temperature=temperature, top_k=top_k, seed=seed,
    )  # fmt: skip
    # A character may be cut between tokens: its bytes wait for the rest.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for _, token in zip(range(tokens), drawn, strict=False):
        if token == tokenizer.end_of_text:
            break
        print(decoder.decode(tokenizer.bytes_of(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))


@command()
@flags
def evaluate(
    run: tyro.conf.Positional[str],
    data: tuple[str, ...] = (),
    tokens: int | None = None,
    step: int | None = None,
) -> None:
    """Prints the loss of a run's model on any shards, with its standard error.

    Args:
        run: folder that has metrics.jsonl and checkpoints/, here or in gs://
        data: shards, or folders of shards, whose validation shards are scored; empty: what the
            run scored
        tokens: score at most so many; None: all
        step: of which checkpoint; None: the newest
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: at least 1.")
    for place in data:
        check_folders(data=place)
    from nanogpt.train.evaluation import evaluate as score
    from nanogpt.train.evaluation import shards_of
    from nanogpt.train.trained import read_trained

    trained = read_trained(run, step)
    own = trained.config.data
    shards = shards_of(data or (own.directory,), trained)
    if not data:
        shards, tokens = shards[:1], min(tokens or own.val_tokens, own.val_tokens)
    found = score(trained, shards, tokens)
    print(f"{trained.config.name}, {trained.step} updates, {found.tokens:,} tokens")
    print(f"loss           {found.loss:.4f} +- {found.standard_error:.4f} nats per token")
    print(f"bits per byte  {found.bits_per_byte:.4f} +- {found.bits_standard_error:.4f}")


@command()
@flags
def export(run: tyro.conf.Positional[str], out: str = "exported", step: int | None = None) -> None:
    """Writes the model of a run as model.safetensors and config.json.

    Args:
        run: folder that has metrics.jsonl and checkpoints/, here or in gs://
        out: folder of the two files
        step: of which checkpoint; None: the newest
    """
    check_folders(out=out)
    from nanogpt.train.export import export as write
    from nanogpt.train.trained import read_trained

    trained = read_trained(run, step)
    print(f"{trained.config.name}, {trained.step} updates: {write(trained, Path(out))}")
