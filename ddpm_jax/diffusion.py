"""q and p_θ: the closed form, the posterior and the parameterizations (paper, Eqs. 1-11, 15).

Three independent choices describe a model: what its network predicts (`PREDICTIONS`), what Σ_θ is
(`VARIANCES`), and what training minimises (`losses.OBJECTIVES`). Noise is always an argument here:
nothing draws. Everything is computed in float32, whatever dtype the network returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.schedules import Schedule

# A network, or anything in its place: (x_t, t) -> output. x_t is float32 [batch, ...], t is int32
# [batch], the time it was trained with in 1..T; the output is [..., C], or [..., 2C] where Σ is
# learned: the prediction's channels first, then the variance's.
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean [batch, ...], log variance in a shape that broadcasts to it."""

    mean: jax.Array
    log_variance: jax.Array

    @property
    def variance(self) -> jax.Array:
        """exp(log_variance)."""
        return jnp.exp(self.log_variance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Process:
    """A diffusion model but for its network: the schedule and two of the three choices.

    Raises:
      ValueError: an unknown prediction or variance.
    """

    schedule: Schedule
    prediction: str = dataclasses.field(default="eps", metadata={"static": True})
    variance: str = dataclasses.field(default="fixed_large", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction {self.prediction!r}: choose from {', '.join(PREDICTIONS)}"
            )
        if self.variance not in VARIANCES:
            raise ValueError(f"variance {self.variance!r}: choose from {', '.join(VARIANCES)}")

    @property
    def learns_variance(self) -> bool:
        """Whether the network's output has channels for the variance."""
        return self.variance in ("learned", "learned_range")


def at(constants: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
    """constants[t] in the shape [batch, 1, ...] that broadcasts against x [batch, ...].

    Raises:
      ValueError: see `check_times`; here 0 is a time as well.
    """
    check_times(t, x, constants.shape[0] - 1, first=0)
    return _broadcast(constants[t], x)


def check_times(t: jax.Array, x: jax.Array, num_steps: int, first: int = 1) -> None:
    """Refuses a t that is not an integer in first..num_steps for each example of x [batch, ...].

    Raises:
      ValueError: another shape or dtype; outside jit, also a time out of range, which indexing
        would silently take for another.
    """
    if t.shape != x.shape[:1] or not jnp.issubdtype(t.dtype, jnp.integer):
        raise ValueError(f"t must be integers [{x.shape[0]}], not {t.dtype} {list(t.shape)}")
    if not isinstance(t, jax.core.Tracer) and t.size:
        low, high = int(np.min(t)), int(np.max(t))
        if low < first or high > num_steps:
            raise ValueError(f"t must lie in {first}..{num_steps}, not {low}..{high}")


def q_sample(schedule: Schedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t(x_0, ε) = √ᾱ_t x_0 + √(1−ᾱ_t) ε, a draw from q(x_t|x_0) for ε ~ N(0, I). Eqs. 4, 9.

    Args:
      x0, noise: [batch, ...], of equal shape.
      t: integer [batch], in 0..T.
    Returns:
      float32 [batch, ...].
    """
    x0, noise = _float32(x0, noise)
    return at(schedule.sqrt_alpha_bar, t, x0) * x0 + (
        at(schedule.sqrt_one_minus_alpha_bar, t, x0) * noise
    )


def q_posterior(schedule: Schedule, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> Gaussian:
    """q(x_{t−1}|x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I). Eqs. 6, 7.

    β̃_1 = 0 has no logarithm; the log variance at t = 1 is that of β̃_2, as in the authors' code.

    Args:
      x0, x_t: [batch, ...], of equal shape.
      t: integer [batch], in 1..T.
    """
    x0, x_t = _float32(x0, x_t)
    check_times(t, x_t, schedule.num_steps)
    mean = at(schedule.posterior_mean_x0, t, x0) * x0 + at(schedule.posterior_mean_xt, t, x0) * x_t
    return Gaussian(mean, at(schedule.log_posterior_variance, t, x0))


class Prediction(NamedTuple):
    """What a network can predict: its target, and x̂_0 from its output. All [batch, ...]."""

    target: Callable[[Schedule, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    to_x0: Callable[[Schedule, jax.Array, jax.Array, jax.Array], jax.Array]


def _eps_target(schedule, x0, noise, x_t, t):
    return noise


def _eps_to_x0(schedule, output, x_t, t):  # Eq. 15.
    noise_part = at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * output
    return (x_t - noise_part) / at(schedule.sqrt_alpha_bar, t, x_t)


def _mu_target(schedule, x0, noise, x_t, t):  # μ̃_t of the chain that the network is trained on.
    mean = q_posterior(schedule, x0, x_t, t).mean
    return (mean - at(schedule.mu_shift, t, x_t) * x_t) / at(schedule.mu_scale, t, x_t)


def _mu_to_x0(schedule, output, x_t, t):  # Eq. 7, solved for x_0.
    mean = _mu_to_mean(schedule, output, x_t, t)
    x_t_part = at(schedule.posterior_mean_xt, t, x_t) * x_t
    return (mean - x_t_part) / at(schedule.posterior_mean_x0, t, x_t)


def _x0_target(schedule, x0, noise, x_t, t):
    return x0


def _x0_to_x0(schedule, output, x_t, t):
    return output


def _v_target(schedule, x0, noise, x_t, t):  # Salimans and Ho 2022 (arXiv:2202.00512), §4.
    return at(schedule.sqrt_alpha_bar, t, x0) * noise - (
        at(schedule.sqrt_one_minus_alpha_bar, t, x0) * x0
    )


def _v_to_x0(schedule, output, x_t, t):
    return at(schedule.sqrt_alpha_bar, t, x_t) * x_t - (
        at(schedule.sqrt_one_minus_alpha_bar, t, x_t) * output
    )


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(_eps_target, _eps_to_x0),
    "mu": Prediction(_mu_target, _mu_to_x0),
    "x0": Prediction(_x0_target, _x0_to_x0),
    "v": Prediction(_v_target, _v_to_x0),
}

VARIANCES = ("fixed_large", "fixed_small", "learned", "learned_range")


def predict_target(
    process: Process, x0: jax.Array, noise: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """What the network should output at x_t = x_t(x_0, ε): float32 [batch, ...]."""
    x0, noise, x_t = _float32(x0, noise, x_t)
    return PREDICTIONS[process.prediction].target(process.schedule, x0, noise, x_t, t)


def predict_x0(process: Process, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """x̂_0, unclipped, from the network's output: float32 [batch, ...]. Eq. 15 for ε."""
    prediction, _ = split_output(process, output, x_t)
    (x_t,) = _float32(x_t)
    return PREDICTIONS[process.prediction].to_x0(process.schedule, prediction, x_t, t)


def predict_eps(schedule: Schedule, x0_hat: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The ε for which x_t = x_t(x̂_0, ε): Eq. 15 solved for ε. [batch, ...]."""
    signal = at(schedule.sqrt_alpha_bar, t, x_t) * x0_hat
    return (x_t - signal) / at(schedule.sqrt_one_minus_alpha_bar, t, x_t)


def p_distribution(
    process: Process, output: jax.Array, x_t: jax.Array, t: jax.Array, clip: bool = True
) -> tuple[Gaussian, jax.Array]:
    """p_θ(x_{t−1}|x_t) = N(μ_θ(x_t, t), Σ_θ(x_t, t)), and x̂_0. Eqs. 1, 11, 15.

    The mean is μ̃_t(x_t, x̂_0), which for ε is Eq. 11. With `mu` it is the output itself.

    Args:
      output: what the network returned, [batch, ..., C] or, with learned variance, [..., 2C].
      x_t: [batch, ..., C].
      t: integer [batch], in 1..T.
      clip: whether x̂_0 is clipped to [−1, 1] before the mean is derived from it. With `mu` only
        the returned x̂_0 is clipped.
    Raises:
      ValueError: the output has not the shape that the process asks for.
    """
    check_times(t, x_t, process.schedule.num_steps)
    x0_hat = predict_x0(process, output, x_t, t)
    if clip:
        x0_hat = jnp.clip(x0_hat, -1.0, 1.0)
    prediction, variance_output = split_output(process, output, x_t)
    (x_t,) = _float32(x_t)
    if process.prediction == "mu":
        mean = _mu_to_mean(process.schedule, prediction, x_t, t)
    else:
        mean = q_posterior(process.schedule, x0_hat, x_t, t).mean
    return Gaussian(mean, p_log_variance(process, variance_output, x_t, t)), x0_hat


def p_log_variance(
    process: Process, variance_output: jax.Array | None, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """log σ²_θ(x_t, t) in a shape that broadcasts to x_t. Paper, §3.2; authors' code for t = 1.

    fixed_large: β_t, but β̃_2 at t = 1. fixed_small: β̃_t, but β̃_2 at t = 1. learned: the network's
    own output. learned_range: from log β̃_t (output −1; at t = 1 that of β̃_2) to log β_t (output 1),
    Nichol and Dhariwal 2021, Eq. 15.
    """
    schedule = process.schedule
    log_small = at(schedule.log_posterior_variance, t, x_t)
    log_large = at(schedule.log_beta, t, x_t)
    if process.variance == "fixed_small":
        return log_small
    if process.variance == "fixed_large":
        return jnp.where(_broadcast(t, x_t) == 1, log_small, log_large)
    if process.variance == "learned":
        return variance_output
    share = (variance_output + 1) / 2
    return share * log_large + (1 - share) * log_small


def split_output(
    process: Process, output: jax.Array, x_t: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The network's output as float32: the prediction, and the variance's channels or None.

    Raises:
      ValueError: the output has not the shape that the process asks for.
    """
    channels = x_t.shape[-1] * (2 if process.learns_variance else 1)
    if output.shape != (*x_t.shape[:-1], channels):
        raise ValueError(
            f"variance {process.variance!r} and x_t {list(x_t.shape)} ask for an output "
            f"{[*x_t.shape[:-1], channels]}, not {list(output.shape)}"
        )
    (output,) = _float32(output)
    if not process.learns_variance:
        return output, None
    prediction, variance_output = jnp.split(output, 2, axis=-1)
    return prediction, variance_output


def _mu_to_mean(schedule, prediction, x_t, t):
    # On the trained chain this is the prediction, to the bit: the factor is 1 and the rest 0.
    return at(schedule.mu_scale, t, x_t) * prediction + at(schedule.mu_shift, t, x_t) * x_t


def _broadcast(t: jax.Array, x: jax.Array) -> jax.Array:
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    if any(array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"shapes differ: {', '.join(str(list(a.shape)) for a in arrays)}")
    return tuple(jnp.asarray(array, dtype=jnp.float32) for array in arrays)
