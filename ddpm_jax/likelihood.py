"""The variational bound, term by term, and the discretised decoder (paper, Eqs. 5, 13, 16).

Elementwise functions return nats, functions of images bits/dim. Everything is float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from ddpm_jax import keys as keys_lib
from ddpm_jax.diffusion import (
    Denoiser,
    Process,
    at,
    p_distribution,
    predict_eps,
    q_posterior,
    q_sample,
)
from ddpm_jax.schedules import Schedule

HALF_BIN = 1 / 255  # Images are 8-bit, scaled to [−1, 1]: bins reach 1/255 to both sides.


def gaussian_kl(
    mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array
) -> jax.Array:
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)), elementwise, in nats.

    ½ (e^d − 1 − d + (mean1 − mean2)² / variance2), d = log variance1 − log variance2: exactly 0
    for equal arguments, and accurate for small differences.
    """
    return _kl_of_difference(mean1 - mean2, log_variance1, log_variance2)


def _kl_of_difference(difference, log_variance1, log_variance2):
    d = log_variance1 - log_variance2
    # expm1(d) − d loses all digits as d → 0; its series does not.
    series = d**2 / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5)))
    small = jnp.abs(d) < 0.1
    excess = jnp.where(small, series, jnp.expm1(jnp.where(small, 0.0, d)) - d)
    return 0.5 * (excess + difference**2 * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(
    x0: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """log ∫ N(x; mean, scale²) dx over the bin of x0, elementwise, in nats. Eq. 13.

    The bins reach 1/255 to both sides of each of the 256 values, and those of −1 and 1 are open:
    the 256 probabilities sum to one. The normal CDF is exact in both tails.

    Args:
      x0: 8-bit values scaled to [−1, 1].
      mean: broadcastable to x0.
      log_scale: log of the standard deviation, broadcastable to x0.
    """
    inverse_scale = jnp.exp(-log_scale)
    centre = (x0 - mean) * inverse_scale
    half = jnp.broadcast_to(HALF_BIN * inverse_scale, centre.shape)
    # By symmetry the bin can be taken on the left of the mean, where log Φ keeps its digits.
    left = -jnp.abs(centre)
    inner = _log_normal_interval(left, half)
    log_cdf_below = log_ndtr(centre + half)
    log_cdf_above = log_ndtr(half - centre)
    return jnp.where(
        x0 < -1 + HALF_BIN, log_cdf_below, jnp.where(x0 > 1 - HALF_BIN, log_cdf_above, inner)
    )


def _log_normal_interval(centre: jax.Array, half: jax.Array) -> jax.Array:
    """log(Φ(centre + half) − Φ(centre − half)) for centre ≤ 0, half > 0."""
    narrow = half < 0.02
    # Wide: log Φ(b) + log(1 − Φ(a)/Φ(b)), whose ratio is formed from logarithms.
    wide_half = jnp.where(narrow, 1.0, half)
    log_b = log_ndtr(centre + wide_half)
    log_ratio = log_ndtr(centre - wide_half) - log_b
    wide = log_b + jnp.log(-jnp.expm1(jnp.minimum(log_ratio, -1e-6)))
    # Narrow, where that difference vanishes: φ(centre) ∫_{−h}^{h} e^{−cu − u²/2} du, up to h⁴.
    narrow_half = jnp.where(narrow, half, 0.01)
    z = centre * narrow_half
    log_sinhc = jnp.abs(z) + jnp.log(-jnp.expm1(-2 * jnp.maximum(jnp.abs(z), 0.1)))
    log_sinhc = jnp.where(
        jnp.abs(z) < 0.1,
        z**2 / 6 - z**4 / 180,
        log_sinhc - jnp.log(2 * jnp.maximum(jnp.abs(z), 0.1)),
    )
    log_density = -0.5 * centre**2 - 0.5 * math.log(2 * math.pi)
    narrow_value = log_density + jnp.log(2 * narrow_half) + log_sinhc - narrow_half**2 / 6
    return jnp.where(narrow, narrow_value, wide)


def prior_term(schedule: Schedule, x0: jax.Array) -> jax.Array:
    """L_T = KL(q(x_T|x_0) ‖ N(0, I)), bits/dim [batch]. Eq. 5."""
    t = jnp.full(x0.shape[:1], schedule.num_steps)
    mean = at(schedule.sqrt_alpha_bar, t, x0) * x0
    log_variance = at(schedule.log_one_minus_alpha_bar, t, x0)
    return bits_per_dim(gaussian_kl(mean, log_variance, 0.0, 0.0))


def vlb_term(
    process: Process,
    output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    clip: bool = True,
) -> jax.Array:
    """The bound's term at t, bits/dim [batch]: L_{t−1}, or the decoder's L_0 where t = 1. Eq. 5.

    Args:
      output: what the network returned at (x_t, t).
      x0, x_t: [batch, ..., C]; x0 holds 8-bit values scaled to [−1, 1].
      t: integer [batch], in 1..T.
      clip: whether x̂_0 is clipped, see `diffusion.p_distribution`.
    Raises:
      ValueError: the output has not the shape that the process asks for.
    """
    p, x0_hat = p_distribution(process, output, x_t, t, clip)
    q = q_posterior(process.schedule, x0, x_t, t)
    if process.prediction == "mu":
        difference = _posterior_mean_minus(process.schedule, p.mean, x0, x_t, t)
    else:  # Both means are μ̃_t(x_t, ·).
        difference = at(process.schedule.posterior_mean_x0, t, x0) * (x0 - x0_hat)
    kl = bits_per_dim(_kl_of_difference(difference, q.log_variance, p.log_variance))
    decoder = bits_per_dim(-discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance))
    return jnp.where(t == 1, decoder, kl)


def _posterior_mean_minus(schedule, mean, x0, x_t, t):
    # Late in the chain μ̃_t and the mean are both close to x_t, whose digits cancel here exactly.
    correction = (
        at(schedule.posterior_mean_xt_minus_1, t, x_t) * x_t
        + at(schedule.posterior_mean_x0, t, x_t) * x0
    )
    return (x_t - mean) + correction


class BoundTerms(NamedTuple):
    """The bound of each image, term by term. All float32 [batch, T+1].

    terms: bits/dim; column k is L_k: L_0 the decoder's, L_T the prior's. Their sum is the bound.
    x0_mse, eps_mse: column t is the mean squared error of x̂_0, and of the ε that it implies, at
      the x_t that the term was evaluated at; column 0 is 0.
    """

    terms: jax.Array
    x0_mse: jax.Array
    eps_mse: jax.Array


def vlb_terms(
    process: Process, denoiser: Denoiser, x0: jax.Array, keys: jax.Array, clip: bool = True
) -> BoundTerms:
    """All T+1 terms of the bound, each at one draw of x_t ~ q(x_t|x_0), in one loop. Eq. 5.

    Args:
      denoiser: the network.
      x0: [batch, ..., C], 8-bit values scaled to [−1, 1].
      keys: [batch], one an image, as from `keys.example_keys(seed, "bound", …)`.
      clip: whether x̂_0 is clipped.
    """
    times = jnp.arange(1, process.schedule.num_steps + 1)
    at_times = vlb_terms_at(
        process, denoiser, x0, keys, jnp.broadcast_to(times, (len(x0), len(times))), clip
    )
    none = jnp.zeros((len(x0), 1))
    return BoundTerms(
        terms=jnp.concatenate([at_times.terms, prior_term(process.schedule, x0)[:, None]], axis=1),
        x0_mse=jnp.concatenate([none, at_times.x0_mse], axis=1),
        eps_mse=jnp.concatenate([none, at_times.eps_mse], axis=1),
    )


def vlb_terms_at(
    process: Process,
    denoiser: Denoiser,
    x0: jax.Array,
    keys: jax.Array,
    times: jax.Array,
    clip: bool = True,
) -> BoundTerms:
    """The terms L_{t−1} at chosen times, equal to those that `vlb_terms` gives at the same keys.

    Args:
      times: integer [batch, k], in 1..T, of each image's own choice.
      others: as for `vlb_terms`.
    Returns:
      float32 [batch, k] each, in the order of `times`; without the prior's term.
    """
    schedule = process.schedule

    def term(_, t):
        noise = keys_lib.normal(keys, t, x0.shape[1:])
        x_t = q_sample(schedule, x0, t, noise)
        output = denoiser(x_t, schedule.timesteps[t])
        _, x0_hat = p_distribution(process, output, x_t, t, clip)
        eps_hat = predict_eps(schedule, x0_hat, x_t, t)
        errors = _mean((x0_hat - x0) ** 2), _mean((eps_hat - noise) ** 2)
        return None, (vlb_term(process, output, x0, x_t, t, clip), *errors)

    _, at_times = jax.lax.scan(term, None, times.T)
    return BoundTerms(*(column.T for column in at_times))


def bits_per_dim(nats: jax.Array) -> jax.Array:
    """The mean over all axes but the first, in bits: [batch, ...] -> [batch]."""
    return _mean(nats) / math.log(2)


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
