"""The products saved by tiles of rows: beside polynomials, float64 and the compiler's own count."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_for_tests import start

from ddpm_jax.models import layers, winograd
from ddpm_jax.parallel import make_layout, network_jit

SAME = ((1, 1), (1, 1))


def direct(x, kernel):
    """The convolution in float64, tap by tap."""
    height, width = x.shape[1:3]
    padded = np.pad(x.astype("f8"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j].astype("f8") for i, j in taps
    )


def direct_gradients(x, kernel, dy):
    """Of sum(dy · direct(x, kernel)), in float64."""
    height, width = x.shape[1:3]
    padded = np.pad(x.astype("f8"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    dx = direct(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    dk = [
        [np.einsum("nhwi,nhwo->io", padded[:, i : i + height, j : j + width], dy.astype("f8"))
         for j in range(3)] for i in range(3)
    ]  # fmt: skip
    return dx, np.asarray(dk)


def made(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype("f4")


def test_matrices_are_a_correlation():
    at, g, bt = winograd.matrices()
    taps, inputs = np.random.default_rng(0).normal(size=(2, 6))
    want = np.correlate(inputs, taps[:3], "valid")
    np.testing.assert_allclose(at @ ((g @ taps[:3]) * (bt @ inputs)), want, rtol=1e-13)
    np.testing.assert_array_equal(bt, np.float32(bt))
    np.testing.assert_array_equal(at, np.float32(at))
    # Symmetric points: every second coefficient is left out.
    assert np.count_nonzero(bt) == 3 + 4 * 4 + 3


@pytest.mark.parametrize("size", [(16, 16), (17, 19), (18, 16), (19, 16), (28, 28)])
def test_values_and_gradients_are_the_convolutions(size):
    x, kernel, dy = made(3, *size, 32), made(3, 3, 32, 48), made(3, *size, 48)
    assert winograd.fits(x, kernel, 1, SAME)
    y, pull = jax.vjp(lambda *a: layers.conv2d(*a, 1, SAME), jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(y, direct(x, kernel), atol=1e-4)
    for got, want in zip(pull(jnp.asarray(dy)), direct_gradients(x, kernel, dy), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_it_rounds_about_twice_as_coarsely_as_the_plain_sums():
    """With the usual points it would be three times; the option gives the plain ones."""
    x, kernel, dy = made(2, 16, 16, 128), made(3, 3, 128, 128), made(2, 16, 16, 128)
    exact = direct(x, kernel), *direct_gradients(x, kernel, dy)

    def errors(fast):
        y, pull = jax.vjp(
            lambda *a: layers.conv2d(*a, 1, SAME, fast), jnp.asarray(x), jnp.asarray(kernel)
        )
        pairs = zip((y, *pull(jnp.asarray(dy))), exact, strict=True)
        return np.array([np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) for a, b in pairs])

    assert (errors(True) < 1e-6).all() and (errors(True) < 2.5 * errors(False)).all()
    plain = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = layers.conv2d(jnp.asarray(x), jnp.asarray(kernel), 1, SAME, False)
    np.testing.assert_array_equal(got, plain)


def test_half_of_the_multiplications():
    x, kernel = jnp.ones((1, 32, 32, 32)), jnp.ones((3, 3, 32, 32))

    def conv(x, kernel):
        return layers.conv2d(x, kernel, 1, SAME)

    def work(function):
        return jax.jit(function).lower(x, kernel).compile().cost_analysis()["flops"]

    plain = 2 * 32 * 32 * 9 * 32 * 32
    # The rest are the sums before and after.
    assert work(conv) < 0.65 * plain
    gradients = jax.grad(lambda *a: (conv(*a) ** 2).sum(), argnums=(0, 1))
    assert work(gradients) < 0.65 * 3 * plain
    text = jax.jit(gradients).lower(x, kernel).as_text()
    forms = re.findall(r"stablehlo.convolution.*?dim_numbers = (\[.*?\]->\[.*?\])", text)
    assert len(forms) == 18
    assert {form.replace(" ", "") for form in forms} == {"[b,0,1,f]x[0,1,i,o]->[b,0,1,f]"}


def test_a_network_holds_the_transformed_kernels_of_few_layers():
    """They are twice as large as the kernels: not all of them before the first layer."""
    x = jax.ShapeDtypeStruct((1, 16, 16, 128), jnp.float32)

    def layers_of(x, kernels):
        for kernel in kernels:
            x = layers.conv2d(x, kernel, 1, SAME)
        return x

    def needs(depth):
        kernels = [jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)] * depth
        program = network_jit(layers_of).lower(x, kernels).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert needs(8) < 1.2 * needs(2)


def test_where_it_does_not_apply():
    x, kernel = jnp.ones((1, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
    assert winograd.fits(x, kernel, 1, SAME)
    assert not winograd.fits(x, kernel, 2, SAME)
    assert not winograd.fits(x, kernel, 1, ((0, 1), (0, 1)))
    assert not winograd.fits(x[:, :15], kernel, 1, SAME)
    assert not winograd.fits(x[:, :, :15], kernel, 1, SAME)
    assert not winograd.fits(x, kernel[..., :3], 1, SAME)
    assert not winograd.fits(x[..., :3], kernel[:, :, :3], 1, SAME)
    assert not winograd.fits(x, kernel[:1, :1], 1, SAME)
    assert not winograd.fits(x.astype(jnp.bfloat16), kernel, 1, SAME)


def test_other_platforms_are_left_their_own():
    x, kernel = jnp.ones((1, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
    text = (
        jax.jit(lambda *a: layers.conv2d(*a, 1, SAME))
        .trace(x, kernel)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    assert len(re.findall("stablehlo.convolution", text)) == 1


def loss_gradients(x, kernel, dy):
    """Of sum(dy · conv2d(x, kernel)) with respect to x and kernel."""

    def loss(x, kernel):
        return (dy * layers.conv2d(x, kernel, 1, SAME)).sum()

    return jax.grad(loss, argnums=(0, 1))(x, kernel)


def remat(x, kernel, dy):
    def loss(x, kernel):
        return (dy * jax.checkpoint(lambda *a: layers.conv2d(*a, 1, SAME))(x, kernel)).sum()

    return jax.grad(loss, argnums=(0, 1))(x, kernel)


def microbatches(x, kernel, dy):
    def one(total, part):
        dx, dk = loss_gradients(part[0], kernel, part[1])
        return total + dk, dx

    parts = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), (x, dy))
    dk, dx = jax.lax.scan(one, jnp.zeros_like(kernel), parts)
    return dx.reshape(x.shape), dk


def seeds(x, kernel, dy):
    """As seeds are trained together by vmap: each with its kernel; of the first."""
    pairs = [jnp.stack([a, b]) for a, b in ((x, x + 1), (kernel, 2 * kernel), (dy, dy))]
    return jax.tree.map(lambda a: a[0], jax.vmap(loss_gradients)(*pairs))


def sharded(mode, x, kernel, dy):
    """On all devices: the batch split, the kernel whole or split, or a program a device."""
    layout = make_layout("jit" if mode == "pmap" else mode)
    if mode == "pmap":
        parts = jax.tree.map(lambda a: a.reshape(layout.num_devices, -1, *a.shape[1:]), (x, dy))
        dx, dk = jax.pmap(lambda x, dy: loss_gradients(x, kernel, dy))(*parts)
        return dx.reshape(x.shape), dk.sum(axis=0)
    shardings = layout.split(0), layout.state(kernel), layout.split(0)
    return network_jit(loss_gradients, in_shardings=shardings)(x, kernel, dy)


FORMS = {
    "jit": loss_gradients,
    "remat": remat,
    "microbatches": microbatches,
    "seeds": seeds,
} | {f"{mode} on 4": functools.partial(sharded, mode) for mode in ("jit", "fsdp", "pmap")}


@functools.cache
def example():
    return made(8, 17, 16, 32), made(3, 3, 32, 64), made(8, 17, 16, 64)


@pytest.fixture(scope="module")
def on_4_devices(tmp_path_factory):
    """The gradients of each form, from a process with as many devices."""
    path = tmp_path_factory.mktemp("forms") / "forms.npz"
    code = f"import test_winograd; test_winograd.save({str(path)!r})"
    process = start([], 4, code)
    assert process.wait(120) == 0, process.communicate()[1]
    return np.load(path)


def save(path):
    """Writes the gradients of each form."""
    assert jax.device_count() == 4
    arrays = {}
    for name, form in FORMS.items():
        run = form if name.endswith("on 4") else jax.jit(form)
        arrays[f"{name} dx"], arrays[f"{name} dk"] = run(*map(jnp.asarray, example()))
    np.savez(path, **arrays)


@pytest.mark.parametrize("form", FORMS)
def test_each_transformation_leaves_the_gradients(on_4_devices, form):
    assert winograd.fits(*map(jnp.asarray, example()[:2]), 1, SAME)
    for name, want in zip(("dx", "dk"), direct_gradients(*example()), strict=True):
        got = on_4_devices[f"{form} {name}"]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
