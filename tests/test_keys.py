"""Randomness by position: a function of (seed, purpose, step, index) and of nothing else."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax import keys


def bits(array):
    return np.asarray(jax.random.key_data(array))


def test_each_coordinate_gives_a_stream_of_its_own_e2():
    """No two of (seed, purpose, step, index) share a key, nor may two coordinates be exchanged."""
    every = [
        bits(keys.example_keys(seed, purpose, step, jnp.arange(8)))
        for seed in range(3)
        for purpose in keys.PURPOSES
        for step in range(8)
    ]
    every = np.concatenate(every)
    assert len(np.unique(every, axis=0)) == len(every) == 3 * len(keys.PURPOSES) * 64


def test_purposes_have_numbers_that_never_change():
    """Runs made before a change must be reproducible after it."""
    numbers = dict(init=0, timestep=1, noise=2, dropout=3, flip=4, sample=5, bound=6)
    assert keys.PURPOSES.items() >= numbers.items()
    assert len(set(keys.PURPOSES.values())) == len(keys.PURPOSES)
    key = jax.random.key(7, impl="threefry2x32")
    for coordinate in (6, 3, 11):  # "bound", step 3, index 11.
        key = jax.random.fold_in(key, coordinate)
    np.testing.assert_array_equal(
        bits(keys.example_keys(7, "bound", 3, jnp.array([11])))[0], bits(key)
    )


def test_an_unknown_purpose_is_refused():
    with pytest.raises(KeyError):
        keys.purpose_key(0, "luck")


def test_a_subset_of_indices_gives_the_same_rows_e26():
    everything = keys.example_keys(3, "noise", 17, jnp.arange(64))
    rows = jnp.array([5, 63, 0, 5])
    some = keys.example_keys(3, "noise", 17, rows)
    np.testing.assert_array_equal(bits(some), bits(everything)[rows])
    np.testing.assert_array_equal(
        keys.normal(some, 2, (3, 2)), keys.normal(everything, 2, (3, 2))[rows]
    )


def test_jit_and_traced_coordinates_change_nothing():
    plain = keys.example_keys(3, "noise", 17, jnp.arange(4))
    traced = jax.jit(lambda seed, step: keys.example_keys(seed, "noise", step, jnp.arange(4)))
    np.testing.assert_array_equal(bits(traced(3, 17)), bits(plain))
    np.testing.assert_array_equal(
        jax.jit(lambda k, p: keys.normal(k, p, (5,)))(plain, 9), keys.normal(plain, 9, (5,))
    )


def test_keys_are_threefry_whatever_the_default():
    """Under vmap the hardware generator ignores all keys but one."""
    with jax.default_prng_impl("rbg"):
        got = keys.example_keys(0, "noise", 0, jnp.arange(3))
    assert str(jax.random.key_impl(got)) == "threefry2x32"
    np.testing.assert_array_equal(bits(got), bits(keys.example_keys(0, "noise", 0, jnp.arange(3))))


def test_noise_is_standard_normal_and_independent_between_rows_and_positions():
    """25,600 numbers, p > 0.001; correlations of rows of 256 below 5/√256."""
    key = keys.example_keys(0, "noise", 0, jnp.arange(10))
    noise = np.stack([keys.normal(key, position, (16, 16)) for position in range(10)])
    assert noise.dtype == np.float32
    assert noise.shape == (10, 10, 16, 16)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise.reshape(100, -1)) - np.eye(100)
    assert np.abs(correlation).max() < 5 / 16


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ddpm_jax import keys, sampling, schedules
from ddpm_jax.diffusion import Process

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("batch",))
split = NamedSharding(mesh, PartitionSpec("batch"))
process = Process(schedules.linear(5, 1e-3, 0.5))

def draw(indices):
    key = keys.example_keys(4, "sample", 2, indices)
    images = sampling.sample(process, lambda x, t: 0.5 * x, (16, 2, 3, 1), key)
    return jax.random.key_data(key), keys.normal(key, 3, (7, 5)), images

indices = jnp.arange(100, 116)
one = jax.jit(draw)(indices)
eight = jax.jit(draw, in_shardings=split, out_shardings=split)(indices)
for a, b in zip(one, eight):
    assert len(a.sharding.device_set) == 1 and len(b.sharding.device_set) == 8
    assert b.addressable_shards[0].data.shape[0] == 2
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
print("equal bits")
"""


def test_eight_devices_draw_the_bits_of_one_e26():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    child = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.stdout == "equal bits\n", child.stderr
