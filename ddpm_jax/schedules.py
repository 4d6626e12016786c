"""The forward process: β_t and all that follows from it (paper, Eqs. 2, 4, 7).

Everything is derived in float64 with NumPy and becomes a float32 pytree once. Arrays are indexed
as the paper indexes them: entry t belongs to time t = 1..T, entry 0 to the data, so that
`alpha_bar[0] == 1` and Eq. 7 may read `alpha_bar[t - 1]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The constants of a chain of T steps, each a float32 array [T+1] indexed by the paper's t.

    Entries at 0, where an equation does not speak of t = 0, are filled with harmless values.
    """

    beta: jax.Array  # β_t                                                            Eq. 2
    alpha: jax.Array  # α_t = 1 − β_t                                                  Eq. 4
    alpha_bar: jax.Array  # ᾱ_t = ∏ α_s                                                Eq. 4
    one_minus_alpha_bar: jax.Array  # 1 − ᾱ_t, the variance of q(x_t|x_0)              Eq. 4
    sqrt_alpha_bar: jax.Array  # √ᾱ_t                                                  Eq. 4
    sqrt_one_minus_alpha_bar: jax.Array  # √(1 − ᾱ_t)                                  Eq. 4
    log_one_minus_alpha_bar: jax.Array  # log(1 − ᾱ_t); entry 0: that of 1
    posterior_mean_x0: jax.Array  # √ᾱ_{t−1} β_t / (1 − ᾱ_t), x_0's share in μ̃_t       Eq. 7
    posterior_mean_xt: jax.Array  # √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t), x_t's share in μ̃_t Eq. 7
    posterior_mean_xt_minus_1: jax.Array  # the same less 1, free of cancellation
    posterior_variance: jax.Array  # β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t); β̃_1 = 0     Eq. 7
    log_beta: jax.Array  # log β_t
    log_posterior_variance: jax.Array  # log β̃_t, with β̃_2 at t = 1
    mu_scale: jax.Array  # μ̃ of this chain = mu_scale · (μ̃ of the trained chain)
    mu_shift: jax.Array  # + mu_shift · x_t; 1 and 0 unless the chain is respaced
    timesteps: jax.Array  # int32: the network's time at each index

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return self.beta.shape[0] - 1


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t linear in t, from β_1 = beta_start to β_T = beta_end: the paper's schedule (§4)."""
    return from_betas(np.linspace(beta_start, beta_end, num_steps, dtype=np.float64))


def quadratic(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """√β_t linear in t, from √beta_start to √beta_end (authors' code, "quad")."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def constant(num_steps: int = 1000, beta: float = 0.02) -> Schedule:
    """β_t = beta at every t (authors' code, "const")."""
    return from_betas(np.full(num_steps, beta, dtype=np.float64))


def warmup(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, fraction: float = 0.1
) -> Schedule:
    """β_t linear up to beta_end over the first `fraction` of the steps, then constant.

    Authors' code, "warmup10" and "warmup50".
    """
    rising = int(num_steps * fraction)
    betas = np.full(num_steps, beta_end, dtype=np.float64)
    betas[:rising] = np.linspace(beta_start, beta_end, rising)
    return from_betas(betas)


def jsd(num_steps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """β_t = 1 / (T − t + 1), at most max_beta (authors' code, "jsd").

    Theirs ends with β_T = 1, where x_T keeps nothing of x_0 and Eq. 15 has no value.
    """
    return from_betas(np.minimum(1.0 / np.arange(num_steps, 0, -1), max_beta))


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) · π/2), with β_t at most max_beta.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), Eq. 17; s = offset.
    """
    times = np.arange(num_steps + 1) / num_steps
    f = np.cos((times + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "quadratic": quadratic,
    "constant": constant,
    "warmup": warmup,
    "jsd": jsd,
    "cosine": cosine,
}


def from_betas(betas: Sequence[float] | np.ndarray) -> Schedule:
    """The schedule with β_1..β_T = betas.

    Args:
      betas: [T], each in (0, 1).
    Raises:
      ValueError: betas is not a vector, or a β lies outside (0, 1), or ᾱ does not fall.
    """
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a vector of at least one number, not {betas.shape}")
    bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if bad.size:
        raise ValueError(
            f"beta must lie in (0, 1), but beta at t = {bad[0] + 1} of {betas.size} is "
            f"{betas[bad[0]]:g}; a linear schedule scaled to fewer steps needs a lower beta_end"
        )
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    if np.any(np.diff(log_alpha_bar) >= 0):
        raise ValueError("alpha_bar must fall at every step; some betas are too small to count")
    if np.exp(log_alpha_bar[-1]) < np.finfo(np.float32).tiny:
        raise ValueError(
            f"alpha_bar falls below the smallest float32: it ends at exp({log_alpha_bar[-1]:.1f}); "
            "use smaller betas or fewer steps"
        )
    return _from_log_alpha_bar(log_alpha_bar, np.arange(betas.size + 1))


def respace(schedule: Schedule, timesteps: Sequence[int] | np.ndarray) -> Schedule:
    """The shorter chain over a subset of a schedule's times, with the same ᾱ at each of them.

    β'_i = 1 − ᾱ_{τ_i}/ᾱ_{τ_{i−1}}, and all else follows, β̃'_2 at the first step included. The
    result's `timesteps` are the times that the network was trained with. Not traceable by jit.

    Args:
      schedule: the chain to shorten.
      timesteps: [S], increasing, out of 1..T.
    Raises:
      ValueError: timesteps is empty, not increasing, or leaves 1..T.
    """
    kept = np.asarray(timesteps)
    if kept.ndim != 1 or kept.size == 0 or not np.issubdtype(kept.dtype, np.integer):
        raise ValueError(f"timesteps must be a vector of integers, not {timesteps!r}")
    if np.any(np.diff(kept) <= 0) or kept[0] < 1 or kept[-1] > schedule.num_steps:
        raise ValueError(f"timesteps must increase within 1..{schedule.num_steps}, not {kept}")
    if kept.size == schedule.num_steps:
        return schedule
    kept = np.concatenate([[0], kept])
    old = jax.tree.map(lambda x: np.asarray(x, dtype=np.float64), schedule)
    # Of β and α = 1 − β, the smaller one has kept its relative accuracy in float32.
    log_alpha = np.where(old.beta < 0.5, np.log1p(-old.beta), np.log(old.alpha))
    # The trained chain's μ̃ coefficients, from this one's (which may be respaced itself).
    trained_x0 = old.posterior_mean_x0[kept] / old.mu_scale[kept]
    trained_xt = (old.posterior_mean_xt - old.mu_shift)[kept] / old.mu_scale[kept]
    return _from_log_alpha_bar(
        np.cumsum(log_alpha)[kept], np.asarray(schedule.timesteps)[kept], (trained_x0, trained_xt)
    )


def spaced(num_steps: int, count: int) -> np.ndarray:
    """`count` times spread evenly over 1..num_steps, both ends included: int64 [count].

    One time alone is num_steps, since every sampler starts there.

    Raises:
      ValueError: count is not in 1..num_steps.
    """
    if not 1 <= count <= num_steps:
        raise ValueError(f"cannot choose {count} of {num_steps} steps")
    if count == 1:
        return np.array([num_steps])
    return np.round(np.linspace(1, num_steps, count)).astype(np.int64)


def _from_log_alpha_bar(
    log_alpha_bar: np.ndarray,
    timesteps: np.ndarray,
    trained_mean: tuple[np.ndarray, np.ndarray] | None = None,
) -> Schedule:
    """All constants from log ᾱ, float64 [T+1] that starts with 0.

    trained_mean: the coefficients of x_0 and x_t in the trained chain's μ̃, where it is another.
    """
    steps = np.diff(log_alpha_bar)
    beta = np.concatenate([[0.0], -np.expm1(steps)])
    alpha = np.concatenate([[1.0], np.exp(steps)])
    alpha_bar = np.exp(log_alpha_bar)
    rest = -np.expm1(log_alpha_bar)  # 1 − ᾱ_t.
    before = np.concatenate([[0.0], rest[:-1]])  # 1 − ᾱ_{t−1}.
    divisor = np.concatenate([[1.0], rest[1:]])
    # Late in a chain 1 − ᾱ_t is 1 but for the digits that its logarithm consists of.
    log_rest = np.where(alpha_bar < 0.5, np.log1p(-np.minimum(alpha_bar, 0.5)), np.log(divisor))
    mean_x0 = np.sqrt(np.concatenate([[1.0], alpha_bar[:-1]])) * beta / divisor
    mean_xt = np.sqrt(alpha) * before / divisor
    # 1 − √α_t (1 − ᾱ_{t−1})/(1 − ᾱ_t), over a common denominator and without differences of
    # nearly equal numbers: (1 − ᾱ_t) − √α_t (1 − ᾱ_{t−1}) = (1 − √α_t)(1 + √α_t ᾱ_{t-1}).
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    root = np.sqrt(alpha)
    minus_1 = -(beta / (1 + root)) * (1 + root * previous) / divisor
    variance = beta * before / divisor
    # β̃_1 = 0 has no logarithm: β̃_2 stands in for it, as in the authors' code.
    first = variance[2] if len(variance) > 2 else beta[1]
    floored = np.concatenate([[1.0, first], variance[2:]])
    trained_x0, trained_xt = trained_mean or (mean_x0, mean_xt)
    scale = np.divide(mean_x0, trained_x0, out=np.ones_like(beta), where=trained_x0 > 0)
    float32 = lambda x: jnp.asarray(x, dtype=jnp.float32)  # noqa: E731
    return Schedule(
        beta=float32(beta),
        alpha=float32(alpha),
        alpha_bar=float32(alpha_bar),
        one_minus_alpha_bar=float32(rest),
        sqrt_alpha_bar=float32(np.sqrt(alpha_bar)),
        sqrt_one_minus_alpha_bar=float32(np.sqrt(rest)),
        log_one_minus_alpha_bar=float32(log_rest),
        posterior_mean_x0=float32(mean_x0),
        posterior_mean_xt=float32(mean_xt),
        posterior_mean_xt_minus_1=float32(minus_1),
        posterior_variance=float32(variance),
        log_beta=float32(np.log(np.concatenate([[1.0], beta[1:]]))),
        log_posterior_variance=float32(np.log(floored)),
        mu_scale=float32(scale),
        mu_shift=float32(mean_xt - scale * trained_xt),
        timesteps=jnp.asarray(timesteps, dtype=jnp.int32),
    )
