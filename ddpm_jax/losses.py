"""What training minimises, and how it chooses t (paper, Eqs. 5, 8, 12, 14)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm_jax import likelihood
from ddpm_jax.diffusion import (
    Denoiser,
    Process,
    check_times,
    predict_target,
    q_sample,
    split_output,
)

OBJECTIVES = ("simple", "vlb", "hybrid")


def check_combination(variance: str, objective: str) -> None:
    """Refuses combinations of the three choices that make no sense.

    Raises:
      ValueError: says why.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    learned = variance in ("learned", "learned_range")
    if learned and objective == "simple":
        raise ValueError(
            f"variance={variance} with objective=simple would never train the variance; "
            "choose objective vlb or hybrid, or a fixed variance"
        )
    if not learned and objective == "hybrid":
        raise ValueError(
            f"objective=hybrid with variance={variance} has no variance to train; "
            "choose variance learned or learned_range, or objective simple or vlb"
        )


def training_loss(
    process: Process,
    denoiser: Denoiser,
    x0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    objective: str = "simple",
) -> jax.Array:
    """The loss of each example, float32 [batch].

    simple: the unweighted mean squared error of what the network predicts: L_simple (Eq. 14) for
      ε, ‖μ̃ − μ̃_θ‖² for μ̃ (Table 2).
    vlb: the bound's term at t, L_{t−1} (Eqs. 8, 12) or L_0, in bits/dim. For t uniform in 1..T, T
      times its mean estimates L − L_T without bias.
    hybrid: simple + T/1000 · L_{t−1}, where the second part trains only the variance (Nichol and
      Dhariwal 2021, §3.1, whose λ = 0.001 weighs the sum of all T terms).

    x̂_0 is not clipped here.

    Args:
      denoiser: the network.
      x0: [batch, ..., C], 8-bit values scaled to [−1, 1].
      t: integer [batch], in 1..T.
      noise: ε ~ N(0, I), of x0's shape.
    Raises:
      ValueError: a combination without sense, or shapes that do not fit.
    """
    check_combination(process.variance, objective)
    check_times(t, x0, process.schedule.num_steps)
    x_t = q_sample(process.schedule, x0, t, noise)
    output = denoiser(x_t, process.schedule.timesteps[t])
    if objective == "vlb":
        return likelihood.vlb_term(process, output, x0, x_t, t, clip=False)
    prediction, variance_output = split_output(process, output, x_t)
    squared_error = (predict_target(process, x0, noise, x_t, t) - prediction) ** 2
    simple = squared_error.mean(axis=tuple(range(1, x0.ndim)))
    if objective == "simple":
        return simple
    frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), variance_output], axis=-1)
    variance_part = likelihood.vlb_term(process, frozen, x0, x_t, t, clip=False)
    return simple + process.schedule.num_steps / 1000 * variance_part


def timesteps(u: jax.Array, num_steps: int) -> jax.Array:
    """t on 1..T from u on [0, 1): int32 of u's shape; uniform where u is. Algorithm 1, line 3."""
    return 1 + jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


def independent(u: jax.Array, index: jax.Array, batch_size: int) -> jax.Array:
    """Positions on [0, 1) for `timesteps`, independent of each other: u itself, as in the paper."""
    return u


def stratified(u: jax.Array, index: jax.Array, batch_size: int) -> jax.Array:
    """Positions on [0, 1) for `timesteps`, one in each of batch_size equal parts.

    Each is uniform over a shuffled data set, and the mean loss of a batch varies less; the idea is
    that of Kingma et al. 2021 (arXiv:2107.00630), appendix I.1.

    Args:
      u: uniform on [0, 1), [n].
      index: the examples' places in the whole batch, [n].
      batch_size: of the whole batch.
    """
    return (index + u) / batch_size


TIMESTEPS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "independent": independent,
    "stratified": stratified,
}
