"""What training carries from step to step, and the optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from ddpm_jax import keys
from ddpm_jax.models import UNet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that is saved: nothing else is needed to go on.

    step: int32, the updates done. ema_params: the parameters' moving average.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState


def make_optimizer(train: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, after a clip of the gradient's global norm."""
    clip = optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity()
    return optax.chain(clip, optax.adam(learning_rate(train)))


def learning_rate(train: ml_collections.ConfigDict) -> optax.Schedule:
    """A linear rise from 0 at step 0 to the full rate at step warmup_steps, then constant."""
    if not train.warmup_steps:
        return optax.constant_schedule(train.learning_rate)
    return optax.linear_schedule(0.0, train.learning_rate, train.warmup_steps)


def ema_decay(train: ml_collections.ConfigDict, step: jax.Array) -> jax.Array:
    """The moving average's decay at the update that follows `step` others.

    0 at step 0, where the average becomes a copy; with train.ema_ramp at most step/(step + 10).
    """
    decay = jnp.where(step == 0, 0.0, train.ema_decay)
    return jnp.minimum(decay, step / (step + 10)) if train.ema_ramp else decay


def init_state(
    model: UNet, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int
) -> State:
    """The state before the first step: a pure function of the seed, to be run under jit.

    jit leaves out the network's pass over nothing, from which the layers know their shapes; Flax's
    `lazy_init` does so as well, in twice the time.
    """
    x, t = jnp.zeros((1, *image_shape)), jnp.ones((1,), jnp.int32)
    params = model.init(keys.purpose_key(seed, "init"), x, t)["params"]
    step = jnp.zeros((), jnp.int32)
    return State(step, params, jax.tree.map(jnp.copy, params), optimizer.init(params))
