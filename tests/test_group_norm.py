"""Group normalisation and its gradients against autodiff in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import layers, norm
from ddpm_jax.parallel import network_jit


def as_written(groups, silu, x, scale, bias, shift=None):
    """The norm of x + shift, then SiLU, without what saves time or memory."""
    x = x if shift is None else x + shift[:, None, None]
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    deviation = jnp.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-6)
    u = (centred / deviation).reshape(x.shape) * scale + bias
    return jax.nn.silu(u) if silu else u


def drawn(channels, offset):
    """A map, a gradient, scale and bias, and a shift, whose means lie `offset` deviations off."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 2, 5, 4, channels))
    scale, bias = rng.normal(size=(2, channels))
    shift = rng.normal(size=(2, channels)) + offset * rng.normal(size=channels)
    x += offset * rng.normal(size=channels)
    return [a.astype("f4") for a in (x, g, scale, bias, shift)]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3])
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (24, 32), (8, 4), (6, 4), (4, 4)])
def test_group_norm_against_float64_far_from_zero(offset, channels, groups):
    x, _, scale, bias, _ = drawn(channels, offset)
    used = np.gcd(groups, channels)
    grouped = x.astype(np.float64).reshape(2, 20, used, channels // used)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    want = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    params = {"scale": scale, "bias": bias}
    got = layers.GroupNorm(groups).apply({"params": params}, x)
    np.testing.assert_allclose(got, want, atol=2e-4 if offset else 5e-6)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3])
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (24, 8), (6, 2), (4, 4)])
def test_the_gradients_of_group_norm_against_autodiff_in_float64(channels, groups, offset, silu):
    x, g, scale, bias, _ = drawn(channels, offset)

    plain = functools.partial(as_written, groups, silu)
    got = jax.vjp(lambda *a: norm.group_norm(*a, groups, silu), x, scale, bias)[1](g)
    with jax.enable_x64(True):
        want = jax.vjp(plain, *(jnp.float64(a) for a in (x, scale, bias)))[1](jnp.float64(g))
        want = [np.asarray(a) for a in want]
    for mine, exact in zip(got, want, strict=True):
        assert mine.dtype == jnp.float32
        largest = np.abs(exact).max()
        np.testing.assert_allclose(mine, exact, atol=largest * (5e-4 if offset else 5e-6))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3])
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (24, 8), (6, 2), (4, 4)])
def test_group_norm_of_a_shifted_map_in_float64(channels, groups, offset, silu):
    """Where each group is one channel, the shift moves nothing, and its gradient is 0."""
    x, g, scale, bias, shift = drawn(channels, offset)

    def shifted(x, scale, bias, shift):
        return norm.group_norm(x, scale, bias, groups, silu, 0.0, shift)

    plain = functools.partial(as_written, groups, silu)
    got, pull = jax.vjp(shifted, x, scale, bias, shift)
    with jax.enable_x64(True):
        want, exact = jax.vjp(plain, *(jnp.float64(a) for a in (x, scale, bias, shift)))
        want, exact = np.asarray(want), [np.asarray(a) for a in exact(jnp.float64(g))]
    np.testing.assert_allclose(got, want, atol=5e-4 if offset else 5e-6)
    *others, d_shift = pull(g)
    for mine, wide in zip(others, exact, strict=False):
        largest = np.abs(wide).max()
        np.testing.assert_allclose(mine, wide, atol=largest * (5e-4 if offset else 5e-6))
    # Sums over 20 pixels of what is itself as large as the gradient of x.
    largest = 20 * np.abs(exact[0]).max()
    np.testing.assert_allclose(d_shift, exact[3], atol=largest * (5e-4 if offset else 5e-6))


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_and_dropout_in_float64(silu):
    """What is dropped has no part in any gradient; what stays is divided by the share that does."""
    rate, (x, g, scale, bias, shift) = 0.3, drawn(8, 0.0)
    keep = np.random.default_rng(1).random(x.shape) >= rate

    def ours(x, scale, bias, shift):
        return norm.group_norm(x, scale, bias, 4, silu, rate, shift, keep)

    def plain(*arguments):
        return keep * as_written(4, silu, *arguments) / (1 - rate)

    got, pull = jax.vjp(ours, x, scale, bias, shift)
    with jax.enable_x64(True):
        want, exact = jax.vjp(plain, *(jnp.float64(a) for a in (x, scale, bias, shift)))
        want = [np.asarray(a) for a in (want, *exact(jnp.float64(g)))]
    for mine, wide in zip((got, *pull(g)), want, strict=True):
        np.testing.assert_allclose(mine, wide, atol=1e-5 * np.abs(wide).max())
    np.testing.assert_array_equal(got == 0, ~keep)


@pytest.mark.parametrize("pixels", [(7, 5), (1, 23), (2, 23), (17, 17), (12, 30), (1, 1)])
@pytest.mark.parametrize("sums", [norm.pixel_sums, norm.gradient_sums, norm.sums_by_rows])
def test_sums_of_two_maps(sums, pixels):
    """Of numbers of pixels with and without divisors up to 16."""
    a, b = np.random.default_rng(0).normal(size=(2, 3, *pixels, 6)).astype("f4")
    for got, x in zip(sums(a, b), (a, b), strict=True):
        np.testing.assert_allclose(got, x.astype("f8").sum(axis=(1, 2)), atol=1e-5)


def lowered(function, platform, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def reductions(function, platform):
    x = jax.ShapeDtypeStruct((2, 8, 16, 4), jnp.float32)
    text = lowered(function, platform, x, x)
    return re.findall(r"across dimensions = (\[.*?\])", text)


def test_gpus_sum_gradients_together_along_rows():
    """Else XLA writes out, in float32, the map that the two are made of."""
    gradients = norm.gradient_sums
    assert reductions(gradients, "cuda") == reductions(gradients, "rocm") == ["[2]", "[1]"]
    assert set(reductions(gradients, "tpu")) == {"[1, 2]"}


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_gpus_sum_the_way_back_by_rows_and_the_way_forward_as_xla_does(platform):
    """The latter by rows takes them a seventh longer to sample."""
    x = jax.ShapeDtypeStruct((2, 8, 16, 4), jnp.float32)
    vector = jax.ShapeDtypeStruct((4,), jnp.float32)

    def norm_of(x, scale, bias):
        return norm.group_norm(x, scale, bias, 2, True)

    def both_ways(x, scale, bias):
        return jax.vjp(norm_of, x, scale, bias)[1](x)

    def axes(function):
        text = lowered(function, platform, x, vector, vector)
        return set(re.findall(r"across dimensions = (\[.*?\])", text))

    of_groups, of_batch = "[2]", "[0]"
    assert axes(norm_of) == {"[1, 2]", of_groups}
    assert axes(both_ways) == {"[1, 2]", of_groups, of_batch, "[1]"}


@pytest.mark.parametrize("sums", [norm.pixel_sums, norm.gradient_sums])
def test_cpus_sum_in_runs_and_write_their_sums(sums):
    """128 pixels: eight runs of sixteen, then eight sums; both maps at once, and a barrier each.

    Without barriers XLA merges runs and sums, which takes three times as long.
    """
    x = jax.ShapeDtypeStruct((2, 8, 16, 4), jnp.float32)
    assert reductions(sums, "cpu") == ["[2]", "[2]"]
    barriers = re.findall(r"optimization_barrier .* : (.*)", lowered(sums, "cpu", x, x))
    assert barriers == [", ".join([f"tensor<2x{n}x4xf32>"] * 2) for n in (8, 1)]


def test_gpus_compute_the_norm_s_maps_again_and_others_do_not():
    """Between the sums and the gradient of x all that these are made of is behind a barrier."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.bfloat16)
    ones = jax.ShapeDtypeStruct((16,), jnp.float32)

    def way_back(x, scale, bias):
        return jax.vjp(lambda *a: norm.group_norm(*a, 4, True), x, scale, bias)[1](x)

    def barriers(platform):
        text = lowered(way_back, platform, x, ones, ones)
        return re.findall(r"optimization_barrier .* : (.*)", text)

    first, second = barriers("cuda")
    assert barriers("tpu") == [first]
    of_maps = [types for types in barriers("cpu") if "2x8x8x16" in types]
    assert of_maps == [first]  # The others are of sums and of groups' means.
    maps, sums = ["tensor<2x8x8x16xbf16>"] * 2, ["tensor<2x16xf32>"] * 2
    assert second.split(", ") == maps + sums


def test_cpus_write_what_groups_share_as_vectors():
    """Else the way through maps looks up each number's group, one after another."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
    vector = jax.ShapeDtypeStruct((16,), jnp.float32)

    def vectors(platform):
        norm_of = functools.partial(norm.group_norm, groups=4, silu=True)
        text = lowered(norm_of, platform, x, vector, vector)
        return re.findall(r"optimization_barrier .* : (.*)", text).count("tensor<2x16xf32>")

    assert vectors("cpu") > 0
    assert vectors("cuda") == vectors("tpu") == 0


def test_group_norm_of_bfloat16_has_float32_statistics():
    """With a shift as float32 as they are; all but the map and its gradient stays so.

    So with dropout, which rounds no more than once.
    """
    draw = np.random.default_rng(0)
    x = jnp.bfloat16(draw.normal(size=(2, 16, 16, 8)) + 30)
    ones, shift = jnp.ones(8), jnp.float32(draw.normal(size=(2, 8)))
    keep = draw.random(x.shape) >= 0.3

    def shifted(x, scale, bias, shift):
        return norm.group_norm(x, scale, bias, 4, True, 0.3, shift, keep)

    got, pull = jax.vjp(shifted, x, ones, ones, shift)
    want, exact = jax.vjp(shifted, jnp.float32(x), ones, ones, shift)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.bfloat16(want))
    g = jnp.bfloat16(np.random.default_rng(1).normal(size=x.shape))
    for mine, wide in zip(pull(g), exact(jnp.float32(g)), strict=True):
        np.testing.assert_array_equal(mine, wide.astype(mine.dtype))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("pixels", [(256, 256), (255, 257)])
def test_sums_and_statistics_of_large_maps(pixels, offset):
    """65,536 terms beside float64's; a mean of 1e3 σ leaves the norm no more than five digits."""
    x = np.random.default_rng(0).normal(size=(1, *pixels, 4)).astype("f4") + np.float32(offset)
    for sums in (norm.pixel_sums, norm.gradient_sums):
        for got, terms in zip(sums(x, x**2), (x, x**2), strict=True):
            exact = terms.astype("f8").sum(axis=(1, 2))
            np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-6 * x[0, ..., 0].size)
    squares = (x**2).astype("f8").sum(axis=(1, 2))
    np.testing.assert_allclose(norm.pixel_sums(x**2)[0], squares, rtol=1e-6)
    np.testing.assert_allclose(norm.gradient_sums(x, x**2)[1], squares, rtol=1e-6)
    wide = x.astype("f8")
    want = (wide - wide.mean(axis=(1, 2))) / np.sqrt(wide.var(axis=(1, 2)) + 1e-6)
    got = norm.group_norm(x, jnp.ones(4), jnp.zeros(4), 4, False)
    np.testing.assert_allclose(got, want, atol=5e-4 if offset else 5e-6)


def test_cpus_write_no_map_for_sums():
    """Neither of both maps nor what they are made of."""
    shape = (16, 32, 32, 64)

    def sums(x, g):
        return norm.gradient_sums(jnp.tanh(x * g), x * jnp.tanh(x * g))

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    needs = network_jit(sums).lower(x, x).compile().memory_analysis()
    assert needs.temp_size_in_bytes < 0.5 * 4 * np.prod(shape)
