"""The training loop: compile, go on from the newest whole checkpoint, step, log, save, show."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from ddpm_jax import config as config_lib
from ddpm_jax import figures, files
from ddpm_jax.data import Batches, Source, nbytes, open_source
from ddpm_jax.evaluation import names
from ddpm_jax.evaluation.evaluators import make_evaluators
from ddpm_jax.evaluation.manifest import Measured, digest
from ddpm_jax.evaluation.requests import Evaluator
from ddpm_jax.evaluation.results import evaluate_and_keep
from ddpm_jax.generation import GRID_IMAGES, compile_sampler, padded_batch
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.parallel import Layout, compile_call, make_layout, to_host
from ddpm_jax.progress import Progress
from ddpm_jax.runs import Run, RunDirectory, image_shape, make_model
from ddpm_jax.sampling import Samples
from ddpm_jax.schedules import spaced
from ddpm_jax.training.checkpoints import Best, Checkpoints
from ddpm_jax.training.metrics import Window, Writer
from ddpm_jax.training.state import State, init_state, make_optimizer
from ddpm_jax.training.step import Task, train_call

PATH_TIMES = 10  # Times of the reverse process in figures/training.png.
PATH_SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run needs, made from its config: nothing here changes while it trains."""

    config: ml_collections.ConfigDict
    layout: Layout
    task: Task
    abstract: State  # Shapes, dtypes and shardings of the state.

    @property
    def sharding(self) -> State:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def make_job(config: ml_collections.ConfigDict) -> Job:
    """The job of a valid config on the devices there are; nothing is compiled.

    Raises:
      RequestError: the batch does not divide over the devices, or the mode does not fit them.
    """
    try:
        layout = make_layout(config.parallel.mode)
    except ValueError as error:
        raise config_lib.RequestError(str(error)) from None
    try:
        names.check_keep_best(config)
    except ValueError as error:
        raise config_lib.RequestError(f"config.{error}") from None
    parts = layout.num_devices * config.parallel.microbatches
    if config.train.batch_size % parts:
        raise config_lib.RequestError(
            f"config.train.batch_size={config.train.batch_size} does not divide by {parts}: "
            f"{layout.num_devices} devices × {config.parallel.microbatches} microbatches"
        )
    task = Task(
        model=make_model(config),
        process=config_lib.make_process(config),
        optimizer=make_optimizer(config.train),
        train=config.train,
        flip=config.data.flip,
        seed=config.seed,
        microbatches=config.parallel.microbatches,
    )
    shapes = jax.eval_shape(_initial(config, task))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        layout.state(shapes),
    )
    return Job(config, layout, task, abstract)


def _initial(config: ml_collections.ConfigDict, task: Task) -> Callable[[], State]:
    return lambda: init_state(task.model, task.optimizer, image_shape(config), config.seed)


def train(config: ml_collections.ConfigDict, workdir: str, say: Callable[[str], None]) -> None:
    """Trains until `train.steps`, going on from the newest whole checkpoint in workdir.

    Args:
      config: a valid config.
      workdir: the run's directory, made if it does not exist.
      say: prints a line.
    Raises:
      RequestError: data, devices or the directory do not fit the config.
      Interrupted: by SIGINT or SIGTERM, after a checkpoint.
      NonFiniteError: a loss or gradient was not finite; checkpoints stay as they were.
      CheckpointError: a checkpoint could not be written, or all are damaged.
    """
    job = make_job(config)
    source = open_source(config, batch_size=config.train.batch_size)
    evaluators = make_evaluators(_template(job), say) if config.train.evaluate_every else []
    directory = RunDirectory.of(workdir)
    directory.save_config(config)
    parameters = sum(x.size for x in jax.tree.leaves(job.abstract.params))
    say(
        f"{source.name}/{source.split}: {len(source):,} images "
        f"{'×'.join(map(str, source.image_shape))} · {parameters:,} parameters · "
        f"{config.diffusion.prediction}, {config.train.objective}, {config.diffusion.variance} · "
        f"batch {config.train.batch_size} on {job.layout.num_devices} "
        f"{jax.devices()[0].device_kind} ({config.parallel.mode}) · {config.train.steps:,} steps"
    )
    say(f"writing to {directory.path}")
    checkpoints = Checkpoints(directory.checkpoints, config.train.keep_checkpoints)
    try:
        with Watch() as watch:
            _Loop(job, source, directory, checkpoints, watch, say, evaluators).run()
    finally:
        checkpoints.close()


def _template(job: Job) -> Run:
    """The run that evaluators are built for: its parameters are but their shapes and shardings."""
    ema = job.config.evaluation.ema
    return Run(
        config=job.config,
        process=job.task.process,
        model=job.task.model,
        params=job.abstract.ema_params if ema else job.abstract.params,
        step=0,
        layout=job.layout,
        kind="ema" if ema else "raw",
    )


class _Loop:
    """The state of a loop: the device's, the window of metrics, the clock."""

    def __init__(
        self,
        job: Job,
        source: Source,
        directory: RunDirectory,
        checkpoints: Checkpoints,
        watch: Watch,
        say: Callable[[str], None],
        evaluators: Sequence[Evaluator],
    ):
        self._evaluators = evaluators
        self._job, self._source, self._directory = job, source, directory
        self._checkpoints, self._watch, self._say = checkpoints, watch, say
        self._train = job.config.train
        self._first_host = jax.process_index() == 0
        self._state, self._step, self._window = self._begin()
        if self._first_host:
            directory.note_start(self._step)
        self._saved = self._step
        self._sampler = None
        self._writer = Writer(
            directory.path, directory.metrics, self._step, self._keeps, self._first_host
        )
        self._progress = Progress(self._step, self._train.steps, self._first_host, say)
        self._best = Best(directory.best, self._train.keep_best) if self._train.keep_best else None

    def _keeps(self, record: dict[str, Any]) -> bool:
        """Whether a line of an earlier life is one that an unbroken run would have."""
        if record["step"] == self._step < self._train.steps:  # Perhaps of an earlier end.
            every = self._train.log_every if "loss" in record else self._train.evaluate_every
            return bool(every) and self._step % every == 0
        return record["step"] <= self._step

    def _begin(self) -> tuple[State, int, Window]:
        found = self._checkpoints.restore(self._job.abstract, warn=self._say)
        if found is None:
            initial = _initial(self._job.config, self._job.task)
            # Run once: not worth the compiler's optimisations, which take longer than all of it.
            quick = {"xla_backend_optimization_level": 0}
            start = jax.jit(initial, out_shardings=self._job.sharding, compiler_options=quick)
            return start(), 0, Window()
        state, step, notes = found
        self._say(f"going on from step {step}")
        return state, step, Window(notes["window"])

    def run(self) -> None:
        """Trains to the last step."""
        train, step_by = self._train, self._train.steps_per_call
        call = compile_call(
            self._job.layout, functools.partial(train_call, self._job.task), self._job.sharding
        )
        batches = Batches(
            self._source,
            self._job.config.seed,
            train.batch_size,
            step_by,
            self._job.layout.split(1),
            nbytes(self._source) <= self._job.config.data.resident_bytes,
        )
        waiting = None  # The metrics of the call before: the host never waits for the device.
        with batches:
            if self._step and not self._evaluated():  # The signal that ended it came in between.
                self._stop()
            while self._step < train.steps:
                self._state, metrics = call(self._state, batches(self._step))
                self._step += step_by
                if waiting is not None:
                    self._take(*waiting, batches)
                waiting = (self._step, metrics)
                stop = self._watch.asked()
                if stop or self._due():
                    self._take(*waiting, batches)
                    waiting = None
                    self._act()
                    stop = stop or not self._evaluated()
                if stop:
                    self._stop()
        self._finish()

    def _due(self) -> bool:
        every = (
            self._train.checkpoint_every,
            self._train.sample_every,
            self._train.evaluate_every,
        )
        return self._step >= self._train.steps or any(n and self._step % n == 0 for n in every)

    def _take(self, step: int, metrics: dict[str, jax.Array], batches: Batches) -> None:
        """Reads the metrics of a call, and writes a line where one is due."""
        self._window.add(step, jax.tree.map(to_host, metrics))
        loss = self._window.sums["loss"] / self._window.sums["steps"]
        self._progress.update(step, f"loss {loss:.4f}")
        if step % self._train.log_every == 0 or step == self._train.steps:
            scalars = self._window.scalars()
            if step % self._train.log_every == 0:
                self._window = Window()
            if self._train.objective == "vlb":  # Bits/dim, without L_T, which has no parameters.
                scalars["bound"] = scalars["loss"] * self._job.task.process.schedule.num_steps
            rate = self._progress.rate(step)
            scalars["steps_per_second"] = rate
            scalars["images_per_second"] = rate * self._train.batch_size
            scalars["seconds_waiting_for_data"], batches.wait_seconds = batches.wait_seconds, 0.0
            self._writer.scalars(step, scalars)

    def _act(self) -> None:
        """Whatever is due at this step; the metrics up to it are known to be finite."""
        train, step = self._train, self._step
        with self._progress.paused():
            last = step >= train.steps
            if last or step % train.checkpoint_every == 0:
                self._save()
            if not last and train.sample_every and step % train.sample_every == 0:
                self._sample()

    def _evaluated(self) -> bool:
        """Evaluates where that is due at this step; whether it was not stopped meanwhile."""
        step, every = self._step, self._train.evaluate_every
        if not every or (step < self._train.steps and step % every):
            return True
        ema = self._job.config.evaluation.ema
        params = self._state.ema_params if ema else self._state.params
        run = dataclasses.replace(_template(self._job), step=step, params=params)
        results: dict[str, Measured] = {}
        with self._progress.paused():
            try:
                for evaluator in self._evaluators:
                    results |= evaluate_and_keep(
                        evaluator, run, self._directory, self._say, self._watch.asked, False
                    )
            except Interrupted:
                return False
            errors = {
                f"{name}_error": measured.standard_error
                for name, measured in results.items()
                if measured.standard_error is not None
            }
            self._writer.scalars_once(step, {n: float(m) for n, m in results.items()} | errors)
            self._keep_best(results)
        return True

    def _keep_best(self, results: dict[str, Measured]) -> None:
        if self._best is None:
            return
        chosen = results[self._train.keep_best]
        protocol = digest(chosen.protocol, chosen.estimator)
        if self._best.beaten_by(float(chosen), chosen.better, protocol):
            both = {"ema_params": self._state.ema_params, "params": self._state.params}
            self._best.save(self._step, both, float(chosen), protocol)

    def _save(self) -> None:
        self._saved = self._step
        self._checkpoints.save(self._step, self._state, {"window": self._window.sums})

    def _stop(self) -> None:
        if self._saved != self._step:
            self._save()
        self._wait()
        self._writer.close()
        self._progress.close()
        raise Interrupted(f"stopped at step {self._step}; the same command goes on from there")

    def _wait(self) -> None:
        self._checkpoints.wait()
        if self._best is not None:
            self._best.close()

    def _sample(self) -> Samples:
        """A grid of samples of the moving average, from the same noise each time."""
        config, layout = self._job.config, self._job.layout
        count = min(config.sample.count, GRID_IMAGES)
        if self._sampler is None:
            self._sampler = compile_sampler(
                layout,
                self._job.task.process,
                self._job.task.model,
                config,
                self._job.sharding.ema_params,
                self._path_indices(),
            )
        batch = padded_batch(min(config.sample.batch_size, count), layout)
        drawn = [
            jax.tree.map(
                to_host, self._sampler(self._state.ema_params, jnp.arange(start, start + batch))
            )
            for start in range(0, count, batch)
        ]
        images = np.concatenate([part.images for part in drawn])[:count]
        samples = Samples(images, drawn[0].x0_path[:, :PATH_SAMPLES][:, :count])
        picture = figures.grid(samples.images)
        if self._first_host:
            figures.save_png(self._picture(), picture)
        self._writer.image(self._step, "samples", picture)
        return samples

    def _finish(self) -> None:
        """The last pictures, while the last checkpoint is on its way to the disk."""
        self._progress.close()
        self._say("drawing samples from the moving average of the parameters")
        samples = self._sample()
        self._wait()
        self._writer.close()
        if not self._first_host:
            return
        rows = samples.x0_path.swapaxes(0, 1)
        path = figures.grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
        figure = self._directory.figures / "training.png"
        trained = spaced(self._job.config.diffusion.num_steps, self._chain_length())
        times = [int(trained[index - 1]) for index in self._path_indices()]
        files.replace(figure, figures.training_figure(self._writer.records, path, times))
        self._say(f"samples: {self._picture()}")
        self._say(f"figure:  {figure}")

    def _picture(self) -> epath.Path:
        return self._directory.samples / f"step_{self._step:08d}.png"

    def _chain_length(self) -> int:
        return self._job.config.sample.steps or self._job.config.diffusion.num_steps

    def _path_indices(self) -> list[int]:
        """The indices of the chain at which the figure shows x̂_0, from its length down."""
        length = self._chain_length()
        return spaced(length, min(PATH_TIMES, length))[::-1].tolist()
