"""Exact answers for data of which everything is known, to check networks, samplers and bounds by.

For Gaussians, mixtures and finite sets of points: the noised marginals, the network that cannot be
improved upon, the bound's terms, −log p(x_0), and the distribution of each sampler's output.
"""

from ddpm_jax.oracles.bounds import bound, bound_of_points, importance_nll, optimal_variance
from ddpm_jax.oracles.denoisers import denoiser, excess_error
from ddpm_jax.oracles.distributions import Gaussian, Mixture, Moments, Points
from ddpm_jax.oracles.samplers import MomentsZ, moments_z, sampler_marginal

__all__ = [
    "Gaussian",
    "Mixture",
    "Moments",
    "MomentsZ",
    "Points",
    "bound",
    "bound_of_points",
    "denoiser",
    "excess_error",
    "importance_nll",
    "moments_z",
    "optimal_variance",
    "sampler_marginal",
]
