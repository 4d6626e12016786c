"""What a sampler's output is distributed as, for Gaussian data and the exact network.

Every step is then affine in (x_t, noise), so x at each index is Gaussian, and its mean and
covariance follow from those at the index above.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddpm_jax.diffusion import Process
from ddpm_jax.oracles.chains import Chain, chain, model_variance
from ddpm_jax.oracles.distributions import Gaussian, flatten, posterior
from ddpm_jax.sampling import METHODS


def sampler_marginal(
    data: Gaussian,
    process: Process,
    method: str = "ancestral",
    steps: int = 0,
    eta: float = 0.0,
    index: int = 0,
) -> Gaussian:
    """The distribution of `sampling.sample(process, denoiser(data, process), …, clip=False)`.

    Algorithm 2 of the paper, or Song, Meng and Ermon 2021 (arXiv:2010.02502), Eqs. 12 and 16.

    Args:
      process: as trained; all four predictions give the same.
      method, steps, eta: as for `sampling.sample`.
      index: at which index of the chain of `steps` steps; 0 for the samples, the chain's length
        for x_T ~ N(0, I).
    Returns:
      float64; with a full covariance [d, d] where the data's is full, else one per coordinate.
    Raises:
      ValueError: data that are not Gaussian, or arguments out of range.
    """
    if not isinstance(data, Gaussian):
        raise ValueError("only for Gaussian data are a sampler's marginals known")
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose from {', '.join(METHODS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0..1, not {eta}")
    trained, short = chain(process.schedule), chain(process.schedule, steps)
    if not 0 <= index <= short.num_steps:
        raise ValueError(f"index must lie in 0..{short.num_steps}, not {index}")
    basis, d = data.parts.basis, data.mean.size
    mean, covariance = np.zeros(d), np.ones(d) if basis is None else np.eye(d)
    for t in range(short.num_steps, index, -1):
        of_x0, of_xt, noise = _step(process, trained, short, data, t, method, eta)
        # Along each eigenvector x̂_0 = m + gain (x_t − √ᾱ m), m being the data's mean there.
        variances, root = data.parts.variances[0], np.sqrt(short.alpha_bar[t])
        gain = root * variances / (short.alpha_bar[t] * variances + short.rest[t])
        centre, slope = data.mean.reshape(-1), of_x0 * gain + of_xt
        if basis is None:
            mean = of_x0 * centre + slope * mean - of_x0 * gain * root * centre
            covariance = slope**2 * covariance + noise
        else:
            gain, slope = (basis * a @ basis.T for a in (gain, slope))
            mean = of_x0 * centre + slope @ mean - of_x0 * root * gain @ centre
            covariance = slope @ covariance @ slope.T + np.diag(noise)
    return Gaussian(
        mean.reshape(data.shape), covariance.reshape(data.shape) if basis is None else covariance
    )


def _step(
    process: Process, trained: Chain, short: Chain, data: Gaussian, t: int, method: str, eta: float
) -> tuple[float, float, np.ndarray]:
    """x_{t−1} = of_x0 · x̂_0 + of_xt · x_t + √noise · ε: two numbers, and noise [d]."""
    if method == "ancestral":
        _, _, unexplained = posterior(
            np,
            data.parts,
            short.alpha_bar[t, None, None],
            short.rest[t, None, None],
            0 * data.mean.reshape(1, -1),
        )
        noise = model_variance(process, trained, short, t, unexplained[0])
        return short.mean_x0[t], short.mean_xt[t], noise * (t > 1)
    noise = eta**2 * short.posterior_variance[t]
    of_eps = np.sqrt(np.maximum(short.rest[t - 1] - noise, 0) / short.rest[t])
    of_x0 = np.sqrt(short.alpha_bar[t - 1]) - of_eps * np.sqrt(short.alpha_bar[t])
    return of_x0, of_eps, np.full(data.mean.size, noise)


class MomentsZ(NamedTuple):
    """z-scores: mean [*shape], covariance [d, d] over the flattened coordinates. float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments_z(samples: np.ndarray, gaussian: Gaussian) -> MomentsZ:
    """How many standard errors the moments of samples are away from a Gaussian's.

    For samples [n, *shape] of that Gaussian each z-score is about N(0, 1): the mean of n numbers
    of variance C_ii has variance C_ii/n, and that of products of two coordinates, around the known
    means, (C_ii C_jj + C_ij²)/n. Where a variance is 0, any difference is infinite.

    Raises:
      ValueError: the samples have another shape.
    """
    x, parts = flatten(samples, gaussian.shape), gaussian.parts
    covariance = np.diag(parts.variances[0]) if parts.basis is None else gaussian.covariance
    variances = np.diag(covariance)
    x = x - gaussian.mean.reshape(-1)
    mean = _ratio(x.mean(axis=0), variances / len(x))
    square = x.T @ x / len(x) - covariance
    errors = (np.outer(variances, variances) + covariance**2) / len(x)
    return MomentsZ(mean.reshape(gaussian.shape), _ratio(square, errors))


def _ratio(difference, variance):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / np.sqrt(variance))
