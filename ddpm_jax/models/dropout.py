"""Dropout (Srivastava et al. 2014, JMLR 15:1929) whose masks come from keys, one an example."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnums=(1, 2))
def dropout_mask(keys: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which entries stay where a share `rate` of them is dropped: bool [batch, *shape].

    Example i's mask depends on keys[i] alone. 16 random bits an entry: the rate is rounded to
    a multiple of 2^−16.

    Args:
      keys: [batch], Threefry's, as all of `ddpm_jax.keys`.
      rate: in [0, 1).
    """
    size = math.prod(shape)
    dropped = jnp.uint32(round(rate * 2**16))
    words = threefry_bits(keys, (size + 1) // 2)
    low, high = words & jnp.uint32(0xFFFF), words >> jnp.uint32(16)
    pairs = (low >= dropped).astype(jnp.uint16) | ((high >= dropped).astype(jnp.uint16) << 8)

    def unchanged(pairs):
        return pairs

    # Written out, else CPUs compute each word twice, once for either half.
    written = lax.optimization_barrier
    pairs = lax.platform_dependent(pairs, cpu=written, default=unchanged)
    keep = lax.bitcast_convert_type(pairs, jnp.uint8) != 0
    return keep.reshape(len(keys), -1)[:, :size].reshape(-1, *shape)


def threefry_bits(keys: jax.Array, count: int) -> jax.Array:
    """`jax.random.bits(key, (count,), uint32)` of each key, to the bit, in one pass on CPUs too.

    There the library's own form is a loop of five passes. Threefry-2x32 with 20 rounds, rotations
    and parity constant of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.2
    and table 4, at the counters (0, 0), (0, 1), …; of each two words the exclusive or, as in JAX's
    partitionable form, its default.

    Args:
      keys: [batch], Threefry's.
    Returns:
      uint32 [batch, count].
    """
    first, second = jnp.split(jax.random.key_data(keys), 2, axis=-1)
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    shape = (len(keys), count)
    x = jnp.broadcast_to(schedule[0], shape)
    y = lax.broadcasted_iota(jnp.uint32, shape, 1) + schedule[1]
    for i in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x += y
            y = (y << bits | y >> (32 - bits)) ^ x
        x += schedule[(i + 1) % 3]
        y += schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y


def kept(x: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 − rate) where `keep`, bool of x's shape, is true, else 0; x itself where it is None.

    The mean over masks is x.

    Args:
      x: of any shape, floating.
      rate: in [0, 1).
    """
    return x if keep is None else jnp.where(keep, x / (1 - rate), 0)
