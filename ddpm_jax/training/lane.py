"""A run on its way: its state, files and clock, and whatever is due at a step."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax import session
from ddpm_jax.config import RequestError
from ddpm_jax.data import Batches, Gather, Source, fingerprint
from ddpm_jax.evaluation.manifest import Measured, digest
from ddpm_jax.evaluation.requests import Evaluator
from ddpm_jax.evaluation.results import evaluate_and_keep
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.lock import Lock
from ddpm_jax.parallel import first_hosts, to_host
from ddpm_jax.progress import Progress
from ddpm_jax.runs import RunDirectory
from ddpm_jax.sampling import Samples
from ddpm_jax.training.checkpoints import Best, CheckpointError, Checkpoints
from ddpm_jax.training.goodput import Clock, Lives
from ddpm_jax.training.job import Job, initial_state, template
from ddpm_jax.training.metrics import NonFiniteError, Window, Writer
from ddpm_jax.training.pictures import Pictures
from ddpm_jax.training.state import State


class Lane:
    """A run on its way: all of it but the program that makes its steps.

    Attributes:
      state: on the devices.
      step: the updates done; `seen` of them with metrics that were read.
      loss: the mean since the last line, as text.
      error: why it cannot go on.
      batches: its images, by step.
      rate: of its steps.
      lives: where its time goes.
    """

    batches: Batches
    rate: Progress
    lives: Lives

    def __init__(
        self,
        stack: contextlib.ExitStack,
        job: Job,
        directory: RunDirectory,
        evaluators: Sequence[Evaluator],
        watch: Watch,
        clock: Clock,
        lock: Lock | None,
        say: Callable[[str], None],
    ):
        """A run at its newest whole checkpoint, or at its start; the stack closes its files.

        Raises:
          RequestError: its last starts have failed one after another where this one begins.
          CheckpointError: all checkpoints are damaged.
        """
        self.job, self.loss = job, ""
        self.error: NonFiniteError | None = None
        self._stack, self._directory, self._evaluators = stack, directory, evaluators
        self._watch, self._clock, self._lock, self._say = watch, clock, lock, say
        self._train = job.config.train
        self._checkpoints = Checkpoints(
            directory.checkpoints, self._train.keep_checkpoints, self._train.keep_every, sweep=True
        )
        stack.callback(self._checkpoints.close)
        self._first_host = jax.process_index() == 0
        self.state, self.step, self._notes = self._restored()
        self._window = Window(self._notes.get("window"))
        self._skipped: list[int] = self._notes.get("skipped", [])
        self._saved: int | None = self.step
        self.seen = self.step
        self._trouble = ""
        self._durations: list[float] = []  # Of a step each, since the last line.
        self._waits: dict[int, float] = {}  # For images, of each host, at the last line.
        self.lives = Lives(directory.goodput, clock, self.step, self._first_host)
        self.lives.check_progress(self._train.max_restarts)
        # The metrics of the call before: the host never waits for the device.
        self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._pictures = Pictures(job, directory, watch.asked)
        self._best = Best(directory.best, self._train.keep_best) if self._train.keep_best else None

    def _restored(self) -> tuple[State, int, dict[str, Any]]:
        found = self._checkpoints.restore(self.job.abstract, warn=self._say)
        if found is None:
            initial = initial_state(self.job.config, self.job.task)
            # Run once: not worth the compiler's optimisations, which take longer than all of it.
            quick = {"xla_backend_optimization_level": 0}
            start = jax.jit(initial, out_shardings=self.job.sharding, compiler_options=quick)
            return start(np.int32(self.job.config.seed)), 0, {}
        self._say(f"going on from step {found[1]}")
        return found

    def begin(self, source: Source, resident: bool | Gather, force: bool = False) -> None:
        """Opens data and files; see `Batches`.

        Args:
          force: whether to go on with images that are not those of before.
        Raises:
          RequestError: the images are not those that it was trained on.
        """
        self._notes["data"] = self._same_data(fingerprint(source), force)
        self._stack.enter_context(self.lives)
        if self._first_host and self.step < self._train.steps:
            try:
                self._directory.note_start(self.step)
            except OSError as error:  # What is there stays, and the training is worth more.
                self._say(f"this start is not noted in provenance.json: {error}")
        self._writer = Writer(
            self._directory.path,
            self._directory.metrics,
            self.step,
            self._keeps,
            self._first_host,
            self._train.write_errors,
            self._say,
        )
        self._stack.callback(self._writer.close)
        self.batches = Batches(
            source,
            self.job.config.seed,
            self._train.batch_size,
            self._train.steps_per_call,
            self.job.layout.split(1),
            resident,
            stall_seconds=self.job.config.data.stall_seconds,
            attempts=self.job.config.data.read_attempts,
        )
        self._stack.callback(self.batches.close)

    def _same_data(self, found: str, force: bool) -> str:
        before = self._notes.get("data", found)
        if before != found:
            line = f"the images differ from those of the run so far (were {before}, are {found})"
            if not force:
                raise RequestError(f"config.data: {line}; give those back, or start with --force")
            self._say(line)
        return found

    def _keeps(self, record: dict[str, Any]) -> bool:
        """Whether a line of an earlier life is one that an unbroken run would have."""
        if record["step"] == self.step < self._train.steps:  # Perhaps of an earlier end.
            every = self._train.log_every if "loss" in record else self._train.evaluate_every
            return bool(every) and self.step % every == 0
        return record["step"] <= self.step

    def step_to(self, state: State, metrics: dict[str, jax.Array]) -> None:
        """Takes the results of a call, and reads what is known of its metrics.

        Raises:
          CheckpointError: the last checkpoint could not be written.
        """
        with self._writing():
            self._checkpoints.poll()
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
        self._skip(self._window.add(step, jax.tree.map(to_host, metrics)))
        self.loss = f"{self._window.loss:.4f}"
        self.seen = step
        if step % self._train.log_every == 0 or step == self._train.steps:
            scalars = self._window.scalars()
            if self._train.objective == "vlb":  # Bits/dim, without L_T, which has no parameters.
                scalars["bound"] = self._window.loss * self.job.task.process.schedule.num_steps
            if self._skipped:
                scalars["skipped_updates"] = len(self._skipped)
            if step % self._train.log_every == 0:
                self._window = Window()
            self._writer.scalars(step, scalars | self._speed(step) | self.lives.scalars())
            with self._writing():
                self.lives.update(step)

    def _skip(self, steps: list[int]) -> None:
        """Counts updates that were left out.

        Raises:
          NonFiniteError: there are too many.
        """
        self._skipped += steps
        for step in steps:
            self._say(f"step {step}: loss or gradient not finite; the update is left out")
        if len(self._skipped) > self._train.max_skipped:
            raise NonFiniteError(
                f"{len(self._skipped)} updates were not finite and left out, more than "
                f"train.max_skipped={self._train.max_skipped}: the last at steps "
                f"{', '.join(map(str, self._skipped[-5:]))}; try a lower "
                "--config.train.learning_rate in another --workdir"
            )

    def _speed(self, step: int) -> dict[str, float]:
        """How fast it was since the last line, and which host waited longest for its images."""
        rate = self.rate.rate(step)
        scalars = {
            "steps_per_second": rate,
            "images_per_second": rate * self._train.batch_size,
            "seconds_waiting_for_data": self.batches.wait_seconds,
        }
        self.batches.wait_seconds = 0.0
        if self._durations:
            scalars["time/step_median"] = float(np.median(self._durations))
            scalars["time/step_max"] = max(self._durations)
            self._durations.clear()
        if of_all := session.current():
            before, self._waits = self._waits, of_all.waits()
            waits = {k: seconds - before.get(k, 0.0) for k, seconds in self._waits.items()}
            slowest = max(waits, key=waits.get)
            scalars |= {"time/input_max": waits[slowest], "time/input_max_host": slowest}
        return scalars

    def took(self, seconds: float) -> None:
        """Notes how long a call has taken."""
        self._durations.append(seconds / self._train.steps_per_call)

    def act(self) -> bool:
        """Whatever is due at this step, but evaluations; whether it was not stopped meanwhile.

        The metrics up to it are known to be finite.
        """
        train, step = self._train, self.step
        last = step >= train.steps
        if last or step % train.checkpoint_every == 0:
            with self._writing():
                self._save()
        if not last and train.sample_every and step % train.sample_every == 0:
            try:
                with self._writing():
                    self._sample()
            except Interrupted:
                return False
        return True

    def evaluated(self) -> bool:
        """Evaluates where that is due at this step; whether it was not stopped meanwhile."""
        step, every = self.step, self._train.evaluate_every
        if not every or (step < self._train.steps and step % every):
            return True
        try:
            with self._clock.phase("evaluate"):
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
            with self._writing(), self._clock.phase("save"):
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
        notes = {**self._notes, "window": self._window.sums, "skipped": self._skipped}
        if self._lock is not None:
            self._lock.check()
        with self._clock.phase("save"):
            self._writer.flush()  # A checkpoint counts when the lines before it are there.
            self._saved = None
            try:
                self._checkpoints.save(self.step, self.state, notes)
            except NonFiniteError as error:
                self.error = error
                return
            self._saved = self.step
            self.lives.update(self.step, at_once=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written ends the run, or is said, as `train.write_errors` tells."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            if self._train.write_errors == "stop":
                raise
            if isinstance(error, CheckpointError):
                self._saved = None
            line = f"{error}; the training goes on (train.write_errors=continue)"
            if line != self._trouble:  # A disk that is full stays so for a while.
                self._trouble = line
                self._say(line)

    def stop(self) -> None:
        """Saves what is not saved yet, and returns when it is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._saved != self.step:
            self._save()
        self._wait()

    def _wait(self) -> None:
        with self._clock.phase("save"):
            self._checkpoints.wait()
            if self._best is not None:
                self._best.close()

    def _sample(self) -> Samples:
        """A grid of samples of the moving average."""
        with self._clock.phase("sample"):
            samples = self._pictures.sample(self.state.ema_params)
            grid = self._pictures.save_grid(self.step, samples)
            self._writer.image(self.step, "samples", grid)
            return samples

    def finish(self) -> None:
        """The last pictures, while the last checkpoint is on its way to the disk.

        Raises:
          Interrupted: before they were drawn; the checkpoint is there.
          CheckpointError: it could not be written.
        """
        self._say("drawing samples from the moving average of the parameters")
        try:
            samples = self._sample()
        finally:  # A checkpoint that is not there is worse than a picture.
            self.stop()
        if self._first_host:
            self._pictures.save_figure(self._writer.records, samples)
            self._say(f"samples: {self._pictures.grid(self.step)}")
            self._say(f"figure:  {self._pictures.figure}")

    def finished(self) -> bool:
        """Whether nothing is left: all is evaluated, the figure drawn after the last samples."""
        if self.step < self._train.steps:
            return False
        drawn = np.array(self._pictures.drawn(self.step))
        return bool(first_hosts(drawn)) and self._measured()

    def _measured(self) -> bool:
        """Whether evaluating at the last step would neither measure nor keep anything."""
        try:
            results = self._results(lambda line: None, lambda: True)
        except Interrupted:
            return False
        return self._new_best(results) is None
