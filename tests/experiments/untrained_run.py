"""A run directory with a checkpoint that no training made, for tests of what reads runs."""

import jax
from runs_for_tests import arguments

from ddpm_jax.main import parse, resolve
from ddpm_jax.runs import RunDirectory, image_shape, make_model
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.state import init_state, make_optimizer


def untrained(workdir, **overrides):
    """Makes the run of the small config at step 10; overrides are spelled evaluation__count=…."""
    config = resolve(*parse(arguments(workdir, **overrides)))
    directory = RunDirectory.of(workdir)
    directory.save_config(config)
    model, optimizer = make_model(config), make_optimizer(config.train)
    init = jax.jit(lambda: init_state(model, optimizer, image_shape(config), config.seed))
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(10, init(), {})
    checkpoints.wait()
    checkpoints.close()
    return workdir
