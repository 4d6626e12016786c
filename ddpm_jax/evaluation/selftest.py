"""Known scores of CIFAR-10 subsets, by which one's Inception weights and this code are checked.

They are what torch-fidelity's tests expect, which compare with the original TensorFlow 1 code
(github.com/toshas/torch-fidelity, tests/tf1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from ddpm_jax.config import RequestError, default_config
from ddpm_jax.data.tfds_sets import FORMAT, open_tfds
from ddpm_jax.evaluation.features import Extractor, make_extractor
from ddpm_jax.evaluation.frechet import frechet_distance, statistics_of
from ddpm_jax.evaluation.metrics import inception_score

SEED = 2020  # Theirs, for subsets and order alike.
SCORE_IMAGES, SCORE = 100, 4.51089784587268
DISTANCE_IMAGES, DISTANCE = 5000, 10.3233274
PUBLISHED_TOLERANCE = 1e-4  # Theirs.
TOLERANCE = 1e-3  # Other hardware rounds otherwise. Any known mistake moves the scores by far more.

ImagesByIndex = Callable[[str, np.ndarray], np.ndarray]


class Check(NamedTuple):
    """A score, and what it should be."""

    name: str
    value: float
    expected: float

    @property
    def ok(self) -> bool:
        """Whether it is what it should be, within TOLERANCE."""
        return abs(self.value - self.expected) <= TOLERANCE

    @property
    def verdict(self) -> str:
        """In words, which also tell whether it is within the smaller PUBLISHED_TOLERANCE."""
        if abs(self.value - self.expected) <= PUBLISHED_TOLERANCE:
            return f"as published (within {PUBLISHED_TOLERANCE:g})"
        if self.ok:
            return f"within {TOLERANCE:g} of the published {self.expected:.5f}"
        return f"WRONG, published is {self.expected:.5f}"


def run(config: ml_collections.ConfigDict, say: Callable[[str], None]) -> bool:
    """Runs the self-test, says each result in a line, and returns whether all are right.

    The Inception score of 100 images is always checked, if the weights have logits. The FID of
    twice 5,000 is where there is an accelerator, or nothing else to check.

    Raises:
      RequestError: the Inception weights or TFDS's cifar10 in `config.data.data_dir` are missing.
    """
    e = config.evaluation
    extractor = make_extractor("inception", e.weights, e.cache_dir)
    full = jax.default_backend() != "cpu" or not extractor.has_logits
    checks = selftest(extractor, cifar10_by_index(config.data.data_dir), full)
    for check in checks:
        say(f"{check.name}: {check.value:.5f}, {check.verdict}")
    return all(check.ok for check in checks)


def selftest(
    extractor: Extractor, images_by_index: ImagesByIndex, full: bool = False, batch_size: int = 50
) -> list[Check]:
    """Compares scores with the known ones.

    Args:
      extractor: that of the features `inception`.
      images_by_index: (split, positions in the original order [n]) -> uint8 [n, 32, 32, 3], as
        from `cifar10_by_index`.
      full: whether to take the FID of 5,000 training and 5,000 test images too, and not only the
        Inception score of 100 training images. On a CPU core that is half an hour instead of 20 s.
      batch_size: images at a time.
    Returns:
      The checks, one line of the result each.
    Raises:
      ValueError: without logits there is only the FID, and `full` was not asked for.
    """
    if not (extractor.has_logits or full):
        raise ValueError("weights without logits have no Inception score: ask for full=True")
    apply = jax.jit(extractor.apply)

    def outputs(split: str, size: int, count: int, name: str) -> np.ndarray:
        images = images_by_index(split, subset(size, count))
        batches = (images[i : i + batch_size] for i in range(0, count, batch_size))
        found = [np.asarray(apply(extractor.params, _padded(b, batch_size))[name]) for b in batches]
        return np.concatenate(found)[:count]

    checks = []
    if extractor.has_logits:
        logits = outputs("train", 50_000, SCORE_IMAGES, "logits")
        order = np.random.RandomState(SEED).permutation(SCORE_IMAGES)
        score = inception_score(logits[order], splits=10).value
        checks.append(Check(f"Inception score of {SCORE_IMAGES} training images", score, SCORE))
    if full:
        train = statistics_of(outputs("train", 50_000, DISTANCE_IMAGES, "features"))
        test = statistics_of(outputs("test", 10_000, DISTANCE_IMAGES, "features"))
        name = f"FID of {DISTANCE_IMAGES:,} training and {DISTANCE_IMAGES:,} test images"
        checks.append(Check(name, frechet_distance(train, test), DISTANCE))
    return checks


def subset(size: int, count: int) -> np.ndarray:
    """Which images of the original order torch-fidelity's tests take: int64 [count], ascending.

    They are written to files named by these numbers, and read in the order of the names.
    """
    return np.sort(np.random.RandomState(SEED).choice(size, count, replace=False))


def cifar10_by_index(data_dir: str) -> ImagesByIndex:
    """The images of TFDS's cifar10 by their place in the original files, which their ids tell.

    Args:
      data_dir: of TFDS; "" for its default.
    Returns:
      (split, positions in the original order [n]) -> uint8 [n, 32, 32, 3].
    Raises:
      RequestError: the set is not prepared there, or has no ids. Also when called.
    """
    data = default_config().data
    data.update(name="cifar10", data_dir=data_dir)
    records: dict[str, np.ndarray] = {}

    def images(split: str, positions: np.ndarray) -> np.ndarray:
        source = open_tfds(data, split)
        if split not in records:
            records[split] = _records_by_index(data_dir, split)
        return source.images(records[split][positions])

    return images


def _records_by_index(data_dir: str, split: str) -> np.ndarray:
    """The record that holds each image of the original order, int64 [n]."""
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=data_dir or None)
    records = builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format=FORMAT,
    )
    parser = tfds.features.FeaturesDict({"id": tfds.features.Text()})
    examples = (parser.deserialize_example_np(records[i]) for i in range(len(records)))
    ids = [(example["id"] or b"").decode() for example in examples]
    places = [int(i.removeprefix(f"{split}_")) if i.startswith(f"{split}_") else -1 for i in ids]
    if sorted(places) != list(range(len(places))):
        raise RequestError(
            f"config.data.data_dir={data_dir}: cifar10 there has no ids {split}_00000, … that tell "
            "each image's place in the original files; prepare the set with TFDS 4 itself"
        )
    return np.argsort(places)


def _padded(batch: np.ndarray, size: int) -> np.ndarray:
    """As many images as `size`, so that one program does for all batches."""
    return np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
