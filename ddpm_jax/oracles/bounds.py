"""The variational bound of the exact network without Monte Carlo, and −log p(x_0) by sampling.

All of it in bits/dim; paper, Eqs. 3, 5 and 13.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # Its `special` is loaded when it is used.

from ddpm_jax import keys as keys_lib
from ddpm_jax.diffusion import Denoiser, Process, p_distribution, q_posterior, q_sample
from ddpm_jax.likelihood import HALF_BIN, discretized_gaussian_log_likelihood
from ddpm_jax.oracles.chains import Chain, chain, model_variance
from ddpm_jax.oracles.distributions import Distribution, Gaussian, Moments, Points, posterior
from ddpm_jax.schedules import Schedule

_REACH = 8.0  # Standard deviations to which integrals reach: 1e-15 is beyond.
# Steps of the trapezoidal rule over noise, in standard deviations, by the number of coordinates.
_STEP = {1: 0.005, 2: 0.125}


def bound(data: Distribution, process: Process, clip: bool = True, steps: int = 0) -> np.ndarray:
    """The expectation, over data and noise, of each term that `likelihood.vlb_terms` estimates.

    The network is `denoiser(data, process)`; column k is L_k: L_0 the decoder's, L_T the prior's.
    For `Gaussian` data L_1..L_T are closed forms in any number of dimensions. L_0 is a
    two-dimensional integral a coordinate, of Eq. 13 as `discretized_gaussian_log_likelihood`
    computes it at values between the 256 as well: over the bin ±1/255 around x_0, open beyond
    ±(1 − 1/255). For `Points` of one or two coordinates all terms are integrals over x_t.
    Integrals are accurate to about 1e-8 (with two coordinates and a learned variance, where that
    of L_0 has a kink, to 1e-5).

    Args:
      process: as trained; with any prediction, but `mu` knows no clipping.
      clip: whether x̂_0 is clipped to [−1, 1]; of no effect on points within.
      steps: length of the chain, spread evenly over 1..T, as for `sampling.sample`; 0 for all.
    Returns:
      float64 [S+1] bits/dim; the sum is the bound.
    Raises:
      ValueError: data of another kind, or too many dimensions for `Points`.
    """
    if not isinstance(data, Gaussian):
        return data.weights @ bound_of_points(data, process, clip, steps)
    trained, short = chain(process.schedule), chain(process.schedule, steps)
    clip = clip and process.prediction != "mu"
    mean, variance = (a.reshape(-1) for a in data.moments)
    nats = np.zeros(short.num_steps + 1)
    nats[-1] = _prior(short, mean**2 + variance).mean()
    for t in range(1, short.num_steps + 1):
        unexplained, explained = _split_variance(data, short, t)
        sigma2 = model_variance(process, trained, short, t, unexplained)
        if t == 1:
            nats[0] = _gaussian_decoder(mean, explained, unexplained, sigma2, clip).mean()
            continue
        error = unexplained + _clipped_square(mean, explained) * clip
        nats[t - 1] = _kl(short, t, sigma2, error).mean()
    return nats / math.log(2)


def bound_of_points(
    data: Points, process: Process, clip: bool = True, steps: int = 0
) -> np.ndarray:
    """`bound` for each point as x_0, over noise alone: float64 [k, S+1] bits/dim."""
    _check_integrable(data)
    trained, short = chain(process.schedule), chain(process.schedule, steps)
    clip = clip and process.prediction != "mu"
    noise, weights = _noise_grid(data)
    nats = np.zeros((len(data.points), short.num_steps + 1))
    nats[:, -1] = _prior(short, data.parts.means**2).mean(axis=1)
    for t in range(1, short.num_steps + 1):
        for i, point in enumerate(data.parts.means):
            x0_hat, _, unexplained = _at_noise(data, short, t, i, noise)
            sigma2 = model_variance(process, trained, short, t, unexplained)
            x0_hat = np.clip(x0_hat, -1, 1) if clip else x0_hat
            if t == 1:
                term = _decoder(point, x0_hat, np.sqrt(sigma2))
            else:
                term = _kl(short, t, sigma2, (point - x0_hat) ** 2)
            nats[i, t - 1] = weights @ term.mean(axis=1)
    return nats / math.log(2)


def optimal_variance(data: Distribution, schedule: Schedule) -> np.ndarray:
    """The best σ²_t that is one number for all of x_t's coordinates, float64 [T+1]; entry 0 is 0.

    σ*²_t = β̃_t + c² E[Var[x_0|x_t]]/d with c = √ᾱ_{t−1} β_t/(1 − ᾱ_t): Bao et al. 2022
    (arXiv:2201.06503), Theorem 1. At t = 1 it is E[Var[x_0|x_1]]/d, yet at least β̃_2. Closed
    form for `Gaussian` data; an integral for `Points` of one or two coordinates.

    Raises:
      ValueError: as for `bound`.
    """
    constants = chain(schedule)
    result = np.zeros(constants.num_steps + 1)
    for t in range(1, constants.num_steps + 1):
        unexplained = _mean_unexplained(data, constants, t)
        result[t] = constants.posterior_variance[t] + constants.mean_x0[t] ** 2 * unexplained
    result[1] = max(result[1], constants.floor[1])
    return result


def _mean_unexplained(data: Distribution, constants: Chain, t: int) -> float:
    """E[Var[x_0|x_t]], the mean over the coordinates."""
    if isinstance(data, Gaussian):
        return _split_variance(data, constants, t)[0].mean()
    _check_integrable(data)
    noise, weights = _noise_grid(data)
    parts = (_at_noise(data, constants, t, i, noise)[2] for i in range(len(data.points)))
    return data.weights @ [weights @ unexplained.mean(axis=1) for unexplained in parts]


def _check_integrable(data: Distribution) -> None:
    if not isinstance(data, Points):
        raise ValueError(f"known for Gaussian and Points alone, not for {type(data).__name__}")
    if data.parts.means.shape[1] > 2:
        raise ValueError(
            f"an integral over {data.parts.means.shape[1]} coordinates takes too long; Points may "
            "have 1 or 2 here: use likelihood.vlb_terms with oracles.denoiser"
        )


def _noise_grid(data: Points) -> tuple[np.ndarray, np.ndarray]:
    """Nodes [n, d] and weights [n] of E f(ε), ε ~ N(0, I): trapezoidal, exact for what decays."""
    d = data.parts.means.shape[1]
    axis = np.arange(-_REACH, _REACH + _STEP[d] / 2, _STEP[d])
    noise = np.stack(np.meshgrid(*[axis] * d), axis=-1).reshape(-1, d)
    weights = np.exp(-0.5 * (noise**2).sum(axis=1))
    return noise, weights / weights.sum()


def _at_noise(data: Points, constants: Chain, t: int, i: int, noise: np.ndarray) -> Moments:
    """The moments of x_0 given x_t = x_t(point i, noise)."""
    alpha_bar, rest = constants.alpha_bar[t, None, None], constants.rest[t, None, None]
    x_t = np.sqrt(alpha_bar) * data.parts.means[i] + np.sqrt(rest) * noise
    return posterior(np, data.parts, alpha_bar, rest, x_t)


def _split_variance(data: Gaussian, short: Chain, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Var[x_0|x_t] and Var[E[x_0|x_t]] of each coordinate, [d]: their sum is Var[x_0]."""
    variances, basis = data.parts.variances[0], data.parts.basis
    total = short.alpha_bar[t] * variances + short.rest[t]
    both = np.stack([variances * short.rest[t], short.alpha_bar[t] * variances**2]) / total
    return tuple(both if basis is None else both @ basis.T**2)


def _prior(short: Chain, square: np.ndarray) -> np.ndarray:
    """KL(q(x_T|x_0) ‖ N(0, I)) where x_0² (or its mean) is `square`; nats, elementwise."""
    log_rest = np.log1p(-short.alpha_bar[-1])
    return 0.5 * (np.expm1(log_rest) - log_rest + short.alpha_bar[-1] * square)


def _kl(short: Chain, t: int, sigma2: np.ndarray, error: np.ndarray) -> np.ndarray:
    """KL(q(x_{t−1}|x_t, x_0) ‖ p) where (x_0 − x̂_0)² (or its mean) is `error`; nats."""
    log_ratio = np.log(short.posterior_variance[t] / sigma2)
    square = short.mean_x0[t] ** 2 * error / sigma2
    return 0.5 * (np.expm1(log_ratio) - log_ratio + square)


def _clipped_square(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E(x − clip(x, −1, 1))² for x ~ N(mean, variance)."""
    scale = np.sqrt(variance)
    total = 0.0
    for beyond in (mean - 1, -1 - mean):  # What is cut off above 1, and mirrored below −1.
        z = beyond / np.maximum(scale, 1e-300)
        density = np.exp(-0.5 * np.minimum(z**2, 1400)) / math.sqrt(2 * math.pi)
        total = total + (variance + beyond**2) * scipy.special.ndtr(z) + scale * beyond * density
    return total


def _decoder(x0: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """−log of Eq. 13's integral, nats, elementwise; float64."""
    centre, half = (x0 - mean) / scale, HALF_BIN / scale
    # Mirrored to the left of the mean, where log Φ keeps its digits.
    left = -np.abs(centre)
    log_high, log_low = scipy.special.log_ndtr(left + half), scipy.special.log_ndtr(left - half)
    inner = log_high + np.log1p(-np.exp(log_low - log_high))
    at_low, at_high = x0 < -1 + HALF_BIN, x0 > 1 - HALF_BIN
    return -np.where(
        at_low,
        scipy.special.log_ndtr(centre + half),
        np.where(at_high, scipy.special.log_ndtr(half - centre), inner),
    )


def _gaussian_decoder(mean, explained, unexplained, sigma2, clip):
    """E of `_decoder` for Gaussian data, nats [d]; each coordinate's numbers are [d]."""
    columns = np.stack(np.broadcast_arrays(mean, explained, unexplained, sigma2), axis=1)
    distinct, places = np.unique(columns, axis=0, return_inverse=True)
    values = np.array([_decoder_integral(*numbers, clip) for numbers in distinct])
    return values[places.reshape(-1)]


def _decoder_integral(mean, explained, unexplained, sigma2, clip):
    """Over x_0, then over x̂_0 given x_0: x̂_0 and x_0 − x̂_0 are independent Gaussians."""
    scale, variance = math.sqrt(sigma2), explained + unexplained
    share = explained / variance if variance else 0.0
    ends = [-1 + HALF_BIN, 1 - HALF_BIN]
    x0, weights = _nodes(np.array(mean), math.sqrt(variance), ends, scale)
    given = math.sqrt(share * unexplained)
    kinks = [-1.0, 1.0] if clip else []
    x0_hat, inner = _nodes(mean + share * (x0 - mean), given, kinks, scale)
    x0_hat = np.clip(x0_hat, -1, 1) if clip else x0_hat
    return weights @ (inner * _decoder(x0[:, None], x0_hat, scale)).sum(axis=1)


def _nodes(mean, deviation, breaks, width):
    """Nodes and weights [..., n] of E f(x), x ~ N(mean [...], deviation²), f smooth but at breaks.

    Sixteen nodes of Gauss and Legendre on each panel; panels are at most 4 widths or 3 deviations.
    """
    count = int(np.clip(np.ceil(2 * _REACH * deviation / (4 * width)), 6, 512))
    edges = np.broadcast_to(np.linspace(-_REACH, _REACH, count + 1), (*mean.shape, count + 1))
    scale = max(deviation, 1e-300)
    cuts = [np.clip((b - mean) / scale, -_REACH, _REACH)[..., None] for b in breaks]
    edges = np.sort(np.concatenate([edges, *cuts], axis=-1), axis=-1)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    middle, half = (edges[..., 1:] + edges[..., :-1]) / 2, np.diff(edges) / 2
    z = (middle[..., None] + half[..., None] * nodes).reshape(*mean.shape, -1)
    weights = (half[..., None] * weights).reshape(z.shape) * np.exp(-0.5 * z**2)
    return mean[..., None] + deviation * z, weights / math.sqrt(2 * math.pi)


def importance_nll(
    process: Process,
    denoiser: Denoiser,
    x0: jax.Array,
    keys: jax.Array,
    num_paths: int,
    clip: bool = True,
) -> jax.Array:
    """An estimate of −log p_θ(x_0), bits/dim float32 [batch], by importance sampling.

    −log of the mean over paths x_{1:T} ~ q(x_{1:T}|x_0) of p_θ(x_{0:T})/q(x_{1:T}|x_0), Eq. 3.
    Its expectation is the bound for one path, falls with their number and tends to −log p_θ(x_0)
    from above (Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519, Theorem 1). Each path
    calls the network T times; paths run one after another in one compiled loop. Where σ²_t is above
    2 β̃_t (fixed_large at small t) the weights' variance is infinite, and many paths are needed.

    Args:
      denoiser: any network.
      x0: [batch, ..., C], 8-bit values scaled to [−1, 1].
      keys: [batch], one an image, as from `keys.example_keys(seed, "bound", …)`.
      clip: whether x̂_0 is clipped, see `diffusion.p_distribution`.
    """
    schedule, shape = process.schedule, x0.shape[1:]
    axes = tuple(range(1, x0.ndim))
    last = jnp.full(x0.shape[:1], schedule.num_steps)

    def path_log_weight(path):
        own = jax.vmap(lambda key: jax.random.fold_in(key, path))(keys)
        noise = keys_lib.normal(own, 0, shape)
        x_t = q_sample(schedule, x0, last, noise)
        log_rest = schedule.log_one_minus_alpha_bar[-1]
        log_weight = (0.5 * (noise**2 - x_t**2 + log_rest)).sum(axis=axes)

        def step(carry, index):
            x_t, log_weight = carry
            t = jnp.full(x0.shape[:1], index)
            p, _ = p_distribution(process, denoiser(x_t, schedule.timesteps[t]), x_t, t, clip)
            q = q_posterior(schedule, x0, x_t, t)
            noise = keys_lib.normal(own, index, shape)
            q_deviation = jnp.exp(0.5 * q.log_variance) * noise
            z = (q.mean - p.mean + q_deviation) * jnp.exp(-0.5 * p.log_variance)
            log_ratio = 0.5 * (noise**2 - z**2 + q.log_variance - p.log_variance)
            decoder = discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
            term = jnp.where(index == 1, decoder, log_ratio)
            return (q.mean + q_deviation, log_weight + term.sum(axis=axes)), None

        steps = jnp.arange(schedule.num_steps, 0, -1)
        return jax.lax.scan(step, (x_t, log_weight), steps)[0][1]

    if num_paths < 1:
        raise ValueError(f"num_paths must be at least 1, not {num_paths}")
    log_weights = jax.lax.map(path_log_weight, jnp.arange(num_paths))
    log_mean = jax.nn.logsumexp(log_weights, axis=0) - math.log(num_paths)
    return -log_mean / (math.log(2) * math.prod(shape))
