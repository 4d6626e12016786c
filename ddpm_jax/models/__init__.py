"""The network: a U-Net in the manner of the paper's appendix B."""

from ddpm_jax.models.layers import timestep_embedding
from ddpm_jax.models.unet import UNet, rounded_kernels

__all__ = ["UNet", "rounded_kernels", "timestep_embedding"]
