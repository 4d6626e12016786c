"""Group normalisation with what follows it, SiLU and dropout, and its way back by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ddpm_jax.models.dropout import kept
from ddpm_jax.parallel import apart

RUN = 16  # Pixels that CPUs sum at a time, measured: those of wide maps stay in the first cache.


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
    d_bias, d_scale = gradient_sums(du, du * normal)
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
    sums, squares = pixel_sums(centred, centred**2)
    mean = sums / pixels
    variance = jnp.maximum(squares / pixels - mean**2, 0)
    mean += origin
    shift = 0 if shift is None else shift
    group_mean = _group_means(mean + shift, groups)
    off_centre = mean + shift - group_mean
    group_variance = _group_means(variance + off_centre**2, groups)
    return group_mean - shift, off_centre, lax.rsqrt(group_variance + 1e-6)


def _group_means(x, groups):
    """The mean of each channel's group, float32 [batch, channels], of such an array."""
    by_group = x.reshape(x.shape[0], groups, -1)
    means = jnp.broadcast_to(by_group.mean(axis=-1, keepdims=True), by_group.shape)

    def unchanged(means):
        return means

    # Written out, else CPUs look up a group for each number of a map, and that not in vectors.
    written = lax.optimization_barrier
    return lax.platform_dependent(means.reshape(x.shape), cpu=written, default=unchanged)


def _at_pixels(x, centre, inverse):
    return (x.astype(jnp.float32) - centre[:, None, None]) * inverse[:, None, None]


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


@jax.jit
def pixel_sums(*maps: jax.Array) -> tuple[jax.Array, ...]:
    """The sums over all pixels of maps of one shape, each float32 [batch, channels].

    CPUs read what the maps are made of once and write none of them; others sum each by itself.

    Args:
      maps: [batch, h, w, channels], of any floating type.
    """

    def each(*maps):
        return tuple(x.sum(axis=(1, 2)) for x in maps)

    maps = tuple(x.astype(jnp.float32) for x in maps)
    return lax.platform_dependent(*maps, cpu=_sums_by_runs, default=each)


def _sums_by_runs(*maps):
    """`pixel_sums` over runs of pixels, then over runs of these sums, until one is left.

    XLA sums all pixels of a few channels before the next few: of large maps each pixel is then
    another line of the cache, and long sums lose digits. Without barriers it merges the sums.
    """
    batch, height, width, channels = maps[0].shape
    pixels = height * width
    while pixels > 1:
        divisors = [n for n in range(2, pixels + 1) if pixels % n == 0]
        run = max((n for n in divisors if n <= RUN), default=divisors[0])
        pixels //= run
        runs = tuple(x.reshape(batch, pixels, run, channels) for x in maps)
        maps = lax.optimization_barrier(_summed(runs, 2))
    return tuple(x.reshape(batch, channels) for x in maps)


@jax.jit
def gradient_sums(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`pixel_sums` of two float32 maps of the way back: on GPUs `sums_by_rows`."""
    rows = {"cuda": sums_by_rows, "rocm": sums_by_rows}
    return lax.platform_dependent(a, b, **rows, default=pixel_sums)


def sums_by_rows(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of both over all pixels in one pass, along rows and then over these.

    Float32 [batch, channels] of float32 maps [batch, h, w, channels]. Of large maps one sum over
    all pixels has so few results that XLA would rather write out what both maps are made of than
    compute it within the sum.
    """
    return _summed(_summed((a, b), 2), 1)


def _summed(maps, axis):
    """The sums over an axis of each of several float32 arrays of one shape, in one pass."""

    def added(x, y):
        return tuple(a + b for a, b in zip(x, y, strict=True))

    return tuple(lax.reduce(maps, tuple(jnp.float32(0) for _ in maps), added, (axis,)))
