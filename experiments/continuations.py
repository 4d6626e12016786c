"""Images that go on from one x_t by reverse processes with noise of their own (Fig. 7)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax import sampling
from ddpm_jax.data import to_uint8
from ddpm_jax.diffusion import Process, p_distribution
from ddpm_jax.generation import padded_batch
from ddpm_jax.parallel import network_jit, to_host
from ddpm_jax.parts import Arrays
from ddpm_jax.runs import Run, image_shape
from ddpm_jax.training.metrics import NonFiniteError
from experiments.common import Study


@dataclasses.dataclass(frozen=True)
class Shared:
    """Images that go on from the same x_t.

    times: of the trained chain, descending. arrays: those of `share`. fixed: the share of the
    variance that is fixed at each time, and its standard error. difference: the root mean square
    difference of two images from one x_t, on 0–255, and its standard error.
    """

    times: list[int]
    arrays: Arrays
    fixed: list[tuple[float, float]]
    difference: list[tuple[float, float]]

    def rows(self) -> list[dict[str, Any]]:
        """Those of the table."""
        columns = {"variance_fixed_at_t": self.fixed, "rms_difference": self.difference}
        return [
            row(name, "continuations", t, *number)
            for name, numbers in columns.items()
            for t, number in zip(self.times, numbers, strict=True)
        ]


def row(quantity: str, of: str, t: int | None, value: float, error: float) -> dict[str, Any]:
    """A row of the figure's table; an error of NaN is none."""
    error = None if math.isnan(error) else float(error)
    return {"quantity": quantity, "of": of, "t": t, "value": float(value), "standard_error": error}


def share(
    study: Study,
    process: Process,
    sampler: dict[str, Any],
    forks: list[int],
    samples: np.ndarray,
) -> Shared:
    """Goes on from x_t of the first chains, at each index in `forks`, with fresh noise.

    Continuation j of chain k has its noise at all forks from one key, that of (j, k).
    The arrays: x_t and x0_hat uint8 [chains, forks, h, w, c], images uint8 [chains, forks,
    continuations, h, w, c].

    Args:
      process: the chain that config.sample asks for, shortened where it is.
      sampler: its protocol.
      forks: indices of the chain, descending.
      samples: uint8 [n, h, w, c], independent ones.
    Raises:
      NonFiniteError: images that are not numbers.
      Interrupted: see `parts.collect`.
    """
    run, config, flags = study.run, study.run.config, study.flags
    per_piece = max(1, config.sample.batch_size // flags.continuations)
    batch = padded_batch(min(per_piece, flags.chains), run.layout)
    advance, predict = compile_advance(run, process), compile_x0_hat(run, process)

    def piece(start: int, length: int) -> Arrays:
        chains = np.arange(start, start + batch)
        keys = keys_lib.example_keys(config.seed, "sample", 0, chains)
        fresh = [
            keys_lib.example_keys(config.seed, "continuation", j, chains)
            for j in range(flags.continuations)
        ]
        fresh = jnp.concatenate(fresh)
        x, at = keys_lib.normal(keys, 0, image_shape(config)), process.schedule.num_steps
        found = {"x_t": [], "x0_hat": [], "images": []}
        for fork in forks:
            x, at = advance(run.params, x, keys, at, fork), fork
            many = jnp.tile(x, (flags.continuations, 1, 1, 1))
            many = jax.device_put(many, run.layout.split(0))
            images = to_host(advance(run.params, many, fresh, fork, 0))
            images = images.reshape(flags.continuations, batch, *x.shape[1:]).swapaxes(0, 1)
            finite = np.isfinite(images).all(axis=(1, 2, 3, 4))[:length]
            if not finite.all():
                raise NonFiniteError("images are not finite: try another checkpoint")
            found["images"].append(images)
            found["x_t"].append(to_host(x))
            found["x0_hat"].append(to_host(predict(run.params, x, fork)))
        stacked = {name: np.stack(parts, axis=1)[:length] for name, parts in found.items()}
        return {name: np.asarray(to_uint8(x)) for name, x in stacked.items()}

    times = np.asarray(process.schedule.timesteps)[forks].tolist()
    sizes = {"chains": flags.chains, "continuations": flags.continuations}
    protocol = sampler | {"forks": times} | sizes
    arrays = study.arrays(protocol, flags.chains, min(batch, flags.chains), piece, "chain")
    fixed, difference = variance_fixed(arrays["images"], samples)
    return Shared(times, arrays, fixed, difference)


def variance_fixed(
    images: np.ndarray, samples: np.ndarray
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(value, standard error) at each fork of `Shared.fixed` and `Shared.difference`.

    Both variances are unbiased and averaged over the pixels; the errors are over draws of the
    chains and of the samples, to first order.

    Args:
      images: [chains, forks, continuations, h, w, c], at least 2 chains and continuations.
      samples: [n, h, w, c], n ≥ 2, independent.
    """
    flat = samples.reshape(len(samples), -1).astype(np.float64)
    squares = np.square(flat - flat.mean(axis=0)).mean(axis=1)
    total = squares.sum() / (len(flat) - 1)
    total_error = squares.std(ddof=1) / math.sqrt(len(flat))
    fixed, difference = [], []
    for k in range(images.shape[1]):
        part = images[:, k].astype(np.float64).reshape(*images[:, k].shape[:2], -1)
        within = part.var(axis=1, ddof=1).mean(axis=1)
        error = within.std(ddof=1) / math.sqrt(len(within))
        mean, rms = within.mean(), math.sqrt(2 * within.mean())
        ratio = mean / total
        fixed.append((1 - ratio, math.hypot(error, ratio * total_error) / total))
        difference.append((rms, error / rms if rms else 0.0))
    return fixed, difference


def compile_advance(run: Run, process: Process) -> Callable[..., jax.Array]:
    """`advance(params, x, keys, start, stop)`: the reverse process from index start to stop.

    The steps of `sampling.reverse`, as one program for all starts and stops.
    """
    how, one = run.config.sample, run.layout.split(0)

    def advance(params, x, keys, start, stop):
        def body(state):
            x, step = state
            t = jnp.full(x.shape[:1], step)
            output = run.apply(params, x, process.schedule.timesteps[t])
            noise = keys_lib.normal(keys, step, x.shape[1:])
            if how.method == "ancestral":
                x = sampling.ancestral_step(process, output, x, t, noise, how.clip)
            else:
                x = sampling.ddim_step(process, output, x, t, noise, how.eta, how.clip)
            return x, step - 1

        return jax.lax.while_loop(lambda state: state[1] > stop, body, (x, start))[0]

    return network_jit(
        advance, in_shardings=(run.params_sharding, one, one, None, None), out_shardings=one
    )


def compile_x0_hat(run: Run, process: Process) -> Callable[..., jax.Array]:
    """`x0_hat(params, x_t, index)`: what the network makes of x_t in one step."""

    def x0_hat(params, x_t, index):
        t = jnp.full(x_t.shape[:1], index)
        output = run.apply(params, x_t, process.schedule.timesteps[t])
        return p_distribution(process, output, x_t, t, run.config.sample.clip)[1]

    one = run.layout.split(0)
    return network_jit(x0_hat, in_shardings=(run.params_sharding, one, None), out_shardings=one)
