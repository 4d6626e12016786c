"""The U-Net of the paper's appendix B, as in the authors' code."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import (
    NEARLY_ZERO,
    Conv,
    Dense,
    GroupNorm,
    dot_product_attention,
    timestep_embedding,
    upsample,
)


class ResidualBlock(nn.Module):
    """Two convolutions, the time embedding added between them, and a shortcut."""

    features: int
    dropout: float
    norm_groups: int
    dtype: jnp.dtype
    winograd: bool

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, keys: jax.Array | None) -> jax.Array:
        conv = functools.partial(Conv, dtype=self.dtype, winograd=self.winograd)
        norm = functools.partial(GroupNorm, self.norm_groups, silu=True, dtype=self.dtype)
        h = norm(name="norm_0")(x)
        h, bias = conv(self.features, bias_apart=True, name="conv_0")(h)
        shift = Dense(self.features, dtype=self.dtype, name="time")(nn.silu(temb)) + bias
        h = norm(rate=self.dropout, name="norm_1")(h, shift, keys)
        h = conv(self.features, init=NEARLY_ZERO, name="conv_1")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=self.dtype, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention of one head over all pixels; softmax in float32."""

    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.norm_groups, dtype=self.dtype, name="norm")(x)
        q, k, v = (
            Dense(channels, dtype=self.dtype, name=name)(h).reshape(batch, height * width, channels)
            for name in "qkv"
        )
        h = dot_product_attention(q, k, v).reshape(x.shape)
        return x + Dense(channels, init=NEARLY_ZERO, dtype=self.dtype, name="out")(h)


class UNet(nn.Module):
    """ε_θ(x_t, t), or whatever else the process predicts.

    Attributes:
      channels: width at the first resolution; even.
      channel_multipliers: the width of each resolution over `channels`; each but the last is
        followed by a halving of the map.
      num_res_blocks: residual blocks a resolution on the way down, one more on the way up.
      attention_resolutions: heights of the maps at which each block is followed by attention;
        between the two middle blocks there always is one.
      dropout: rate within the residual blocks, where `dropout_keys` are given.
      out_channels: those of the output: the images', or twice as many with learned variance.
      norm_groups: groups of each normalisation, fewer where they do not divide the width.
      dtype: of the computation; parameters are float32.
      remat: keep only the inputs of residual blocks and attention for the way back, and compute
        each of them again there. Parameters, outputs and dropout's masks are the same.
      winograd: on CPUs, 3×3 convolutions in float32 by half of the multiplications, which rounds
        about twice as coarsely as the plain sums; see `models.winograd`.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    out_channels: int = 3
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    winograd: bool = True

    @nn.compact
    def __call__(
        self, x_t: jax.Array, t: jax.Array, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """The network's output.

        Args:
          x_t: [batch, height, width, channels].
          t: integer [batch], in 1..T.
          dropout_keys: [batch], one an example, for training; None: no dropout.
        Returns:
          float32 [batch, height, width, out_channels].
        Raises:
          ValueError: the image does not divide by the number of halvings.
        """
        levels = len(self.channel_multipliers)
        factor = 2 ** (levels - 1)
        if x_t.shape[1] % factor or x_t.shape[2] % factor:
            raise ValueError(
                f"{levels} resolutions need images whose sides divide by {factor}, "
                f"not {x_t.shape[1]}×{x_t.shape[2]}"
            )
        common = {"norm_groups": self.norm_groups, "dtype": self.dtype}
        wrap = nn.remat if self.remat else lambda module: module
        residual_block, attention = wrap(ResidualBlock), wrap(Attention)
        blocks = 0

        def block(h: jax.Array, features: int, name: str) -> jax.Array:
            nonlocal blocks
            blocks += 1
            keys = dropout_keys
            if keys is not None:
                keys = jax.vmap(jax.random.fold_in, (0, None))(keys, blocks)
            made = residual_block(
                features, self.dropout, winograd=self.winograd, **common, name=name
            )
            return made(h, temb, keys)

        def block_and_attention(h: jax.Array, level: int, i: int, name: str) -> jax.Array:
            h = block(h, self.channels * self.channel_multipliers[level], f"{name}_block_{i}")
            if h.shape[1] in self.attention_resolutions:
                h = attention(**common, name=f"{name}_attention_{i}")(h)
            return h

        # The only place that counts time from 0.
        temb = timestep_embedding(t - 1, self.channels)
        temb = Dense(4 * self.channels, dtype=self.dtype, name="time_0")(temb)
        temb = Dense(4 * self.channels, dtype=self.dtype, name="time_1")(nn.silu(temb))

        conv = functools.partial(Conv, dtype=self.dtype, winograd=self.winograd)
        h = conv(self.channels, name="conv_in")(x_t)
        skips = [h]
        for level in range(levels):
            for i in range(self.num_res_blocks):
                h = block_and_attention(h, level, i, f"down_{level}")
                skips.append(h)
            if level < levels - 1:
                h = conv(h.shape[-1], stride=2, name=f"down_{level}_conv")(h)
                skips.append(h)

        h = block(h, h.shape[-1], "middle_block_0")
        h = attention(**common, name="middle_attention")(h)
        h = block(h, h.shape[-1], "middle_block_1")

        for level in reversed(range(levels)):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block_and_attention(h, level, i, f"up_{level}")
            if level > 0:
                h = upsample(h)
                h = conv(h.shape[-1], name=f"up_{level}_conv")(h)
        assert not skips

        h = GroupNorm(self.norm_groups, silu=True, dtype=self.dtype, name="norm_out")(h)
        h = conv(self.out_channels, init=NEARLY_ZERO, name="conv_out")(h)
        return h.astype(jnp.float32)


def rounded_kernels(dtype: jnp.dtype, params: Any) -> Any:
    """The parameters with kernels, all that has two axes or more, rounded as every layer does.

    For loops, whose passes would each round them again; what they compute stays the same.
    """
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
