"""Data distributions whose noised versions and denoisers are known in closed form.

Gaussians, mixtures of Gaussians and finite sets of points. Internally each is a mixture of k
Gaussians with diagonal covariances over flat x [n, d], a full covariance in the basis of its
eigenvectors. NumPy functions work in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax.oracles.chains import chain
from ddpm_jax.schedules import Schedule

# Where samples take their randomness from each key. No step of a chain has this number, so the
# same keys can serve for the data and for what is done with them.
_POSITION = 2**32 - 1


class Parts(NamedTuple):
    """A mixture over flat x: weights [k], means and variances [k, d], basis [d, d] or None.

    With a basis, means and variances belong to x @ basis, whose columns are eigenvectors.
    """

    weights: Any
    means: Any
    variances: Any
    basis: Any


class Moments(NamedTuple):
    """What is known of x_0 given x_t, [n, ...]: E[x_0|x_t], E[ε|x_t], and each Var[x_0|x_t]."""

    x0: Any
    eps: Any
    variance: Any


class Distribution:
    """What `Gaussian`, `Mixture` and `Points` have in common."""

    shape: tuple[int, ...]
    parts: Parts

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the variance of each coordinate, float64 [*shape]."""
        weights, means, variances, basis = self.parts
        mean = weights @ means
        variance = weights @ (variances + (means - mean) ** 2)
        if basis is not None:
            mean, variance = basis @ mean, basis**2 @ variance
        return mean.reshape(self.shape), variance.reshape(self.shape)

    def sample(self, keys: jax.Array) -> jax.Array:
        """Draws x_0, float32 [n, *shape], one for each of the keys [n]."""
        weights, means, variances, basis = (
            None if part is None else jnp.asarray(part, jnp.float32) for part in self.parts
        )

        def draw(key):
            key = jax.random.fold_in(key, np.uint32(_POSITION))
            part = jax.random.choice(jax.random.fold_in(key, 0), len(weights), p=weights)
            noise = keys_lib.normal(key[None], 1, means.shape[1:])[0]
            x = means[part] + jnp.sqrt(variances[part]) * noise
            return (x if basis is None else (basis * x).sum(axis=1)).reshape(self.shape)

        return jax.vmap(draw)(keys)

    def posterior(self, schedule: Schedule, t: int, x_t: np.ndarray) -> Moments:
        """E[x_0|x_t], E[ε|x_t] and Var[x_0|x_t] of each coordinate, float64 [n, *shape].

        Args:
          t: index of the schedule, in 1..T.
          x_t: [n, *shape].
        Raises:
          ValueError: t or the shape of x_t is another.
        """
        constants = chain(schedule)
        _check_time(t, 1, constants.num_steps)
        x = flatten(x_t, self.shape)
        constants = (np.full((1, 1), c[t]) for c in (constants.alpha_bar, constants.rest))
        return Moments(
            *(m.reshape(-1, *self.shape) for m in posterior(np, self.parts, *constants, x))
        )


def posterior(xp: Any, parts: Parts, alpha_bar: Any, rest: Any, x: Any) -> Moments:
    """The moments of x_0 given x_t = x [n, d], for ᾱ_t and 1 − ᾱ_t [n, 1] or [1, 1].

    xp is numpy (float64) or jax.numpy (float32). x̂_0 and ε are both formed without differences
    of nearly equal numbers, at either end of the chain.
    """
    weights, means, variances, basis = parts
    if basis is not None:
        x = _rotate(x, basis)
    alpha_bar, rest, root = alpha_bar[:, None], rest[:, None], xp.sqrt(alpha_bar)[:, None]
    total = alpha_bar * variances + rest  # Var[x_t] in each part, [n, k, d].
    difference = x[:, None] - root * means
    shares = _shares(xp, xp.log(weights), root * means, difference, total)[..., None]
    x0_part = means + root * variances / total * difference
    x0 = (shares * x0_part).sum(axis=1)
    eps = (shares * xp.sqrt(rest) / total * difference).sum(axis=1)
    variance = (shares * (variances * rest / total + (x0_part - x0[:, None]) ** 2)).sum(axis=1)
    if basis is not None:
        x0, eps, variance = (
            _rotate(x0, basis.T),
            _rotate(eps, basis.T),
            _rotate(variance, basis.T**2),
        )
    return Moments(x0, eps, variance)


def _shares(xp, log_weights, means, difference, variance):
    """P(part | x) [n, k] from x − mean and variances [n, k, d].

    Logits are taken relative to the likeliest part's, each z² − z'² as (z − z')(z + z'), whose
    first factor keeps its digits where two parts differ by little or in few coordinates.
    """
    variance = xp.broadcast_to(variance, difference.shape)
    means = xp.broadcast_to(means, difference.shape)
    rough = log_weights - 0.5 * (difference**2 / variance + xp.log(variance)).sum(axis=-1)
    best = xp.argmax(rough, axis=1)[:, None, None]
    pick = lambda a: xp.take_along_axis(a, best, axis=1)  # noqa: E731
    scale, best_scale = xp.sqrt(variance), xp.sqrt(pick(variance))
    minus = (means - pick(means)) / best_scale + difference * (1 / best_scale - 1 / scale)
    plus = pick(difference) / best_scale + difference / scale
    logits = (0.5 * minus * plus - xp.log(scale / best_scale)).sum(axis=-1) + log_weights
    shares = xp.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _rotate(x, matrix):
    """x @ matrix in full float32, whatever the device makes of products of matrices."""
    return (x[:, :, None] * matrix).sum(axis=1)


class _Density(Distribution):
    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """log density in nats, float64 [n], at x [n, *shape]; it needs variances above zero.

        Raises:
          ValueError: another shape, or a variance of zero.
        """
        x, (weights, means, variances, basis) = flatten(x, self.shape), self.parts
        if (variances <= 0).any():
            raise ValueError("a distribution with a variance of zero has no density")
        x = x if basis is None else x @ basis
        squares = (x[:, None] - means) ** 2 / variances
        logs = np.log(weights) - 0.5 * (squares + np.log(2 * math.pi * variances)).sum(axis=-1)
        return np.logaddexp.reduce(logs, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian(_Density):
    """N(mean, covariance).

    Args:
      mean: [*shape], channels last.
      covariance: one variance; or [*shape], one for each coordinate; or [d, d] over the flattened
        coordinates.
    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or a covariance that is none.
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        mean, covariance = _finite("mean", self.mean), _finite("covariance", self.covariance)
        d = mean.size
        if mean.ndim == 0 or covariance.shape not in ((), mean.shape, (d, d)):
            raise ValueError(
                f"a mean [*shape] asks for a covariance [], [*shape] or [d, d], not "
                f"{list(mean.shape)} and {list(covariance.shape)}"
            )
        basis, variances = None, covariance
        if covariance.shape == (d, d) != mean.shape:
            if not np.allclose(covariance, covariance.T):
                raise ValueError("the covariance must be symmetric")
            variances, basis = np.linalg.eigh(covariance)
            # A singular matrix has eigenvalues of zero, give or take rounding.
            tiny = 1e-12 * np.abs(variances).max()
            variances = np.where(np.abs(variances) < tiny, 0.0, variances)
        if not (variances >= 0).all():
            raise ValueError("the covariance must have no negative eigenvalue")
        flat = mean.reshape(1, d) if basis is None else mean.reshape(1, d) @ basis
        variances = np.broadcast_to(variances, mean.shape if basis is None else (d,))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)
        object.__setattr__(self, "shape", mean.shape)
        object.__setattr__(self, "parts", Parts(np.ones(1), flat, variances.reshape(1, d), basis))

    def marginal(self, schedule: Schedule, t: int) -> Gaussian:
        """q(x_t), for an index t in 0..T: N(√ᾱ_t mean, ᾱ_t covariance + (1 − ᾱ_t) I)."""
        alpha_bar, rest = _constants(schedule, t)
        noise = rest if self.parts.basis is None else rest * np.eye(self.mean.size)
        return Gaussian(np.sqrt(alpha_bar) * self.mean, alpha_bar * self.covariance + noise)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(_Density):
    """Σ_k weights_k N(means_k, variances_k).

    Args:
      weights: [k], positive; they are divided by their sum.
      means: [k, *shape], channels last.
      variances: one for all; [k]; or [k, *shape].
    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, a weight ≤ 0 or a
        variance < 0.
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def __post_init__(self) -> None:
        means, variances = _finite("means", self.means), _finite("variances", self.variances)
        if means.ndim < 2 or variances.shape not in ((), means.shape[:1], means.shape):
            raise ValueError(
                f"means [k, *shape] ask for variances [], [k] or [k, *shape], not "
                f"{list(means.shape)} and {list(variances.shape)}"
            )
        if not (variances >= 0).all():
            raise ValueError("variances must not be negative")
        weights, flat = _weights(self.weights, len(means)), means.reshape(len(means), -1)
        if variances.ndim <= 1:
            variances = np.broadcast_to(variances.reshape(-1, 1), flat.shape).reshape(means.shape)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "variances", variances)
        object.__setattr__(self, "shape", means.shape[1:])
        object.__setattr__(self, "parts", Parts(weights, flat, variances.reshape(flat.shape), None))

    def marginal(self, schedule: Schedule, t: int) -> Mixture:
        """q(x_t), for an index t in 0..T: the same mixture of the parts' marginals."""
        alpha_bar, rest = _constants(schedule, t)
        means = np.sqrt(alpha_bar) * self.means
        return Mixture(self.weights, means, alpha_bar * self.variances + rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Points(Distribution):
    """A finite set of points, such as 8-bit images scaled to [−1, 1].

    Args:
      points: [k, *shape], channels last.
      weights: [k], positive; they are divided by their sum. Equal unless given.
    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or a weight ≤ 0.
    """

    points: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        points = _finite("points", self.points)
        if points.ndim < 2 or len(points) == 0:
            raise ValueError(f"points must be [k, *shape], not {list(points.shape)}")
        weights = np.ones(len(points)) if self.weights is None else self.weights
        weights, flat = _weights(weights, len(points)), points.reshape(len(points), -1)
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "shape", points.shape[1:])
        object.__setattr__(self, "parts", Parts(weights, flat, np.zeros_like(flat), None))

    def marginal(self, schedule: Schedule, t: int) -> Mixture:
        """q(x_t), for an index t in 0..T: Gaussians of variance 1 − ᾱ_t around √ᾱ_t times each."""
        alpha_bar, rest = _constants(schedule, t)
        return Mixture(self.weights, np.sqrt(alpha_bar) * self.points, rest)

    def nearest(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest point's index, int64 [n], and its distance, the largest of any coordinate's.

        A good sampler's samples are on the points, on each as often as its weight says.
        """
        samples, points = flatten(samples, self.shape), self.parts.means
        distance = np.abs(samples[:, None] - points).max(axis=-1)
        return distance.argmin(axis=1), distance.min(axis=1)


def _finite(name: str, values: Any) -> np.ndarray:
    values = np.array(values, dtype=np.float64)
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise ValueError(f"{name}: {bad} of {values.size} numbers are not finite")
    return values


def _constants(schedule, t):
    constants = chain(schedule)
    _check_time(t, 0, constants.num_steps)
    return constants.alpha_bar[t], constants.rest[t]


def _check_time(t, first, last):
    if not first <= t <= last:
        raise ValueError(f"t must lie in {first}..{last}, not {t}")


def flatten(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """x [n, *shape] as float64 [n, d].

    Raises:
      ValueError: another shape.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.shape[1:] != shape:
        raise ValueError(f"the data have shape {list(shape)}, but [n, *shape] is {list(x.shape)}")
    return x.reshape(len(x), -1)


def _weights(weights, count):
    weights = _finite("weights", weights)
    if weights.shape != (count,) or not (weights > 0).all():
        raise ValueError(f"weights must be {count} positive numbers, not {weights.tolist()}")
    return weights / weights.sum()
