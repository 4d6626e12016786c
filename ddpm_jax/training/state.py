"""What training carries from step to step, and the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    """Adam, for gradients that are clipped already."""
    # The identity stands where checkpoints have the empty state of a clip.
    return optax.chain(optax.identity(), optax.adam(learning_rate(train)))


def clip_factor(train: ml_collections.ConfigDict, norm: jax.Array) -> jax.Array:
    """What gradients of this global norm are multiplied by, to have `train.clip_norm` at most."""
    return jnp.minimum(1.0, train.clip_norm / norm) if train.clip_norm else jnp.ones_like(norm)


def global_norm(tree: Any) -> jax.Array:
    """The root of the sum of all squares, float32: `optax.tree.norm`, equal leaves traced once."""
    squares = jax.jit(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))))
    return jnp.sqrt(sum(squares(x) for x in jax.tree.leaves(tree)))


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


def map_leaves(
    update: Callable[..., tuple[jax.Array, jax.Array, optax.OptState]],
    grads: Any,
    state: State,
    *scalars: jax.Array,
) -> tuple[Any, Any, optax.OptState]:
    """New parameters, average and optimizer state by an `update` of one leaf.

    Equal leaves are traced and lowered once.

    Args:
      update: (gradient, parameter, average, optimizer state, *scalars) of a leaf, to its new
        parameter, average and optimizer state.
    Raises:
      ValueError: the optimizer's state has arrays that are not laid out as the parameters. One that
        sees several leaves and has no such state goes unnoticed.
    """
    tree = jax.tree.structure(grads)

    def like_params(x: Any) -> bool:
        return jax.tree.structure(x) == tree

    # Of the optimizer's state some parts are like the parameters; others are shared by all leaves.
    parts, outer = jax.tree.flatten(state.opt_state, is_leaf=like_params)
    if any(jnp.ndim(x) for x in parts if not like_params(x)):
        raise ValueError(
            "the optimizer does not treat each leaf by itself, alike: see Task.optimizer"
        )
    own = [jax.tree.leaves(x) if like_params(x) else [x] * tree.num_leaves for x in parts]
    rows = zip(*map(jax.tree.leaves, (grads, state.params, state.ema_params)), *own, strict=True)
    once = jax.jit(update)
    new = [once(g, p, e, outer.unflatten(s), *scalars) for g, p, e, *s in rows]
    params, ema_params, opt_states = zip(*new, strict=True)
    columns = zip(*map(outer.flatten_up_to, opt_states), strict=True)
    parts = [
        tree.unflatten(column) if like_params(x) else column[0]
        for x, column in zip(parts, columns, strict=True)
    ]
    return tree.unflatten(params), tree.unflatten(ema_params), outer.unflatten(parts)


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
