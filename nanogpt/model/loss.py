"""Cross entropy of soft-capped logits, and its sum."""

import jax
import jax.numpy as jnp

from nanogpt.model.gpt import LOGIT_CAP, soft_cap, widen_exactly


@jax.custom_vjp
def token_losses(raw_NxV: jax.Array, targets_N: jax.Array) -> jax.Array:
    """-log softmax(soft_cap(raw))[target] of every token, computed in float32.

    No maximum is subtracted: the cap of 15 keeps exp within float32. The derivative is written out
    because XLA on CPU otherwise computes it once for each of its three uses (kernel, bias, input),
    and because it then needs only the raw logits and one number a token, not three float32 arrays
    of the logits' size.

    Args:
        raw_NxV: Logits before the cap, float32 or bfloat16.
        targets_N: int32 token ids.

    Returns:
        (N,) float32, nats.

    Example:
        >>> token_losses(jnp.zeros((1, 50304)), jnp.zeros(1, jnp.int32)).tolist()
        [10.82584]
    """
    return _forward(raw_NxV, targets_N)[0]


def _forward(raw_NxV: jax.Array, targets_N: jax.Array):
    logits_NxV = soft_cap(widen_exactly(raw_NxV))
    sum_N = jnp.sum(jnp.exp(logits_NxV), axis=-1)
    picked_N = jnp.take_along_axis(logits_NxV, targets_N[:, None], axis=-1)[:, 0]
    return jnp.log(sum_N) - picked_N, (raw_NxV, targets_N, sum_N)


def _backward(residuals, cotangent_N: jax.Array):
    """(softmax - one-hot) times the cap's slope (15 / sqrt(z^2 + 225))^3.

    In this form softmax and slope are exactly 1/V and 1 under zero logits (V a power of 2), and
    zero entries of the first gradient are zero, not rounding that Adam would blow up.
    """
    raw_NxV, targets_N, sum_N = residuals
    wide_NxV = widen_exactly(raw_NxV)
    softmax_NxV = jnp.exp(soft_cap(wide_NxV)) * (1 / sum_N)[:, None]
    hot_NxV = jnp.arange(raw_NxV.shape[-1]) == targets_N[:, None]
    inverse_NxV = jax.lax.rsqrt(wide_NxV * wide_NxV + LOGIT_CAP**2)
    slope_NxV = (LOGIT_CAP * inverse_NxV) ** 3
    gradient_NxV = (softmax_NxV - hot_NxV) * slope_NxV * cotangent_N[:, None]
    return jax.lax.optimization_barrier(gradient_NxV.astype(raw_NxV.dtype)), None


token_losses.defvjp(_forward, _backward)


def pairwise_sum(x: jax.Array) -> jax.Array:
    """Sums all entries by halving, so that the rounding error grows with log2 of their number.

    XLA on CPU adds a row one entry after the other, which costs 1e-5 on a loss.

    Args:
        x: float32 array with at least one entry.

    Returns:
        float32 scalar.

    Example:
        >>> float(pairwise_sum(jnp.ones((3, 5))))
        15.0
    """
    x = jnp.pad(x.ravel(), (0, (1 << (x.size - 1).bit_length()) - x.size))
    while x.size > 1:
        x = x[: x.size // 2] + x[x.size // 2 :]
    return x[0]
