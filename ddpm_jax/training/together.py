"""The seeds of a small network, trained together by one program.

A network too small to fill the devices leaves room for those of other seeds. Each seed is an
ordinary run in a directory of its own, with the numbers it would have alone; together they take
less time. The program takes the seeds as numbers, so that it is compiled once for any of them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import session
from ddpm_jax.config import RequestError
from ddpm_jax.data import nbytes, open_source, resident_gather
from ddpm_jax.parallel import Layout, network_jit
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.job import Job, make_job
from ddpm_jax.training.lane import Lane
from ddpm_jax.training.loop import (
    Call,
    attend,
    check_agreement,
    evaluators_of,
    headline,
    run_lanes,
    take,
    watched,
)
from ddpm_jax.training.metrics import NonFiniteError
from ddpm_jax.training.state import State
from ddpm_jax.training.step import Task, train_call, train_step

SEED = "{seed}"  # Its place in the pattern of the directories.
FORMS = ("unrolled", "vmap")


def parse_seeds(text: str) -> list[int]:
    """The seeds of "0,1,2".

    Raises:
      RequestError: anything else.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RequestError(f"--seeds={text}: expected integers such as 0,1,2") from None


def workdir_of(pattern: str, seed: int) -> str:
    """The directory of a seed.

    Raises:
      RequestError: the pattern has no place for it.
    """
    if SEED not in pattern:
        raise RequestError(
            f"--workdir={pattern}: with --seeds it needs {SEED}, e.g. --workdir='runs/digits{SEED}'"
        )
    return pattern.replace(SEED, str(seed))


def form_of(layout: Layout) -> str:
    """The faster form on these devices, see `compile_together`."""
    return "unrolled" if layout.mesh.devices.flat[0].platform == "cpu" else "vmap"


def compile_together(
    layout: Layout, task: Task, seeds: Sequence[int], state_sharding: Any, form: str | None = None
) -> Call:
    """`call(states, images) -> (states, metrics)`: `train_call` for each seed, in one program.

    Args:
      layout: with the mode jit.
      task: of any seed.
      state_sharding: of each state.
      form: "unrolled", the steps of the seeds written out one beside another, which CPUs run at
        the same time; "vmap", one step with batched kernels, which is compiled as fast as a
        single one, but whose convolutions are slow on CPUs; None: `form_of` the devices.
    Returns:
      A function of a list of states (donated) and one of images [steps, batch, ...], in
      `layout.split(1)`, in the order of the seeds; it returns the like, and replicated metrics.
    """
    bodies = {"unrolled": _unrolled, "vmap": _vmapped}
    n, images, whole = len(seeds), layout.split(1), layout.replicated
    program = network_jit(
        functools.partial(bodies[form or form_of(layout)], task),
        in_shardings=(whole, [state_sharding] * n, [images] * n),
        out_shardings=([state_sharding] * n, [whole] * n),
        donate_argnums=1,
    )
    return functools.partial(program, np.asarray(seeds, np.int32))


def _unrolled(
    task: Task, seeds: jax.Array, states: list[State], images: list[jax.Array]
) -> tuple[list[State], list[Any]]:
    tasks = [dataclasses.replace(task, seed=seed) for seed in seeds]

    def step(states: list[State], images: list[jax.Array]) -> tuple[list[State], list[Any]]:
        done = [train_step(*one) for one in zip(tasks, states, images, strict=True)]
        return [state for state, _ in done], [metrics for _, metrics in done]

    return jax.lax.scan(step, states, images, unroll=len(images[0]) == 1)


def _vmapped(
    task: Task, seeds: jax.Array, states: list[State], images: list[jax.Array]
) -> tuple[list[State], list[Any]]:
    def of_seed(seed: jax.Array, state: State, images: jax.Array) -> tuple[State, Any]:
        return train_call(dataclasses.replace(task, seed=seed), state, images)

    def stack(*leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves)

    done = jax.vmap(of_seed)(seeds, jax.tree.map(stack, *states), jnp.stack(images))
    each = [jax.tree.map(lambda x, i=i: x[i], done) for i in range(len(states))]
    return [state for state, _ in each], [metrics for _, metrics in each]


def train_together(
    config: ml_collections.ConfigDict,
    workdir: str,
    seeds: Sequence[int],
    say: Callable[[str], None],
    form: str | None = None,
    force: bool = False,
    started: float | None = None,
) -> None:
    """Trains a run of each seed until `train.steps`, in one program; see `loop.train`.

    Each goes on from its own newest whole checkpoint: those furthest behind first, together with
    the others from where these stand. Finished ones are left alone. One whose loss is not finite
    stops with its checkpoints as they were, and the others go on.

    Each has the numbers it would have alone: to the bit where unrolled, to rounding under vmap.
    There one that goes on has them but to rounding as well, where the seeds stand apart: how a
    batched kernel rounds depends on how many go together.

    Args:
      config: a valid config, whose seed does not count.
      workdir: the runs' directories, with {seed} in the place of the seed.
      say: prints a line.
      form: see `compile_together`.
      force, started: see `loop.train`.
    Raises:
      RequestError: seeds, data, devices or the directories do not fit the config.
      Interrupted: by SIGINT or SIGTERM, after a checkpoint of each.
      NonFiniteError: losses, gradients or results of some were not finite; the others are finished.
      CheckpointError: a checkpoint could not be written, or all of a run are damaged.
      ReadError, LostError: see `loop.train`.
    """
    directories = {seed: RunDirectory.of(workdir_of(workdir, seed)) for seed in seeds}
    if len(directories) < len(seeds):
        raise RequestError(f"--seeds={','.join(map(str, seeds))}: each must be named once")
    if config.parallel.mode != "jit":
        raise RequestError(
            f"config.parallel.mode={config.parallel.mode}: seeds are trained together with jit "
            "only; set that, or train them one by one with --config.seed"
        )
    jobs = {seed: job for seed, job in zip(seeds, _jobs(config, seeds), strict=True)}
    source = open_source(config, batch_size=config.train.batch_size)
    says = {seed: functools.partial(_say_of, say, seed) for seed in seeds}
    check_agreement(config, workdir, source)
    evaluators_of(jobs[seeds[0]], say)  # All is found to fit before a directory is written.
    for seed, directory in directories.items():
        directory.check_resumable(jobs[seed].config, force, says[seed])
    layout, first = jobs[seeds[0]].layout, jobs[seeds[0]]
    form = form or form_of(layout)
    say(headline(first, source, len(seeds)))
    say(f"writing to {', '.join(str(d.path) for d in directories.values())}")

    def program(group: Sequence[Lane]) -> Call:
        members = [lane.job.config.seed for lane in group]
        say(f"training seeds {', '.join(map(str, members))} from step {group[0].step} ({form})")
        return compile_together(layout, first.task, members, first.sharding, form)

    with contextlib.ExitStack() as stack:
        clock, watch = watched(stack, config, started)
        locks = {s: take(stack, directories[s], says[s]) for s in seeds}
        every = [
            Lane(
                stack,
                jobs[s],
                directories[s],
                evaluators_of(jobs[s], says[s]),
                watch,
                clock,
                locks[s],
                says[s],
            )
            for s in seeds
        ]
        session.agree("where they go on", {f"seed {k}": x.step for k, x in enumerate(every)})
        for lane in every:
            lane.check(source, force)
        for s in seeds:
            directories[s].save_config(jobs[s].config)
        lanes = [lane for lane in every if not lane.finished()]
        if lanes:
            fits = nbytes(source) <= config.data.resident_bytes
            gather = fits and resident_gather(source, layout.split(1))  # One for all.
            for lane in lanes:
                lane.begin(source, gather)
            attend(lanes, watch, clock)
            run_lanes(lanes, program, watch, clock, say)
            for lane in lanes:
                lane.lives.failure = str(lane.error or "")
            say(lanes[0].lives.summary())
    failed = [f"seed {lane.job.config.seed}: {lane.error}" for lane in lanes if lane.error]
    if failed:
        raise NonFiniteError("; ".join(failed))


def _jobs(config: ml_collections.ConfigDict, seeds: Sequence[int]) -> list[Job]:
    """The job of each seed: the same model, process and optimizer."""
    configs = []
    for seed in seeds:
        of_seed = copy.deepcopy(config)
        of_seed.seed = seed
        config_lib.validate(of_seed)
        configs.append(of_seed)
    job = make_job(configs[0])
    return [
        dataclasses.replace(job, config=c, task=dataclasses.replace(job.task, seed=c.seed))
        for c in configs
    ]


def _say_of(say: Callable[[str], None], seed: int, line: str) -> None:
    say(f"seed {seed}: {line}")
