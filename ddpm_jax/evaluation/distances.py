"""Squared Euclidean distances between rows, a block of the matrix at a time.

Everything that needs distances (neighbours, precision, recall, density, coverage) takes them from
here. NumPy alone; sums are float64.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import numpy as np

MAX_BYTES = 2**28
LARGEST = 1e15  # Of a feature: the metrics' sums of its twelfth power stay finite.


def as_rows(features: np.ndarray, least: int, name: str, width: int | None = None) -> np.ndarray:
    """The features as a finite float32 or float64 array [n, d], for one-line errors early.

    Args:
      features: [n, d]; float32 and float64 are kept, anything else becomes float64.
      least: the smallest n that will do.
      name: what the rows are, for the errors.
      width: the d that they must have, where it is known.
    Raises:
      ValueError: another rank or width, fewer rows, or values that are not finite or beyond ±1e15.
    """
    rows = np.asarray(features)
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(
            f"{name}: the shape is {rows.shape}, but rows of features [n, d] are needed"
        )
    if width is not None and rows.shape[1] != width:
        raise ValueError(f"{name}: {rows.shape[1]} features a row, but the others have {width}")
    if len(rows) < least:
        raise ValueError(f"{name}: {len(rows)} rows, but at least {least} are needed; take more")
    bad = len(rows) - np.count_nonzero(np.isfinite(rows).all(axis=1))
    if bad:
        raise ValueError(f"{name}: {bad} of {len(rows)} rows have values that are not finite")
    largest = max(rows.max(initial=0), -rows.min(initial=0))
    if largest > LARGEST:
        raise ValueError(
            f"{name}: a value of magnitude {largest:.3g}; rescale the features below {LARGEST:g}"
        )
    return rows


def nearest(
    queries: np.ndarray,
    reference: np.ndarray,
    k: int = 1,
    exclude_self: bool = False,
    max_bytes: int = MAX_BYTES,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest reference rows of each query, the nearest first.

    The distances are those of the rows' differences, squared and summed in float64: 0 for
    identical rows. Of equal distances the lowest position comes first.

    Args:
      queries: [n, d]. reference: [m, d].
      exclude_self: whether query i is reference row i, which is then not its own neighbour.
      max_bytes: about what the block of distances takes.
    Returns:
      squared distances, float64 [n, k]; positions in the reference, int64 [n, k].
    Raises:
      ValueError: k < 1, there are no k neighbours, or as `as_rows`.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least 1 neighbour is needed")
    queries = as_rows(queries, 1, "queries")
    reference = as_rows(reference, k + exclude_self, "reference", queries.shape[1])
    if exclude_self and len(queries) != len(reference):
        raise ValueError("exclude_self: the queries must be the reference rows themselves")
    squared = np.empty((len(queries), k))
    positions = np.empty((len(queries), k), np.int64)
    for block in blocks(queries, reference, max_bytes):
        if exclude_self:
            block.squared[np.arange(len(block.squared)), np.arange(len(reference))[block.rows]] = (
                np.inf
            )
        kth = np.partition(block.squared, k - 1, axis=1)[:, k - 1 : k]
        candidates = block.near(kth) | (block.squared < kth)
        block.settle(candidates)
        rows, columns = np.nonzero(candidates)
        found = block.squared[rows, columns]
        order = np.lexsort((columns, found, rows))
        counts = np.count_nonzero(candidates, axis=1)
        first = np.cumsum(counts) - counts
        winners = order[first[:, None] + np.arange(k)]
        squared[block.rows], positions[block.rows] = found[winners], columns[winners]
    return squared, positions


@dataclasses.dataclass(frozen=True)
class Block:
    """The squared distances of some queries to all reference rows.

    rows: which queries.
    squared: float64 [b, m]; off by at most `near`'s bound, and by 1e-6 of themselves; exactly 0
      for identical rows. Entries that were settled are exact to float64's rounding.
    """

    rows: slice
    squared: np.ndarray
    _queries: _Rows
    _reference: _Rows
    _max_bytes: int

    def near(self, threshold: np.ndarray | float) -> np.ndarray:
        """Which entries rounding might put on the wrong side of the threshold: bool [b, m]."""
        off = self.squared - threshold
        return np.abs(off, out=off) <= self._bound

    def settle(self, where: np.ndarray) -> None:
        """Computes the chosen entries (bool [b, m]) anew, from the rows' differences."""
        rows, columns = np.nonzero(where & np.isfinite(self.squared))
        self.squared[rows, columns] = 0
        differ = self._queries.digest[rows] != self._reference.digest[columns]
        rows, columns = rows[differ], columns[differ]
        step = max(1, self._max_bytes // (32 * self._reference.values.shape[1]))
        for start in range(0, len(rows), step):
            i, j = rows[start : start + step], columns[start : start + step]
            difference = self._queries.values[i].astype(np.float64) - self._reference.values[j]
            self.squared[i, j] = np.einsum("pd,pd->p", difference, difference)

    @functools.cached_property
    def _bound(self) -> np.ndarray:
        """What each entry may be off by, apart from 1e-6 of itself: float64 [b, m]."""
        # |error| of a dot product of length d is at most d·ε|x||y| (Higham 2002, §3.1); with the
        # norms' and the centring's own errors, and generously.
        factor = 4 * (self._reference.values.shape[1] + 8) * np.finfo(np.float64).eps
        return factor * self._queries.norm[:, None] + factor * self._reference.norm


def blocks(
    queries: np.ndarray, reference: np.ndarray, max_bytes: int = MAX_BYTES
) -> Iterator[Block]:
    """The matrix of squared distances in blocks of queries, in order; never the whole of it.

    Besides the block a float64 copy of the reference is held.

    Args:
      queries: float [n, d]. reference: float [m, d].
      max_bytes: about what a block takes, with the arrays made while working on it.
    """
    # Distances do not change when both are shifted, and errors grow with the norms.
    centre = reference.mean(axis=0, dtype=np.float64)
    centred = reference - centre
    reference_rows = _Rows.of(reference, centred)
    step = max(1, max_bytes // (32 * len(reference)))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        shifted = part - centre
        query_rows = _Rows.of(part, shifted)
        squared = shifted @ centred.T
        squared *= -2
        squared += query_rows.norm[:, None]
        squared += reference_rows.norm
        np.maximum(squared, 0, out=squared)
        rows = slice(start, start + len(part))
        block = Block(rows, squared, query_rows, reference_rows, max_bytes)
        block.settle(squared <= 1e6 * block._bound)
        yield block


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows [n, d], their squared norms [n] about the centre, and a hash [n] of their values."""

    values: np.ndarray
    norm: np.ndarray
    digest: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, centred: np.ndarray) -> _Rows:
        # Copies are told by their hash: sets with thousands of them (a collapsed model's) would
        # else be compared pair by pair.
        digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values)
        norm = np.einsum("nd,nd->n", centred, centred)
        return cls(values, norm, np.frombuffer(b"".join(digests), np.uint64))
