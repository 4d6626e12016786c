"""The U-Net's layers. Maps are NHWC, kernels HWIO, parameters and norm statistics float32."""

from __future__ import annotations

import functools
import math

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models.dropout import dropout_mask
from ddpm_jax.models.norm import group_norm, pixel_sums
from ddpm_jax.models.winograd import Padding, conv3x3, fits, kernel_gradient
from ddpm_jax.parallel import apart

INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# The authors' "zero": the last layer of each branch starts at nearly nothing.
NEARLY_ZERO = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def timestep_embedding(position: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of a position: sin ‖ cos of position / 10000^(i/(dim/2 − 1)).

    Authors' code; Vaswani et al. 2017 (arXiv:1706.03762), §3.5. The paper's t = 1..T is embedded
    at the positions 0..T−1.

    Args:
      position: [batch].
      dim: even.
    Returns:
      float32 [batch, dim].
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000) / max(half - 1, 1) * jnp.arange(half))
    angles = position.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


@jax.custom_vjp
def add_to_pixels(x: jax.Array, shift: jax.Array) -> jax.Array:
    """shift [batch, channels] added at every pixel of x [batch, h, w, channels], of its dtype."""
    return x + shift[:, None, None]


def _add_forward(x, shift):
    return add_to_pixels(x, shift), None


@jax.jit
def _add_backward(_, g):
    return g, pixel_sums(g)[0].astype(g.dtype)


add_to_pixels.defvjp(_add_forward, _add_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv2d(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, winograd: bool = True
) -> jax.Array:
    """Convolution of x [batch, h, w, in] with kernel [kh, kw, in, out].

    The values and gradients of `lax.conv_general_dilated`, to float32's rounding. On CPUs the
    gradients are stated as ordinary forward convolutions, since XLA runs its own forms of them
    several times slower within a loop (jax#12868). Reverse mode only: no jvp.

    Args:
      winograd: whether CPUs may take `models.winograd`, where that is faster; it rounds about
        twice as coarsely.
    """
    return _conv_forward(x, kernel, stride, padding, winograd)[0]


def _conv(x, kernel, stride, padding, x_dilation=1, kernel_dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        lhs_dilation=(x_dilation, x_dilation),
        rhs_dilation=(kernel_dilation, kernel_dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# Under jit equal layers are traced and lowered once: half of the time until the first step.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _conv_forward(x, kernel, stride, padding, winograd):
    def as_xla(x, kernel):
        return _conv(x, kernel, stride, padding)

    if winograd and fits(x, kernel, stride, padding):
        y = lax.platform_dependent(x, kernel, cpu=conv3x3, default=as_xla)
    else:
        y = as_xla(x, kernel)
    return y, (x, kernel)


@functools.partial(apart, static_argnums=(0, 1, 2))
def _conv_backward(stride, padding, winograd, saved, g):
    x, kernel = saved

    def as_xla(x, kernel, g):
        return jax.vjp(lambda x, kernel: _conv(x, kernel, stride, padding), x, kernel)[1](g)

    def as_forward(x, kernel, g):
        # Else the transposes below are made on the way forward, and kept.
        x, kernel, g = lax.optimization_barrier((x, kernel, g))
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        if winograd and fits(x, kernel, stride, padding):
            return conv3x3(g, flipped, padded=True), kernel_gradient(x, g)
        sizes = list(zip(x.shape[1:3], kernel.shape[:2], g.shape[1:3], padding, strict=True))
        # Of x: the flipped kernel, its channels swapped, over g with gaps where strides skipped.
        pads = [(k - 1 - p[0], n - 1 - (m - 1) * stride + p[0]) for n, k, m, p in sizes]
        dx = _conv(g, flipped, 1, pads, x_dilation=stride)
        # Of the kernel: the batch is contracted, in the place of the channels. Rows that the
        # strided window never reached have no part in it.
        pads = [(p[0], (m - 1) * stride + k - n - p[0]) for n, k, m, p in sizes]
        by_batch = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        dk = _conv(*by_batch, 1, pads, kernel_dilation=stride).transpose(1, 2, 0, 3)
        return dx, dk

    return lax.platform_dependent(x, kernel, g, cpu=as_forward, default=as_xla)


conv2d.defvjp(_conv_forward, _conv_backward)


def _parameter(
    module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """`module.param`, which would trace `init` again to check the shape of each that is there."""
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        path = module.scope.path_text
        raise flax.errors.ScopeParamShapeError(name, path, value.shape, shape)
    return value


class Conv(nn.Module):
    """A square convolution with bias; stride 2 is padded at the bottom and right (TF's SAME).

    Attributes:
      bias_apart: the map without the bias, and the bias, float32 [features]: for what follows to
        add, and to find the bias's gradient, without a pass over the map.
    """

    features: int
    size: int = 3
    stride: int = 1
    init: nn.initializers.Initializer = INIT
    dtype: jnp.dtype = jnp.float32
    winograd: bool = True
    bias_apart: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = _parameter(self, "kernel", self.init, shape)
        bias = _parameter(self, "bias", nn.initializers.zeros, (self.features,))
        total = self.size - self.stride
        pads = (total // 2, total - total // 2)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        x = conv2d(x, kernel, self.stride, (pads, pads), self.winograd)
        if self.bias_apart:
            return x, bias
        bias = bias.astype(self.dtype)
        return add_to_pixels(x, jnp.broadcast_to(bias, (x.shape[0], self.features)))


class Dense(nn.Module):
    """An affine map of the last axis: the authors' `dense`, and on maps their `nin`."""

    features: int
    init: nn.initializers.Initializer = INIT
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _parameter(self, "kernel", self.init, (x.shape[-1], self.features))
        bias = _parameter(self, "bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        # As one matrix: else CPUs copy maps with their axes swapped to find the kernel's gradient.
        y = x.reshape(-1, x.shape[-1]) @ kernel
        y = y.reshape(*x.shape[:-1], self.features)
        if y.ndim != 4:
            return y + bias
        return add_to_pixels(y, jnp.broadcast_to(bias, (y.shape[0], self.features)))


class GroupNorm(nn.Module):
    """`group_norm` over at most `groups` groups, as many as divide the channels; then dropout.

    Its `shift` is float32 [batch, channels], its `keys` [batch] are those of dropout, if any.

    Attributes:
      rate: of dropout, where there are keys for it.
    """

    groups: int = 32
    silu: bool = False
    dtype: jnp.dtype = jnp.float32
    rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, shift: jax.Array | None = None, keys: jax.Array | None = None
    ) -> jax.Array:
        channels = x.shape[-1]
        scale = _parameter(self, "scale", nn.initializers.ones, (channels,))
        bias = _parameter(self, "bias", nn.initializers.zeros, (channels,))
        groups = math.gcd(self.groups, channels)
        keep = None
        if keys is not None and self.rate:
            keep = dropout_mask(keys, self.rate, x.shape[1:])
        x = x.astype(self.dtype)
        return group_norm(x, scale, bias, groups, self.silu, self.rate, shift, keep)


@jax.jit
def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √channels) v of each example: attention of one head, the softmax in float32.

    Vaswani et al. 2017 (arXiv:1706.03762), equation 1. On CPUs in plain products, all in float32:
    the maps of `jax.nn`'s own have other layouts, and are transposed there.

    Args:
      q: [batch, queries, channels], of any floating type.
      k: [batch, keys, channels]; so is v.
    Returns:
      [batch, queries, channels], of q's dtype.
    """

    def by_product(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        # Divided last: there are fewer channels than keys.
        return (weights @ v) / weights.sum(axis=-1, keepdims=True)

    def by_library(q, k, v):
        one_head = (x[:, :, None] for x in (q, k, v))
        return jax.nn.dot_product_attention(*one_head)[:, :, 0].astype(jnp.float32)

    out = lax.platform_dependent(q, k, v, cpu=by_product, default=by_library)
    return out.astype(q.dtype)


def upsample(x: jax.Array) -> jax.Array:
    """Each pixel of [batch, h, w, c] repeated twice in both directions."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
