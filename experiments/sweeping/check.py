"""What a sweep will cost, before anything starts."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ddpm_jax.config import RequestError
from ddpm_jax.data import open_source
from ddpm_jax.evaluation import names
from ddpm_jax.generation import GRID_IMAGES
from ddpm_jax.models import rounded_kernels
from ddpm_jax.parallel import compile_call
from ddpm_jax.progress import duration
from ddpm_jax.runs import image_shape
from ddpm_jax.training.check import counted, step_flops
from ddpm_jax.training.loop import make_job
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import train_call
from experiments.sweeping.cells import Cell
from experiments.sweeping.executors import shares, visible_gpus
from experiments.sweeping.plan import Plan, RunPlan

Say = Callable[[str], None]
TIMED_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a run. seconds: of training with its compilation; of evaluation, network calls alone."""

    parameters: int
    flops: float  # Of a step.
    step_seconds: float
    train_seconds: float
    evaluate_seconds: float
    disk_bytes: int


def open_data(plan: Plan) -> dict[str, dict[str, int]]:
    """Opens all that the runs read; {cell: {split: images}}.

    Raises:
      RequestError: data, weights or devices that are not there, or do not fit; the cell is named.
    """
    sizes: dict[str, dict[str, int]] = {}
    opened: dict[str, int] = {}
    for cell in plan.sweep.cells:
        for run in plan.of(cell)[:1]:
            sizes[cell.name] = _open(run, opened)
    return sizes


def _open(run: RunPlan, opened: dict[str, int]) -> dict[str, int]:
    found = {}
    try:
        for stage in run.stages:
            config = run.config(stage)
            splits = [config.data.split] if stage.mode == "train" else []
            if stage.mode == "train":
                make_job(config)
            elif stage.mode == "evaluate":
                run.asked(stage)
                splits = config.evaluation.split
            for split in splits:
                key = str((config.data.to_dict(), split, config.train.batch_size))
                if key not in opened:
                    batch = config.train.batch_size if stage.mode == "train" else 1
                    opened[key] = len(open_source(config, split, batch_size=batch))
                found[split] = opened[key]
    except RequestError as error:
        cell = f"cell {run.cell.name}: "
        raise RequestError(cell + str(error).removeprefix(cell)) from error
    return found


def take_share(num_jobs: int) -> None:
    """Keeps this process to the part of the machine that one of so many jobs has.

    To be called before JAX has started.
    """
    environment, cpus = shares(num_jobs)[0]
    os.environ.update(environment)
    if cpus:
        os.sched_setaffinity(0, cpus)


def report(plan: Plan, num_jobs: int, together: bool, say: Say) -> None:
    """Checks every cell and says what the sweep costs on this machine, from a short timing.

    Args:
      together: whether the seeds of a cell are to be trained in one program.
    Raises:
      RequestError: a cell that cannot run.
    """
    sizes = open_data(plan)
    timed: dict[str, Cost] = {}
    costs: dict[str, Cost] = {}
    for cell in plan.sweep.cells:
        runs = plan.of(cell)
        if runs:
            costs[cell.name] = _cost(runs[0], sizes[cell.name], timed)
            say(_line(cell, costs[cell.name], len(runs)))
        else:
            say(f"{cell.name}: skipped: {cell.skip}")
    left = [run for run in plan.runs if run.missing()]
    every = [costs[run.cell.name] for run in left]
    total = sum(c.train_seconds + c.evaluate_seconds for c in every)
    disk = sum(c.disk_bytes for c in every)
    flops = sum(cost.flops * run.steps for cost, run in zip(every, left, strict=True))
    where = plan.directory
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    if jax.default_backend() == "cpu" and hasattr(os, "sched_getaffinity"):
        devices += f" ({len(os.sched_getaffinity(0))} cores)"
    rounds = f"one after another on {devices}"
    if num_jobs > 1:
        share = "its own GPU" if visible_gpus() else f"{devices} each"
        rounds = f"{num_jobs} at a time with {share}: about {duration(total / num_jobs)}"
    work = counted(flops, f"{flops:.3g} FLOPs of training")
    say(
        f"{len(plan.runs)} runs, all valid, {len(left)} to do: {total / 3600:.2f} hours of "
        f"computation, {rounds}; {work}; {disk / 2**30:.2f} GiB of disk, "
        f"{free / 2**30:.0f} GiB are free"
    )
    say(
        "(not counted: starting the programs, compiling the evaluation, feature networks and what "
        "they leave on the disk, evaluation while training)"
    )
    if together:
        say("(seeds are counted one by one: what --together saves is to come off)")
    if disk > free:
        raise RequestError(
            f"--workdir={plan.directory}: {disk / 2**30:.1f} GiB are needed, {free / 2**30:.1f} "
            "GiB are free; choose another disk, or keep fewer checkpoints"
        )


def _line(cell: Cell, cost: Cost, runs: int) -> str:
    total = runs * (cost.train_seconds + cost.evaluate_seconds)
    work = counted(cost.flops, f"{cost.flops / 1e9:.2f} GFLOP")
    return (
        f"{cell.name}: {cost.parameters:,} parameters, {work}, "
        f"{cost.step_seconds:.3g} s a step; training {duration(cost.train_seconds)}, evaluation "
        f"{duration(cost.evaluate_seconds)}; {runs} runs {duration(total)}"
    )


def _cost(run: RunPlan, sizes: dict[str, int], timed: dict[str, Cost]) -> Cost:
    config = run.config(run.stages[0])
    # Cells with the same network and batch cost the same to a few per cent.
    learned = config.diffusion.variance in ("learned", "learned_range")
    t, p = config.train, config.parallel
    same = (config.model.to_dict(), image_shape(config), learned, t.objective, t.batch_size)
    same += (config.evaluation.batch_size,)
    key = str((*same, t.steps_per_call, p.to_dict()))
    if key not in timed:
        timed[key] = _time(config)
    unit = timed[key]
    kept = min(t.keep_checkpoints, max(1, -(-t.steps // t.checkpoint_every)))
    calls = network_calls(run, sizes)
    pixels = math.prod(image_shape(config))
    return dataclasses.replace(
        unit,
        train_seconds=unit.train_seconds + unit.step_seconds * t.steps,
        evaluate_seconds=unit.evaluate_seconds * calls,
        disk_bytes=unit.disk_bytes * kept + 2 * pixels * config.evaluation.count,
    )


def network_calls(run: RunPlan, sizes: dict[str, int]) -> int:
    """Images that the network sees in all beside training: the bound's terms, samples' steps."""
    calls = 0
    for stage in run.stages:
        config = run.config(stage)
        e, how, num_steps = config.evaluation, config.sample, config.diffusion.num_steps
        chain = how.steps or num_steps
        if stage.mode == "train":
            every = config.train.sample_every
            grids = 1 + ((config.train.steps - 1) // every if every else 0)
            calls += grids * min(how.count, GRID_IMAGES) * chain
        elif stage.mode == "sample":
            calls += how.count * chain
        else:
            if names.BOUND in e.metrics:
                images = sum(min(e.max_images or sizes[s], sizes[s]) for s in e.split)
                calls += images * (e.terms or e.steps or num_steps) * e.draws
            if any(metric != names.BOUND for metric in e.metrics):
                calls += e.count * chain
    return calls


def _time(config: ml_collections.ConfigDict) -> Cost:
    """train_seconds: of compilation; evaluate_seconds: of the network on one image."""
    job = make_job(config)
    task, layout = job.task, job.layout
    start = time.perf_counter()
    call = compile_call(layout, functools.partial(train_call, task), job.sharding)
    initial = functools.partial(
        init_state, task.model, task.optimizer, image_shape(config), config.seed
    )
    state = jax.jit(initial, out_shardings=job.sharding)()
    per_call, batch = config.train.steps_per_call, config.train.batch_size
    images = jnp.zeros((per_call, batch, *image_shape(config)), jnp.uint8)
    images = jax.device_put(images, layout.split(1))
    state, metrics = jax.block_until_ready(call(state, images))
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(TIMED_CALLS):
        state, metrics = call(state, images)
    jax.block_until_ready((state, metrics))
    step = (time.perf_counter() - start) / TIMED_CALLS / per_call
    leaves = jax.tree.leaves(job.abstract)
    return Cost(
        parameters=sum(x.size for x in jax.tree.leaves(job.abstract.params)),
        flops=step_flops(job),
        step_seconds=step,
        train_seconds=max(0.0, compiling - per_call * step),
        evaluate_seconds=_network_seconds(config, job, state.params),
        disk_bytes=sum(x.size * x.dtype.itemsize for x in leaves),
    )


def _network_seconds(config: ml_collections.ConfigDict, job: Any, params: Any) -> float:
    """Of the network on one image of a batch, within a loop on the device as samplers have it."""
    batch = config.evaluation.batch_size // job.layout.num_devices * job.layout.num_devices
    batch = batch or job.layout.num_devices
    x = jnp.zeros((batch, *image_shape(config)), device=job.layout.split(0))
    t = jnp.ones((batch,), jnp.int32, device=job.layout.split(0))
    channels = image_shape(config)[-1]

    def several(params: Any, x: jax.Array) -> jax.Array:
        params = rounded_kernels(job.task.model.dtype, params)

        def one(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return job.task.model.apply({"params": params}, x, t)[..., :channels], None

        return jax.lax.scan(one, x, length=TIMED_CALLS)[0]

    compiled = jax.jit(several).lower(params, x).compile()
    jax.block_until_ready(compiled(params, x))
    start = time.perf_counter()
    jax.block_until_ready(compiled(params, x))
    return (time.perf_counter() - start) / TIMED_CALLS / batch
