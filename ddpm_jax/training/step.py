"""The training step (paper, Algorithm 1): one pure function of the state and a batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from ddpm_jax import keys, losses
from ddpm_jax.data import random_flip, to_float
from ddpm_jax.diffusion import Process
from ddpm_jax.models import UNet
from ddpm_jax.parallel import apart, as_stored
from ddpm_jax.training.state import (
    State,
    clip_factor,
    ema_decay,
    global_norm,
    learning_rate,
    map_leaves,
)

QUARTERS = 4  # Parts of 1..T whose losses are shown apart.


@dataclasses.dataclass(frozen=True)
class Task:
    """All that a step needs beside the state and the batch; fixed when it is compiled.

    Attributes:
      optimizer: it is called with one leaf at a time, and gets gradients that are clipped by
        train.clip_norm: no norm, mask or noise of its own over several leaves.
      skip_nonfinite: whether an update whose loss or gradient is not finite is left out, as if the
        run had gone back and done without that batch.
      loss: in place of `example_losses`, with its arguments, where it is another forward process
        that is to be reversed; num_steps is T of that one, and `process` may be None.
    """

    model: UNet
    process: Process | None
    optimizer: optax.GradientTransformation
    train: ml_collections.ConfigDict
    flip: bool
    seed: int
    microbatches: int = 1
    skip_nonfinite: bool = False
    loss: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    num_steps: int | None = None

    @property
    def length(self) -> int:
        """T of the forward process."""
        return self.num_steps or self.process.schedule.num_steps


def positional_keys(task: Task, purpose: str, step: jax.Array, index: jax.Array) -> jax.Array:
    """Keys [batch] of the examples at places `index` of the whole batch, see `keys`."""
    return keys.example_keys(task.seed, purpose, step, index)


def augmented(task: Task, images: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
    """The images, mirrored by chance where the task says so."""
    if not task.flip:
        return images
    draws = positional_keys(task, "flip", step, index)
    return random_flip(images, jax.vmap(jax.random.bernoulli)(draws))


def drawn_timesteps(task: Task, index: jax.Array, step: jax.Array) -> jax.Array:
    """t of each example, int32 [batch] in 1..T, as `train.timesteps` says."""
    u = jax.vmap(jax.random.uniform)(positional_keys(task, "timestep", step, index))
    place = losses.TIMESTEPS[task.train.timesteps](u, index, task.train.batch_size)
    return losses.timesteps(place, task.length)


def dropout_keys(task: Task, index: jax.Array, step: jax.Array) -> jax.Array | None:
    """Keys [batch] of the network's dropout; None where it has none."""
    return positional_keys(task, "dropout", step, index) if task.model.dropout else None


def example_losses(
    task: Task, params: Any, images: jax.Array, index: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss and the t of each example, [batch]: a function of its place in the whole batch.

    Args:
      images: uint8 [batch, height, width, channels].
      index: the examples' places in the whole batch, [batch].
      step: the updates done before.
    """

    x0 = augmented(task, to_float(images), index, step)
    t = drawn_timesteps(task, index, step)
    noise = keys.normal(positional_keys(task, "noise", step, index), 0, x0.shape[1:])
    masks = dropout_keys(task, index, step)

    def denoiser(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return task.model.apply({"params": params}, x_t, t, masks)

    loss = losses.training_loss(task.process, denoiser, x0, t, noise, task.train.objective)
    return loss, t


def _loss_and_metrics(task, params, images, index, step):
    loss, t = (task.loss or example_losses)(task, params, images, index, step)
    quarter = (t - 1) * QUARTERS // task.length
    in_quarter = quarter[:, None] == jnp.arange(QUARTERS)
    metrics = {
        "loss": loss.mean(),
        "quarter_loss": (in_quarter * loss[:, None]).mean(axis=0),
        "quarter_share": in_quarter.mean(axis=0, dtype=jnp.float32),
    }
    return metrics["loss"], metrics


def gradient(
    task: Task, params: Any, images: jax.Array, index: jax.Array, step: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of the mean loss of a batch, and metrics, both in float32.

    With several microbatches, one after another, their mean: that of the batch as a whole.
    """

    def of(images: jax.Array, index: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        grad_fn = jax.grad(_loss_and_metrics, argnums=1, has_aux=True)
        return grad_fn(task, params, images, index, step)

    parts = task.microbatches
    if parts == 1:
        return of(images, index)

    def deal(x: jax.Array) -> jax.Array:  # Example i goes to part i mod parts, on its device.
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(*part)), None

    shapes = jax.eval_shape(
        of, images[: images.shape[0] // parts], index[: index.shape[0] // parts]
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (deal(images), deal(index)))
    return jax.tree.map(lambda x: x / parts, total)


def updated(
    task: Task, state: State, grads: Any, loss: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    """The state after an update by these gradients, their norm, and whether all was finite.

    With task.skip_nonfinite only the step goes on where it was not.
    """
    norm = global_norm(grads)  # Before the clip.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def of_leaf(g, param, average, opt_state, factor, decay, finite):
        update, new_opt_state = task.optimizer.update(g * factor, opt_state, param)
        new_param = optax.apply_updates(param, update)
        new = new_param, decay * average + (1 - decay) * new_param, new_opt_state
        if not task.skip_nonfinite:
            return new
        return jax.tree.map(
            lambda there, before: jnp.where(finite, there, before), new, (param, average, opt_state)
        )

    scalars = clip_factor(task.train, norm), ema_decay(task.train, state.step), finite
    # Behind a barrier, lest each leaf computes the scalars again, or has the gradients' layout.
    grads, scalars = jax.lax.optimization_barrier((as_stored(grads), scalars))
    return State(state.step + 1, *map_leaves(of_leaf, grads, state, *scalars)), norm, finite


def train_step(
    task: Task, state: State, images: jax.Array, axis_name: str | None = None
) -> tuple[State, dict[str, jax.Array]]:
    """One update. Algorithm 1.

    Args:
      images: uint8 [batch, height, width, channels], or under pmap this device's part of it.
      axis_name: of the devices, under pmap.
    Returns:
      The new state, and float32 metrics: loss; quarter_loss and quarter_share [4], whose ratio is
      the mean loss over that quarter of 1..T; grad_norm, before clipping; learning_rate, that of
      this step, which Adam reaches later by as many as were left out before; with
      task.skip_nonfinite also skipped, whether this update was left out.
    """
    index = jnp.arange(images.shape[0])
    if axis_name:
        index += jax.lax.axis_index(axis_name) * images.shape[0]
    grads, metrics = gradient(task, state.params, images, index, state.step)
    if axis_name:
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    update = apart(functools.partial(updated, task))
    new, metrics["grad_norm"], finite = update(state, grads, metrics["loss"])
    metrics["learning_rate"] = jnp.asarray(learning_rate(task.train)(state.step), jnp.float32)
    if task.skip_nonfinite:
        metrics["skipped"] = ~finite
    return new, metrics


def train_call(
    task: Task, state: State, images: jax.Array, axis_name: str | None = None
) -> tuple[State, dict[str, jax.Array]]:
    """Several updates in one program: images and metrics have a leading axis of steps."""
    if images.shape[0] == 1:
        state, metrics = train_step(task, state, images[0], axis_name)
        return state, jax.tree.map(lambda x: x[None], metrics)
    return jax.lax.scan(lambda s, x: train_step(task, s, x, axis_name), state, images)


def seeded_call(
    task: Task, carried: tuple[jax.Array, State], images: jax.Array, axis_name: str | None = None
) -> tuple[tuple[jax.Array, State], dict[str, jax.Array]]:
    """`train_call` with (seed, state) for the state: one program serves runs that differ in it."""
    seed, state = carried
    state, metrics = train_call(dataclasses.replace(task, seed=seed), state, images, axis_name)
    return (seed, state), metrics
