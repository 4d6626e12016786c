"""Real images' features: which images, kept, checked, refused."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import RequestError
from ddpm_jax.data import ArraySource
from ddpm_jax.evaluation import reference
from ddpm_jax.evaluation.features import from_function
from ddpm_jax.parallel import make_layout

IMAGES = np.random.default_rng(4).integers(0, 256, (11, 4, 4, 3), dtype=np.uint8)
SOURCE = ArraySource("toys", "train", IMAGES)


def corners(images):
    """Left and right columns, of the first row: a mirror swaps them."""
    return jnp.stack([images[:, 0, 0, 0], images[:, 0, -1, 0]], axis=1)


def by_hand(images):
    return np.stack([images[:, 0, 0, 0], images[:, 0, -1, 0]], axis=1).astype(np.float32)


def features(
    cache, source=SOURCE, count=0, mirror=False, file="", identity=None, batch=4, calls=None
):
    extractor = from_function("corners", corners, identity)
    compute = reference.compile_extractor(extractor, make_layout("jit"), batch)

    def counting(images):
        if calls is not None:
            calls.append(len(images))
        return compute(images)

    return reference.load_reference(
        extractor, counting, source, count, mirror, str(cache), file, batch, lambda line: None
    )


def test_positions_are_spread_evenly():
    assert reference.evenly(10, 0).tolist() == list(range(10))
    assert reference.evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert reference.evenly(10, 3).tolist() == [0, 3, 6]
    with pytest.raises(ValueError, match="11 images of 10"):
        reference.evenly(10, 11)


def test_features_are_those_of_the_images_and_their_mirror_images(tmp_path):
    got = features(tmp_path)
    np.testing.assert_array_equal(got.features, by_hand(IMAGES))
    np.testing.assert_allclose(got.statistics.mean, by_hand(IMAGES).mean(axis=0))
    np.testing.assert_allclose(got.statistics.covariance, np.cov(by_hand(IMAGES).T))
    doubled = features(tmp_path, count=5, mirror=True)
    chosen = by_hand(IMAGES[[0, 2, 4, 6, 8]])
    np.testing.assert_array_equal(doubled.features, np.concatenate([chosen, chosen[:, ::-1]]))
    assert doubled.statistics.count == 10


def test_they_are_computed_once(tmp_path):
    calls = []
    first = features(tmp_path, calls=calls)
    assert sum(calls) == 11 and not list(tmp_path.glob("*.parts"))
    again = features(tmp_path, calls=calls, batch=3)
    assert sum(calls) == 11
    np.testing.assert_array_equal(again.features, first.features)
    assert again.protocol == first.protocol


def test_whatever_they_depend_on_makes_another_file(tmp_path):
    features(tmp_path)
    other = IMAGES.copy()
    other[7, 0, 0, 0] ^= 1
    features(tmp_path, source=ArraySource("toys", "train", other))
    features(tmp_path, source=ArraySource("toys", "test", IMAGES))
    features(tmp_path, count=9)
    features(tmp_path, mirror=True)
    features(tmp_path, identity={"weights": "new"})
    assert len(list(tmp_path.glob("*.npz"))) == 6


def test_a_damaged_file_is_made_again(tmp_path, caplog):
    whole = features(tmp_path)
    (path,) = tmp_path.glob("*.npz")
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # Inside the features.
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = features(tmp_path)
    assert "is made again" in caplog.text
    np.testing.assert_array_equal(again.features, whole.features)


def test_a_file_of_another_protocol_is_refused(tmp_path):
    features(tmp_path / "a")
    (path,) = (tmp_path / "a").glob("*.npz")
    assert features(tmp_path / "b", file=str(path)).statistics.count == 11
    for change, words in [
        ({"count": 9}, "images=11, not 9"),
        ({"mirror": True}, "mirror=False, not True"),
        ({"identity": {"weights": "new"}}, "weights=None, not new"),
        ({"source": ArraySource("toys", "train", IMAGES[:10])}, "not"),
    ]:
        with pytest.raises(RequestError, match=words):
            features(tmp_path / "b", file=str(path), **change)
    assert not (tmp_path / "b").exists()
