"""From noise to images: Algorithm 2, strided and DDIM samplers, x̂_0 paths, interpolation.

Every sampler visits T first and ends at 0, calls the network at exactly the times it was trained
with, and runs as one compiled loop. Noise comes from one key an image, so image k does not depend
on which other images are drawn beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax.diffusion import (
    Denoiser,
    Process,
    at,
    p_distribution,
    predict_eps,
    q_sample,
)
from ddpm_jax.schedules import respace, spaced

METHODS = ("ancestral", "ddim")


def ancestral_step(
    process: Process,
    output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    clip: bool = True,
) -> jax.Array:
    """x_{t−1} ~ p_θ(x_{t−1}|x_t); at t = 1 the mean, without noise. Algorithm 2, lines 3-4.

    Args:
      output: what the network returned at (x_t, t).
      x_t, noise: [batch, ..., C].
      t: integer [batch], in 1..T.
      clip: whether x̂_0 is clipped to [−1, 1], see `diffusion.p_distribution`.
    Returns:
      float32 [batch, ..., C].
    """
    return _ancestral(process, output, x_t, t, noise, clip)[0]


def ddim_step(
    process: Process,
    output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    eta: float = 0.0,
    clip: bool = True,
) -> jax.Array:
    """x at index t−1 of the process's schedule, whatever times the indices stand for.

    √ᾱ_{t−1} x̂_0 + √(1 − ᾱ_{t−1} − σ²) ε̂ + σ noise with σ = η √β̃_t: Song, Meng and Ermon 2021
    (arXiv:2010.02502), Eqs. 12 and 16. ε̂ is the one that belongs to x̂_0, clipped or not.

    Args, Returns: as for `ancestral_step`; eta: 0 for the deterministic sampler, at most 1.
    """
    return _ddim(process, output, x_t, t, noise, eta, clip)[0]


def _ancestral(process, output, x_t, t, noise, clip):
    p, x0_hat = p_distribution(process, output, x_t, t, clip)
    scale = jnp.exp(0.5 * p.log_variance)
    first = (t == 1).reshape(t.shape + (1,) * (x_t.ndim - 1))
    return p.mean + jnp.where(first, 0.0, scale * noise), x0_hat


def _ddim(process, output, x_t, t, noise, eta, clip):
    schedule = process.schedule
    _, x0_hat = p_distribution(process, output, x_t, t, clip)
    eps_hat = predict_eps(schedule, x0_hat, x_t, t)
    # 1 − ᾱ_{t−1} − σ² = (1 − ᾱ_{t−1}) (1 − η² β_t / (1 − ᾱ_t)), never below zero.
    share = 1 - eta**2 * at(schedule.beta, t, x_t) / at(schedule.one_minus_alpha_bar, t, x_t)
    direction = at(schedule.sqrt_one_minus_alpha_bar, t - 1, x_t) * jnp.sqrt(jnp.maximum(share, 0))
    scale = eta * jnp.sqrt(at(schedule.posterior_variance, t, x_t))
    signal = at(schedule.sqrt_alpha_bar, t - 1, x_t) * x0_hat
    return signal + direction * eps_hat + scale * noise, x0_hat


class Samples(NamedTuple):
    """Samples with the path of x̂_0 that led to them.

    images: float32 [batch, height, width, channels], about [−1, 1].
    x0_path: float32 [len(x0_at), batch, height, width, channels].
    """

    images: jax.Array
    x0_path: jax.Array


def sample(
    process: Process,
    denoiser: Denoiser,
    shape: Sequence[int],
    keys: jax.Array,
    method: str = "ancestral",
    steps: int = 0,
    eta: float = 0.0,
    clip: bool = True,
    x0_at: Sequence[int] = (),
) -> jax.Array | Samples:
    """Images from x_T ~ N(0, I) by the reverse process. Algorithm 2.

    Args:
      denoiser: the network.
      shape: (batch, height, width, channels), or without the batch.
      keys: [batch], one an image, as from `keys.example_keys(seed, "sample", …)`; or a single key,
        from which image k takes the one folded with k.
      method: "ancestral" or "ddim".
      steps: length of the chain, spread evenly over 1..T with both ends; 0 for all the steps.
      eta: DDIM's η in 0..1.
      clip: whether x̂_0 is clipped to [−1, 1] at each step.
      x0_at: indices of the chain, in the order wanted, at which x̂_0 is returned as well.
    Returns:
      float32 [batch, height, width, channels], or `Samples` where x0_at is given.
    Raises:
      ValueError: an unknown method, or arguments that do not fit each other.
    """
    shape = tuple(shape)
    if keys.ndim == 0:
        count = shape[0] if len(shape) != 3 else 1
        keys = jax.vmap(functools.partial(jax.random.fold_in, keys))(jnp.arange(count))
    if len(shape) == 3:
        shape = (keys.shape[0], *shape)
    if keys.shape != shape[:1]:
        raise ValueError(f"{shape[0]} images need as many keys, not {list(keys.shape)}")
    if steps:
        process = shorten(process, steps)
    x_T = keys_lib.normal(keys, 0, shape[1:])  # noqa: N806 (the paper's name)
    return reverse(process, denoiser, x_T, keys, None, method, eta, clip, x0_at)


def shorten(process: Process, steps: int) -> Process:
    """The process over `steps` times spread evenly over 1..T, both ends included."""
    schedule = process.schedule
    return Process(
        respace(schedule, spaced(schedule.num_steps, steps)), process.prediction, process.variance
    )


def reverse(
    process: Process,
    denoiser: Denoiser,
    x_t: jax.Array,
    keys: jax.Array,
    start: int | None = None,
    method: str = "ancestral",
    eta: float = 0.0,
    clip: bool = True,
    x0_at: Sequence[int] = (),
) -> jax.Array | Samples:
    """The reverse process from x_t at index `start` (T, unless given) down to 0, in one loop.

    Step t takes its noise from fold_in(keys[k], t), so that chains that start at different times
    share the noise of the steps they have in common. Other arguments as for `sample`.
    """
    schedule = process.schedule
    start = schedule.num_steps if start is None else start
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose from {', '.join(METHODS)}")
    if not 1 <= start <= schedule.num_steps:
        raise ValueError(f"start must lie in 1..{schedule.num_steps}, not {start}")
    if not all(1 <= t <= start for t in x0_at):
        raise ValueError(f"x0_at must lie in 1..{start}, not {tuple(x0_at)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0..1, not {eta}")
    kept, places = np.unique(np.asarray(x0_at, dtype=int), return_inverse=True)
    slots = np.full(schedule.num_steps + 1, len(kept))  # The last: not kept.
    slots[kept] = np.arange(len(kept))
    slots = jnp.asarray(slots)

    def body(carry, step):
        x_t, path = carry
        t = jnp.full(x_t.shape[:1], step)
        output = denoiser(x_t, schedule.timesteps[t])
        noise = keys_lib.normal(keys, step, x_t.shape[1:])
        if method == "ancestral":
            x_t, x0_hat = _ancestral(process, output, x_t, t, noise, clip)
        else:
            x_t, x0_hat = _ddim(process, output, x_t, t, noise, eta, clip)
        return (x_t, path.at[slots[step]].set(x0_hat)), None

    path = jnp.zeros((len(kept) + 1, *x_t.shape), jnp.float32)
    (x0, path), _ = jax.lax.scan(body, (x_t, path), jnp.arange(start, 0, -1))
    return Samples(x0, path[places]) if len(x0_at) else x0


def interpolate(
    process: Process,
    denoiser: Denoiser,
    x0: jax.Array,
    x0_other: jax.Array,
    fractions: Sequence[float],
    t: int,
    keys: jax.Array,
    share_noise: bool = False,
    clip: bool = True,
) -> jax.Array:
    """Images between pairs of images: x̄_t = (1−λ) x_t + λ x'_t, decoded by the chain. Paper, §4.4.

    x_t ~ q(x_t|x_0) and x'_t ~ q(x_t|x'_0), each with noise of its own that is the same for every
    λ, as is the noise of the reverse steps.

    Args:
      x0, x0_other: [batch, height, width, channels] in [−1, 1].
      fractions: the λ's.
      t: how far both are diffused, in 1..T: the larger, the coarser the features that mix.
      keys: [batch], one a pair.
      share_noise: whether both ends of a pair are diffused with the same noise.
      clip: whether x̂_0 is clipped.
    Returns:
      float32 [len(fractions), batch, height, width, channels].
    """
    times = jnp.full(x0.shape[:1], t)
    # Positions beyond the chain's own 1..T, which the reverse steps use.
    first = process.schedule.num_steps + 1
    noise = keys_lib.normal(keys, first, x0.shape[1:])
    noise_other = noise if share_noise else keys_lib.normal(keys, first + 1, x0.shape[1:])
    x_t = q_sample(process.schedule, x0, times, noise)
    x_t_other = q_sample(process.schedule, x0_other, times, noise_other)
    mixed = [(1 - fraction) * x_t + fraction * x_t_other for fraction in fractions]
    repeated = jnp.concatenate([keys] * len(mixed))
    decoded = reverse(process, denoiser, jnp.concatenate(mixed), repeated, t, clip=clip)
    return decoded.reshape(len(mixed), *x0.shape)
