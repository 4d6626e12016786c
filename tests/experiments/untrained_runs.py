"""Run directories in a moment: the small run of `runs_for_tests`, its parameters random."""

import dataclasses

import jax
import numpy as np
from runs_for_tests import arguments

from ddpm_jax import main as program
from ddpm_jax import runs
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.state import init_state, make_optimizer


def untrained(workdir, **overrides):
    """Makes workdir a run whose network is one of no training, but nowhere zero."""
    chosen = [a for a in arguments(workdir, **overrides) if not a.startswith(("--work", "--mode"))]
    config = program.resolve(*program.parse(chosen))
    directory = runs.RunDirectory.of(workdir)
    directory.save_config(config)
    optimizer, shape = make_optimizer(config.train), runs.image_shape(config)
    model = runs.make_model(config)
    state = jax.jit(lambda seed: init_state(model, optimizer, shape, seed))(config.seed)
    rng = np.random.default_rng(config.seed)
    shaken = jax.tree.map(
        lambda x: x + rng.normal(0, 0.05, x.shape).astype(np.float32), state.params
    )
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(1, dataclasses.replace(state, params=shaken, ema_params=shaken), {})
    checkpoints.wait()
    checkpoints.close()
    return workdir
