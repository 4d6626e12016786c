"""The training loop: compile, go on from the newest whole checkpoint, step, log, save, show."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import session
from ddpm_jax.data import ReadError, Source, fingerprint, nbytes, open_source
from ddpm_jax.evaluation import manifest
from ddpm_jax.evaluation.evaluators import make_evaluators
from ddpm_jax.evaluation.requests import Evaluator
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.lock import Lock, hold
from ddpm_jax.parallel import compile_call
from ddpm_jax.progress import Progress
from ddpm_jax.runs import RunDirectory
from ddpm_jax.training.checkpoints import CheckpointError
from ddpm_jax.training.goodput import Clock
from ddpm_jax.training.job import Job, make_job, template
from ddpm_jax.training.lane import Lane
from ddpm_jax.training.state import State
from ddpm_jax.training.step import seeded_call


def train(
    config: ml_collections.ConfigDict,
    workdir: str,
    say: Callable[[str], None],
    force: bool = False,
    started: float | None = None,
) -> None:
    """Trains until `train.steps`, going on from the newest whole checkpoint in workdir.

    Args:
      config: a valid config.
      workdir: the run's directory, made if it does not exist.
      say: prints a line.
      force: whether to go on under another config, or with other images, than those of before.
      started: the monotonic time when the process began, see `goodput`.
    Raises:
      RequestError: data, devices, the directory or the other hosts do not fit the config; another
        training has the directory; or its last starts all failed at the same place.
      Interrupted: by SIGINT or SIGTERM, after a checkpoint.
      NonFiniteError: a loss or gradient was not finite: checkpoints stay as they were; or a result.
      CheckpointError: a checkpoint could not be written, or all are damaged.
      ReadError: images cannot be read; after a checkpoint, on a single host.
      LostError: another training has taken the directory, or it is gone.
    """
    job = make_job(config)
    source = open_source(config, batch_size=config.train.batch_size)
    check_agreement(config, workdir, source)
    evaluators = evaluators_of(job, say)
    directory = RunDirectory.of(workdir)
    say(headline(job, source))
    say(f"writing to {directory.path}")
    seeded = job.layout.replicated, job.sharding
    program = compile_call(job.layout, functools.partial(seeded_call, job.task), seeded)

    def call(states: Sequence[State], images: Sequence[jax.Array]) -> tuple[Any, Any]:
        (_, state), metrics = program((np.int32(config.seed), *states), *images)
        return [state], [metrics]

    with contextlib.ExitStack() as stack:
        clock, watch = watched(stack, config, started)
        lock = take(stack, directory, say)
        directory.check_resumable(config, force, say)
        lane = Lane(stack, job, directory, evaluators, watch, clock, lock, say)
        session.agree("where they go on", {"step": lane.step})
        lane.check(source, force)
        directory.save_config(config)
        lane.begin(source, nbytes(source) <= config.data.resident_bytes)
        attend([lane], watch, clock)
        if lane.step < config.train.steps:
            with clock.phase("compile"):
                program.prepare((np.int32(0), job.abstract), job.images)
        run_lanes([lane], lambda group: call, watch, clock, say)
        if lane.error:
            raise lane.error
        say(lane.lives.summary())


def watched(
    stack: contextlib.ExitStack, config: ml_collections.ConfigDict, started: float | None
) -> tuple[Clock, Watch]:
    """The clock of this process, and who hears signals and notices that it hangs."""
    clock = Clock(started)
    stack.callback(clock.close)
    watch = Watch(config.parallel.hang_seconds, clock.describe, clock.patience)
    stack.enter_context(watch)
    if of_all := session.current():
        of_all.doing, of_all.waited = clock.describe, lambda: clock.seconds_of("input")
    return clock, watch


def attend(lanes: Sequence[Lane], watch: Watch, clock: Clock) -> None:
    """From now on the clock shows where these lanes are, and a hang is noted in their files."""
    clock.step = min(lane.step for lane in lanes)
    watch.farewell = lambda how: [lane.lives.end(how) for lane in lanes]


def check_agreement(config: ml_collections.ConfigDict, workdir: str, source: Source) -> None:
    """Checks that all hosts run the same code on the same config, images and kind of device.

    Raises:
      RequestError: names the host and the difference.
    """
    check_config(config)
    facts = {
        "the code": manifest.source_digest(),
        "the run directory": str(workdir),
        "the images' fingerprint": fingerprint(source),
    }
    session.agree("what they train", facts)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks that all hosts have the same config, JAX and kind of device.

    Raises:
      RequestError: names the host and the difference.
    """
    # Where a host finds the images and keeps what it has decoded is its own affair.
    shared = [key for key in config_lib.FIELDS if not key.endswith(("data_dir", "cache_dir"))]
    facts = {f"config.{key}": config_lib.get(config, key) for key in shared}
    facts |= {
        "jax": jax.__version__,
        "the number of devices": jax.local_device_count(),
        "the kind of device": jax.local_devices()[0].device_kind,
    }
    session.agree("their config", facts)


def take(
    stack: contextlib.ExitStack, directory: RunDirectory, say: Callable[[str], None]
) -> Lock | None:
    """The lock of a run's directory, on the first host; all hosts see that it is the same one.

    Raises:
      RequestError: another training has it; or the hosts have no disk in common.
    """
    held = None
    if jax.process_index() == 0:
        held = stack.enter_context(hold(directory.path, say))
    directory.check_shared()
    return held


def evaluators_of(job: Job, say: Callable[[str], None]) -> list[Evaluator]:
    """The evaluators of a run while it trains: none unless `train.evaluate_every`."""
    return make_evaluators(template(job), say) if job.config.train.evaluate_every else []


def headline(job: Job, source: Source, seeds: int = 1) -> str:
    """What is trained, on what, in a line."""
    config, parts = job.config, job.task.microbatches
    parameters = f"{sum(x.size for x in jax.tree.leaves(job.abstract.params)):,} parameters"
    return (
        f"{source.name}/{source.split}: {len(source):,} images "
        f"{'×'.join(map(str, source.image_shape))} · "
        f"{f'{seeds} seeds × ' if seeds > 1 else ''}{parameters} · "
        f"{config.diffusion.prediction}, {config.train.objective}, {config.diffusion.variance} · "
        f"batch {config.train.batch_size}{f' in {parts} parts' if parts > 1 else ''} on "
        f"{job.layout.num_devices} "
        f"{jax.devices()[0].device_kind} ({config.parallel.mode}) · {config.train.steps:,} steps"
    )


# A compiled call of lanes that stand at the same step: their states, and the images of each, to
# their new states and their metrics.
Call = Callable[[Sequence[State], Sequence[jax.Array]], tuple[Sequence[State], Sequence[Any]]]


def run_lanes(
    lanes: Sequence[Lane],
    program: Callable[[Sequence[Lane]], Call],
    watch: Watch,
    clock: Clock,
    say: Callable[[str], None],
) -> None:
    """Trains all lanes to their last step and draws their last pictures.

    Those furthest behind go first, until they stand where the next ones do; then they go together.
    A lane whose loss or evaluation is not finite stays behind with its `error`; the others go on.

    Args:
      lanes: begun and attended to, of the same config but for the seed.
      program: the call that trains these lanes together.
    Raises:
      Interrupted: by SIGINT or SIGTERM, after a checkpoint of each.
      CheckpointError, ReadError: see `train`.
    """
    # The signal that ended them may have come in between.
    behind = [lane for lane in lanes if lane.step]
    stop = not all(lane.shown(missing=True) and lane.evaluated() for lane in behind)
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
        stop = _advance(group, program(group), steps[1], watch, clock, say)
    sound = [lane for lane in lanes if lane.error is None]
    problems = []
    for lane in sound:
        try:
            if stop:
                lane.stop()
            else:
                lane.finish()
        except Interrupted:
            stop = True
        except (CheckpointError, OSError) as error:  # The other lanes' are worth saving.
            problems.append(error)
    if problems:
        raise problems[0]
    if stop and sound:
        reached = min(lane.step for lane in sound)
        raise Interrupted(f"stopped at step {reached}; the same command goes on from there")


def _advance(
    lanes: Sequence[Lane],
    call: Call,
    until: int,
    watch: Watch,
    clock: Clock,
    say: Callable[[str], None],
) -> bool:
    """Trains lanes to a step, or until one of them fails or all shall stop: whether they shall."""
    first, total = lanes[0].step, lanes[0].job.config.train.steps
    stop = False
    with contextlib.ExitStack() as stack:
        stack.enter_context(clock.phase("step"))
        shown = jax.process_index() == 0
        progress = stack.enter_context(contextlib.closing(Progress(first, total, shown, say)))
        for lane in lanes:
            lane.rate = Progress(first, total, False, say)
        while lanes[0].step < until and not stop and not any(lane.error for lane in lanes):
            began, clock.step = time.monotonic(), lanes[0].step
            try:
                with clock.phase("input"):
                    images = _images(lanes)
            except Interrupted:  # It is not known whether they will ever come.
                stop = True
                break
            # The first call may be compiled; the others only start on their way.
            with clock.phase("compile" if lanes[0].step == first else "step"):
                states, metrics = call([lane.state for lane in lanes], images)
            stop = watch.asked()
            for lane, state, of_lane in zip(lanes, states, metrics, strict=True):
                lane.step_to(state, of_lane)
            if lanes[0].seen > first:
                progress.update(lanes[0].seen, "loss " + " ".join(lane.loss for lane in lanes))
                for lane in lanes:
                    lane.took(time.monotonic() - began)
            if lanes[0].due():
                sound = [lane for lane in lanes if lane.error is None]
                with contextlib.ExitStack() as pauses:
                    for lane in sound:
                        pauses.enter_context(lane.rate.paused())
                    acted = [lane.act() for lane in sound]
                    sound = [lane for lane in sound if lane.error is None]
                    stop = stop or not all(acted) or not all(lane.evaluated() for lane in sound)
        for lane in lanes:
            lane.read()
    return stop


def _images(lanes: Sequence[Lane]) -> list[jax.Array]:
    """The next images of each lane.

    Raises:
      ReadError: they cannot be read; what was trained until then is saved first, on a single host:
        of several the others go on waiting for this one.
    """
    try:
        return [lane.batches(lane.step) for lane in lanes]
    except ReadError:
        for lane in lanes:
            lane.read()
            if lane.error is None and jax.process_count() == 1:
                with contextlib.suppress(CheckpointError):  # It is worse that there is no image.
                    lane.stop()
        raise
