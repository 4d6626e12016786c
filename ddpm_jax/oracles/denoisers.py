"""The network that cannot be improved upon, for data distributions known in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax.diffusion import Denoiser, Process, at, q_sample, split_output
from ddpm_jax.oracles.chains import Chain, chain, log_excess
from ddpm_jax.oracles.distributions import Distribution, Parts, posterior


def denoiser(data: Distribution, process: Process) -> Denoiser:
    """The exact denoiser: what a network trained perfectly on `data` returns at (x_t, t).

    The prediction is the mean of its target given x_t. Where the variance is learned, each
    coordinate's is the one that minimises the terms L_{t−1}, t ≥ 2: σ*²_t = β̃_t + c² Var[x_0|x_t],
    c being x_0's share in μ̃_t (Eq. 7); Bao et al. 2022 (arXiv:2201.06503), Theorem 1, is its
    average. At t = 1, where β̃_1 = 0, it is Var[x_0|x_1], yet at least β̃_2.

    Build it from the process as trained, and use it on shorter chains too, like any network: it
    takes the network's time. Built from a respaced process, it knows that chain's times alone,
    and its learned variances are optimal there.

    Args:
      data: the distribution of x_0.
      process: the process, with the prediction and the variance wanted.
    Returns:
      A function (x_t float32 [batch, *shape], t int [batch]) -> float32 [batch, ..., C or 2C],
      which jit and vmap can transform. It raises ValueError for another shape and, outside jit,
      for a time that the process does not have.
    """
    schedule, constants = process.schedule, chain(process.schedule)
    parts = Parts(*(None if p is None else np.asarray(p, np.float32) for p in data.parts))
    times = np.asarray(schedule.timesteps)
    alpha_bar, rest, mean_x0, mean_xt = (
        jnp.asarray(c, jnp.float32)
        for c in (constants.alpha_bar, constants.rest, constants.mean_x0, constants.mean_xt)
    )
    to_variance = _variance_output(process, constants)

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        x_t = jnp.asarray(x_t, jnp.float32)
        if x_t.shape[1:] != data.shape:
            wanted = ", ".join(map(str, data.shape))
            raise ValueError(f"x_t must be [batch, {wanted}], not {list(x_t.shape)}")
        index = _index(times, t)
        x = x_t.reshape(len(x_t), -1)
        x0, eps, variance = posterior(
            jnp, parts, alpha_bar[index][:, None], rest[index][:, None], x
        )
        x0, eps, variance = (a.reshape(x_t.shape) for a in (x0, eps, variance))
        if process.prediction == "eps":
            output = eps
        elif process.prediction == "x0":
            output = x0
        elif process.prediction == "v":
            root, root_rest = (at(jnp.sqrt(a), index, x_t) for a in (alpha_bar, rest))
            output = root * eps - root_rest * x0
        else:  # μ̃ of the trained chain, which is another if this one is respaced.
            mean = at(mean_x0, index, x_t) * x0 + at(mean_xt, index, x_t) * x_t
            shift = at(schedule.mu_shift, index, x_t) * x_t
            output = (mean - shift) / at(schedule.mu_scale, index, x_t)
        if not process.learns_variance:
            return output
        return jnp.concatenate([output, to_variance(variance, index)], axis=-1)

    return denoise


def _variance_output(process: Process, constants: Chain):
    """The function from Var[x_0|x_t] and t to the optimal output of the variance's channels."""
    with np.errstate(divide="ignore", invalid="ignore"):  # Entry 0 has no meaning.
        gain = constants.mean_x0**2 / constants.floor
        log_floor, span = np.log(constants.floor), np.log(constants.beta / constants.floor)
    per_span = np.divide(2.0, span, out=np.zeros_like(span), where=span > 0)
    gain, log_floor, per_span = (jnp.asarray(a, jnp.float32) for a in (gain, log_floor, per_span))

    def output(variance: jax.Array, index: jax.Array) -> jax.Array:
        first = at(jnp.arange(len(gain)) == 1, index, variance)
        log_ratio = log_excess(jnp, first, at(gain, index, variance) * variance)
        if process.variance == "learned":
            return at(log_floor, index, variance) + log_ratio
        return at(per_span, index, variance) * log_ratio - 1

    return output


def _index(times: np.ndarray, t: jax.Array) -> jax.Array:
    """The index of the chain at which the network is told t."""
    if not isinstance(t, jax.core.Tracer) and not np.isin(t, times[1:]).all():
        raise ValueError(f"the process has no step whose time is {np.asarray(t).tolist()}")
    return jnp.searchsorted(jnp.asarray(times), jnp.asarray(t))


def excess_error(
    data: Distribution,
    process: Process,
    network: Denoiser,
    keys: jax.Array,
    times: Sequence[int],
) -> np.ndarray:
    """How far a denoiser's prediction is from the optimal one, float32 [len(times)].

    The mean over n draws of x_0 from the data and of x_t ~ q(x_t|x_0), and over the coordinates,
    of the squared difference of the two predictions (variances aside). 0 for a perfect network.
    The loss L_simple exceeds its smallest possible value by this in expectation.

    Args:
      network: the network to judge.
      keys: [n], one a draw, as from `keys.example_keys(seed, "noise", …)`.
      times: indices of the process's schedule, in 1..T.
    """
    if not all(1 <= t <= process.schedule.num_steps for t in times):
        raise ValueError(f"times must lie in 1..{process.schedule.num_steps}, not {tuple(times)}")
    best, x0 = denoiser(data, process), jax.jit(data.sample)(keys)

    @jax.jit
    def error(step):
        t = jnp.full(x0.shape[:1], step)
        x_t = q_sample(process.schedule, x0, t, keys_lib.normal(keys, step, x0.shape[1:]))
        time = process.schedule.timesteps[t]
        got, expected = (split_output(process, f(x_t, time), x_t)[0] for f in (network, best))
        return jnp.mean((got - expected) ** 2)

    return np.array([error(t) for t in times], dtype=np.float32)
