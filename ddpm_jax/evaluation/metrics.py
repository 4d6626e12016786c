"""Inception score and kernel distance, and what every metric returns.

Fréchet distances are in `frechet`, metrics of neighbourhoods in `neighbors`. NumPy alone; sums
are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax.evaluation.distances import MAX_BYTES, as_rows


class Estimate(NamedTuple):
    """A metric's value.

    standard_error: over draws of the generated samples, with the reference held fixed; None where
      the samples are too few to tell.
    details: further numbers, named.
    """

    value: float
    standard_error: float | None
    details: dict[str, float]


def inception_score(logits: np.ndarray, splits: int = 10) -> Estimate:
    """The Inception score exp(E KL(p(y|x) ‖ p(y))) (Salimans et al. 2016, arXiv:1606.03498, §4).

    As in OpenAI's code: the softmax is over all logits given (1008 of them there, without the last
    layer's bias), the splits are contiguous and in the order given, and p(y) is each split's own.

    Args:
      logits: [n, classes].
      splits: number of splits.
    Returns:
      value: the mean over the splits. standard_error: from the score's linearisation, whose
      influence of a sample is its KL(p(y|x) ‖ p(y)). details: `std`, the population standard
      deviation over the splits, which is what papers write after "±"; it tells of a split's
      spread, √splits times the value's.
    Raises:
      ValueError: fewer samples than splits, no splits, or as `distances.as_rows`.
    """
    if splits < 1:
        raise ValueError(f"splits={splits}: at least 1 is needed")
    logits = as_rows(logits, splits, "logits")
    n = len(logits)
    scores, variances = [], []
    for i in range(splits):
        part = logits[i * n // splits : (i + 1) * n // splits].astype(np.float64)
        log_p = part - _log_sum_exp(part, axis=1)
        log_marginal = _log_sum_exp(log_p, axis=0) - math.log(len(part))
        divergence = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        scores.append(math.exp(divergence.mean()))
        squares = np.square(divergence - divergence.mean()).sum()
        variances.append(scores[-1] ** 2 * squares / (len(part) * max(len(part) - 1, 1)))
    error = math.sqrt(sum(variances)) / splits if n >= 2 * splits else None
    return Estimate(float(np.mean(scores)), error, {"std": float(np.std(scores))})


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))


def kd(
    features: np.ndarray, reference_features: np.ndarray, max_bytes: int = MAX_BYTES
) -> Estimate:
    """The kernel distance: the unbiased MMD² with k(x, y) = (⟨x, y⟩/d + 1)³.

    Bińkowski et al. 2018, arXiv:1801.01401, §4 (KID, where the features are Inception's), on the
    whole sets and not as the mean over subsets, which has the same expectation and more variance.
    Equal distributions give 0 in expectation, so the value may be negative.

    Args:
      features: generated, [n, d]. reference_features: [m, d].
      max_bytes: about what a block of the kernel's matrix takes.
    Returns:
      standard_error: over draws of the generated samples, the reference held fixed. Given the
      reference the value is a U-statistic of second degree; both terms of its variance (Hoeffding
      1948) are estimated without bias, so it holds as well for equal distributions, where the
      first vanishes. None for n < 4.
    Raises:
      ValueError: n < 2 or m < 2, or as `distances.as_rows`.
    """
    x = as_rows(features, 2, "samples")
    y = as_rows(reference_features, 2, "reference", x.shape[1])
    n, m = len(x), len(y)
    reference_sum = sum(_off_diagonal(k, rows).sum() for rows, k in _kernel(y, y, max_bytes))
    to_reference = np.concatenate([k.mean(axis=1) for _, k in _kernel(x, y, max_bytes)])
    row_sums, squares = np.empty(n), 0.0
    for rows, k in _kernel(x, x, max_bytes):
        k -= to_reference[rows, None]
        k -= to_reference
        h = _off_diagonal(k, rows)
        row_sums[rows] = h.sum(axis=1)
        squares += np.einsum("ij,ij->", h, h)
    value = row_sums.sum() / (n * (n - 1)) + reference_sum / (m * (m - 1))
    return Estimate(float(value), _u_statistic_error(row_sums, squares), {})


def _kernel(x: np.ndarray, y: np.ndarray, max_bytes: int) -> Iterator[tuple[slice, np.ndarray]]:
    y = y.astype(np.float64)  # And so is its product with float32.
    step = max(1, max_bytes // (16 * len(y)))
    for start in range(0, len(x), step):
        base = x[start : start + step] @ y.T / y.shape[1] + 1
        yield slice(start, start + len(base)), base * base * base


def _off_diagonal(k: np.ndarray, rows: slice) -> np.ndarray:
    k[np.arange(len(k)), np.arange(rows.start, rows.stop)] = 0
    return k


def _u_statistic_error(row_sums: np.ndarray, squares: float) -> float | None:
    """The standard error of Σ_{i≠j} h_ij / n(n − 1) from h's row sums and its squares' sum."""
    n = len(row_sums)
    if n < 4:
        return None
    # Means of h_ij h_kl over distinct indices, with two, one or no index shared.
    chained = np.square(row_sums).sum() - squares
    apart = row_sums.sum() ** 2 - 4 * chained - 2 * squares
    two = squares / (n * (n - 1))
    one = chained / (n * (n - 1) * (n - 2))
    none = apart / (n * (n - 1) * (n - 2) * (n - 3))
    first, second = one - none, max(two - none, 0.0)
    # The first is never below 0 but its estimate may be. To cut it there would add a bias; half
    # the least variance possible guards against nonsense.
    return math.sqrt(max(4 * (n - 2) * first + 2 * second, second) / (n * (n - 1)))
