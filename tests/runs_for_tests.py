"""A run small enough to train in seconds, and ways to run it, here or in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from ddpm_jax import runs
from ddpm_jax.main import main
from ddpm_jax.training.checkpoints import Checkpoints
from ddpm_jax.training.loop import make_job

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "data.flip": "true",
    "model.channels": 8,
    "model.channel_multipliers": "1",
    "model.num_res_blocks": 1,
    "model.dropout": 0.1,
    "model.attention_resolutions": "()",
    "model.norm_groups": 4,
    "diffusion.num_steps": 20,
    "diffusion.beta_end": 0.4,
    "diffusion.schedule": "linear",
    "train.steps": 20,
    "train.steps_per_call": 1,
    "train.batch_size": 8,
    "train.warmup_steps": 5,
    "train.log_every": 5,
    "train.checkpoint_every": 10,
    "train.sample_every": 0,
    "sample.count": 4,
    "sample.batch_size": 4,
}


def arguments(workdir, mode="train", **overrides):
    """The command line of the small run; overrides are spelled train__steps=…."""
    settings = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={ROOT}/configs/digits.py", f"--workdir={workdir}", f"--mode={mode}", *flags]


def lines(workdir):
    """metrics.jsonl, without what the clock says."""
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8")
    clocks = ("time/", "steps_per", "images_per", "seconds_")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(clocks)}
        for line in text.splitlines()
    ]


def train(workdir, **overrides):
    """Trains here; returns the exit code."""
    return main(arguments(workdir, **overrides))


def start(argv, devices=1, code=None):
    """Starts a process of the program (or of some code) with so many virtual devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    program = ["-m", "ddpm_jax.main"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *argv],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def final_state(workdir):
    """The newest whole checkpoint: its leaves by name as arrays, and its step."""
    directory = runs.RunDirectory.of(workdir)
    checkpoints = Checkpoints(directory.checkpoints)
    state, step, _ = checkpoints.restore(make_job(directory.load_config()).abstract)
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, step


def assert_equal_states(one, other):
    """Every leaf equal to the bit, and there are leaves of every kind."""
    assert one.keys() == other.keys()
    assert {name.split(".")[1].split("[")[0] for name in one} == {
        "step",
        "params",
        "ema_params",
        "opt_state",
    }
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
