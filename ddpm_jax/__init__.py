"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020) in JAX and Flax."""

__version__ = "0.1.0"
