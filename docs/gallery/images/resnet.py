"""Residual networks of He et al. 2016 (arXiv:1512.03385) in Flax NNX, with batch statistics.

Shapes are part of the names: B images, H height, W width, C channels, K classes. Blocks are the
second version's in one respect, as everywhere today: in a bottleneck the 3x3 convolution has the
stride. The last gain of each block starts at zero, so that a block starts as the identity
(Goyal et al. 2017, arXiv:1706.02677, section 5.1).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

MOMENTUM, EPSILON = 0.9, 1e-5  # of batch statistics
EXPANSION = 4  # of a bottleneck's last convolution


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Shape of a network.

    Attributes:
        stages: residual blocks at each resolution.
        width: channels of the first stage, twice as many in each further one.
        classes: number of classes.
        bottleneck: whether blocks are 1x1, 3x3, 1x1 convolutions, not two of 3x3.
        channels: of the images.
        large: whether the stem is that of ImageNet, which makes images four times smaller.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    bottleneck: bool = True
    channels: int = 3
    large: bool = True


RESNET50 = ResNetConfig()
DIGITS = ResNetConfig((1, 1, 1), 16, classes=10, bottleneck=False, channels=1, large=False)


class Convolution(nnx.Module):
    """A convolution without bias, then normalization over the batch, then the activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, dtype: Any, rngs: nnx.Rngs,
        *, rectify: bool = True, zero: bool = False,
    ):  # fmt: skip
        self.rectify = rectify
        self.conv = nnx.Conv(
            inputs, outputs, (size, size), stride, padding=[(size // 2, size // 2)] * 2,
            use_bias=False, dtype=dtype, rngs=rngs,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )  # fmt: skip
        gain = nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
        self.norm = nnx.BatchNorm(
            outputs, momentum=MOMENTUM, epsilon=EPSILON, scale_init=gain, dtype=dtype, rngs=rngs
        )

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Its output, of another number of channels."""
        y_BxHxWxC = self.norm(self.conv(x_BxHxWxC))
        return nnx.relu(y_BxHxWxC) if self.rectify else y_BxHxWxC


class Block(nnx.Module):
    """A residual block; the shortcut is a convolution where shapes change."""

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, dtype: Any, rngs: nnx.Rngs
    ):
        make = functools.partial(Convolution, dtype=dtype, rngs=rngs)
        outputs = width * (EXPANSION if bottleneck else 1)
        first = (
            [make(inputs, width, 1, 1), make(width, width, 3, stride)]
            if bottleneck
            else [make(inputs, width, 3, stride)]
        )
        last = make(width, outputs, 1 if bottleneck else 3, 1, rectify=False, zero=True)
        self.body = nnx.List([*first, last])
        changes = stride > 1 or inputs != outputs
        self.shortcut = make(inputs, outputs, 1, stride, rectify=False) if changes else None

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Its output."""
        y_BxHxWxC = x_BxHxWxC
        for convolution in self.body:
            y_BxHxWxC = convolution(y_BxHxWxC)
        return nnx.relu(
            y_BxHxWxC + (x_BxHxWxC if self.shortcut is None else self.shortcut(x_BxHxWxC))
        )


class ResNet(nnx.Module):
    """A stem, stages of residual blocks, the mean over positions, a linear head.

    Args:
        config: its shape.
        dtype: of activations; parameters and batch statistics are float32.
        rngs: its `params` stream is drawn from.
    """

    def __init__(self, config: ResNetConfig, dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(Convolution, dtype=dtype, rngs=rngs)
        self.large = config.large
        size, stride = (7, 2) if config.large else (3, 1)
        self.stem = make(config.channels, config.width, size, stride)
        blocks, inputs = [], config.width
        for stage, count in enumerate(config.stages):
            width = config.width * 2**stage
            for k in range(count):
                stride = 2 if stage and not k else 1
                blocks.append(Block(inputs, width, stride, config.bottleneck, dtype, rngs))
                inputs = width * (EXPANSION if config.bottleneck else 1)
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(
            inputs, config.classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Logits (B, K), float32."""
        y_BxHxWxC = self.stem(x_BxHxWxC)
        if self.large:
            y_BxHxWxC = nnx.max_pool(y_BxHxWxC, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for block in self.blocks:
            y_BxHxWxC = block(y_BxHxWxC)
        return self.head(jnp.mean(y_BxHxWxC.astype(jnp.float32), axis=(1, 2)))


def draw(config: ResNetConfig, seed: int) -> tuple[Any, Any]:
    """Parameters and batch statistics of a new network, two trees of float32 arrays.

    Args:
        config: its shape.
        seed: of the weights.
    """
    model = ResNet(config, jnp.float32, nnx.Rngs(seed))
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def structure(config: ResNetConfig, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """What parameters and statistics need beside them to be a network: in training, in use.

    Args:
        config: its shape.
        dtype: of activations.
    """
    model = nnx.eval_shape(lambda: ResNet(config, dtype, nnx.Rngs(0)))
    train = nnx.split(model, nnx.Param, nnx.BatchStat)[0]
    model.eval()
    return train, nnx.split(model, nnx.Param, nnx.BatchStat)[0]


def apply(graphdef: nnx.GraphDef, params: Any, stats: Any, images: jax.Array) -> tuple[Any, Any]:
    """Logits, float32 (B, K), and the batch statistics after these images.

    Args:
        graphdef: one of `structure`.
        params: of `draw`.
        stats: of `draw`.
        images: (B, H, W, C), about mean 0 and deviation 1.
    """
    model = nnx.merge(graphdef, params, stats)
    logits = model(images)
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
