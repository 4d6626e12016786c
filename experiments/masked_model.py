"""The network that reverses a masking process over images, its training, bits and samples."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import keys, runs
from ddpm_jax.config import RequestError
from ddpm_jax.data import Batches, Source, nbytes, to_float
from ddpm_jax.evaluation import cost, manifest, reference
from ddpm_jax.generation import padded_batch
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.models import UNet
from ddpm_jax.parallel import compile_call, from_host, once_jit, to_host
from ddpm_jax.parts import Arrays
from ddpm_jax.progress import Progress
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.job import make_job
from ddpm_jax.training.metrics import NonFiniteError, Window, Writer
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import Task, augmented, drawn_timesteps, dropout_keys, train_call
from experiments import common, masking
from experiments.masking import Masking

SAMPLES = 16
# How far the bound and the chain rule may be apart, relative, as the network computes.
ROUNDING = {"float32": 1e-4, "bfloat16": 1e-2}


class DisagreementError(NonFiniteError):
    """Two ways to the same number differ, which is reported like a number that is none."""


@dataclasses.dataclass(frozen=True)
class Model:
    """p_θ of a masking process over images.

    Attributes:
      masking: the forward process.
      levels: uint8 [K], ascending: the grey levels that images may have.
      network: takes the image, 0 where blank, and for each channel what is not blank; gives logits.
      shape: (height, width, channels) of the images.
    """

    masking: Masking
    levels: np.ndarray
    network: UNet
    shape: tuple[int, int, int]

    def encode(self, images: jax.Array) -> jax.Array:
        """Level indices int32 [n, D] of uint8 images [n, h, w, c] that have no other levels."""
        table = np.zeros(256, np.int32)
        table[self.levels] = np.arange(len(self.levels))
        return jnp.asarray(table)[images.reshape(len(images), -1)]

    def decode(self, x: np.ndarray) -> np.ndarray:
        """uint8 images [n, h, w, c] of level indices [n, D]."""
        return self.levels[x].reshape(-1, *self.shape)

    def inputs(self, x_t: jax.Array) -> jax.Array:
        """What the network sees of x_t, int32 [n, D]: float32 [n, h, w, 2c]."""
        values = jnp.append(to_float(self.levels), 0.0)[x_t]  # The last is that of a blank.
        seen = (x_t != self.masking.blank).astype(jnp.float32)
        parts = [part.reshape(-1, *self.shape) for part in (values, seen)]
        return jnp.concatenate(parts, axis=-1)

    def conditional(self, params: Any, dropout: jax.Array | None = None) -> masking.Conditional:
        """(x_t, t) -> logits [n, K] of the coordinate that step t blanked."""

        def logits(x_t: jax.Array, t: jax.Array) -> jax.Array:
            out = self.network.apply({"params": params}, self.inputs(x_t), t, dropout)
            every = out.reshape(len(x_t), -1, len(self.levels))
            place = jnp.asarray(self.masking.order)[t - 1]
            return jnp.take_along_axis(every, place[:, None, None], axis=1)[:, 0]

        return logits


def losses(
    model: Model, task: Task, params: Any, images: jax.Array, index: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """T · L_{t−1} at one t an example, in bits/dim [batch], and the t: unbiased for the bound.

    Args: see `training.step.example_losses`, in whose place it stands.
    """
    x0 = model.encode(augmented(task, images, index, step))
    t = drawn_timesteps(task, index, step)
    conditional = model.conditional(params, dropout_keys(task, index, step))
    nats = masking.kl_of_coordinates(model.masking, conditional, x0, t).sum(axis=-1)
    return nats / math.log(2), t  # T and the dimensionality are the same number.


def make_task(config: Any, model: Model) -> Task:
    """The run's training, of another model.

    Raises:
      RequestError: the batch does not divide over the devices.
    """
    config = copy.deepcopy(config)
    config.train.keep_best = ""  # Of results that only the run's own training measures.
    return dataclasses.replace(
        make_job(config).task,
        model=model.network,
        process=None,
        loss=functools.partial(losses, model),
        num_steps=model.masking.num_steps,
    )


def make_order(name: str, seed: int, dimensions: int) -> np.ndarray:
    """The coordinates in the order in which they are blanked: the last to be drawn comes first."""
    if name == "raster":
        return np.arange(dimensions)[::-1]
    return np.asarray(jax.random.permutation(keys.purpose_key(seed, "order"), dimensions))


def occurring_levels(source: Source, config: Any) -> np.ndarray:
    """uint8 [K], ascending: the levels of a split; all 256 where it is too large to be read."""
    if nbytes(source) > config.data.resident_bytes:
        return np.arange(256, dtype=np.uint8)
    return np.unique(source.images(np.arange(len(source))))


def check_levels(images: np.ndarray, levels: np.ndarray, source: Source) -> None:
    """Refuses images with a level to which the model gives no mass.

    Raises:
      RequestError: names the level.
    """
    if len(other := np.setdiff1d(images, levels)):
        raise RequestError(
            f"level {other[0]} occurs in {source.name}/{source.split} but not in the training "
            "split: its bits would be infinite; choose another --split"
        )


class Trainer:
    """The model's training, in a directory of its own, on from where it was."""

    def __init__(
        self, study: common.Study, model: Model, source: Source, steps: int, at_least: bool = False
    ):
        """Opens the directory.

        Args:
          steps: of training in all.
          at_least: whether a model that has been trained for more is taken as it is.
        Raises:
          RequestError: the model has been trained for more steps, or the batch does not divide
            over the devices.
        """
        self._study, self._source = study, source
        self._config = config = study.run.config
        self._task = make_task(config, model)
        height, width, channels = model.shape
        self._initial = lambda: init_state(
            self._task.model, self._task.optimizer, (height, width, 2 * channels), config.seed
        )
        groups = ("seed", "data", "model", "train")
        settings = {
            key: config_lib.get(config, key)
            for key in config_lib.FIELDS
            if key.partition(".")[0] in groups and key not in runs.HARMLESS
        }
        data = reference.data_protocol(source, 0)
        key = manifest.digest(common.VERSION, settings, data)
        self.path: epath.Path = study.directory.path / study.name / f"{study.flags.order}_{key}"
        self._checkpoints = Checkpoints(self.path / "checkpoints", config.train.keep_checkpoints)
        newest = max(self._checkpoints.steps(), default=0)
        self.steps = max(steps, newest) if at_least else steps
        if newest > self.steps:
            raise RequestError(
                f"--steps={steps}: the model in {self.path} has been trained for {newest} steps; "
                f"choose --steps={newest} or more, or delete it"
            )

    def __call__(self) -> tuple[Any, list[dict[str, Any]]]:
        """The parameters (their average, as `evaluation.ema` says), and the lines of metrics.

        Raises:
          Interrupted: by SIGINT or SIGTERM, after a checkpoint.
          NonFiniteError: a loss or gradient was not finite.
        """
        replicated = self._study.run.layout.replicated
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
            jax.eval_shape(self._initial),
        )
        found = self._checkpoints.restore(abstract, warn=self._study.say)
        if found is None:
            initial = once_jit(self._initial, out_shardings=replicated)
            state, step, notes = initial(), 0, {}
        else:
            state, step, notes = found
        writer = Writer(
            self.path, self.path / "metrics.jsonl", step, lambda r: r["step"] <= step, True
        )
        try:
            if step < self.steps:
                begun = f", from step {step:,}" if step else ""
                self._study.say(f"training for {self.steps:,} steps in {self.path}{begun}")
                state = self._train(state, step, Window(notes.get("window")), writer)
            self._checkpoints.wait()
        finally:
            self._checkpoints.close()
            writer.close()
        ema = self._config.evaluation.ema
        return (state.ema_params if ema else state.params), writer.records

    def _train(self, state: Any, step: int, window: Window, writer: Writer) -> Any:
        train, layout = self._config.train, self._study.run.layout
        sharding = jax.tree.map(lambda x: x.sharding, state)
        call = compile_call(layout, functools.partial(train_call, self._task), sharding)
        progress = Progress(step, self.steps, True, self._study.say)
        resident = nbytes(self._source) <= self._config.data.resident_bytes
        batches = Batches(
            self._source,
            self._config.seed,
            train.batch_size,
            train.steps_per_call,
            layout.split(1),
            resident,
        )
        with batches, Watch() as watch:
            while step < self.steps:
                state, metrics = call(state, batches(step))
                step += train.steps_per_call
                window.add(step, jax.tree.map(to_host, metrics))
                progress.update(step, f"loss {window.scalars()['loss']:.3f} bits/dim")
                if step % train.log_every == 0:
                    writer.scalars(step, window.scalars())
                    window = Window()
                stop = watch.asked() and step < self.steps
                if stop or step >= self.steps or step % train.checkpoint_every == 0:
                    self._checkpoints.save(step, state, {"window": window.sums})
                if stop:
                    self._checkpoints.wait()
                    raise Interrupted(f"stopped at step {step}; the same command goes on")
        progress.close()
        return state


def measure(study: common.Study, model: Model, params: Any, images: np.ndarray) -> Arrays:
    """Of each image, in bits/dim: "terms" [n, T+1] of the bound, "scores" [n, T] by the chain rule.

    Raises:
      NonFiniteError: the network's output is not finite.
      DisagreementError: the two differ by more than rounding; nothing of that batch is kept.
    """
    layout, T = study.run.layout, model.masking.num_steps  # noqa: N806 (the paper's name)
    batch = padded_batch(min(study.run.config.evaluation.batch_size, len(images)), layout)

    @jax.jit
    def both(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0, conditional = model.encode(images), model.conditional(params)
        terms = masking.bound_terms(model.masking, conditional, x0)
        return terms, masking.chain_rule(model.masking, conditional, x0)

    def piece(start: int, length: int) -> Arrays:
        chosen = images[start : start + length]
        padded = np.concatenate([chosen, np.repeat(chosen[-1:], batch - length, axis=0)])
        found = both(params, from_host(padded, layout.split(0)))
        terms, scores = (to_host(x)[:length].astype(np.float64) / math.log(2) / T for x in found)
        check_equal(terms, scores, study.run.config.model.dtype)
        return {"terms": terms, "scores": scores}

    height, width, channels = model.shape
    cost.announce(
        f"bits/dim by both ways: {len(images):,} images × {T:,} terms",
        layout,
        lambda p, x, t: model.network.apply({"params": p}, x, t),
        params,
        (batch, height, width, 2 * channels),
        2 * T * -(-len(images) // batch),
        study.say,
    )
    of_images = {"images_crc32": runs.fingerprint({"images": jnp.asarray(images)})}
    protocol = protocol_of(model, params) | of_images
    return study.arrays(protocol, len(images), batch, piece)


def check_equal(terms: np.ndarray, scores: np.ndarray, dtype: str) -> None:
    """Refuses numbers that are not those of one likelihood; see `measure`.

    Args:
      dtype: the network's.
    Raises:
      NonFiniteError, DisagreementError: see `measure`.
    """
    bound, chain = terms.sum(axis=1), -scores.sum(axis=1)
    if not np.isfinite(bound).all() or not np.isfinite(chain).all():
        raise NonFiniteError(
            "bits/dim is not finite: the network's output is not; start again, with a lower "
            "train.learning_rate"
        )
    apart = np.abs(bound - chain).max()
    if apart > ROUNDING[dtype] * bound.max() or terms[:, -1].any():
        raise DisagreementError(
            f"the bound and the chain rule differ by {apart:.3g} of {bound.max():.3g} bits/dim, "
            f"more than rounding in {dtype}: nothing is published; run with "
            "JAX_DEFAULT_MATMUL_PRECISION=highest"
        )


def protocol_of(model: Model, params: Any) -> dict[str, Any]:
    """What a model's numbers depend on."""
    return {
        "order": model.masking.order.tolist(),
        "levels": model.levels.tolist(),
        "model_crc32": runs.fingerprint(params),
    }


def draw_samples(study: common.Study, model: Model, params: Any) -> np.ndarray:
    """int32 [SAMPLES, D]: samples, as level indices."""

    @jax.jit
    def drawn(params: Any, indices: jax.Array) -> jax.Array:
        sample_keys = keys.example_keys(study.run.config.seed, "sample", 0, indices)
        return masking.sample(model.masking, model.conditional(params), sample_keys)

    protocol = {**protocol_of(model, params), "samples": SAMPLES}
    compute = lambda start, n: {"x0": np.asarray(drawn(params, jnp.arange(start, start + n)))}  # noqa: E731
    return study.arrays(protocol, SAMPLES, SAMPLES, compute)["x0"]
