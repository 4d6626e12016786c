"""The program that trains several seeds together: what it computes, and for which seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_for_tests import ROOT, TINY, arguments, start

from ddpm_jax import config as config_lib
from ddpm_jax.parallel import compile_call
from ddpm_jax.training import together
from ddpm_jax.training.job import initial_state, make_job
from ddpm_jax.training.step import seeded_call

SEEDS = (0, 5)


@pytest.mark.long
def test_as_alone_to_the_bit_with_the_compilers_optimisations(monkeypatch):
    """The digits' settings; half of their network, as compiling it takes all the time."""
    monkeypatch.setenv("XLA_FLAGS", "")
    process = start([], code="import test_together_program as t; t.optimised()")
    assert process.wait(timeout=300) == 0, process.communicate()


def optimised():
    """In a process of its own: two seeds, and one of them alone, whole and in parts."""
    for parts in (1, 2):
        config = config_lib.load_file(f"{ROOT}/configs/digits.py")
        config.model.update(channel_multipliers=(1,), attention_resolutions=(8,))
        config.parallel.microbatches = parts
        two_seeds_and_one(make_job(config))


def two_seeds_and_one(job):
    """Checks, over 20 steps, that they are equal to the bit."""
    seeds, images = SEEDS, np.random.default_rng(0).integers(0, 256, (2, 10, 64, 8, 8, 1))
    initial = jax.jit(initial_state(job.config, job.task), out_shardings=job.sharding)
    both = together.compile_together(job.layout, job.task, seeds, job.sharding, "unrolled")
    program = functools.partial(seeded_call, job.task)
    alone = compile_call(job.layout, program, (job.layout.replicated, job.sharding))
    carried, states = (np.int32(seeds[1]), initial(seeds[1])), [initial(seed) for seed in seeds]
    for batches in images.astype(np.uint8):
        carried, metrics = alone(carried, batches)
        states, of_each = both(states, [batches] * 2)
        jax.tree.map(np.testing.assert_array_equal, metrics, of_each[1])
    assert states[1].step == 20
    jax.tree.map(np.testing.assert_array_equal, carried[1], states[1])


def test_one_program_serves_any_seeds():
    config = config_lib.load_file(arguments("")[0].removeprefix("--config="))
    for key, value in TINY.items():
        config_lib.override(config, key, value)
    job = make_job(config)

    def program(seeds, form):
        call = together.compile_together(job.layout, job.task, seeds, job.sharding, form)
        images = jax.ShapeDtypeStruct((1, 8, 8, 8, 1), jnp.uint8)
        return call.func.lower(*call.args, [job.abstract] * 2, [images] * 2).as_text()

    for form in together.FORMS:
        assert program((0, 1), form) == program((7, 3), form)
    assert program((0, 1), "unrolled") != program((0, 1), "vmap")
