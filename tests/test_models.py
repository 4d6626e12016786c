"""The network against the authors' parameter counts, float64 NumPy and XLA's own gradients."""

import re

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax.models import UNet, layers, norm, rounded_kernels, timestep_embedding
from ddpm_jax.models.dropout import dropout_mask, kept, threefry_bits
from ddpm_jax.parallel import network_jit

TINY = {"channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1}


def shapes(model, size, channels=3):
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]


def apply(model, params, *inputs):
    """model.apply under jit, which compiles in less time than the layers one by one take."""
    return jax.jit(model.apply)({"params": params}, *inputs)


def randomised(params, seed=0):
    """Parameters in which no layer is nearly zero, so that every path shows."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [0.2 * jax.random.normal(k, x.shape) + 0.1 for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize(
    ("attributes", "size", "count"),
    [
        ({}, 32, 35_746_307),
        ({"channel_multipliers": (1, 1, 2, 2, 4, 4)}, 256, 113_673_219),
        ({"channel_multipliers": (1, 1, 2, 2, 4, 4), "channels": 192}, 256, 255_677_955),
    ],
)
def test_parameter_counts_are_the_authors(attributes, size, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(UNet(**attributes), size))) == count


def test_attention_follows_each_block_at_16_and_the_middle():
    names = [name for name in shapes(UNet(), 32) if "attention" in name]
    assert sorted(names) == [
        "down_1_attention_0",
        "down_1_attention_1",
        "middle_attention",
        "up_1_attention_0",
        "up_1_attention_1",
        "up_1_attention_2",
    ]


def test_timestep_embedding_is_sin_then_cos_over_half_minus_one():
    position = np.array([0, 1, 500, 999])
    frequencies = 10000.0 ** (-np.arange(64) / 63)
    angles = position[:, None] * frequencies
    want = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(position), 128), want, atol=1e-4)


def test_network_embeds_t_minus_one():
    """With all else zero, the output at t depends on the embedding of position t − 1."""
    model = UNet(**TINY)
    params = randomised(shapes(model, 8))
    x = jnp.zeros((2, 8, 8, 3))
    t = jnp.array([1, 40])
    out = apply(model, params, x, t)
    seen = []

    def spy(position, dim):
        jax.debug.callback(seen.append, position)
        return timestep_embedding(position, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_jax.models.unet.timestep_embedding", spy)
        # Another program, and so other roundings.
        np.testing.assert_allclose(apply(model.clone(), params, x, t), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen[0], [0, 39])


def attended(q, k, v):
    """softmax(q kᵀ / √channels) v, as it is written."""
    scores = jnp.einsum("bqc,bkc->bqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores, axis=-1), v)


def attention_in_float64(q, k, v, g):
    """The values, and the gradients of all three for g."""
    with jax.enable_x64(True):
        out, pull = jax.vjp(attended, *(jnp.float64(a) for a in (q, k, v)))
        return [np.asarray(a) for a in (out, *pull(jnp.float64(g)))]


@pytest.mark.parametrize(("offset", "bound"), [(0, 2e-6), (2, 1e-5), (8, 1e-4)])
@pytest.mark.parametrize(("queries", "keys", "channels"), [(16, 16, 8), (5, 9, 3), (64, 64, 256)])
def test_attention_and_its_gradients_in_float64(queries, keys, channels, offset, bound):
    """What all keys and values have in common cancels in the gradient of the queries."""
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, 3, queries, channels)).astype("f4")
    k, v = rng.normal(size=(2, 3, keys, channels)).astype("f4")
    k += offset * rng.normal(size=channels).astype("f4")
    v += offset * rng.normal(size=channels).astype("f4")
    got, pull = jax.vjp(layers.dot_product_attention, q, k, v)
    want = attention_in_float64(q, k, v, g)
    for mine, exact in zip((got, *pull(g)), want, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, exact, atol=bound * max(1, np.abs(exact).max()))


def test_attention_of_large_scores_is_finite():
    q = jnp.full((1, 4, 8), 100.0)
    out, pull = jax.vjp(layers.dot_product_attention, q, q, q)
    np.testing.assert_allclose(out, q, rtol=1e-6)
    assert all(np.isfinite(d).all() for d in pull(jnp.ones_like(q)))


def test_attention_of_bfloat16_is_rounded_once_on_cpus():
    rng = np.random.default_rng(0)
    q, k, v, g = jnp.bfloat16(rng.normal(size=(4, 2, 300, 24)) + 1)
    got, pull = jax.vjp(layers.dot_product_attention, q, k, v)
    want = attention_in_float64(q, k, v, g)
    for mine, exact in zip((got, *pull(g)), want, strict=True):
        assert mine.dtype == jnp.bfloat16
        error = np.abs(np.float64(mine) - exact)
        assert (error <= 2**-8 * np.abs(exact) + 1e-5 * np.abs(exact).max()).all()


def test_attention_on_other_platforms_is_the_library_s():
    x = jax.ShapeDtypeStruct((2, 16, 8), jnp.bfloat16)

    def program(function, platform):
        exported = jax.export.export(jax.jit(function), platforms=[platform])(x, x, x)
        return exported.mlir_module()

    def products(function, platform):
        return re.findall(r"dot_general %\d+, %\d+, (.*) loc", program(function, platform))

    def library(q, k, v):
        return jax.nn.dot_product_attention(*(a[:, :, None] for a in (q, k, v)))[:, :, 0]

    theirs = products(library, "cuda")
    assert theirs
    assert (
        products(layers.dot_product_attention, "cuda")
        == products(layers.dot_product_attention, "tpu")
        == theirs
    )
    assert products(layers.dot_product_attention, "cpu") != theirs


def test_the_way_back_of_attention_keeps_one_map_a_layer():
    """jax.nn.dot_product_attention keeps more than two on CPUs."""
    tokens, channels, depth = 256, 8, 8

    def loss(x):
        for _ in range(depth):
            x = layers.dot_product_attention(x, x, x)
        return (x**2).sum()

    x = jax.ShapeDtypeStruct((1, tokens, channels), jnp.float32)
    needs = network_jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    # Three on the way: weights, their gradient, and its product with them.
    assert needs.temp_size_in_bytes / 4 / tokens**2 < depth + 3 + depth * 3 * channels / tokens


def test_a_shift_of_all_pixels_has_the_gradient_of_a_broadcast_sum():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 3, 7, 5, 6)).astype("f4")
    shift = rng.normal(size=(3, 6)).astype("f4")
    got, pull = jax.vjp(layers.add_to_pixels, x, shift)
    np.testing.assert_array_equal(got, x + shift[:, None, None])
    dx, d_shift = pull(g)
    np.testing.assert_array_equal(dx, g)
    np.testing.assert_allclose(d_shift, g.astype("f8").sum(axis=(1, 2)), atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 4)])
def test_dense_layers_and_their_gradients_in_float64(shape):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(*shape, 8)), rng.normal(size=(*shape, 6))
    kernel, bias = rng.normal(size=(8, 6)), rng.normal(size=6)
    params = {"params": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}
    y, pull = jax.vjp(layers.Dense(6).apply, params, jnp.float32(x))
    d_params, dx = pull(jnp.float32(g))
    np.testing.assert_allclose(y, x @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(dx, g @ kernel.T, atol=1e-5)
    d_kernel = x.reshape(-1, 8).T @ g.reshape(-1, 6)
    np.testing.assert_allclose(d_params["params"]["kernel"], d_kernel, atol=1e-5)
    pixels = tuple(range(len(shape)))
    np.testing.assert_allclose(d_params["params"]["bias"], g.sum(axis=pixels), atol=1e-5)


def test_dense_s_way_back_is_of_matrices():
    """CPUs copy maps of more axes with these swapped, to sum over all but the last."""
    layer, x = layers.Dense(6), jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32)
    params = {"params": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}}

    def way_back(params, x):
        y, pull = jax.vjp(layer.apply, params, x)
        return pull(y)

    text = jax.jit(way_back).lower(params, x).as_text()
    contracted = re.findall(r"dot_general.*contracting_dims = (\S+ x \S+),", text)
    assert sorted(contracted) == ["[0] x [0]", "[1] x [0]", "[1] x [1]"]


@pytest.mark.parametrize(("channels", "on_the_way"), [(16, 3), (64, 5)])
def test_the_way_back_keeps_the_inputs_of_layers_alone(channels, on_the_way):
    """Normalised maps, SiLU's and transposed ones are made again: else they are most of it.

    The kernels that tiles of rows need, twice as large, are made one after another.
    """
    map_shape = (2, 32, 32, channels)

    def loss(kernels, x):
        ones = jnp.ones(channels)
        for kernel in kernels:
            x = norm.group_norm(x, ones, ones, 4, True)
            x = layers.conv2d(x, kernel, 1, ((1, 1), (1, 1)))
        return (x**2).sum()

    def maps(depth):
        x = jax.ShapeDtypeStruct(map_shape, jnp.float32)
        kernels = jax.ShapeDtypeStruct((depth, 3, 3, channels, channels), jnp.float32)
        needs = network_jit(jax.grad(loss)).lower(kernels, x).compile().memory_analysis()
        return needs.temp_size_in_bytes / 4 / np.prod(map_shape)

    # Each layer's input and that of its convolution, and a few of the one on its way.
    assert maps(8) < 2 * 8 + on_the_way


@pytest.mark.parametrize(
    ("stride", "padding"),
    [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1))), (1, ((0, 0), (0, 0))), (3, ((1, 2), (2, 0)))],
)
@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_convolution_and_its_gradients_are_xlas(stride, padding, size):
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(3, *size, 4)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 4, 5)))

    def plain(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    ours, pull_ours = jax.vjp(lambda *a: layers.conv2d(*a, stride, padding), x, kernel)
    theirs, pull_theirs = jax.vjp(plain, x, kernel)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    g = jnp.float32(rng.normal(size=ours.shape))
    for mine, xla in zip(pull_ours(g), pull_theirs(g), strict=True):
        np.testing.assert_allclose(mine, xla, atol=1e-4)


def test_gradients_of_convolutions_are_forward_ones():
    """XLA's own forms of them are a dozen times slower on CPUs within a loop (jax#12868)."""
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32"), jnp.ones((3, 3, 3, 5))

    def loss(x, kernel):
        return sum((layers.conv2d(x, kernel, s, ((1, 1), (1, 1))) ** 2).sum() for s in (1, 2))

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel).as_text()
    forms = re.findall(r"stablehlo.convolution.*?dim_numbers = (\[.*?\]->\[.*?\])", text)
    assert len(forms) == 6
    assert {form.replace(" ", "") for form in forms} == {"[b,0,1,f]x[0,1,i,o]->[b,0,1,f]"}


def test_a_convolution_may_leave_its_bias_to_others():
    draw = np.random.default_rng(0)
    x, kernel = (jnp.float32(draw.normal(size=shape)) for shape in ((2, 6, 6, 4), (3, 3, 4, 8)))
    params = {"kernel": kernel, "bias": jnp.arange(8.0)}
    whole = layers.Conv(8).apply({"params": params}, x)
    apart, bias = layers.Conv(8, bias_apart=True).apply({"params": params}, x)
    np.testing.assert_array_equal(bias, params["bias"])
    np.testing.assert_array_equal(apart + bias, whole)


def test_stride_two_is_padded_as_tensorflows_same():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 8, 8, 2)), rng.normal(size=(3, 3, 2, 3))
    want = lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    params = {"kernel": kernel, "bias": np.zeros(3)}
    got = layers.Conv(3, stride=2).apply({"params": params}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def threefry_keys(seed, count):
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


def test_threefry_is_that_of_its_paper_and_of_the_library():
    # The known answer of Random123's own tests for key 0, counter 0.
    zero = jax.random.wrap_key_data(jnp.zeros((1, 2), jnp.uint32), impl="threefry2x32")
    assert int(threefry_bits(zero, 1)[0, 0]) == 0x6B200159 ^ 0x99BA4EFE
    keys = threefry_keys(5, 3)
    want = [jax.random.bits(key, (1001,), jnp.uint32) for key in keys]
    np.testing.assert_array_equal(threefry_bits(keys, 1001), want)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.75, 0.99])
@pytest.mark.parametrize("shape", [(7, 9, 3), (1, 1, 1), (64, 64, 32)])
def test_dropout_masks_are_sixteen_bits_of_the_librarys_words(rate, shape):
    keys = threefry_keys(2, 6)
    size = np.prod(shape)
    words = [jax.random.bits(key, (-(-size // 2),), jnp.uint32) for key in keys]
    halves = np.asarray(words).astype("<u4").view("<u2")[:, :size]
    want = (halves >= round(rate * 2**16)).reshape(6, *shape)
    keep = dropout_mask(keys, rate, shape)
    assert keep.dtype == bool
    np.testing.assert_array_equal(keep, want)
    # As networks are compiled; and of two seeds in one program.
    np.testing.assert_array_equal(
        network_jit(lambda keys: dropout_mask(keys, rate, shape))(keys), want
    )
    pairs = jax.vmap(lambda keys: dropout_mask(keys, rate, shape))(keys.reshape(2, 3))
    np.testing.assert_array_equal(pairs, want.reshape(2, 3, *shape))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices' programs differ")
def test_dropout_masks_are_made_in_one_pass_on_cpus():
    keys = threefry_keys(2, 3)
    mask = network_jit(lambda keys: dropout_mask(keys, 0.1, (8, 8, 64)))
    program = mask.lower(keys).compile().as_text()
    assert "while" not in program
    # Both halves of each word are one number, which is written out: no word is computed twice.
    assert re.search(r"= u16\[3,2048\]\S* (parallel-)?fusion\(", program)


def test_dropout_keeps_the_mean_and_draws_each_example_from_its_own_key():
    keys = threefry_keys(0, 4)
    keep = dropout_mask(keys, 0.3, (31, 33, 3))
    assert keep.shape == (4, 31, 33, 3)
    assert abs(float(keep.mean()) - 0.7) < 4 * np.sqrt(0.3 * 0.7 / keep.size)
    out = kept(jnp.ones(keep.shape), keep, 0.3)
    np.testing.assert_allclose(out, np.where(keep, 1 / 0.7, 0), rtol=1e-6)
    alone = dropout_mask(keys[2:3], 0.3, (31, 33, 3))
    np.testing.assert_array_equal(alone[0], keep[2])
    assert np.any(np.asarray(keep[0]) != np.asarray(keep[1]))


def test_dropout_masks_differ_between_blocks_and_need_keys():
    model = UNet(**TINY, dropout=0.5, out_channels=3)
    params = randomised(shapes(model, 8))
    x, t = jnp.ones((2, 8, 8, 3)), jnp.array([3, 3])
    seen = []
    original = layers.dropout_mask

    def spy(keys, rate, shape):
        jax.debug.callback(seen.append, jax.random.key_data(keys))
        return original(keys, rate, shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "dropout_mask", spy)
        plain = apply(model, params, x, t)
        assert not seen
        noisy = apply(model, params, x, t, jax.random.split(jax.random.key(1), 2))
    assert len({data.tobytes() for keys in seen for data in np.asarray(keys)}) == 2 * 8
    assert np.abs(plain - noisy).max() > 1e-3


def test_examples_do_not_see_each_other():
    model = UNet(**TINY)
    params = randomised(shapes(model, 8))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    t = jnp.array([1, 500, 1000])
    together = apply(model, params, x, t)
    for k in range(3):
        alone = apply(model, params, x[k : k + 1], t[k : k + 1])
        np.testing.assert_allclose(alone[0], together[k], rtol=1e-4, atol=1e-4)


def test_output_starts_at_nearly_nothing_and_has_the_channels_asked_for():
    model = UNet(**TINY, out_channels=6)
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([1, 1000])
    out, _ = jax.jit(model.init_with_output)(jax.random.key(0), x, t)
    assert out.shape == (2, 8, 8, 6)
    assert np.abs(out).max() < 1e-3


def test_bfloat16_computes_coarsely_but_returns_float32():
    params = randomised(shapes(UNet(**TINY), 8))
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([1, 1000])
    full = apply(UNet(**TINY), params, x, t)
    coarse = apply(UNet(**TINY, dtype=jnp.bfloat16), params, x, t)
    assert coarse.dtype == jnp.float32
    difference = np.abs(coarse - full).max() / np.abs(full).max()
    assert 1e-5 < difference < 0.05
    parameters = shapes(UNet(**TINY, dtype=jnp.bfloat16), 8)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameters))


def test_kernels_rounded_once_compute_what_each_layer_s_rounding_does():
    model = UNet(**TINY, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    t = jnp.array([1, 30])
    params = randomised(jax.jit(model.init)(jax.random.key(0), x, t)["params"])
    rounded = rounded_kernels(model.dtype, params)
    for leaf in jax.tree.leaves(rounded):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32)
    np.testing.assert_array_equal(apply(model, rounded, x, t), apply(model, params, x, t))
    wide = model.clone(dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, rounded_kernels(wide.dtype, params), params)


def test_given_parameters_are_of_the_layer_s_shape_and_their_initialisers_rest():
    def fails(*_):
        raise AssertionError("traced")

    x = jnp.ones((1, 4, 4, 2))
    given = {"kernel": jnp.ones((3, 3, 2, 5)), "bias": jnp.zeros(5)}
    y = layers.Conv(5, init=fails).apply({"params": given}, x)
    np.testing.assert_allclose(y[0, 1, 1], 18)
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r'"bias".*\(5,\).*\(4,\)'):
        layers.Conv(5).apply({"params": given | {"bias": jnp.zeros(4)}}, x)
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="bias"):
        layers.Conv(5).apply({"params": {"kernel": given["kernel"]}}, x)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"divide by 8, not 12×12"):
        shapes(UNet(), 12)


def test_rematerialisation_changes_memory_alone():
    """Names, outputs and dropout's masks are the same, gradients to rounding; less is kept."""
    plain, again = (
        UNet(8, (1,), 3, (8,), dropout=0.3, norm_groups=4, remat=remat) for remat in (False, True)
    )
    assert shapes(again, 8) == shapes(plain, 8)
    params = randomised(shapes(plain, 8))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    inputs = params, x, jnp.array([1, 40, 500, 1000])
    masks, others = (jax.random.split(jax.random.key(i), 4) for i in range(2))

    def compiled(model):
        def loss(params, *inputs):
            out = model.apply({"params": params}, *inputs)
            return (out**2).mean(), out

        return network_jit(jax.grad(loss, has_aux=True)).lower(*inputs, masks).compile()

    def temporary(program):
        return program.memory_analysis().temp_size_in_bytes

    usual, frugal = compiled(plain), compiled(again)
    assert temporary(frugal) < 0.5 * temporary(usual)
    (grads, out), (grads_again, out_again) = (f(*inputs, masks) for f in (usual, frugal))
    np.testing.assert_allclose(out_again, out, rtol=1e-5, atol=1e-5 * np.abs(out).max())
    other = usual(*inputs, others)[1]
    assert np.abs(other - out).max() > 0.05 * np.abs(out).max()  # Dropout counts.
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for g, g_again in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_again), strict=True):
        np.testing.assert_allclose(g_again, g, rtol=1e-4, atol=1e-6 * largest)
