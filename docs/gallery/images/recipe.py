"""How a residual network is trained on ImageNet: settings, schedules, optimizers.

Of He et al. 2016 and Goyal et al. 2017 (arXiv:1706.02677): SGD with Nesterov momentum, a rate of
0.1 for every 256 images of a batch, five epochs of linear warmup, decay 1e-4 of kernels alone,
90 epochs. Cosine and label smoothing are those of He et al. 2019 (arXiv:1812.01187). Shampoo stands
in the place of the gradient in front of the same momentum and decay, as in Meta's package
(arXiv:2309.06497), so with the norm of the gradient grafted onto it the rate is SGD's.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from docs.gallery.images.folder import DEVIATION, MEAN
from docs.gallery.images.resnet import RESNET50, ResNetConfig
from docs.gallery.images.training import kernels
from shampoo_jax import Blocking, Placement, momentum, shampoo

NETWORKS = {
    "resnet50": RESNET50,
    "tiny": ResNetConfig((1,), 8, bottleneck=False, large=False),  # to try the command with
}
REFERENCE = 256  # images that rates are for
RATES = {"sgd": 0.1, "adam": 5e-4, "none": 0.01}  # by grafted norm


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. Rates are for 256 images of a batch and grow with it."""

    data: Path = Path("data/imagenet")  # folder with train/<class>/*.JPEG and val/<class>/*.JPEG
    out: Path = Path("runs/imagenet/shampoo")  # folder of the run: settings, metrics, checkpoints
    network: Literal["resnet50", "tiny"] = "resnet50"
    optimizer: Literal["sgd", "shampoo"] = "shampoo"  # sgd: with Nesterov momentum
    graft: Literal["sgd", "adam", "none"] = "sgd"  # whose norm Shampoo's blocks have
    every: int = 50  # steps between inverse roots
    block_size: int = 2048  # largest edge of a block
    b2: float = 0.999  # decay of Shampoo's factors, and of the grafted second moment
    solver: str = "eigh"  # of inverse roots, as of shampoo_jax.shampoo
    learning_rate: float | None = None  # peak; None: 0.1 with the norm of sgd, 5e-4 adam, 0.01 none
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-4  # of kernels, not of gains and biases
    label_smoothing: float = 0.1
    schedule: Literal["cosine", "steps"] = "cosine"  # steps: a tenth at 30, 60 and 80 of 90 epochs
    epochs: float = 90.0
    warmup_epochs: float = 5.0
    rows: int = 1024  # images of a batch, on all devices
    size: int = 224  # pixels of a side
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations
    seed: int = 0  # of weights, order, crops
    threads: int = 16  # of each process that read images
    checkpoint_every: int = 1000  # steps

    def __post_init__(self) -> None:
        """Raises ValueError for a number that makes no sense."""
        least = {"every": 1, "block_size": 1, "rows": 1, "size": 8, "threads": 1}
        least |= {"checkpoint_every": 1, "warmup_epochs": 0, "weight_decay": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}.")
        if self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"epochs={self.epochs} must be more than warmup_epochs={self.warmup_epochs}."
            )

    @property
    def config(self) -> ResNetConfig:
        """Shape of the network, but for the number of classes."""
        return NETWORKS[self.network]

    @property
    def activations(self) -> Any:
        """Their dtype."""
        return jnp.dtype(self.dtype)

    def steps(self, images: int) -> int:
        """Updates of the whole run.

        Args:
            images: for training.
        """
        return max(1, round(self.epochs * images / self.rows))


def scaled(images: jax.Array) -> jax.Array:
    """uint8 pixels as float32 of about mean 0 and deviation 1, by the figures of ImageNet."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION)


def rate(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate: linear warmup, then half a cosine to zero, or a tenth at three steps.

    Args:
        settings: of the run.
        steps: of the run.
    """
    peak = settings.learning_rate
    if peak is None:
        peak = RATES["sgd" if settings.optimizer == "sgd" else settings.graft]
    peak *= settings.rows / REFERENCE
    warmup = max(1, round(steps * settings.warmup_epochs / settings.epochs))
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
    if settings.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    else:
        ends = [round(steps * share) - warmup for share in (30 / 90, 60 / 90, 80 / 90)]
        fall = optax.piecewise_constant_schedule(peak, dict.fromkeys(ends, 0.1))
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    settings: Settings, steps: int, placement: Placement | None = None
) -> optax.GradientTransformation:
    """The optimizer of a run; gains and biases have SGD, or Adam with Adam's grafted norm.

    Args:
        settings: of the run.
        steps: of the run.
        placement: of Shampoo's blocks, and of momentum, on a mesh.
    """
    schedule = rate(settings, steps)
    nesterov = optax.sgd(schedule, settings.momentum, nesterov=True)
    if settings.optimizer == "sgd":
        return optax.chain(optax.add_decayed_weights(settings.weight_decay, kernels), nesterov)
    adam = optax.adam(schedule, settings.momentum, settings.b2)
    return _shampoo(settings, schedule, adam if settings.graft == "adam" else nesterov, placement)


def _shampoo(
    settings: Settings, schedule: optax.Schedule, others: Any, placement: Placement | None
) -> optax.GradientTransformation:
    return shampoo(
        schedule,
        b1=0.0,  # momentum follows the direction
        b2=settings.b2,
        blocking=Blocking(settings.block_size),
        exponents=None,  # 1/4, as in the paper
        solver=settings.solver,
        every=settings.every,
        graft=None if settings.graft == "none" else settings.graft,
        momentum=momentum(settings.momentum, nesterov=True),
        weight_decay=settings.weight_decay,
        preconditioned=lambda path, leaf: leaf.ndim > 1,  # the head too, as in the paper
        others=others,
        placement=placement,
    )
