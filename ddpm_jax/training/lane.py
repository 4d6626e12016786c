"""A run on its way: its state, files and clock, and whatever is due at a step."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax import figures, files
from ddpm_jax.data import Batches, Gather, Source
from ddpm_jax.evaluation.manifest import Measured, digest
from ddpm_jax.evaluation.requests import Evaluator
from ddpm_jax.evaluation.results import evaluate_and_keep
from ddpm_jax.generation import GRID_IMAGES, compile_sampler, padded_batch
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.parallel import first_hosts, to_host
from ddpm_jax.progress import Progress
from ddpm_jax.runs import RunDirectory
from ddpm_jax.sampling import Samples
from ddpm_jax.schedules import spaced
from ddpm_jax.training.checkpoints import Best, Checkpoints
from ddpm_jax.training.job import Job, initial_state, template
from ddpm_jax.training.metrics import NonFiniteError, Window, Writer
from ddpm_jax.training.state import State

PATH_TIMES = 10  # Times of the reverse process in figures/training.png.
PATH_SAMPLES = 6


class Lane:
    """A run on its way: all of it but the program that makes its steps.

    Attributes:
      state: on the devices.
      step: the updates done; `seen` of them with metrics that were read.
      loss: the mean since the last line, as text.
      error: why it cannot go on.
      batches: its images, by step.
      clock: of its steps a second.
    """

    batches: Batches
    clock: Progress

    def __init__(
        self,
        stack: contextlib.ExitStack,
        job: Job,
        directory: RunDirectory,
        evaluators: Sequence[Evaluator],
        watch: Watch,
        say: Callable[[str], None],
    ):
        """A run at its newest whole checkpoint, or at its start; the stack closes its files."""
        self.job, self.loss = job, ""
        self.error: NonFiniteError | None = None
        self._stack, self._directory, self._evaluators = stack, directory, evaluators
        self._watch, self._say = watch, say
        self._train = job.config.train
        self._checkpoints = Checkpoints(directory.checkpoints, self._train.keep_checkpoints)
        stack.callback(self._checkpoints.close)
        self._first_host = jax.process_index() == 0
        self.state, self.step, self._window = self._restored()
        self._saved = self.seen = self.step
        # The metrics of the call before: the host never waits for the device.
        self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._sampler = None
        self._best = Best(directory.best, self._train.keep_best) if self._train.keep_best else None

    def _restored(self) -> tuple[State, int, Window]:
        found = self._checkpoints.restore(self.job.abstract, warn=self._say)
        if found is None:
            initial = initial_state(self.job.config, self.job.task)
            # Run once: not worth the compiler's optimisations, which take longer than all of it.
            quick = {"xla_backend_optimization_level": 0}
            start = jax.jit(initial, out_shardings=self.job.sharding, compiler_options=quick)
            return start(np.int32(self.job.config.seed)), 0, Window()
        state, step, notes = found
        self._say(f"going on from step {step}")
        return state, step, Window(notes["window"])

    def begin(self, source: Source, resident: bool | Gather) -> None:
        """Opens data and files; see `Batches`."""
        if self._first_host and self.step < self._train.steps:
            try:
                self._directory.note_start(self.step)
            except OSError as error:  # What is there stays, and the training is worth more.
                self._say(f"this start is not noted in provenance.json: {error}")
        self._writer = Writer(
            self._directory.path, self._directory.metrics, self.step, self._keeps, self._first_host
        )
        self._stack.callback(self._writer.close)
        self.batches = Batches(
            source,
            self.job.config.seed,
            self._train.batch_size,
            self._train.steps_per_call,
            self.job.layout.split(1),
            resident,
        )
        self._stack.callback(self.batches.close)

    def _keeps(self, record: dict[str, Any]) -> bool:
        """Whether a line of an earlier life is one that an unbroken run would have."""
        if record["step"] == self.step < self._train.steps:  # Perhaps of an earlier end.
            every = self._train.log_every if "loss" in record else self._train.evaluate_every
            return bool(every) and self.step % every == 0
        return record["step"] <= self.step

    def step_to(self, state: State, metrics: dict[str, jax.Array]) -> None:
        """Takes the results of a call, and reads what is known of its metrics."""
        self.state = state
        self.step += self._train.steps_per_call
        self._waiting.append((self.step, metrics))
        self.read(0 if self.due() else 1)

    def read(self, left: int = 0) -> None:
        """Reads the metrics of all calls but the `left` last ones."""
        while len(self._waiting) > left and self.error is None:
            try:
                self._take(*self._waiting.popleft())
            except NonFiniteError as error:
                self.error = error

    def due(self) -> bool:
        """Whether anything is due at this step."""
        every = (
            self._train.checkpoint_every,
            self._train.sample_every,
            self._train.evaluate_every,
        )
        return self.step >= self._train.steps or any(n and self.step % n == 0 for n in every)

    def _take(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the metrics of a call, and writes a line where one is due."""
        self._window.add(step, jax.tree.map(to_host, metrics))
        self.loss = f"{self._window.sums['loss'] / self._window.sums['steps']:.4f}"
        self.seen = step
        if step % self._train.log_every == 0 or step == self._train.steps:
            scalars = self._window.scalars()
            if step % self._train.log_every == 0:
                self._window = Window()
            if self._train.objective == "vlb":  # Bits/dim, without L_T, which has no parameters.
                scalars["bound"] = scalars["loss"] * self.job.task.process.schedule.num_steps
            rate = self.clock.rate(step)
            scalars["steps_per_second"] = rate
            scalars["images_per_second"] = rate * self._train.batch_size
            scalars["seconds_waiting_for_data"] = self.batches.wait_seconds
            self.batches.wait_seconds = 0.0
            self._writer.scalars(step, scalars)

    def act(self) -> None:
        """Whatever is due at this step; the metrics up to it are known to be finite."""
        train, step = self._train, self.step
        last = step >= train.steps
        if last or step % train.checkpoint_every == 0:
            self._save()
        if not last and train.sample_every and step % train.sample_every == 0:
            self._sample()

    def evaluated(self) -> bool:
        """Evaluates where that is due at this step; whether it was not stopped meanwhile."""
        step, every = self.step, self._train.evaluate_every
        if not every or (step < self._train.steps and step % every):
            return True
        try:
            results = self._results(self._say, self._watch.asked)
        except Interrupted:
            return False
        except NonFiniteError as error:
            self.error = error
            return True
        errors = {
            f"{name}_error": measured.standard_error
            for name, measured in results.items()
            if measured.standard_error is not None
        }
        self._writer.scalars_once(step, {n: float(m) for n, m in results.items()} | errors)
        if best := self._new_best(results):
            both = {"ema_params": self.state.ema_params, "params": self.state.params}
            self._best.save(step, both, *best)
        return True

    def _results(self, say: Callable[[str], None], stop: Callable[[], bool]) -> dict[str, Measured]:
        """What the evaluators find at this step, or have found before."""
        ema = self.job.config.evaluation.ema
        params = self.state.ema_params if ema else self.state.params
        run = dataclasses.replace(template(self.job), step=self.step, params=params)
        results: dict[str, Measured] = {}
        for evaluator in self._evaluators:
            results |= evaluate_and_keep(evaluator, run, self._directory, say, stop, False)
        return results

    def _new_best(self, results: dict[str, Measured]) -> tuple[float, str] | None:
        """The value and protocol of the result that chooses, if it beats the one kept."""
        if self._best is None:
            return None
        chosen = results[self._train.keep_best]
        value, protocol = float(chosen), digest(chosen.protocol, chosen.estimator)
        return (value, protocol) if self._best.beaten_by(value, chosen.better, protocol) else None

    def _save(self) -> None:
        self._saved = self.step
        self._checkpoints.save(self.step, self.state, {"window": self._window.sums})

    def stop(self) -> None:
        """Saves what is not saved yet, and returns when it is on the disk."""
        if self._saved != self.step:
            self._save()
        self._wait()

    def _wait(self) -> None:
        self._checkpoints.wait()
        if self._best is not None:
            self._best.close()

    def _sample(self) -> Samples:
        """A grid of samples of the moving average, from the same noise each time."""
        config, layout = self.job.config, self.job.layout
        count = min(config.sample.count, GRID_IMAGES)
        if self._sampler is None:
            self._sampler = compile_sampler(
                layout,
                self.job.task.process,
                self.job.task.model,
                config,
                self.job.sharding.ema_params,
                self._path_indices(),
            )
        batch = padded_batch(min(config.sample.batch_size, count), layout)
        drawn = [
            jax.tree.map(
                to_host, self._sampler(self.state.ema_params, jnp.arange(start, start + batch))
            )
            for start in range(0, count, batch)
        ]
        images = np.concatenate([part.images for part in drawn])[:count]
        samples = Samples(images, drawn[0].x0_path[:, :PATH_SAMPLES][:, :count])
        picture = figures.grid(samples.images)
        if self._first_host:
            figures.save_png(self._picture(), picture)
        self._writer.image(self.step, "samples", picture)
        return samples

    def finish(self) -> None:
        """The last pictures, while the last checkpoint is on its way to the disk."""
        self._say("drawing samples from the moving average of the parameters")
        samples = self._sample()
        self._wait()
        if not self._first_host:
            return
        rows = samples.x0_path.swapaxes(0, 1)
        path = figures.grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
        trained = spaced(self.job.config.diffusion.num_steps, self._chain_length())
        times = [int(trained[index - 1]) for index in self._path_indices()]
        figure = figures.training_figure(self._writer.records, path, times)
        files.replace(self._figure(), figure)
        self._say(f"samples: {self._picture()}")
        self._say(f"figure:  {self._figure()}")

    def finished(self) -> bool:
        """Whether nothing is left: all is evaluated, the figure drawn after the last samples."""
        if self.step < self._train.steps:
            return False
        figure, picture = self._figure(), self._picture()
        drawn = figure.exists() and picture.exists()
        drawn = drawn and figure.stat().mtime >= picture.stat().mtime
        return bool(first_hosts(np.array(drawn))) and self._measured()

    def _measured(self) -> bool:
        """Whether evaluating at the last step would neither measure nor keep anything."""
        try:
            results = self._results(lambda line: None, lambda: True)
        except Interrupted:
            return False
        return self._new_best(results) is None

    def _figure(self) -> epath.Path:
        return self._directory.figures / "training.png"

    def _picture(self) -> epath.Path:
        return self._directory.samples / f"step_{self.step:08d}.png"

    def _chain_length(self) -> int:
        return self.job.config.sample.steps or self.job.config.diffusion.num_steps

    def _path_indices(self) -> list[int]:
        """The indices of the chain at which the figure shows x̂_0, from its length down."""
        length = self._chain_length()
        return spaced(length, min(PATH_TIMES, length))[::-1].tolist()
