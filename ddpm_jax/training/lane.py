"""A run on its way: its state, files and clock, and whatever is due at a step."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax import session
from ddpm_jax.config import RequestError
from ddpm_jax.data import Batches, Gather, Source, fingerprint
from ddpm_jax.data.threads import started
from ddpm_jax.evaluation.manifest import Measured, digest
from ddpm_jax.evaluation.requests import Evaluator
from ddpm_jax.evaluation.results import evaluate_and_keep
from ddpm_jax.interruption import Interrupted, Watch
from ddpm_jax.lock import Lock
from ddpm_jax.parallel import first_hosts, to_host
from ddpm_jax.progress import Progress
from ddpm_jax.runs import RunDirectory
from ddpm_jax.sampling import Samples
from ddpm_jax.training.goodput import Clock, Lives
from ddpm_jax.training.job import Job, template
from ddpm_jax.training.keeping import Keeper
from ddpm_jax.training.metrics import NonFiniteError, Window, Writer
from ddpm_jax.training.pace import Pace
from ddpm_jax.training.pictures import Pictures
from ddpm_jax.training.state import State


class Lane:
    """A run on its way: all of it but the program that makes its steps.

    Attributes:
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
        self._watch, self._clock, self._say = watch, clock, say
        self._train = job.config.train
        self._first_host = jax.process_index() == 0
        self.lives = Lives(directory.goodput, clock, self._first_host)
        self.lives.check_progress(self._train.max_restarts)
        stack.enter_context(self.lives)
        watch.listeners.append(self.lives.interrupt)
        self._keeper = Keeper(self._train, directory, lock, clock, say)
        stack.callback(self._keeper.close)
        self._state, self.step, self._notes = self._restored()
        self.lives.begin(self.step)
        self.lives.check_progress(self._train.max_restarts)
        self._window = Window(self._notes.get("window"))
        self._skipped: list[int] = self._notes.get("skipped", [])
        self.seen = self.step
        self._pace = Pace(clock, self._train.steps_per_call)
        self._waits: dict[int, float] = {}  # For images, of each host, at the last line.
        # The metrics of the call before: the host never waits for the device.
        self._waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._pictures = Pictures(job, directory, self._asked)

    def _asked(self) -> bool:
        """Whether to stop, asked between pieces of what takes long; the time goes on."""
        self.note_life()
        return self._watch.asked()

    def note_life(self) -> None:
        """Notes now and then how far it is; see `Keeper.check`."""
        self._keeper.check()
        with self._keeper.writing():
            self.lives.update(self.step)

    @property
    def state(self) -> State:
        """On the devices. The first one is computed when it is asked for, compiled before that."""
        if isinstance(self._state, concurrent.futures.Future):
            self._state = self._state.result()()
        return self._state

    def _restored(self) -> tuple[State | concurrent.futures.Future, int, dict[str, Any]]:
        found = self._keeper.restore(self.job.abstract)
        if found is None:
            # No process may end while XLA is at work in one of its threads.
            self._stack.callback(self._await_start)
            return started(Job.prepare_start, self.job, "initial state"), 0, {}
        self._say(f"going on from step {found[1]}")
        return found

    def _await_start(self) -> None:
        if isinstance(self._state, concurrent.futures.Future):
            concurrent.futures.wait([self._state])

    def check(self, source: Source, force: bool) -> None:
        """Refuses what the checkpoint does not fit; before anything is written.

        Args:
          force: whether to go on with images that are not those of before.
        Raises:
          RequestError: the images are not those that it was trained on, or the calls would pass
            over the steps at which something is due.
        """
        if self.step % self._train.steps_per_call:
            raise RequestError(
                f"config.train.steps_per_call={self._train.steps_per_call} does not divide the "
                f"step {self.step} to go on from; choose one that does"
            )
        found = fingerprint(source)
        before = self._notes.setdefault("data", found)
        if before != found:
            line = f"the images differ from those of the run so far (were {before}, are {found})"
            if not force:
                raise RequestError(f"config.data: {line}; give those back, or start with --force")
            self._say(line)
            self._notes["data"] = found

    def begin(self, source: Source, resident: bool | Gather) -> None:
        """Opens data and files; see `Batches`."""
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
            # Of several hosts the others wait for this one.
            stop=self._watch.heard if jax.process_count() == 1 else lambda: False,
        )
        self._stack.callback(self.batches.close)

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
        self._keeper.poll()
        self.note_life()
        self._state = state
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
        with self._pace.awaiting():
            numbers = jax.tree.map(to_host, metrics)
        self._skip(self._window.add(step, numbers))
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
            self._keeper.check()
            self._writer.scalars(step, scalars | self._speed(step) | self.lives.scalars())

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
        scalars = {
            "steps_per_second": (rate := self.rate.rate(step)),
            "images_per_second": rate * self._train.batch_size,
            "seconds_waiting_for_data": self.batches.wait_seconds,
        }
        self.batches.wait_seconds = 0.0
        scalars |= self._pace.scalars()
        if of_all := session.current():
            before, self._waits = self._waits, of_all.waits()
            waits = ((seconds - before.get(k, 0.0), k) for k, seconds in self._waits.items())
            scalars["time/input_max"], scalars["time/input_max_host"] = max(waits)
        return scalars

    def took(self, seconds: float) -> None:
        """Notes how long a call has taken."""
        self._pace.took(seconds)

    def act(self) -> bool:
        """Whatever is due at this step, but evaluations; whether it was not stopped meanwhile.

        The metrics up to it are known to be finite.
        """
        train, step = self._train, self.step
        last = step >= train.steps
        if last or step % train.checkpoint_every == 0:
            self._save()
        return last or self.error is not None or self.shown()

    def shown(self, missing: bool = False) -> bool:
        """Draws the grid that is due at this step; whether it was not stopped meanwhile.

        Args:
          missing: draws it only if it is not there: an earlier life may not have come to it.
        """
        every = self._train.sample_every
        if not every or self.step % every or self.step >= self._train.steps:
            return True
        if missing and first_hosts(np.array(self._pictures.grid(self.step).exists())):
            return True
        try:
            with self._keeper.writing():
                self._sample()
        except Interrupted:
            return False
        return True

    def evaluated(self) -> bool:
        """Evaluates where that is due at this step; whether it was not stopped meanwhile."""
        step, every = self.step, self._train.evaluate_every
        if not every or (step < self._train.steps and step % every):
            return True
        results: dict[str, Measured] = {}
        try:
            with self._keeper.writing(), self._clock.phase("evaluate"):
                results = self._results(self._say, self._asked)
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
        if results:
            self._writer.scalars_once(step, {n: float(m) for n, m in results.items()} | errors)
        if best := self._new_best(results):
            both = {"ema_params": self.state.ema_params, "params": self.state.params}
            self._keeper.save_best(step, both, *best)
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
        chosen = results.get(self._train.keep_best)
        if chosen is None:
            return None
        value, protocol = float(chosen), digest(chosen.protocol, chosen.estimator)
        return (value, protocol) if self._keeper.beaten_by(value, chosen.better, protocol) else None

    def _save(self) -> None:
        notes = {**self._notes, "window": self._window.sums, "skipped": self._skipped}
        self._writer.flush()  # A checkpoint counts when the lines before it are there.
        try:
            self._keeper.save(self.step, self.state, notes)
        except NonFiniteError as error:
            self.error = error
        else:
            with self._keeper.writing():
                self.lives.update(self.step, at_once=True)

    def stop(self) -> None:
        """Saves what is not saved yet, and returns when it is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._keeper.saved != self.step:
            self._save()
        self._keeper.finish()

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
        samples = None
        try:
            with self._keeper.writing():
                samples = self._sample()
        finally:  # A checkpoint that is not there is worse than a picture.
            self.stop()
        if samples is not None and self._first_host:
            with self._keeper.writing():
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
