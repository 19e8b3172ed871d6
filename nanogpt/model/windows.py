"""Attention within documents and within a window of blocks: the mask, and two ways to compute it.

A query sees the keys before it and itself, of its own document, in its own block of positions and
the `window - 1` blocks before that. `attend_dense` writes the scores of all pairs down: the
reference. `attend_banded` takes one block of keys for every block of queries at a time, nearest
first: its memory grows with the positions alone, and its work with the window, which may change
from call to call of one program. It is plain XLA, so the same on CPUs, GPUs and TPUs.

Shapes as in `nanogpt.model.gpt`; C positions of a block, M blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Scaled = tuple[Array, Array, Array]  # queries, times the scale, keys, values
NOBODY = -1  # the document of keys before the first


def documents(tokens_BxT: Array, end_of_text: int) -> Array:
    """Numbers documents: ends of text up to and with each token, which begin the next one.

    >>> documents(jnp.array([[5, 9, 6, 9]]), 9).tolist()
    [[0, 1, 1, 2]]
    """
    return jnp.cumsum(tokens_BxT == end_of_text, axis=1, dtype=jnp.int32)


def allowed(documents_BxT: Array, window: Array, block: int) -> Array:
    """Which keys a query sees: bool (B, T, T), [b, query, key].

    Args:
        documents_BxT: from `documents`.
        window: int32, blocks; less than 1 is 1.
        block: positions of a block.

    >>> allowed(jnp.array([[0, 0, 1, 1]]), jnp.int32(1), 2)[0, 3].tolist()
    [False, False, True, True]
    """
    at = jnp.arange(documents_BxT.shape[1])
    near = at[:, None] // block - at // block < jnp.maximum(window, 1)
    same = documents_BxT[:, :, None] == documents_BxT[:, None]
    return same & near & (at <= at[:, None])


def attend_dense(
    q_BxTxNxH: Array, k_BxTxNxH: Array, v_BxTxNxH: Array, documents_BxT: Array, window: Array,
    *, block: int, most: int, scale: float,
) -> Array:  # fmt: skip
    """The reference: scores of all pairs of positions, (B, N, T, T).

    Args:
        q_BxTxNxH: queries; with keys of norm sqrt(H) for `attend_banded`.
        k_BxTxNxH: keys.
        v_BxTxNxH: values.
        documents_BxT: from `documents`.
        window: int32, blocks that a query sees, its own among them; less than 1 is 1.
        block: positions of a block, which divides T.
        most: the largest window, in blocks.
        scale: factor of the scores.

    Returns:
        Array (B, T, N, H) of the dtype of the values.
    """
    del most
    seen = allowed(documents_BxT, window, block)[:, None]
    scores = jnp.einsum("bqnh,bknh->bnqk", q_BxTxNxH, k_BxTxNxH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen, scale * scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqk,bknh->bqnh", weights.astype(v_BxTxNxH.dtype), v_BxTxNxH)


def attend_banded(
    q_BxTxNxH: Array, k_BxTxNxH: Array, v_BxTxNxH: Array, documents_BxT: Array, window: Array,
    *, block: int, most: int, scale: float, twice: bool = False,
) -> Array:  # fmt: skip
    """What `attend_dense` gives, block by block.

    No maximum is subtracted from the scores: those of queries and keys of norm sqrt(H) are within
    `scale` * H, whose exponential float32 and bfloat16 hold for any head that is in use.

    Args:
        q_BxTxNxH: as `attend_dense`'s arguments, all of them.
        k_BxTxNxH: likewise.
        v_BxTxNxH: likewise.
        documents_BxT: likewise.
        window: likewise; at most `most` counts.
        block: likewise.
        most: likewise.
        scale: likewise.
        twice: whether the result is to be differentiated twice, which costs more: blocks outside
            of the window are skipped and yet added as zeros.

    Returns:
        Array (B, T, N, H) of the dtype of the values.
    """
    count = min(most, q_BxTxNxH.shape[1] // block)
    q, k, v = (_in_blocks(x, block) for x in (q_BxTxNxH, k_BxTxNxH, v_BxTxNxH))
    owners = documents_BxT.reshape(len(documents_BxT), 1, -1, block)
    number = jnp.clip(window, 1, count)
    attend = _by_scan if twice else _by_loop
    out_BxNxMxCxH = attend(count, scale, q, k, v, owners, number)
    return out_BxNxMxCxH.transpose(0, 2, 3, 1, 4).reshape(q_BxTxNxH.shape)


def _in_blocks(x_BxTxNxH: Array, block: int) -> Array:
    """(B, T, N, H) -> (B, N, M, C, H)."""
    rows, _, heads, width = x_BxTxNxH.shape
    return x_BxTxNxH.reshape(rows, -1, block, heads, width).transpose(0, 3, 1, 2, 4)


def _shifted(x: Array, offset: Array, count: int, fill: int = 0) -> Array:
    """What lies `offset` blocks before each block, `fill` before the first; axis 2 counts them."""
    ahead = [(0, 0, 0)] * x.ndim
    ahead[2] = (count - 1, 0, 0)
    padded = jax.lax.pad(x, jnp.asarray(fill, x.dtype), ahead)
    return jax.lax.dynamic_slice_in_dim(padded, count - 1 - offset, x.shape[2], axis=2)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _weights(count: int, scale: float, offset: Array, q: Array, k: Array, owners: Array) -> Array:
    """exp(score), 0 where the mask says so, float32 (B, N, M, C, C); keys are already shifted."""
    at = jnp.arange(q.shape[3])
    earlier = (offset > 0) | (at <= at[:, None])
    same = owners[..., None] == _shifted(owners, offset, count, NOBODY)[..., None, :]
    return jnp.where(same & earlier, jnp.exp(scale * _dot("bnmqh,bnmkh->bnmqk", q, k)), 0.0)


def _part(count: int, scale: float, offset: Array, q, k, v, owners) -> tuple[Array, Array]:
    """Sum of the weights, and of values times weights, of one block of keys for every query."""
    k, v = (_shifted(x, offset, count) for x in (k, v))
    weights = _weights(count, scale, offset, q, k, owners)
    return weights.sum(-1), _dot("bnmqk,bnmkh->bnmqh", weights.astype(v.dtype), v)


def _zeros(q: Array) -> tuple[Array, Array]:
    return jnp.zeros(q.shape[:-1], jnp.float32), jnp.zeros(q.shape, jnp.float32)


def _add(x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _by_scan(count: int, scale: float, q, k, v, owners, number) -> Array:
    """All blocks that there may be, one after the other; differentiated as it stands."""

    @jax.checkpoint
    def part(offset, q, k, v):
        inside: Callable = lambda: _part(count, scale, offset, q, k, v, owners)  # noqa: E731
        return jax.lax.cond(offset < number, inside, lambda: _zeros(q))

    def add(sums, offset):
        return _add(sums, part(offset, q, k, v)), None

    (total, mixed), _ = jax.lax.scan(add, _zeros(q), jnp.arange(count))
    return (mixed / total[..., None]).astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_loop(count: int, scale: float, q, k, v, owners, number) -> Array:
    """The blocks of the window alone, with a derivative that is a loop, too."""
    return _forward(count, scale, q, k, v, owners, number)[0]


def _forward(count: int, scale: float, q, k, v, owners, number):
    total, mixed = jax.lax.fori_loop(
        0, number, lambda o, sums: _add(sums, _part(count, scale, o, q, k, v, owners)), _zeros(q)
    )
    out = (mixed / total[..., None]).astype(v.dtype)
    return out, (q, k, v, owners, number, out, total)


def _backward(count: int, scale: float, kept, cotangent: Array):
    """With p the softmax: dv = p^T do; ds = p (do v^T - do . out); dq = ds k, dk = ds^T q."""
    q, k, v, owners, number, out, total = kept
    along = jnp.sum(cotangent.astype(jnp.float32) * out, -1, keepdims=True)
    over = 1 / total[..., None]

    def before(sums: Array, offset: Array, more: Array) -> Array:
        """Adds to the blocks that lie `offset` before."""
        start = count - 1 - offset
        there = jax.lax.dynamic_slice_in_dim(sums, start, more.shape[2], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(sums, there + more, start, axis=2)

    def add(offset, sums):
        dq, dk, dv = sums
        near_k, near_v = (_shifted(x, offset, count) for x in (k, v))
        p = over * _weights(count, scale, offset, q, near_k, owners)
        narrow = p.astype(v.dtype)
        ds = scale * p * (_dot("bnmqh,bnmkh->bnmqk", cotangent, near_v) - along)
        ds = ds.astype(q.dtype)
        return (
            dq + _dot("bnmqk,bnmkh->bnmqh", ds, near_k),
            before(dk, offset, _dot("bnmqk,bnmqh->bnmkh", ds, q)),
            before(dv, offset, _dot("bnmqk,bnmqh->bnmkh", narrow, cotangent)),
        )

    rows, heads, blocks, *rest = k.shape
    wide = jnp.zeros((rows, heads, blocks + count - 1, *rest), jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(0, number, add, (_zeros(q)[1], wide, wide))
    dk, dv = (x[:, :, count - 1 :] for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_by_loop.defvjp(_forward, _backward)
