"""The bound of a trained network under one choice of Σ after another, its means as they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import CubicSpline

from ddpm_jax import keys as keys_lib
from ddpm_jax import likelihood, parts, sampling
from ddpm_jax.data import Source, to_float
from ddpm_jax.diffusion import Process, at, p_distribution, q_sample, split_output
from ddpm_jax.evaluation import bound as bounds
from ddpm_jax.evaluation import cost, reference
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import from_host, network_jit, to_host
from ddpm_jax.runs import Run, image_shape
from ddpm_jax.training.metrics import NonFiniteError
from experiments import common
from experiments.progressive_coding import neighbors

# log σ² at which L_0 is evaluated: from a sixteenth of half a bin up to twice the images' range.
LOG_SIGMA2 = np.arange(math.log((likelihood.HALF_BIN / 16) ** 2), math.log(16), 0.25)


@dataclasses.dataclass(frozen=True)
class Errors:
    """What the bound of n images depends on, under any isotropic Σ. Float64, or int.

    times: [n, k], of each image, the first 1. weights: [k], see `bound.weights`.
    excess: [n, k], ‖μ̃_t − μ_θ‖²/(D β̃_t) at each time; column 0 has no meaning.
    decoder: [n, G], L_0 in bits/dim at each of `LOG_SIGMA2`.
    fixed_decoder: [n], L_0 with σ²_1 = β̃_2, that of both fixed choices.
    prior: [n], L_T in bits/dim.
    own, log_ratio: [n, k], the terms in bits/dim with the network's own Σ, and the mean of
    log σ²_t/β̃_t (β̃_2 at t = 1) over coordinates.
    """

    times: np.ndarray
    weights: np.ndarray
    excess: np.ndarray
    decoder: np.ndarray
    fixed_decoder: np.ndarray
    prior: np.ndarray
    own: np.ndarray
    log_ratio: np.ndarray


@dataclasses.dataclass(frozen=True)
class Choice:
    """The bound under one choice of Σ. Float64.

    terms: [n, k], bits/dim, of each image at its times. log_ratio: [T+1], of log σ²_t/β̃_t (β̃_2 at
    t = 1); for a learned Σ its mean over images and coordinates.
    """

    terms: np.ndarray
    log_ratio: np.ndarray


def chosen_process(run: Run) -> Process:
    """The chain that `evaluation.steps` asks for."""
    steps = run.config.evaluation.steps
    return sampling.shorten(run.process, steps) if steps else run.process


def compile_errors(
    run: Run, process: Process, terms: int, seed: int, clip: bool
) -> Callable[[np.ndarray, np.ndarray], parts.Arrays]:
    """`compute(images, indices)`: what `Errors` holds, but weights, of uint8 images [b, h, w, c].

    Times and noise are those of `bound.compile_terms` at draw 0, with the same arguments.
    """
    schedule, num_steps = process.schedule, process.schedule.num_steps
    equal = Process(schedule, process.prediction, "fixed_small")

    def compute(params: Any, images: jax.Array, indices: jax.Array) -> parts.Arrays:
        x0 = to_float(images)
        keys = keys_lib.example_keys(seed, "bound", 0, indices)
        times = jnp.broadcast_to(jnp.arange(1, num_steps + 1), (len(images), num_steps))
        if terms:
            time_keys = keys_lib.example_keys(seed, "bound_times", 0, indices)
            times = jax.vmap(lambda key: bounds.chosen_times(key, num_steps, terms))(time_keys)

        def at_time(mean_1, t):
            x_t = q_sample(schedule, x0, t, keys_lib.normal(keys, t, x0.shape[1:]))
            output = run.apply(params, x_t, schedule.timesteps[t])
            p, _ = p_distribution(process, output, x_t, t, clip)
            prediction, _ = split_output(process, output, x_t)
            # Between Gaussians of variance β̃_t the KL is half the excess, whatever is predicted.
            half = likelihood.vlb_term(equal, prediction, x0, x_t, t, clip) * math.log(2)
            own = likelihood.vlb_term(process, output, x0, x_t, t, clip)
            ratio = p.log_variance - at(schedule.log_posterior_variance, t, x_t)
            mean_1 = jnp.where(at(jnp.arange(num_steps + 1) == 1, t, x_t), p.mean, mean_1)
            return mean_1, (2 * half, own, ratio.mean(axis=tuple(range(1, x_t.ndim))))

        mean_1, found = jax.lax.scan(at_time, jnp.zeros_like(x0), times.T)
        log_likelihood = likelihood.discretized_gaussian_log_likelihood
        decoder = jax.lax.map(
            lambda log_scale: -likelihood.bits_per_dim(log_likelihood(x0, mean_1, log_scale)),
            jnp.append(LOG_SIGMA2, schedule.log_posterior_variance[1]).astype(jnp.float32) / 2,
        )
        by_name = dict(zip(("excess", "own", "log_ratio"), (x.T for x in found), strict=True))
        prior = likelihood.prior_term(schedule, x0)
        by_name |= {"decoder": decoder[:-1].T, "fixed_decoder": decoder[-1]}
        return {"times": times, "prior": prior, **by_name}

    one = run.layout.split(0)
    compiled = network_jit(compute, in_shardings=(run.params_sharding, one, one), out_shardings=one)

    def on_host(images: np.ndarray, indices: np.ndarray) -> parts.Arrays:
        placed = from_host(images, one), from_host(indices.astype(np.int32), one)
        return {name: to_host(x) for name, x in compiled(run.params, *placed).items()}

    return on_host


def measure(
    study: common.Study, source: Source, positions: np.ndarray, terms: int, seed: int
) -> Errors:
    """The errors of the study's run over images, from the disk if there.

    Raises:
      NonFiniteError: the network's output is not finite.
      Interrupted: by SIGINT or SIGTERM; the same command goes on.
    """
    run, e = study.run, study.run.config.evaluation
    process = chosen_process(run)
    num_steps = process.schedule.num_steps
    batch = padded_batch(min(e.batch_size, len(positions)), run.layout)
    compute = compile_errors(run, process, terms, seed, e.clip)
    protocol = {
        "data": reference.data_protocol(source, e.max_images),
        "seed": seed,
        "terms": terms,
        "chain": num_steps,
        "clip": e.clip,
        "fixed_decoder": "exact",
    }
    if not study.arrays_path(protocol).exists():
        n, k = len(positions), terms or num_steps
        cost.announce(
            f"errors of {study.run.process.prediction}: {n:,} images × {k:,} terms",
            run.layout,
            run.apply,
            run.params,
            (batch, *image_shape(run.config)),
            -(-n // batch) * k,
            study.say,
        )

    def piece(start: int, length: int) -> parts.Arrays:
        chosen = positions[start : start + length]
        padded = np.concatenate([chosen, np.repeat(chosen[-1:], batch - length)])
        found = {name: x[:length] for name, x in compute(source.images(padded), padded).items()}
        if not all(np.isfinite(x).all() for x in found.values()):
            raise NonFiniteError(
                f"the bound of images {chosen[0]} to {chosen[-1]} is not finite: the network's "
                "output is not; try another checkpoint"
            )
        return found

    found = study.arrays(protocol, len(positions), batch, piece)
    times = found.pop("times")
    doubles = {name: x.astype(np.float64) for name, x in found.items()}
    return Errors(times=times, weights=bounds.weights(num_steps, terms), **doubles)


def kl(log_ratio: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """L_{t−1}, bits/dim: ½ (log ρ + (1 + excess)/ρ − 1), in bits, where ρ = σ²_t/β̃_t.

    Args:
      log_ratio: log ρ.
      excess: see `Errors`.
    """
    inverse = np.exp(-log_ratio)
    return (np.expm1(-log_ratio) + log_ratio + excess * inverse) / (2 * math.log(2))


def isotropic(errors: Errors, log_ratio: np.ndarray, decoder: np.ndarray) -> Choice:
    """The bound with one σ²_t for all images and coordinates.

    Args:
      log_ratio: [T+1], log σ²_t/β̃_t.
      decoder: [n], L_0 with that σ²_1.
    """
    terms = kl(log_ratio[errors.times], errors.excess)
    terms[:, 0] = decoder
    return Choice(terms, log_ratio)


def best_isotropic(errors: Errors, group_of: np.ndarray, floor: float) -> Choice:
    """The bound with those σ²_t/β̃_t that minimise it, one for each group of times.

    Args:
      group_of: [T+1], the group of each time; of `grouped`.
      floor: log β̃_2, which stands for log β̃_1.
    """
    group = group_of[errors.times[:, 1:]].ravel()
    count = np.bincount(group, minlength=group_of.max() + 1)
    total = np.bincount(group, errors.excess[:, 1:].ravel(), minlength=len(count))
    log_ratio = np.log1p(total / np.maximum(count, 1))[group_of]
    mean = CubicSpline(LOG_SIGMA2, errors.decoder.mean(axis=0))
    candidates = np.append(mean.derivative().roots(extrapolate=False), LOG_SIGMA2[[0, -1]])
    log_sigma2 = candidates[mean(candidates).argmin()]  # Within the grid: nothing is extrapolated.
    log_ratio[1] = log_sigma2 - floor
    return isotropic(errors, log_ratio, CubicSpline(LOG_SIGMA2, errors.decoder, axis=1)(log_sigma2))


def grouped(num_steps: int, terms: int, images: int) -> np.ndarray:
    """int [T+1]: which group of neighbouring times each belongs to; t = 1 is alone in group 0."""
    groups = neighbors(num_steps, terms, images)
    lengths = [last - first + 1 for first, last in groups]
    return np.append(-1, np.repeat(np.arange(len(groups)), lengths))


def choices(errors: Errors, process: Process, group_of: np.ndarray) -> dict[str, Choice]:
    """The bound under fixed_large, fixed_small, best and, where it is learned, the network's Σ."""
    schedule = process.schedule
    log_small = np.asarray(schedule.log_posterior_variance, np.float64)
    large = np.asarray(schedule.log_beta, np.float64) - log_small
    large[:2] = 0
    found = {
        "fixed_large": isotropic(errors, large, errors.fixed_decoder),
        "fixed_small": isotropic(errors, np.zeros_like(large), errors.fixed_decoder),
        "best": best_isotropic(errors, group_of, log_small[1]),
    }
    if process.learns_variance:
        group = group_of[errors.times].ravel()
        mean = np.bincount(group, errors.log_ratio.ravel()) / np.maximum(np.bincount(group), 1)
        full = np.zeros(group_of.max() + 1)
        full[: len(mean)] = mean
        found["learned"] = Choice(errors.own, full[group_of])
    return found


def total(errors: Errors, choice: Choice) -> np.ndarray:
    """The bound of each image, bits/dim [n]."""
    return choice.terms @ errors.weights + errors.prior
