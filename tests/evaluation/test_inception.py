"""The Inception network against torch-fidelity's, stored and live, and its resize."""

import importlib.util

import flax
import jax
import make_inception_golden as golden
import numpy as np
import pytest

from ddpm_jax.evaluation import inception

needs_torch_fidelity = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "torch_fidelity")),
    reason="torch and torch-fidelity are not installed",
)


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def state(stored):
    shapes = {
        str(name): tuple(map(int, shape.split(",")))
        for name, shape in zip(stored["names"], stored["shapes"], strict=True)
    }
    return golden.seeded_state(shapes)


@pytest.fixture(scope="module")
def params(state):
    flat = inception.from_torch_state(state)
    inception.check_shapes(flat)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda params, images: inception.Inception().apply({"params": params}, images))


def assert_close(got, expected, tolerance=1e-5):
    """Within the tolerance of the layer's largest value."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("index", [0, 1])
def test_features_are_torch_fidelitys(stored, params, apply, index):
    got = apply(params, golden.inputs()[index])
    assert set(got) == set(golden.POINTS)
    for name in golden.POINTS:
        assert got[name].dtype == np.float32
        assert_close(got[name], stored[f"{name}_{index}"])


def test_the_network_without_logits_and_float_images(params):
    images = golden.inputs()[0]
    apply = inception.Inception(with_logits=False).apply
    params = {name: value for name, value in params.items() if name != "fc"}
    features = jax.eval_shape(apply, {"params": params}, images.astype(np.float32))
    assert {name: array.shape for name, array in features.items()} == {
        name: (2, int(name)) for name in ("64", "192", "768", "2048")
    }
    resized = inception.tf1_resize(images.astype(np.float32))
    np.testing.assert_array_equal(resized, inception.tf1_resize(images))


@needs_torch_fidelity
def test_torch_fidelity_live(state, params, apply):
    import torch

    images = np.random.default_rng(32).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    network = golden.their_network()
    assert golden.shapes_of(network) == {name: array.shape for name, array in state.items()}
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    network.load_state_dict(tensors, strict=False, assign=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Several wait for each other on a busy machine.
    try:
        expected = golden.run(network, images)
    finally:
        torch.set_num_threads(threads)
    got = apply(params, images)
    for name in golden.POINTS:
        assert_close(got[name], expected[name])


@needs_torch_fidelity
@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (256, 256), (299, 299), (400, 7)])
def test_resize_is_tensorflow_1s_live(shape):
    import torch

    _, module = golden.import_torch_fidelity()
    images = np.random.default_rng(33).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(
        torch.tensor(images.transpose(0, 3, 1, 2)).float(), (299, 299), align_corners=False
    )
    got = inception.tf1_resize(images)  # Not compiled, so that nothing is fused.
    np.testing.assert_array_equal(got, theirs.numpy().transpose(0, 2, 3, 1))
    compiled = jax.jit(inception.tf1_resize)(images)
    np.testing.assert_allclose(compiled, got, rtol=0, atol=1e-4)


def test_resize_by_hand():
    image = np.array([[0.0, 10.0], [20.0, 50.0]]).reshape(1, 2, 2, 1)
    # Positions 0, 2/3 and 4/3 of 0..1; beyond the last pixel it is repeated.
    row = np.array([[0, 20 / 3, 10], [20, 40, 50]])
    expected = np.stack([row[0], row[0] + (row[1] - row[0]) * 2 / 3, row[1]])
    got = inception.tf1_resize(image, 3)
    np.testing.assert_allclose(got[0, ..., 0], expected, rtol=1e-6)


def test_only_rgb_images_are_taken():
    with pytest.raises(ValueError, match=r"not \[2, 8, 8, 1\]"):
        inception.Inception().init(jax.random.key(0), np.zeros((2, 8, 8, 1), np.uint8))


def test_numbers_of_parameters():
    sizes = {name: np.prod(shape) for name, shape in inception.parameter_shapes().items()}
    learned = {k: v for k, v in sizes.items() if not k.endswith(("/mean", "/var"))}
    assert sum(learned.values()) == 23_850_960
    assert sum(v for k, v in learned.items() if not k.startswith("fc/")) == 21_785_568
    assert sum(sizes.values()) == 23_885_392


GRAPH_NAMES = {  # One block of each kind, as published with torch-fidelity.
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    "mixed/conv": "Mixed_5b/branch1x1",
    "mixed/tower/conv": "Mixed_5b/branch5x5_1",
    "mixed/tower/conv_1": "Mixed_5b/branch5x5_2",
    "mixed/tower_1/conv": "Mixed_5b/branch3x3dbl_1",
    "mixed/tower_1/conv_1": "Mixed_5b/branch3x3dbl_2",
    "mixed/tower_1/conv_2": "Mixed_5b/branch3x3dbl_3",
    "mixed/tower_2/conv": "Mixed_5b/branch_pool",
    "mixed_3/conv": "Mixed_6a/branch3x3",
    "mixed_3/tower/conv": "Mixed_6a/branch3x3dbl_1",
    "mixed_3/tower/conv_1": "Mixed_6a/branch3x3dbl_2",
    "mixed_3/tower/conv_2": "Mixed_6a/branch3x3dbl_3",
    "mixed_7/conv": "Mixed_6e/branch1x1",
    "mixed_7/tower/conv": "Mixed_6e/branch7x7_1",
    "mixed_7/tower/conv_1": "Mixed_6e/branch7x7_2",
    "mixed_7/tower/conv_2": "Mixed_6e/branch7x7_3",
    "mixed_7/tower_1/conv": "Mixed_6e/branch7x7dbl_1",
    "mixed_7/tower_1/conv_1": "Mixed_6e/branch7x7dbl_2",
    "mixed_7/tower_1/conv_2": "Mixed_6e/branch7x7dbl_3",
    "mixed_7/tower_1/conv_3": "Mixed_6e/branch7x7dbl_4",
    "mixed_7/tower_1/conv_4": "Mixed_6e/branch7x7dbl_5",
    "mixed_7/tower_2/conv": "Mixed_6e/branch_pool",
    "mixed_8/tower/conv": "Mixed_7a/branch3x3_1",
    "mixed_8/tower/conv_1": "Mixed_7a/branch3x3_2",
    "mixed_8/tower_1/conv": "Mixed_7a/branch7x7x3_1",
    "mixed_8/tower_1/conv_1": "Mixed_7a/branch7x7x3_2",
    "mixed_8/tower_1/conv_2": "Mixed_7a/branch7x7x3_3",
    "mixed_8/tower_1/conv_3": "Mixed_7a/branch7x7x3_4",
    "mixed_10/conv": "Mixed_7c/branch1x1",
    "mixed_10/tower/conv": "Mixed_7c/branch3x3_1",
    "mixed_10/tower/mixed/conv": "Mixed_7c/branch3x3_2a",
    "mixed_10/tower/mixed/conv_1": "Mixed_7c/branch3x3_2b",
    "mixed_10/tower_1/conv": "Mixed_7c/branch3x3dbl_1",
    "mixed_10/tower_1/conv_1": "Mixed_7c/branch3x3dbl_2",
    "mixed_10/tower_1/mixed/conv": "Mixed_7c/branch3x3dbl_3a",
    "mixed_10/tower_1/mixed/conv_1": "Mixed_7c/branch3x3dbl_3b",
    "mixed_10/tower_2/conv": "Mixed_7c/branch_pool",
}


def test_names_in_the_frozen_graph():
    names = inception.tf_names()
    assert GRAPH_NAMES.items() <= names.items()
    layers = {name.rsplit("/", 1)[0] for name in inception.parameter_shapes()} - {"fc"}
    assert len(names) == 94 and set(names.values()) == layers
