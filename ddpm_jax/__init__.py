"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020) in JAX and Flax."""

from ddpm_jax import (
    diffusion,
    interop,
    keys,
    likelihood,
    losses,
    models,
    oracles,
    sampling,
    schedules,
)

__all__ = [
    "diffusion",
    "interop",
    "keys",
    "likelihood",
    "losses",
    "models",
    "oracles",
    "sampling",
    "schedules",
]
__version__ = "0.1.0"
