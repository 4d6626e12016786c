"""The training loop: compile, go on from the newest whole checkpoint, step, log, save, show."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from ddpm_jax.data import Source, nbytes, open_source
from ddpm_jax.evaluation.evaluators import make_evaluators
from ddpm_jax.evaluation.requests import Evaluator
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.parallel import compile_call
from ddpm_jax.progress import Progress
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.job import Job, make_job, template
from ddpm_jax.training.lane import Lane
from ddpm_jax.training.state import State
from ddpm_jax.training.step import seeded_call


def train(config: ml_collections.ConfigDict, workdir: str, say: Callable[[str], None]) -> None:
    """Trains until `train.steps`, going on from the newest whole checkpoint in workdir.

    Args:
      config: a valid config.
      workdir: the run's directory, made if it does not exist.
      say: prints a line.
    Raises:
      RequestError: data, devices or the directory do not fit the config.
      Interrupted: by SIGINT or SIGTERM, after a checkpoint.
      NonFiniteError: a loss or gradient was not finite: checkpoints stay as they were; or a result.
      CheckpointError: a checkpoint could not be written, or all are damaged.
    """
    job = make_job(config)
    source = open_source(config, batch_size=config.train.batch_size)
    evaluators = evaluators_of(job, say)
    directory = RunDirectory.of(workdir)
    directory.save_config(config)
    say(headline(job, source))
    say(f"writing to {directory.path}")
    seeded = job.layout.replicated, job.sharding
    program = compile_call(job.layout, functools.partial(seeded_call, job.task), seeded)

    def call(states: Sequence[State], images: Sequence[jax.Array]) -> tuple[Any, Any]:
        (_, state), metrics = program((np.int32(config.seed), *states), *images)
        return [state], [metrics]

    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch())
        lane = Lane(stack, job, directory, evaluators, watch, say)
        lane.begin(source, nbytes(source) <= config.data.resident_bytes)
        run_lanes([lane], lambda group: call, watch, say)
        if lane.error:
            raise lane.error


def evaluators_of(job: Job, say: Callable[[str], None]) -> list[Evaluator]:
    """The evaluators of a run while it trains: none unless `train.evaluate_every`."""
    return make_evaluators(template(job), say) if job.config.train.evaluate_every else []


def headline(job: Job, source: Source, seeds: int = 1) -> str:
    """What is trained, on what, in a line."""
    config = job.config
    parameters = f"{sum(x.size for x in jax.tree.leaves(job.abstract.params)):,} parameters"
    return (
        f"{source.name}/{source.split}: {len(source):,} images "
        f"{'×'.join(map(str, source.image_shape))} · "
        f"{f'{seeds} seeds × ' if seeds > 1 else ''}{parameters} · "
        f"{config.diffusion.prediction}, {config.train.objective}, {config.diffusion.variance} · "
        f"batch {config.train.batch_size} on {job.layout.num_devices} "
        f"{jax.devices()[0].device_kind} ({config.parallel.mode}) · {config.train.steps:,} steps"
    )


# A compiled call of lanes that stand at the same step: their states, and the images of each, to
# their new states and their metrics.
Call = Callable[[Sequence[State], Sequence[jax.Array]], tuple[Sequence[State], Sequence[Any]]]


def run_lanes(
    lanes: Sequence[Lane],
    program: Callable[[Sequence[Lane]], Call],
    watch: Watch,
    say: Callable[[str], None],
) -> None:
    """Trains all lanes to their last step and draws their last pictures.

    Those furthest behind go first, until they stand where the next ones do; then they go together.
    A lane whose loss or evaluation is not finite stays behind with its `error`; the others go on.

    Args:
      lanes: begun, of the same config but for the seed.
      program: the call that trains these lanes together.
    Raises:
      Interrupted: by SIGINT or SIGTERM, after a checkpoint of each.
    """
    # The signal that ended them may have come in between.
    stop = not all(lane.evaluated() for lane in lanes if lane.step)
    last, group = lanes[0].job.config.train.steps, lanes
    while True:
        for lane in group:
            if lane.error and len(lanes) > 1:
                say(f"seed {lane.job.config.seed}: {lane.error}")
        going = [lane for lane in lanes if lane.error is None and lane.step < last]
        if stop or not going:
            break
        steps = sorted({lane.step for lane in going} | {last})
        group = [lane for lane in going if lane.step == steps[0]]
        stop = _advance(group, program(group), steps[1], watch, say)
    sound = [lane for lane in lanes if lane.error is None]
    for lane in sound:
        if stop:
            lane.stop()
        else:
            lane.finish()
            stop = lane is not sound[-1] and watch.asked()
    if stop and sound:
        reached = min(lane.step for lane in sound)
        raise Interrupted(f"stopped at step {reached}; the same command goes on from there")


def _advance(
    lanes: Sequence[Lane], call: Call, until: int, watch: Watch, say: Callable[[str], None]
) -> bool:
    """Trains lanes to a step, or until one of them fails or all shall stop: whether they shall."""
    first, total = lanes[0].step, lanes[0].job.config.train.steps
    stop = False
    with contextlib.closing(Progress(first, total, jax.process_index() == 0, say)) as progress:
        for lane in lanes:
            lane.clock = Progress(first, total, False, say)
        while lanes[0].step < until and not stop and not any(lane.error for lane in lanes):
            images = [lane.batches(lane.step) for lane in lanes]
            states, metrics = call([lane.state for lane in lanes], images)
            stop = watch.asked()
            for lane, state, of_lane in zip(lanes, states, metrics, strict=True):
                lane.step_to(state, of_lane)
            if lanes[0].seen > first:
                progress.update(lanes[0].seen, "loss " + " ".join(lane.loss for lane in lanes))
            if lanes[0].due():
                sound = [lane for lane in lanes if lane.error is None]
                with contextlib.ExitStack() as pauses:
                    for lane in sound:
                        pauses.enter_context(lane.clock.paused())
                    for lane in sound:
                        lane.act()
                    stop = stop or not all(lane.evaluated() for lane in sound)
        for lane in lanes:
            lane.read()
    return stop
