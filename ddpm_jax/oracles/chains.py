"""A chain's constants in float64, derived from its β_t once more (paper, Eqs. 2, 4, 7).

Schedules are float32; what is computed here is exact for the β_t that they hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.diffusion import Process
from ddpm_jax.schedules import Schedule, spaced


class Chain(NamedTuple):
    """Constants of a chain of S steps, float64 [S+1], indexed by the paper's t; entry 0 is ᾱ_0's.

    trained: int64, which step of the trained chain each step is; unless shortened, its own index.
    """

    alpha_bar: np.ndarray  # ᾱ_t
    rest: np.ndarray  # 1 − ᾱ_t
    beta: np.ndarray  # β_t
    posterior_variance: np.ndarray  # β̃_t; β̃_1 = 0
    floor: np.ndarray  # β̃_t, with β̃_2 at t = 1
    mean_x0: np.ndarray  # x_0's share in μ̃_t
    mean_xt: np.ndarray  # x_t's share in μ̃_t
    trained: np.ndarray

    @property
    def num_steps(self) -> int:
        """S, the number of steps."""
        return len(self.beta) - 1


def chain(schedule: Schedule, steps: int = 0) -> Chain:
    """The float64 constants of a schedule, or of its chain over `steps` times spread evenly.

    Raises:
      ValueError: steps is not in 0..T.
    """
    beta = np.asarray(schedule.beta, dtype=np.float64)
    alpha = np.asarray(schedule.alpha, dtype=np.float64)
    # Of β and 1 − β, the smaller one has kept its relative accuracy in float32.
    log_alpha = np.where(beta < 0.5, np.log1p(-np.minimum(beta, 0.5)), np.log(alpha))
    log_alpha_bar = np.cumsum(log_alpha)
    trained = np.arange(len(beta))
    if steps:
        trained = np.concatenate([[0], spaced(schedule.num_steps, steps)])
        log_alpha_bar = log_alpha_bar[trained]
    alpha_bar, rest = np.exp(log_alpha_bar), -np.expm1(log_alpha_bar)
    step = np.diff(log_alpha_bar)
    beta = np.append(0.0, -np.expm1(step))
    mean_x0, mean_xt, variance = np.zeros((3, len(beta)))
    mean_x0[1:] = np.sqrt(alpha_bar[:-1]) * beta[1:] / rest[1:]
    mean_xt[1:] = np.exp(step / 2) * rest[:-1] / rest[1:]
    variance[1:] = beta[1:] * rest[:-1] / rest[1:]
    floor = variance.copy()
    floor[1] = variance[2] if len(beta) > 2 else beta[1]
    return Chain(alpha_bar, rest, beta, variance, floor, mean_x0, mean_xt, trained)


def log_excess(xp: Any, first: Any, gain: Any) -> Any:
    """log(σ*²_t / β̃_t) from gain = c² Var[x_0|x_t] / β̃_t, where c is x_0's share in μ̃_t.

    At t = 1 (`first`), where β̃_1 = 0, σ*² is Var[x_0|x_1], yet at least β̃_2. xp: numpy or
    jax.numpy.
    """
    return xp.where(first, xp.log(xp.maximum(gain, 1.0)), xp.log1p(gain))


def model_variance(
    process: Process, trained: Chain, chain: Chain, t: int, unexplained: np.ndarray
) -> np.ndarray:
    """σ²_t of the model at index t of `chain`, in the shape of Var[x_0|x_t] (`unexplained`).

    A learned variance is what the exact network of the trained chain returns at that step.
    """
    if process.variance == "fixed_small" or (process.variance == "fixed_large" and t == 1):
        return np.full_like(unexplained, chain.floor[t])
    if process.variance == "fixed_large":
        return np.full_like(unexplained, chain.beta[t])
    k = chain.trained[t]
    log_ratio = log_excess(np, k == 1, trained.mean_x0[k] ** 2 * unexplained / trained.floor[k])
    if process.variance == "learned":
        return trained.floor[k] * np.exp(log_ratio)
    span = np.log(trained.beta[k] / trained.floor[k])
    share = log_ratio / span if span else np.zeros_like(log_ratio)
    return chain.floor[t] * (chain.beta[t] / chain.floor[t]) ** share
