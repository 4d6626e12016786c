"""The self-test: which images, in which order, and scores of a toy extractor by hand."""

import importlib.resources
import io
import sys

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import RequestError, default_config
from ddpm_jax.evaluation import features, selftest


def toy_images(split, positions):
    """uint8 [n, 2, 1, 3] that tell the split and the position."""
    base = {"train": 0, "test": 7}[split]
    values = np.stack([positions // 256 + base, positions % 256, positions % 100], axis=-1)
    return np.stack([values, values[:, ::-1]], axis=1)[:, :, None].astype(np.uint8)


def toy_extractor(has_logits=True):
    def apply(params, images):
        x = images.astype(np.float32).reshape(-1, 6)[:, :3] / params
        return {"features": x, **({"logits": x} if has_logits else {})}

    return features.Extractor("inception", {}, np.float32(64), apply, has_logits)


def score_by_hand():
    """The Inception score of the toy's logits, without the code under test."""
    rng = np.random.RandomState(2020)
    names = sorted(f"{i:05d}.png" for i in rng.choice(50_000, 100, replace=False))
    order = np.random.RandomState(2020).permutation(100)
    positions = np.array([int(names[i][:5]) for i in order])
    logits = toy_images("train", positions)[:, 0, 0].astype(np.float64) / 64
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in p.reshape(10, 10, 3):
        kl = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(kl.mean()))
    return np.mean(scores)


def distance_by_hand():
    statistics = []
    for split, size in (("train", 50_000), ("test", 10_000)):
        chosen = np.random.RandomState(2020).choice(size, 5000, replace=False)
        x = toy_images(split, chosen)[:, 0, 0].astype(np.float64) / 64
        statistics.append((x.mean(0), np.cov(x, rowvar=False)))
    (mean1, cov1), (mean2, cov2) = statistics
    root = np.sqrt(np.linalg.eigvals(cov1 @ cov2).real).sum()
    return ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root


@pytest.mark.parametrize("batch_size", [50, 64])
def test_scores_of_a_toy(batch_size):
    checks = selftest.selftest(toy_extractor(), toy_images, full=True, batch_size=batch_size)
    assert [check.expected for check in checks] == [4.51089784587268, 10.3233274]
    assert checks[0].value == pytest.approx(score_by_hand(), rel=1e-6)
    assert checks[1].value == pytest.approx(distance_by_hand(), rel=1e-5)
    assert not any(check.ok for check in checks)


def test_what_is_checked(monkeypatch):
    (check,) = selftest.selftest(toy_extractor(), toy_images)
    assert "Inception score" in check.name
    for off, ok in [(0.0, True), (5e-4, True), (-5e-4, True), (2e-3, False), (-2e-3, False)]:
        monkeypatch.setattr(selftest, "SCORE", check.value + off)
        assert selftest.selftest(toy_extractor(), toy_images)[0].ok == ok
    with pytest.raises(ValueError, match="have no Inception score"):
        selftest.selftest(toy_extractor(has_logits=False), toy_images)
    (check,) = selftest.selftest(
        toy_extractor(has_logits=False), toy_images, full=True, batch_size=500
    )
    assert "FID" in check.name


@pytest.mark.parametrize("has_logits", [True, False])
def test_the_request(monkeypatch, has_logits):
    config = default_config()
    config.data.data_dir, config.evaluation.weights = "sets", "file"
    asked, said = [], []

    def make(*args):
        asked.append(args)
        return toy_extractor(has_logits)

    monkeypatch.setattr(selftest, "make_extractor", make)
    monkeypatch.setattr(selftest, "cifar10_by_index", lambda d: asked.append(d) or toy_images)
    monkeypatch.setattr(selftest.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(selftest, "SCORE", score_by_hand())
    monkeypatch.setattr(selftest, "DISTANCE", distance_by_hand() + 1)
    assert selftest.run(config, said.append) == has_logits
    assert asked == [("inception", "file", config.evaluation.cache_dir), "sets"]
    (line,) = said  # On a CPU the FID only if there is nothing else.
    expected = (
        "training images: {:.5f}, as published (within"
        if has_logits
        else "test images: {:.5f}, WRONG"
    )
    assert expected.format(score_by_hand() if has_logits else distance_by_hand()) in line


@pytest.mark.parametrize(
    ("off", "verdict", "ok"),
    [
        (0.0, "as published (within 0.0001)", True),
        (8e-5, "as published (within 0.0001)", True),
        (-8e-5, "as published (within 0.0001)", True),
        (2e-4, "within 0.001 of the published 4.50000", True),
        (-9e-4, "within 0.001 of the published 4.50000", True),
        (2e-3, "WRONG, published is 4.50000", False),
        (-2e-3, "WRONG, published is 4.50000", False),
        (np.nan, "WRONG, published is 4.50000", False),
    ],
)
def test_verdicts(off, verdict, ok):
    check = selftest.Check("score", 4.5 + off, 4.5)
    assert (check.verdict, check.ok) == (verdict, ok)


def test_an_accelerator_checks_the_fid_too(monkeypatch):
    said = []
    monkeypatch.setattr(selftest, "make_extractor", lambda *args: toy_extractor())
    monkeypatch.setattr(selftest, "cifar10_by_index", lambda data_dir: toy_images)
    monkeypatch.setattr(selftest.jax, "default_backend", lambda: "gpu")
    assert not selftest.run(default_config(), said.append)
    assert ["FID" in line for line in said] == [False, True]


def test_the_chosen_images():
    chosen = selftest.subset(50_000, 100)
    assert chosen[:5].tolist() == [1438, 1497, 2293, 2432, 4473]
    assert len(set(chosen.tolist())) == 100 and (np.diff(chosen) > 0).all()
    # The order in which the records lie does not matter: names are zero-padded to five digits.
    names = [f"{i:05d}.png" for i in chosen]
    assert names == sorted(names)


def prepare_cifar10(data_dir, ids):
    """A cifar10 of TFDS whose images tell their id's number, in the order of TFDS's shuffle."""
    sys.modules.setdefault("importlib_resources", importlib.resources)  # TFDS does not declare it.
    import tensorflow_datasets as tfds

    names = {"id": tfds.features.Text()} if ids else {}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "cifar10"
        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            image = tfds.features.Image(shape=(32, 32, 3))
            label = tfds.features.ClassLabel(num_classes=10)
            described = tfds.features.FeaturesDict({**names, "image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, _):
            return {
                split: [(i, example(ids and ids.format(split=split, i=i), i)) for i in range(count)]
                for split, count in (("train", 20), ("test", 7))
            }

        def _generate_examples(self):
            raise NotImplementedError

    Made(data_dir=data_dir, file_format="array_record").download_and_prepare()


def example(name, i):
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 10 * i, np.uint8)).save(file, "PNG")
    file.seek(0)
    return {"image": file, "label": i % 10} | ({"id": name} if name else {})


def test_cifar10_by_its_original_order(tmp_path):
    prepare_cifar10(tmp_path, "{split}_{i:05d}")
    images = selftest.cifar10_by_index(str(tmp_path))
    for split, positions in (("train", [3, 0, 19, 3]), ("test", [6, 1])):
        got = images(split, np.array(positions))
        assert got.dtype == np.uint8 and got.shape == (len(positions), 32, 32, 3)
        assert (got == 10 * np.array(positions)[:, None, None, None]).all()


@pytest.mark.parametrize("ids", ["", "image_{i}", "{split}_7"])
def test_cifar10_without_its_ids(tmp_path, ids):
    prepare_cifar10(tmp_path, ids)
    images = selftest.cifar10_by_index(str(tmp_path))
    with pytest.raises(RequestError, match="has no ids train_00000"):
        images("train", np.array([0]))


def test_cifar10_that_is_not_prepared(tmp_path):
    with pytest.raises(RequestError, match="cifar10: not prepared in"):
        selftest.cifar10_by_index(str(tmp_path))("train", np.array([0]))
