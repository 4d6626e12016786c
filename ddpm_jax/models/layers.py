"""The U-Net's layers. Maps are NHWC, kernels HWIO, parameters and norm statistics float32."""

from __future__ import annotations

import functools
import math

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models.winograd import Padding, conv3x3, fits, kernel_gradient
from ddpm_jax.parallel import apart

INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# The authors' "zero": the last layer of each branch starts at nearly nothing.
NEARLY_ZERO = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")
BLOCK = 1024  # Pixels that one product sums.


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


@functools.partial(jax.jit, static_argnums=(1, 2))
def dropout_mask(keys: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which entries stay where a share `rate` of them is dropped: bool [batch, *shape].

    Example i's mask depends on keys[i] alone. 16 random bits an entry: the rate is rounded to
    a multiple of 2^−16.

    Args:
      keys: [batch].
    """
    size = math.prod(shape)

    def mask(key: jax.Array) -> jax.Array:
        words = jax.random.bits(key, ((size + 1) // 2,), jnp.uint32)
        halves = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]
        return (halves >= round(rate * 2**16)).reshape(shape)

    return jax.vmap(mask)(keys)


def kept(x: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """x / (1 − rate) where `keep`, bool of x's shape, is true, else 0; x itself where it is None.

    Dropout (Srivastava et al. 2014, JMLR 15:1929), with the mean over masks left as it is.
    """
    return x if keep is None else jnp.where(keep, x / (1 - rate), 0)


@jax.jit
def pixel_sums(x: jax.Array) -> jax.Array:
    """The sums over all pixels: float32 [batch, channels] of x [batch, h, w, channels].

    On CPUs products with ones, since XLA's reductions of such axes run on one core, several times
    slower than memory. Products sum one term after another: large maps are cut into blocks, whose
    sums are added up, which keeps the digits.
    """

    def by_product(x):
        batch, height, width, channels = x.shape
        pixels = height * width
        block = pixels if pixels <= BLOCK else math.gcd(pixels, BLOCK)
        blocks = x.reshape(batch, pixels // block, block, channels)
        ones = jnp.ones((*blocks.shape[:2], 1, block), jnp.float32)
        return (ones @ blocks).sum(axis=(1, 2))

    def by_reduction(x):
        return x.sum(axis=(1, 2))

    x = x.astype(jnp.float32)
    return lax.platform_dependent(x, cpu=by_product, default=by_reduction)


@jax.jit
def pixel_sums_of_both(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`pixel_sums` of two float32 maps that are made of the same; on GPUs `sums_by_rows`."""

    def each(a, b):
        return pixel_sums(a), pixel_sums(b)

    return lax.platform_dependent(a, b, cuda=sums_by_rows, rocm=sums_by_rows, default=each)


def sums_by_rows(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of both over all pixels in one pass, along rows and then over these.

    Float32 [batch, channels] of float32 maps [batch, h, w, channels]. Of large maps one sum over
    all pixels has so few results that XLA would rather write out what both maps are made of than
    compute it within the sum.
    """

    def added(x, y):
        return x[0] + y[0], x[1] + y[1]

    zeros = jnp.float32(0), jnp.float32(0)
    return tuple(lax.reduce(lax.reduce((a, b), zeros, added, (2,)), zeros, added, (1,)))


@jax.custom_vjp
def add_to_pixels(x: jax.Array, shift: jax.Array) -> jax.Array:
    """shift [batch, channels] added at every pixel of x [batch, h, w, channels], of its dtype."""
    return x + shift[:, None, None]


def _add_forward(x, shift):
    return add_to_pixels(x, shift), None


@jax.jit
def _add_backward(_, g):
    return g, pixel_sums(g).astype(g.dtype)


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
            return conv3x3(g, flipped), kernel_gradient(x, g)
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
        x @= kernel
        if x.ndim != 4:
            return x + bias
        return add_to_pixels(x, jnp.broadcast_to(bias, (x.shape[0], self.features)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    silu: bool,
    rate: float = 0.0,
    shift: jax.Array | None = None,
    keep: jax.Array | None = None,
) -> jax.Array:
    """x + shift normalised over a group's pixels and channels, scale, bias, SiLU, dropout.

    Wu and He 2018 (arXiv:1803.08494), equations 1, 2 and 7; ε is 1e-6 (TensorFlow's). The way back
    keeps x, the statistics and the mask, and computes the rest again. Reverse mode only: no jvp.

    Args:
      x: [batch, h, w, channels], of any floating type; statistics are float32.
      scale: float32 [channels]; so is bias.
      groups: as many as divide the channels.
      silu: whether u is followed by u · sigmoid(u).
      rate: of dropout, in [0, 1); without `keep` it does nothing.
      shift: float32 [batch, channels], the same at all pixels; None: 0. It moves the means alone,
        so that neither x + shift nor its gradient is a map of its own.
      keep: bool of x's shape, which outputs stay, over 1 − rate; the others are 0. None: all stay
        as they are. Within the norm dropout's way back is no pass of its own.
    """
    return _group_norm_forward(x, scale, bias, groups, silu, rate, shift, keep)[0]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _group_norm_forward(x, scale, bias, groups, silu, rate, shift, keep):
    # normal = (x − centre) · inverse; a channel's mean of it is off_centre · inverse.
    centre, off_centre, inverse = _group_statistics(x.astype(jnp.float32), shift, groups)
    u = _at_pixels(x, centre, inverse) * scale + bias
    out = u * jax.nn.sigmoid(u) if silu else u
    out = kept(out, keep, rate)
    off_centre = None if shift is None else off_centre
    return out.astype(x.dtype), (x, centre, inverse, scale, bias, off_centre, keep)


@functools.partial(apart, static_argnums=(0, 1, 2))
def _group_norm_backward(groups, silu, rate, saved, g):
    saved, g = lax.optimization_barrier((saved, g))
    x, centre, inverse, scale, bias, off_centre, keep = saved

    def maps(x, g):
        normal = _at_pixels(x, centre, inverse)
        du = kept(g.astype(jnp.float32), keep, rate)
        if silu:
            u = normal * scale + bias
            sigmoid = jax.nn.sigmoid(u)
            du *= sigmoid * (1 + u * (1 - sigmoid))
        return normal, du

    normal, du = maps(x, g)
    d_bias, d_scale = pixel_sums_of_both(du, du * normal)
    x, g, d_bias, d_scale = _anew(x, g, d_bias, d_scale)
    normal, du = maps(x, g)
    # What moves the group's mean and its standard deviation moves no output.
    pixels = x.shape[1] * x.shape[2]
    of_mean = _group_means(d_bias * scale, groups) / pixels
    of_deviation = _group_means(d_scale * scale, groups) / pixels
    dx = du * scale - of_mean[:, None, None] - normal * of_deviation[:, None, None]
    dx *= inverse[:, None, None]
    d_shift = None
    if off_centre is not None:  # The sums of dx.
        normals = pixels * off_centre * inverse
        d_shift = (d_bias * scale - pixels * of_mean - normals * of_deviation) * inverse
    return dx.astype(x.dtype), d_scale.sum(axis=0), d_bias.sum(axis=0), d_shift, None


def _anew(*values):
    """The values, from which GPUs compute again what they have computed before.

    There a map in float32 takes longer to write and to read than what it is made of to read twice.
    And a sum over a batch of sums over pixels would be taken from the map once more.
    """

    def barrier(*values):
        return lax.optimization_barrier(values)

    def unchanged(*values):
        return values

    return lax.platform_dependent(*values, cuda=barrier, rocm=barrier, default=unchanged)


def _group_statistics(x, shift, groups):
    """Of x + shift: where each channel's group's mean lies in x, the channel's mean less that of
    its group, and 1 / the group's standard deviation, each [batch, channels]."""
    # Moments about one of the channel's own pixels, so that a mean far from 0 costs no digits.
    pixels = x.shape[1] * x.shape[2]
    origin = x[:, 0, 0]
    centred = x - origin[:, None, None]
    mean = pixel_sums(centred) / pixels
    variance = jnp.maximum(pixel_sums(centred**2) / pixels - mean**2, 0)
    mean += origin
    shift = 0 if shift is None else shift
    group_mean = _group_means(mean + shift, groups)
    off_centre = mean + shift - group_mean
    group_variance = _group_means(variance + off_centre**2, groups)
    return group_mean - shift, off_centre, lax.rsqrt(group_variance + 1e-6)


def _group_means(x, groups):
    """The mean of each channel's group, [batch, channels]."""
    by_group = x.reshape(x.shape[0], groups, -1)
    return jnp.broadcast_to(by_group.mean(axis=-1, keepdims=True), by_group.shape).reshape(x.shape)


def _at_pixels(x, centre, inverse):
    return (x.astype(jnp.float32) - centre[:, None, None]) * inverse[:, None, None]


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


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
