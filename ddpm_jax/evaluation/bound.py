"""The variational bound over a set of images: bits/dim, rate and distortion, with their errors.

Every image counts exactly once. All T terms of an image are evaluated in one compiled loop, or some
of them, chosen so that their weighted sum is unbiased. Sums over images are float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import keys as keys_lib
from ddpm_jax import likelihood
from ddpm_jax.data import to_float
from ddpm_jax.diffusion import Process
from ddpm_jax.parallel import Layout, from_host, make_layout, network_jit, to_host
from ddpm_jax.parts import collect
from ddpm_jax.training.metrics import NonFiniteError

Apply = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, x_t, t) -> output.


class Terms(NamedTuple):
    """Terms of the bound of each image at its own times.

    times: int32 [batch, k], in 1..T. terms, x0_mse, eps_mse: float32 [batch, k], see
    `likelihood.BoundTerms`. prior: float32 [batch], L_T.
    """

    times: Any
    terms: Any
    x0_mse: Any
    eps_mse: Any
    prior: Any


def compile_terms(
    layout: Layout,
    process: Process,
    apply: Apply,
    params_sharding: Any = None,
    seed: int = 0,
    terms: int = 0,
    clip: bool = True,
) -> Callable[[Any, np.ndarray, np.ndarray, int], Terms]:
    """`compute(params, images, indices, draw)`: the terms of uint8 images [batch, h, w, c].

    Image number indices[k] gets its noise from (seed, draw, number) alone. The batch is split over
    the devices; it must be a multiple of them. Arrays are the host's, in and out.

    Args:
      layout: the devices.
      apply: the network: (params, x_t, t) -> output.
      params_sharding: how the parameters lie; None leaves it to them.
      terms: how many of the T terms; 0 for all. See `chosen_times`.
      clip: whether x̂_0 is clipped.
    """
    num_steps = process.schedule.num_steps

    def compute(
        params: Any, images: jax.Array, indices: jax.Array, seed: jax.Array, draw: jax.Array
    ) -> Terms:
        x0 = to_float(images)
        keys = keys_lib.example_keys(seed, "bound", draw, indices)
        if terms:
            time_keys = keys_lib.example_keys(seed, "bound_times", draw, indices)
            times = jax.vmap(lambda key: chosen_times(key, num_steps, terms))(time_keys)
        else:
            times = jnp.broadcast_to(jnp.arange(1, num_steps + 1), (len(images), num_steps))
        denoiser = lambda x_t, t: apply(params, x_t, t)  # noqa: E731
        found = likelihood.vlb_terms_at(process, denoiser, x0, keys, times, clip)
        return Terms(times, *found, likelihood.prior_term(process.schedule, x0))

    one = layout.split(0)
    compiled = network_jit(
        compute,
        in_shardings=(params_sharding, one, one, layout.replicated, layout.replicated),
        out_shardings=Terms(one, one, one, one, one),
    )

    def on_host(params: Any, images: np.ndarray, indices: np.ndarray, draw: int) -> Terms:
        placed = from_host(images, one), from_host(indices.astype(np.int32), one)
        # As arguments: one program serves all seeds.
        numbers = (from_host(np.int32(number), layout.replicated) for number in (seed, draw))
        terms = compiled(params, *placed, *numbers)
        return Terms(*map(to_host, terms))

    return on_host


def checked_terms(terms: int, num_steps: int) -> int:
    """`terms`, or 0 where they are all of the chain's.

    Raises:
      ValueError: fewer than two, of which one is always the decoder's.
    """
    if terms >= num_steps:
        return 0
    if terms < 0 or terms == 1:
        raise ValueError(f"terms={terms}: one is always the decoder's; choose 2 or more, or 0")
    return terms


def strata(num_steps: int, count: int) -> np.ndarray:
    """int [count]: the first times of count − 1 parts of 2..T, and T + 1 at the end.

    Parts grow with t, as the terms fall; those of small t hold a single time, if count allows.
    """
    edges = [2]
    for left in range(count - 1, 0, -1):
        following = round(edges[-1] * ((num_steps + 1) / edges[-1]) ** (1 / left))
        edges.append(min(max(edges[-1] + 1, following), num_steps + 2 - left))
    return np.array(edges)


def chosen_times(key: jax.Array, num_steps: int, count: int) -> jax.Array:
    """int32 [count]: t = 1, and one t drawn evenly from each part of `strata`.

    Σ weights(T, count) · L_{t−1} over these times is an unbiased estimate of Σ_t L_{t−1}.
    """
    edges = strata(num_steps, count)
    width = jnp.asarray(np.diff(edges))
    place = (jax.random.uniform(key, width.shape) * width).astype(jnp.int32)
    others = jnp.asarray(edges[:-1]) + jnp.minimum(place, width - 1)
    return jnp.concatenate([jnp.ones(1, jnp.int32), others])


def weights(num_steps: int, count: int) -> np.ndarray:
    """float64 [count or T]: the weight of each of an image's terms in its bound."""
    if not count:
        return np.ones(num_steps)
    return np.concatenate([[1.0], np.diff(strata(num_steps, count))])


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of n images at d draws of the noise. All float64; bits/dim but where said.

    Of each image, [n, d]:
      total: L_0 + … + L_T. decoder: L_0, the distortion. x0_mse_1: the mean squared error of x̂_0 at
      t = 1, images scaled to [−1, 1].
    prior: L_T of each image, [n].
    Of each t, over images and draws, [T+1]; column k of `terms` is L_k (L_{t−1}, which belongs to
    x_t, is column t − 1); column t of the errors belongs to x_t; column k of `rate` is Σ_{j≥k} L_j,
    what has been sent when x_{k−1} can be drawn:
      terms, terms_error, x0_mse, x0_mse_error, eps_mse, eps_mse_error, rate, rate_error: means and
      their standard errors over images. NaN where no image's term was evaluated; `rate`, whose
      every image is an unbiased estimate, has no such gaps.
    """

    total: np.ndarray
    decoder: np.ndarray
    x0_mse_1: np.ndarray
    prior: np.ndarray
    terms: np.ndarray
    terms_error: np.ndarray
    x0_mse: np.ndarray
    x0_mse_error: np.ndarray
    eps_mse: np.ndarray
    eps_mse_error: np.ndarray
    rate: np.ndarray
    rate_error: np.ndarray

    def summary(self) -> dict[str, tuple[float, float | None]]:
        """{name: (value, standard error over images)}: what `names.BOUND_RESULTS` lists.

        bits_per_dim = rate + distortion; rate = L_1 + … + L_T; distortion = L_0; rmse: of x̂_0 at
        t = 1, on 0–255; prior = L_T. The errors hold the images' and the noise's part.
        """
        mse, mse_error = _mean_and_error(self.x0_mse_1.mean(axis=1))
        rmse = 127.5 * np.sqrt(mse)
        return {
            "bits_per_dim": _mean_and_error(self.total.mean(axis=1)),
            "rate": _mean_and_error((self.total - self.decoder).mean(axis=1)),
            "distortion": _mean_and_error(self.decoder.mean(axis=1)),
            "rmse": (float(rmse), mse_error and float(127.5**2 / (2 * rmse) * mse_error)),
            "prior": _mean_and_error(self.prior),
        }

    def noise_error(self) -> float | None:
        """The standard error of bits_per_dim over draws of the noise, the images held fixed."""
        images, draws = self.total.shape
        if draws < 2:
            return None
        return float(np.sqrt(self.total.var(axis=1, ddof=1).sum() / draws) / images)

    def save(self, file: BinaryIO) -> None:
        """Writes all of it as an .npz file."""
        np.savez_compressed(file, **dataclasses.asdict(self))


def _mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def measure(
    compute: Callable[[Any, np.ndarray, np.ndarray, int], Terms],
    params: Any,
    read: Callable[[np.ndarray], np.ndarray],
    positions: np.ndarray,
    batch: int,
    num_steps: int,
    terms: int = 0,
    draws: int = 1,
    say: Callable[[str], None] = print,
    **keep: Any,
) -> Bound:
    """The bound of the images at `positions`, each exactly once.

    Args:
      compute: as from `compile_terms`, with the same `terms`.
      read: positions -> uint8 images.
      positions: integer [n]; image k's noise is that of number positions[k].
      batch: images at a time, a multiple of the devices. The last batch is padded, and what the
        padding gives is dropped.
      num_steps: T of the chain.
      draws: of the noise, for each image.
      say: prints a line.
      keep: directory, protocol and stop of `parts.collect`.
    Raises:
      NonFiniteError: an image's bound is not a number; nothing of its batch is kept.
    """
    weight = weights(num_steps, terms)

    def piece(start: int, length: int) -> dict[str, np.ndarray]:
        chosen = positions[start : start + length]
        padded = np.concatenate([chosen, np.repeat(chosen[-1:], batch - length)])
        images = read(padded)
        drawn = [
            Terms(*(x[:length] for x in compute(params, images, padded, draw)))
            for draw in range(draws)
        ]
        found = _piece(drawn, weight, num_steps)
        bad = np.flatnonzero(~np.isfinite(found["total"]).all(axis=1))
        if bad.size:
            raise NonFiniteError(
                f"bits/dim of {bad.size} of {length} images is not finite, first of number "
                f"{chosen[bad[0]]}: the network's output is not; try another checkpoint"
            )
        return found

    pieces = collect(len(positions), batch, piece, "image", say, **keep)
    return _bound(pieces)


_SUMMED = ("terms", "x0_mse", "eps_mse", "rate")


def _piece(drawn: list[Terms], weight: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
    """What is kept of a batch: numbers of each image, and sums over images [1, T+1]."""
    every = {
        name: np.stack([np.asarray(getattr(d, name), np.float64) for d in drawn], axis=1)
        for name in ("terms", "x0_mse", "eps_mse")
    }  # [batch, draws, k].
    times = np.stack([d.times for d in drawn], axis=1)
    prior = np.asarray(drawn[0].prior, np.float64)
    arrays = {
        "total": (every["terms"] * weight).sum(axis=2) + prior[:, None],
        "decoder": every["terms"][:, :, 0],
        "x0_mse_1": every["x0_mse"][:, :, 0],
        "prior": prior,
    }
    # An image's mean over its draws at each t is one observation.
    count = _by_time(np.ones(times.shape), times, num_steps)
    means = {}
    for name, values in every.items():
        shift = 1 if name == "terms" else 0  # L_{t−1} is the term of time t.
        with np.errstate(invalid="ignore"):
            mean = _by_time(values, times, num_steps) / count
        means[name] = np.roll(mean, -shift, axis=1)
        if name == "terms":
            means[name][:, -1] = prior
    for name in ("x0_mse", "eps_mse"):
        means[name][:, 0] = 0
    # Each term stands for its part of the times, wherever in it its own time was drawn.
    sent = np.roll(_by_time(every["terms"] * weight, times, num_steps), -1, axis=1) / times.shape[1]
    sent[:, -1] = prior
    means["rate"] = sent[:, ::-1].cumsum(axis=1)[:, ::-1]
    for name, mean in means.items():
        seen = np.isfinite(mean)
        value = np.where(seen, mean, 0.0)
        arrays[f"{name}_count"] = seen.sum(axis=0, dtype=np.float64)[None]
        arrays[f"{name}_sum"] = value.sum(axis=0)[None]
        arrays[f"{name}_squares"] = (value**2).sum(axis=0)[None]
    return arrays


def _by_time(values: np.ndarray, times: np.ndarray, num_steps: int) -> np.ndarray:
    """[batch, T+1]: the sums of an image's values [batch, draws, k] at each time."""
    images = np.arange(len(values))[:, None, None] * (num_steps + 1)
    flat = np.bincount(
        (images + times).ravel(), values.ravel(), minlength=len(values) * (num_steps + 1)
    )
    return flat.reshape(len(values), num_steps + 1)


def _bound(pieces: dict[str, np.ndarray]) -> Bound:
    columns = {}
    for name in _SUMMED:
        n = pieces[f"{name}_count"].sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = pieces[f"{name}_sum"].sum(axis=0) / n
            spread = np.maximum(pieces[f"{name}_squares"].sum(axis=0) / n - mean**2, 0)
            columns[name] = mean
            columns[f"{name}_error"] = np.sqrt(spread / (n - 1))
    per_image = {name: pieces[name] for name in ("total", "decoder", "x0_mse_1", "prior")}
    return Bound(**per_image, **columns)


def bits_per_dim(
    process: Process,
    denoiser: Callable[[jax.Array, jax.Array], jax.Array],
    images: np.ndarray,
    *,
    seed: int = 0,
    terms: int = 0,
    draws: int = 1,
    clip: bool = True,
    batch: int = 128,
    say: Callable[[str], None] = print,
) -> Bound:
    """The bound of any network on uint8 images [n, h, w, c], on all devices: for notebooks.

    Args:
      denoiser: (x_t, t) -> output, whatever it is made with; jit compiles it.
      others: as for `compile_terms` and `measure`.
    Raises:
      ValueError: images that are not uint8 [n, h, w, c], a seed outside 0..2³¹ − 1, or terms=1.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed}: it must lie in 0..2³¹ − 1")
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"images must be uint8 [n, h, w, c], not {images.dtype} {images.shape}")
    terms = checked_terms(terms, process.schedule.num_steps)
    layout = make_layout("jit")
    batch = -(-min(batch, len(images)) // layout.num_devices) * layout.num_devices
    compute = compile_terms(
        layout, process, lambda _, x_t, t: denoiser(x_t, t), None, seed, terms, clip
    )
    everything = np.arange(len(images))
    return measure(
        compute,
        None,
        images.__getitem__,
        everything,
        batch,
        process.schedule.num_steps,
        terms,
        draws,
        say,
    )
