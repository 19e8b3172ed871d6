"""What happens to data, clocks, gradients and files of a run, and what becomes of the run."""

import itertools
import pathlib
import random
import shutil
import signal
from collections.abc import Iterator

from nanogpt.train.nonfinite import EXIT_CODE
from scripts.maintenance.faulting.kills import gone_on, undisturbed
from scripts.maintenance.faulting.mutants import mutate
from scripts.maintenance.faulting.outcome import Trial
from scripts.maintenance.faulting.rig import Rig, differences

AT = 8  # the batch before which something happens


def accidents(folder: pathlib.Path) -> Iterator[Trial]:
    """Gradients that are not finite, shards that change, a clock set back, two starts of one run.

    Yields:
        A trial each.
    """
    rig = Rig(folder).with_shards()
    undisturbed(rig)
    yield from _nan(rig)
    yield from _shards(rig)
    for back in (3600, 86_400_000, -86_400_000):
        name = f"clock-{back}"
        ended = rig.start(name, accidents=[f"clock={AT}:{back}", f"kill={AT + 5}"]).end()
        told = f"{back} s back, ended {ended.code}: {ended.last[:150]}"
        # Orbax gives up a save that seems to take so long, if it is at one.
        given_up = back < 0 and ended.in_a_sentence and "clock was set forward" in ended.output
        if ended.code == -signal.SIGKILL or given_up:
            yield gone_on(rig, "the clock is set", name, told)
        else:
            yield Trial("the clock is set", name, False, None, told)
    yield from _two(rig)


def _nan(rig: Rig) -> Iterator[Trial]:
    few = rig.start("nan-few", accidents=["nan=4,8,9"]).end()
    told = f"ended {few.code}: {few.last}"
    yield Trial("gradients are not finite", "3 skipped, goes on", few.code == 0, None, told)
    many = rig.start("nan-many", "--nonfinite-limit", "3", accidents=["nan=4,8,9,10,11"]).end()
    told = f"ended {many.code}: {many.last}"
    sound = many.code == EXIT_CODE and many.in_a_sentence and "steps 8 to 10" in many.output
    yield Trial("gradients are not finite", "3 in a row end it", sound, None, told)


def _shards(rig: Rig) -> Iterator[Trial]:
    """Damages a shard that is read, and puts it back before the run goes on."""
    names = ("text_train_000001.bin", "text_val_000000.bin")
    for file, accident in itertools.product(names, ("spoil", "cut")):
        shard = rig.shards / file
        whole, name = shard.read_bytes(), f"{accident}-{file}"
        ended = rig.start(name, accidents=[f"{accident}={AT}:{shard}"]).end()
        damaged = rig.go_on(name)
        shard.write_bytes(whole)
        told = f"ended {ended.code}: {ended.last[:150]}; resumed damaged: {damaged.code}"
        if ended.in_a_sentence and shard.name in ended.output and damaged.in_a_sentence:
            yield gone_on(rig, "a shard changes in the training", name, told)
        else:
            yield Trial("a shard changes in the training", name, False, None, told)


def _two(rig: Rig) -> Iterator[Trial]:
    """A second start of a run that is trained already, and both at the same moment."""
    for name, trained in (("two-after", True), ("two-at-once", False)):
        # One is in the middle of its training for as long as the second start takes.
        first = rig.start(name, accidents=[f"freeze={AT}"] if trained else [])
        frozen = trained and first.stopped()
        second = rig.start(name, *(["--resume"] if trained else []))
        refusal = second.end()
        if frozen:
            first.send(signal.SIGCONT)
        ended = [refusal, first.end()]
        sound = sum(end.code == 0 for end in ended) == 1
        refused = all(end.in_a_sentence for end in ended if end.code)
        wrong = differences(rig.runs / "straight", rig.runs / name, rig.steps)
        told = "; ".join([*(f"{end.code}: {end.last[:100]}" for end in ended), *wrong[:3]])
        yield Trial("two starts of one run", name, sound and refused, not wrong, told)


def damaged_checkpoints(folder: pathlib.Path, trials: int, seed: int) -> Iterator[Trial]:
    """Flips a byte of a file of the newest checkpoint, cuts it, empties it, or deletes it.

    Yields:
        Trials, by kind of damage: `--resume` refuses in a sentence, and `--resume=previous-good`
        ends exactly; or the first one does, where nothing depends on that file.
    """
    rig = Rig(folder, every=7).with_shards()
    undisturbed(rig)
    rig.start("cut", accidents=["stop=13"]).end()
    chance = random.Random(seed)
    newest = rig.runs / "cut" / "checkpoints" / str(max(rig.checkpoints("cut")))
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    for trial in range(trials):
        name, damage = f"damaged-{trial}", ("flip", "cut", "empty", "delete")[trial % 4]
        run = rig.runs / name
        shutil.copytree(rig.runs / "cut", run)
        victim = run / chance.choice(files).relative_to(rig.runs / "cut")
        if damage == "delete":
            victim.unlink()
        else:
            victim.write_bytes(mutate(victim.read_bytes(), chance, damage))
        ended = rig.go_on(name)
        told = f"{victim.relative_to(run / 'checkpoints')}: ended {ended.code}"
        kind = f"a checkpoint's file: {damage}"
        if ended.code and not ended.in_a_sentence:
            yield Trial(kind, name, False, None, f"{told}: {ended.last[:150]}")
        elif ended.code:
            told = f"{told}: {ended.last[:150]}; gone back"
            yield gone_on(rig, kind, name, told, "--resume=previous-good")
        else:
            wrong = differences(rig.runs / "straight", run, rig.steps)
            yield Trial(kind, name, not wrong, not wrong, "; ".join([told, *wrong[:3]]))
        shutil.rmtree(run)
