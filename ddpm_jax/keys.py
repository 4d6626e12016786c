"""Randomness by position: every random number is a function of (seed, purpose, step, index).

No key is carried from step to step or split among devices, so noise, timesteps, dropout and
samples do not depend on batch layout, device count or restarts. Keys are Threefry's: the hardware
generator's (rbg) ignore all but one key under vmap.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Every purpose in one table. Numbers are never reused: a new purpose takes the next one.
PURPOSES = {
    "init": 0,  # The network's parameters.
    "timestep": 1,  # t of each training example.
    "noise": 2,  # ε of each training example.
    "dropout": 3,  # Dropout masks, one key an example.
    "flip": 4,  # Mirrored training images.
    "sample": 5,  # One key a sample: x_T and the noise of every reverse step.
    "bound": 6,  # One key an image: the x_t at which the bound's terms are evaluated.
    "bound_times": 7,  # One key an image: the t at which a part of the terms is evaluated.
    "order": 8,  # The order of coordinates of a forward process that masks them one by one.
    "continuation": 9,  # One key a reverse process that goes on from another's x_t.
    "interpolation": 10,  # One key a pair of images: both ends' noise and the reverse steps'.
}


def purpose_key(seed: int | jax.Array, purpose: str) -> jax.Array:
    """The key of a purpose.

    Raises:
      KeyError: an unknown purpose.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), PURPOSES[purpose])


def example_keys(
    seed: int | jax.Array, purpose: str, step: int | jax.Array, indices: jax.Array
) -> jax.Array:
    """Keys [n] for the examples at the global positions `indices` [n] of a step."""
    at_step = jax.random.fold_in(purpose_key(seed, purpose), step)
    return jax.vmap(lambda index: jax.random.fold_in(at_step, index))(indices)


def normal(keys: jax.Array, position: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise float32 [n, *shape], row i drawn from keys[i] at `position`.

    Args:
      keys: [n].
      position: one for all rows, or [n].
      shape: of a row.
    """

    def draw(key: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, place), shape, dtype=jnp.float32)

    return jax.vmap(draw)(keys, jnp.broadcast_to(position, keys.shape))
