"""The table of extractors: what they compute, and what tells them apart."""

import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import make_efficientnet_golden
import make_inception_golden
import numpy as np
import pytest

from ddpm_jax.config import RequestError
from ddpm_jax.evaluation import efficientnet, features, inception
from ddpm_jax.evaluation.weights import LoadedWeights

GREY = np.random.default_rng(50).integers(0, 256, (3, 4, 5, 1), dtype=np.uint8)
RGB = np.random.default_rng(51).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)


def seeded(golden, convert):
    with np.load(golden.FILE) as stored:
        names, shapes = stored["names"], stored["shapes"]
    shapes = {str(n): tuple(map(int, s.split(","))) for n, s in zip(names, shapes, strict=True)}
    state = convert(make_inception_golden.seeded_state(shapes))
    return flax.traverse_util.unflatten_dict(state, sep="/")


@pytest.fixture(scope="module")
def inception_params():
    return seeded(make_inception_golden, inception.from_torch_state)


@pytest.fixture
def inception_weights(monkeypatch, inception_params):
    """Stands for the user's file; without the logits if it is called so."""

    def load(path, cache_dir):
        has_logits = path != "fid_only"
        params = {k: v for k, v in inception_params.items() if has_logits or k != "fc"}
        return LoadedWeights(params, f"sha of {path}", "file.pth", has_logits)

    monkeypatch.setattr(features, "load_inception", load)


@pytest.fixture
def effnet_weights(monkeypatch):
    def load():
        params = seeded(make_efficientnet_golden, efficientnet.from_torch_state)
        return LoadedWeights(params, "0123", "lite0.pth", True)

    monkeypatch.setattr(efficientnet, "load_efficientnet", load)


def test_inception_features_and_the_papers_logits(inception_weights):
    golden = make_inception_golden
    extractor = features.make_extractor("inception", "a")
    images = golden.inputs()[0]
    assert extractor.has_logits
    assert extractor.num_features((32, 32, 3)) == extractor.num_features((8, 9, 1)) == 2048
    got = jax.jit(extractor.apply)(extractor.params, images)
    with np.load(golden.FILE) as stored:
        for name, point in {"features": "2048", "logits": "logits_unbiased"}.items():
            expected = stored[f"{point}_0"]
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=atol)
            assert got[name].dtype == np.float32
        assert np.abs(got["logits"] - stored["logits_0"]).max() > 1e-3
    assert set(got) == {"features", "logits"}


def test_inception_without_logits(inception_weights):
    extractor = features.make_extractor("inception", "fid_only")
    assert not extractor.has_logits
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8)
    assert set(jax.eval_shape(extractor.apply, extractor.params, images)) == {"features"}


def test_effnet_features(effnet_weights):
    golden = make_efficientnet_golden
    extractor = features.make_extractor("effnetlite0_75")
    assert extractor.has_logits and extractor.num_features((32, 32, 3)) == 1280
    got = jax.jit(extractor.apply)(extractor.params, golden.inputs("seeded"))
    with np.load(golden.FILE) as stored:
        for name in ("features", "logits"):
            expected = stored[f"seeded_{name}"]
            np.testing.assert_allclose(got[name], expected, atol=1e-5 * np.abs(expected).max())


class Seen:
    """Stands for a network: its features are the images that it is given."""

    def __init__(self, *args, **kwargs):
        self.with_logits = True

    def apply(self, variables, images):
        return dict.fromkeys(("features", "logits", "2048", "logits_unbiased"), images)


@pytest.mark.parametrize("name", ["inception", "effnetlite0_32"])
def test_grey_is_rgb_for_the_networks(inception_weights, monkeypatch, name):
    monkeypatch.setattr(inception, "Inception", Seen)
    monkeypatch.setattr(efficientnet, "EfficientNetLite0", Seen)
    monkeypatch.setattr(
        efficientnet, "load_efficientnet", lambda: LoadedWeights({}, "0123", "lite0.pth", True)
    )
    extractor = features.make_extractor(name)
    for images, expected in ((GREY, np.concatenate([GREY] * 3, axis=-1)), (RGB, RGB)):
        seen = extractor.apply(extractor.params, images)
        np.testing.assert_array_equal(seen["features"], expected)
    with pytest.raises(ValueError, match="not 4 channels"):
        extractor.num_features((8, 8, 4))


def test_pixels():
    extractor = features.make_extractor("pixels")
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 8, 2)
    got = jax.jit(extractor.apply)(extractor.params, images)
    assert set(got) == {"features"} and not extractor.has_logits
    expected = np.arange(256.0).reshape(2, 128) * 2 / 255 - 1
    np.testing.assert_allclose(got["features"], expected, atol=1e-6)
    assert got["features"][0, 0] == -1 and got["features"][-1, -1] == 1
    assert extractor.num_features((8, 8, 2)) == 128


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *[("inception", True), ("pixels", True), ("effnetlite0_32", True)],
        *[("effnetlite0_512", True), ("effnetlite0_31", False), ("effnetlite0_513", False)],
        *[("effnetlite0_", False), ("effnetlite0_064", False), ("effnetlite0_64 ", False)],
        *[("effnetlite1_64", False), ("Inception", False), ("", False)],
    ],
)
def test_known_names(name, known):
    assert features.known(name) == known
    if not known:
        with pytest.raises(RequestError, match="no features are called"):
            features.make_extractor(name)


def test_identities_tell_features_apart(inception_weights, effnet_weights):
    extractors = [
        features.make_extractor("inception", "a"),
        features.make_extractor("inception", "b"),
        features.make_extractor("effnetlite0_64"),
        features.make_extractor("effnetlite0_65"),
        features.make_extractor("pixels"),
        features.from_function("mine", lambda x: x),
        features.from_function("mine", lambda x: x, {"weights": 2}),
    ]
    texts = [json.dumps(e.identity, sort_keys=True) for e in extractors]
    assert len(set(texts)) == len(texts)
    again = features.make_extractor("inception", "a")
    assert again.identity == extractors[0].identity
    assert extractors[0].identity["weights_sha256"] == "sha of a"


def double_mean(images):
    return 2.0 * images.astype(np.float32).mean(axis=(1, 2))


def on_host(images):
    assert type(images) is np.ndarray and images.dtype == np.uint8
    return double_mean(images).astype(np.float64)


@pytest.mark.parametrize(
    "extractor",
    [
        features.from_function("mine", double_mean),
        features.from_function("mine", on_host, on_host=True),
        features.from_function(
            "mine", lambda scale, x: scale * x.mean(axis=(1, 2)), params=jnp.float32(2)
        ),
    ],
    ids=["jax", "host", "params"],
)
def test_functions_of_ones_own(extractor):
    assert extractor.num_features((4, 5, 3)) == 3 and not extractor.has_logits
    for apply in (
        (extractor.apply,) if extractor.on_host else (extractor.apply, jax.jit(extractor.apply))
    ):
        got = apply(extractor.params, RGB)
        assert got["features"].dtype == np.float32
        np.testing.assert_allclose(got["features"], 2 * RGB.mean(axis=(1, 2)), rtol=1e-6)


def test_a_function_on_the_host_is_called_outside_of_any_program():
    # A callback from a program of several devices can wait for itself.
    extractor = features.from_function("mine", on_host, on_host=True)
    assert extractor.on_host and not features.make_extractor("pixels").on_host
    assert type(extractor.apply(extractor.params, RGB)["features"]) is np.ndarray


@pytest.mark.parametrize("host", [False, True])
def test_functions_that_classify(host):
    def both(images):
        mean = double_mean(images)
        return {"logits": mean[:, :2] - 300, "features": mean}

    extractor = features.from_function("mine", both, on_host=host, has_logits=True)
    assert extractor.has_logits and extractor.num_features((4, 5, 3)) == 3
    got = (extractor.apply if host else jax.jit(extractor.apply))(extractor.params, RGB)
    assert got.keys() == {"features", "logits"} and got["logits"].dtype == np.float32
    expected = 2 * RGB.mean(axis=(1, 2))
    np.testing.assert_allclose(got["features"], expected, rtol=1e-6)
    np.testing.assert_allclose(got["logits"], expected[:, :2] - 300, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *["inception", "pixels", "effnetlite0_64", "effnetlite0_999", "effnetlite0_064"],
        *["effnetlite0_6٤", "", "a-b", "mine\n", "größe", "a b"],
    ],
)
def test_names_that_are_taken_or_no_names(name):
    with pytest.raises(ValueError, match="choose letters"):
        features.from_function(name, double_mean)
    assert not features.known("effnetlite0_6٤")


def test_params_of_a_function_on_the_host():
    with pytest.raises(ValueError, match="params are for functions in JAX"):
        features.from_function("mine", double_mean, params=1, on_host=True)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize(
    ("result", "has_logits", "message"),
    [
        (np.zeros(1), False, r"features \[1, d\] are needed, and the function gave \[1\]"),
        (np.zeros((2, 3)), False, r"and the function gave \[2, 3\]"),
        ([1], False, r"and the function gave \[1\]"),
        (None, False, r"features \[1, d\] are needed, and the function gave "),
        ("text", False, r"features \[1, d\] are needed, and the function gave "),
        (np.zeros((1, 2)), True, r"features and logits are needed .*gave features"),
        ({"features": np.zeros((1, 2))}, True, r"features and logits are needed .*gave features"),
        (
            {"features": np.zeros((1, 2)), "logits": np.zeros((1, 2))},
            False,
            r"features are needed \(has_logits=False\), .*gave features, logits",
        ),
        (
            {"features": np.zeros((1, 2)), "logits": np.zeros(2)},
            True,
            r"logits \[1, d\] are needed, and the function gave \[2\]",
        ),
    ],
)
def test_functions_that_do_not_fit(host, result, has_logits, message):
    wrong = features.from_function("m", lambda x: result, on_host=host, has_logits=has_logits)
    with pytest.raises(ValueError, match=message):
        wrong.num_features((4, 5, 3))


def test_extractors_are_pure_functions_of_params_and_images(effnet_weights):
    extractor = features.make_extractor("effnetlite0_32")
    zeros = dataclasses.replace(extractor, params=jax.tree.map(np.zeros_like, extractor.params))
    program = jax.jit(extractor.apply).lower(extractor.params, RGB).as_text()
    assert len(program) < 1_000_000  # No weights are in it.
    got = jax.jit(extractor.apply)(zeros.params, RGB)
    np.testing.assert_array_equal(got["features"], 0)
