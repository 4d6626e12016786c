"""The training step against the same thing done by hand."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from ddpm_jax import keys, parallel, schedules
from ddpm_jax.diffusion import Process
from ddpm_jax.models import UNet
from ddpm_jax.training.state import State, ema_decay, init_state, learning_rate, make_optimizer
from ddpm_jax.training.step import Task, train_call, train_step, updated

BATCH, SIZE, STEPS_T = 8, 8, 20


def train_config(**changes):
    values = {
        "objective": "simple",
        "timesteps": "independent",
        "batch_size": BATCH,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "ema_ramp": False,
    }
    return ml_collections.ConfigDict(values | changes)


def make_task(microbatches=1, dropout=0.0, flip=False, **changes):
    train = train_config(**changes)
    # Two channels a group: alone, a channel's bias before a norm has no gradient but rounding.
    model = UNet(8, (1, 2), 1, (), dropout=dropout, out_channels=1, norm_groups=4)
    process = Process(schedules.linear(STEPS_T, 1e-3, 0.4))
    return Task(model, process, make_optimizer(train), train, flip, 7, microbatches)


@pytest.fixture(scope="module")
def state():
    task = make_task()
    make = jax.jit(lambda: init_state(task.model, task.optimizer, (SIZE, SIZE, 1), task.seed))
    state = make()
    # Away from the nearly zero start, where little depends on anything.
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape),
        state.params,
    )
    return dataclasses.replace(state, params=params)


def test_initial_parameters_are_flax_s_own():
    """To the bit those of `lazy_init`, which never passes anything through the network."""
    task = make_task()
    model = task.model
    x, t = jax.ShapeDtypeStruct((1, SIZE, SIZE, 1), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    key = keys.purpose_key(task.seed, "init")
    want = jax.jit(lambda: model.lazy_init(key, x, t)["params"])()
    make = jax.jit(lambda: init_state(model, task.optimizer, (SIZE, SIZE, 1), task.seed))
    jax.tree.map(np.testing.assert_array_equal, make().params, want)
    text = make.lower().as_text()
    assert "convolution" not in text and "dot_general" not in text  # Nor does ours, under jit.


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(
        np.random.default_rng(0).integers(0, 256, (3, BATCH, SIZE, SIZE, 1)), "uint8"
    )


def close(one, other, rtol=1e-4, atol=1e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("flip", [False, True])
def test_first_update_is_algorithm_1_then_clip_then_adam_by_hand(state, images, flip):
    task = make_task(flip=flip)
    new, metrics = jax.jit(functools.partial(train_step, task))(state, images[0])

    index = jnp.arange(BATCH)
    draw = {p: keys.example_keys(7, p, 0, index) for p in ("timestep", "noise", "flip")}
    x0 = np.asarray(images[0], np.float64) / 127.5 - 1
    if flip:
        mirrored = np.array([bool(jax.random.bernoulli(k)) for k in draw["flip"]])
        assert 0 < mirrored.sum() < BATCH
        x0[mirrored] = x0[mirrored][:, :, ::-1]
    u = np.array([float(jax.random.uniform(k)) for k in draw["timestep"]])
    t = 1 + np.floor(u * STEPS_T).astype(int)
    noise = np.asarray(keys.normal(draw["noise"], 0, (SIZE, SIZE, 1)), np.float64)
    alpha_bar = np.cumprod(1 - np.linspace(1e-3, 0.4, STEPS_T))[t - 1][:, None, None, None]
    x_t = jnp.float32(np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * noise)

    def loss(params):
        out = task.model.apply({"params": params}, x_t, jnp.asarray(t))
        return ((jnp.float32(noise) - out) ** 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    norm = np.sqrt(
        sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    )
    assert norm > 1  # So that the clip counts.
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)

    def adam(parameter, g):  # Its first step: both moments are the gradient's own.
        g = np.asarray(g, np.float64) / norm
        return np.asarray(parameter, np.float64) - 1e-2 * g / (np.abs(g) + 1e-8)

    wanted = jax.tree.map(adam, state.params, grads)
    for path, got in jax.tree_util.tree_leaves_with_path(new.params):
        want = functools.reduce(lambda node, key: node[key.key], path, wanted)
        g = functools.reduce(lambda node, key: node[key.key], path, grads)
        sure = np.abs(g) > 1e-4  # Where the gradient's sign is beyond rounding.
        np.testing.assert_allclose(np.asarray(got)[sure], want[sure], atol=2e-5)
    assert new.step == 1
    close(new.ema_params, new.params, rtol=0, atol=0)  # A copy at step 0.


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(optax.linear_schedule(0.0, 0.1, 3)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
        optax.sgd(0.1),
    ],
    ids=["adam", "momentum and decay", "descent"],
)
@pytest.mark.parametrize("shapes", [[(3, 4), (5,), (), (3, 4)], [(3,)], [()]])
def test_updates_leaf_by_leaf_are_those_of_optax_after_its_clip(inner, shapes):
    """The gradients' norm is above the clip at first, and then below."""
    rng = np.random.default_rng(0)
    tree = {str(i): jnp.asarray(rng.normal(size=s), jnp.float32) for i, s in enumerate(shapes)}
    whole = optax.chain(optax.clip_by_global_norm(1.0), inner)
    traced = []

    def counted(*arguments):
        traced.append(arguments)
        return inner.update(*arguments)

    once = optax.GradientTransformation(inner.init, counted)
    task = dataclasses.replace(make_task(), optimizer=optax.chain(optax.identity(), once))
    zero = jnp.zeros((), jnp.int32)
    state = State(zero, tree, tree, task.optimizer.init(tree))
    params, want = tree, whole.init(tree)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(want)
    update = jax.jit(functools.partial(updated, task))
    loss = jnp.zeros(())
    for scale in (10.0, 1.0, 0.01, 0.0):
        grads = jax.tree.map(lambda x, s=scale: s * jnp.cos(x), params)
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values()))
        average = state.ema_params
        state, got, finite = update(state, grads, loss)
        assert finite
        np.testing.assert_allclose(got, norm, rtol=1e-6)
        updates, want = whole.update(grads, want, params)
        params = optax.apply_updates(params, updates)
        close((state.params, state.opt_state), (params, want), rtol=2e-6, atol=1e-7)
        decay = 0.9 if state.step > 1 else 0.0
        wanted = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, average, params)
        close(state.ema_params, wanted, rtol=2e-6, atol=1e-7)
    assert state.step == 4
    assert len(traced) == len(set(shapes))  # Equal leaves together.


def test_an_optimizer_that_masks_leaves_is_refused(state):
    mask = jax.tree.map(lambda x: x.ndim > 1, state.params)
    task = dataclasses.replace(make_task(), optimizer=optax.masked(optax.adam(0.1), mask))
    state = dataclasses.replace(state, opt_state=task.optimizer.init(state.params))
    with pytest.raises(ValueError, match="each leaf by itself"):
        updated(task, state, state.params, jnp.zeros(()))


@pytest.mark.parametrize("remat", [False, True])
def test_the_update_and_the_ways_back_are_apart_on_cpus_alone(monkeypatch, state, images, remat):
    """A program of one piece is for other platforms."""
    monkeypatch.setattr(parallel.jaxlib.version, "__version__", "0.10.2")
    monkeypatch.setattr(parallel.jax, "default_backend", lambda: "cpu")
    task = make_task()
    task = dataclasses.replace(task, model=task.model.clone(remat=remat))
    state = dataclasses.replace(state, opt_state=task.optimizer.init(state.params))

    def marks():
        step = jax.jit(functools.partial(train_step, task)).lower(state, images[0])
        return step.as_text().count('inlineable = "false"')

    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    convolutions = sum(leaf.ndim == 4 for _, leaf in leaves)
    norms = sum(path[-1].key == "scale" for path, _ in leaves)
    # Of the first convolution only the kernel's gradient is used, and its mark with it.
    assert marks() == 1 + convolutions - 1 + norms
    with parallel.in_one_piece():
        assert marks() == 0


def test_on_gpus_gradients_come_to_the_update_as_they_are_stored(state):
    """Else the compiler lets the update have the order of what makes them."""
    task = dataclasses.replace(make_task(), optimizer=optax.sgd(1.0))
    state = dataclasses.replace(state, opt_state=task.optimizer.init(state.params))

    def orders(platform):
        traced = jax.jit(functools.partial(updated, task)).trace(state, state.params, jnp.zeros(()))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(r"@LayoutConstraint.*?result_layouts = \[dense<(.*?)> ", text)
        return [[int(axis) for axis in re.findall(r"\d+", order)] for order in found]

    assert orders("cpu") == orders("tpu") == []
    dimensions = [x.ndim for x in jax.tree.leaves(state.params)]
    assert [len(order) for order in orders("cuda")] == dimensions
    assert all(order == sorted(order, reverse=True) for order in orders("cuda"))


def test_no_clip_where_there_is_none(state):
    task = dataclasses.replace(make_task(clip_norm=0.0), optimizer=optax.sgd(1.0))
    state = dataclasses.replace(state, opt_state=task.optimizer.init(state.params))
    grads = jax.tree.map(jnp.negative, state.params)
    new, norm, _ = updated(task, state, grads, jnp.zeros(()))
    assert norm > 1
    close(new.params, jax.tree.map(lambda x: 2 * x, state.params), rtol=1e-6)


def test_average_follows_with_its_decay_after_the_copy(state, images):
    step = jax.jit(functools.partial(train_step, make_task()))
    first, _ = step(state, images[0])
    second, _ = step(first, images[1])
    wanted = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, first.ema_params, second.params)
    close(second.ema_params, wanted, rtol=1e-6)


def test_several_steps_in_a_call_are_the_same_steps(state, images):
    # Plain descent: Adam turns gradients that are rounding alone, as that of the keys' bias in
    # attention, into whole steps.
    task = dataclasses.replace(make_task(dropout=0.1, flip=True), optimizer=optax.sgd(0.1))
    state = dataclasses.replace(state, opt_state=task.optimizer.init(state.params))
    together, metrics = jax.jit(functools.partial(train_call, task))(state, images)
    step, alone, losses = jax.jit(functools.partial(train_step, task)), state, []
    for batch in images:
        alone, one = step(alone, batch)
        losses.append(one["loss"])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)
    close(together.params, alone.params, atol=1e-5)


@pytest.mark.parametrize(("microbatches", "timesteps"), [(4, "stratified")])
def test_microbatches_give_the_mean_of_the_whole_batch(state, images, microbatches, timesteps):
    one, many = (
        jax.jit(functools.partial(train_step, make_task(m, 0.1, True, timesteps=timesteps)))(
            state, images[0]
        )[1]
        for m in (1, microbatches)
    )
    close(many, one, rtol=2e-5)


def test_quarters_share_out_the_loss(state, images):
    _, metrics = jax.jit(functools.partial(train_step, make_task()))(state, images[0])
    np.testing.assert_allclose(metrics["quarter_share"].sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["quarter_loss"].sum(), metrics["loss"], rtol=1e-5)


def test_learning_rate_rises_from_zero_and_stays():
    rate = learning_rate(train_config(warmup_steps=4, learning_rate=0.8))
    np.testing.assert_allclose([rate(s) for s in (0, 1, 3, 4, 100)], [0, 0.2, 0.6, 0.8, 0.8])


def test_ema_decay_is_a_copy_first_and_may_rise():
    plain, ramp = train_config(ema_decay=0.99), train_config(ema_decay=0.99, ema_ramp=True)
    np.testing.assert_allclose([ema_decay(plain, jnp.int32(s)) for s in (0, 1, 9)], [0, 0.99, 0.99])
    got = [ema_decay(ramp, jnp.int32(s)) for s in (0, 10, 90, 10**6)]
    np.testing.assert_allclose(got, [0, 0.5, 0.9, 0.99])
