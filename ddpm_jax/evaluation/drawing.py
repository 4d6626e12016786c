"""The samples that evaluators look at: drawn once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ddpm_jax import generation
from ddpm_jax.evaluation import cost
from ddpm_jax.parallel import first_hosts
from ddpm_jax.runs import Run, RunDirectory, image_shape


@dataclasses.dataclass
class Drawer:
    """Draws `run.config.sample.count` samples of a run's parameters, in a program compiled once.

    The last ones are kept, for the next evaluator of the same step.
    """

    say: Callable[[str], None]
    _sampler: Callable[..., generation.Drawn] | None = None
    _last: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(
        self, run: Run, directory: RunDirectory | None, stop: Callable[[], bool] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images [n, h, w, c], and the share of each that was outside [−1, 1].

        Args:
          directory: of the run, where they are kept or are already; None keeps them nowhere.
          stop: see `parts.collect`.
        """
        if self._last is None or self._last[0] is not run.params:
            self._last = run.params, self._draw(run, directory, stop)
        return self._last[1]

    def _draw(
        self, run: Run, directory: RunDirectory | None, stop: Callable[[], bool] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        how = run.config.sample
        there = directory is not None and generation.target(run, directory.samples).exists()
        if not first_hosts(np.array(there)):
            self._prepare(run)
        if directory is None:
            batch = generation.padded_batch(min(how.batch_size, how.count), run.layout)
            drawn = generation.draw(
                self._sampler, run.params, how.count, batch, self.say, stop=stop
            )
            return drawn["images"], drawn["outside"]
        path = generation.generate(run, directory.samples, self.say, self._sampler, stop)
        return generation.load_images(path)[0], generation.load_outside(path)

    def _prepare(self, run: Run) -> None:
        if self._sampler is not None:
            return
        how = run.config.sample
        batch = generation.padded_batch(min(how.batch_size, how.count), run.layout)
        steps = (how.steps or run.config.diffusion.num_steps) * -(-how.count // batch)
        shape = (batch, *image_shape(run.config))
        what = f"{how.count:,} samples"
        cost.announce(what, run.layout, run.apply, run.params, shape, steps, self.say)
        self._sampler = generation.compile_sampler(
            run.layout, run.process, run.model, run.config, run.params_sharding
        )
