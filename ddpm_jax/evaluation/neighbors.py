"""Precision, recall, density and coverage, and how close samples come to the reference's points.

All distances come from `distances`. NumPy alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ddpm_jax.evaluation.distances import MAX_BYTES, as_rows, blocks, nearest
from ddpm_jax.evaluation.metrics import Estimate

# Halvings of the samples that recall's error is taken from, and how many neighbours are kept to
# find those within a half, at least: of 32, fewer than 3 are in it once in two million times.
HALVINGS = 10
HALF_NEIGHBOURS = 32
# From so many held-out points on their 1 % quantile is not below the least of them.
LEAST_HELD_OUT = 99


def prdc(
    features: np.ndarray,
    reference_features: np.ndarray,
    k_precision: int = 3,
    k_coverage: int = 5,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Estimate]:
    """Precision, recall, density and coverage.

    Each point has a ball that reaches to its k-th neighbour in its own set, other than itself.
    - precision: share of the samples inside a reference point's ball (distance ≤ radius), and
      recall: share of the reference points inside a sample's (Kynkäänniemi et al. 2019,
      arXiv:1904.06991, §2);
    - density: mean number of reference balls around a sample (distance < radius), over k, and
      coverage: share of the reference balls with a sample (Naeem et al. 2020, arXiv:2002.09797,
      §3).

    Args:
      features: generated, [n, d]. reference_features: [m, d].
      k_precision: k of precision and recall. k_coverage: k of density and coverage.
      max_bytes: about what a block of distances takes.
    Returns:
      The four by name. Standard errors are over draws of the generated samples, the reference held
      fixed: of a mean for precision and density; for the others see `_recall_error` and
      `_coverage_error`, each None where the samples do not tell it.
    Raises:
      ValueError: a k < 1, n or m not above the larger k, other dimensions, or as
        `distances.as_rows`.
    """
    if min(k_precision, k_coverage) < 1:
        raise ValueError(f"k_precision={k_precision}, k_coverage={k_coverage}: at least 1 each")
    k_max = max(k_precision, k_coverage)
    x = as_rows(features, k_max + 1, "samples")
    y = as_rows(reference_features, k_max + 1, "reference", x.shape[1])
    n, m = len(x), len(y)
    radii, _ = nearest(y, y, k_max, exclude_self=True, max_bytes=max_bytes)
    own, in_half, half_radii = _sample_radii(x, k_precision, max_bytes)
    precise, balls_around = np.zeros(n, bool), np.zeros(n, np.int64)
    recalled, half_recalled = np.zeros(m, bool), np.zeros((len(in_half), 2, m), bool)
    samples_around, signature = np.zeros(m, np.int64), np.zeros(m, np.uint64)
    tokens = np.random.Philox(key=np.uint64(n)).random_raw(n)
    for block in blocks(x, y, max_bytes):
        rows, own_radii = block.rows, own[block.rows, None]
        precision_radii, coverage_radii = radii[:, k_precision - 1], radii[:, k_coverage - 1]
        for threshold in (own_radii, precision_radii, coverage_radii):
            block.settle(block.near(threshold))
        precise[rows] = (block.squared <= precision_radii).any(axis=1)
        recalled |= (block.squared <= own_radii).any(axis=0)
        inside = block.squared < coverage_radii
        balls_around[rows] = np.count_nonzero(inside, axis=1)
        samples_around += np.count_nonzero(inside, axis=0)
        signature += tokens[rows] @ inside
        for i, half in enumerate(in_half[:, rows]):
            reached = block.squared <= half_radii[i, rows, None]
            half_recalled[i, 0] |= reached[half].any(axis=0)
            half_recalled[i, 1] |= reached[~half].any(axis=0)
    coverage = float(np.mean(samples_around > 0))
    return {
        "precision": _mean(precise),
        "recall": Estimate(float(recalled.mean()), _recall_error(half_recalled), {}),
        "density": _mean(balls_around / k_coverage),
        "coverage": Estimate(coverage, _coverage_error(samples_around, signature, n), {}),
    }


def _mean(values: np.ndarray) -> Estimate:
    n = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Estimate(float(values.mean()), error, {})


def _sample_radii(x, k, max_bytes):
    """Squared distances to the k-th other sample [n]; halvings, bool [h, n]; radii within them.

    Halving i takes the first ⌊n/2⌋ positions sorted by Philox's raw bits under the key (n, i).
    """
    n = len(x)
    num_halvings = HALVINGS if n // 2 > k else 0
    kept = min(n - 1, max(4 * k, HALF_NEIGHBOURS)) if num_halvings else k
    squared, positions = nearest(x, x, kept, exclude_self=True, max_bytes=max_bytes)
    in_half, radii = np.zeros((num_halvings, n), bool), np.empty((num_halvings, n))
    for i in range(num_halvings):
        bits = np.random.Philox(key=np.array([n, i], np.uint64)).random_raw(n)
        in_half[i, np.argsort(bits, kind="stable")[: n // 2]] = True
        same = in_half[i][positions] == in_half[i][:, None]
        kth = np.argmax(np.cumsum(same, axis=1) == k, axis=1)
        enough = np.count_nonzero(same, axis=1) >= k
        radii[i] = squared[np.arange(n), np.where(enough, kth, kept - 1)]
    return squared[:, k - 1], in_half, radii


def _recall_error(half_recalled: np.ndarray) -> float | None:
    """Recall's standard error from what random halves of the samples reach, bool [h, 2, m].

    The variance has a part that falls with the reference's size, of each point's being reached or
    not, and one that falls with the samples', of what all points share. A half's variance has the
    first in full and the second twice; the first is seen on each point. To that order halves of
    the same recall as the whole are presumed.
    """
    if not len(half_recalled):
        return None
    first, second = half_recalled[:, 0], half_recalled[:, 1]
    of_points = np.mean(first != second) / 2 / half_recalled.shape[2]
    of_halves = np.mean(np.square(first.mean(axis=1) - second.mean(axis=1))) / 2
    return math.sqrt(of_points + max(of_halves - of_points, 0.0) / 2)


def _coverage_error(around: np.ndarray, signature: np.ndarray, n: int) -> float | None:
    """Coverage's standard error from the number of samples [m] in each ball, and from which.

    The variance of the number of empty balls is Σ_jl P(j, l empty) − P(j empty) P(l empty). For
    Poisson counts the last product is the expectation of (−1)^|j ∩ l| where no sample is in just
    one of the two, so all terms cancel but those of balls around the same samples, s > 0 of them:
    −(−1)^s each is free of bias. Of large s it is noise: it is weighted down as by Efron & Thisted
    1976 (Biometrika 63), with P(Binomial(4, ½) ≥ s). A fixed n takes off
    (Σ_j P(one sample in j))² / n.
    """
    weight = np.array([0, 15, -11, 5, -1]) / 16
    _, first, sizes = np.unique(signature, return_index=True, return_counts=True)
    samples = around[first]
    small = samples < len(weight)
    variance = weight[samples[small]] @ np.square(sizes[small], dtype=np.float64)
    variance -= np.count_nonzero(around == 1) ** 2 / n
    return math.sqrt(variance) / len(around) if variance > 0 else None


class Neighbors(NamedTuple):
    """distances: float64 [n, k], root mean square over dimensions; positions: int64 [n, k]."""

    distances: np.ndarray
    positions: np.ndarray


def neighbors_of(features: np.ndarray, reference_features: np.ndarray, k: int = 1) -> Neighbors:
    """The k nearest reference points of each sample, the nearest first, lowest position of equals.

    Args:
      features: [n, d]. reference_features: [m, d].
    Raises:
      ValueError: k < 1, m < k, other dimensions, or as `distances.as_rows`.
    """
    squared, positions = nearest(features, reference_features, k)
    return Neighbors(np.sqrt(squared / np.shape(features)[1]), positions)


def nearest_neighbors(
    features: np.ndarray,
    reference_features: np.ndarray,
    held_out_features: np.ndarray | None = None,
) -> Estimate:
    """How far the samples are from the reference's (the training set's) nearest points.

    Distances are root mean square over dimensions. A model that has learned the distribution comes
    as close to the training set as held-out data do, and one that memorises comes closer.

    Args:
      features: generated, [n, d]. reference_features: [m, d].
      held_out_features: real and not among the reference, [h, d].
    Returns:
      value: the samples' median distance. standard_error: over draws of the samples, the others
      held fixed, from the order statistics one standard error around the median's rank.
      details: `quantile_0`, `_0.01`, `_0.1`, `_0.5`, `_0.9` of the distances; `copies`, the number
      of samples identical to a reference point. With held-out features also their
      `held_out_quantile_…` and `held_out_copies`, and for h ≥ 99 `memorization`: the share of the
      samples closer to the reference than the held-out points' 1 % quantile, with its
      `memorization_standard_error`, which holds that quantile fixed. A perfect model gets 0.01 on
      average.
    Raises:
      ValueError: an empty set, other dimensions, or as `distances.as_rows`.
    """
    own = neighbors_of(as_rows(features, 1, "samples"), reference_features).distances[:, 0]
    details = _quantiles(own, "")
    if held_out_features is not None:
        held_out = as_rows(held_out_features, 1, "held-out", np.shape(features)[1])
        others = neighbors_of(held_out, reference_features).distances[:, 0]
        details |= _quantiles(others, "held_out_")
        limit = memorization_limit(others)
        if limit is not None:
            details |= _memorization(own, limit)
    return Estimate(float(np.median(own)), _median_error(own), details)


def memorization_limit(held_out: np.ndarray) -> float | None:
    """The distance below which `memorization` counts a sample: held-out points' 1 % quantile.

    Weibull's quantile, since that of h points has expectation 0.01 in the distribution that they
    are from.

    Args:
      held_out: [h], distances of held-out points to the reference.
    Returns:
      None for h < 99, whose 1 % quantile would be below the least of them.
    """
    if len(held_out) < LEAST_HELD_OUT:
        return None
    return float(np.quantile(held_out, 0.01, method="weibull"))


def _memorization(own, limit):
    closer = _mean(own < limit)
    if closer.standard_error is None:
        return {"memorization": closer.value}
    return {
        "memorization": closer.value,
        "memorization_standard_error": closer.standard_error,
    }


def _quantiles(distances, prefix):
    quantiles = {
        f"{prefix}quantile_{q:g}": float(np.quantile(distances, q))
        for q in (0, 0.01, 0.1, 0.5, 0.9)
    }
    return quantiles | {f"{prefix}copies": float(np.count_nonzero(distances == 0))}


def _median_error(values: np.ndarray) -> float | None:
    # The rank of the median among n has standard deviation √n / 2 (Woodruff 1952).
    half = 0.5 / math.sqrt(len(values))
    if len(values) < 4:
        return None
    low, high = np.quantile(values, [0.5 - half, 0.5 + half])
    return float(high - low) / 2
