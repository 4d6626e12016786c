"""What a run shows of itself: grids of samples on the way, the figure at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddpm_jax import figures, files
from ddpm_jax.generation import GRID_IMAGES, compile_sampler, padded_batch
from ddpm_jax.interruption import Interrupted
from ddpm_jax.parallel import to_host
from ddpm_jax.runs import RunDirectory
from ddpm_jax.sampling import Samples
from ddpm_jax.schedules import spaced
from ddpm_jax.training.job import Job

PATH_TIMES = 10  # Times of the reverse process in figures/training.png.
PATH_SAMPLES = 6


class Pictures:
    """Samples of a run's moving average, always from the same noise, in a program compiled once."""

    def __init__(self, job: Job, directory: RunDirectory, stop: Callable[[], bool]):
        """Nothing is compiled yet.

        Args:
          stop: whether to stop, asked before each batch of samples.
        """
        self._job, self._directory, self._stop = job, directory, stop
        self._sampler: Callable[..., Any] | None = None

    def sample(self, ema_params: Any) -> Samples:
        """At most GRID_IMAGES images, and x̂_0 over time of the first PATH_SAMPLES, on every host.

        Raises:
          Interrupted: `stop` said so.
        """
        job, config = self._job, self._job.config
        count = min(config.sample.count, GRID_IMAGES)
        if self._sampler is None:
            self._sampler = compile_sampler(
                job.layout,
                job.task.process,
                job.task.model,
                config,
                job.sharding.ema_params,
                self._path_indices(),
            )
        batch = padded_batch(min(config.sample.batch_size, count), job.layout)
        drawn = []
        for start in range(0, count, batch):
            if self._stop():
                raise Interrupted("stopped before all samples were drawn")
            of_batch = self._sampler(ema_params, jnp.arange(start, start + batch))
            drawn.append(jax.tree.map(to_host, of_batch))
        images = np.concatenate([part.images for part in drawn])[:count]
        return Samples(images, drawn[0].x0_path[:, :PATH_SAMPLES][:, :count])

    def save_grid(self, step: int, samples: Samples) -> np.ndarray:
        """Writes the grid of a step on the first host, and returns it, uint8 [h, w, c]."""
        picture = figures.grid(samples.images)
        if jax.process_index() == 0:
            figures.save_png(self.grid(step), picture)
        return picture

    def save_figure(self, records: list[dict[str, Any]], samples: Samples) -> None:
        """Writes the figure of the loss, from lines of metrics, and of x̂_0 over time."""
        rows = samples.x0_path.swapaxes(0, 1)
        path = figures.grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
        trained = spaced(self._job.config.diffusion.num_steps, self._chain_length())
        times = [int(trained[index - 1]) for index in self._path_indices()]
        files.replace(self.figure, figures.training_figure(records, path, times))

    def drawn(self, step: int) -> bool:
        """Whether the figure is there, drawn after the grid of this last step."""
        figure, grid = self.figure, self.grid(step)
        both = figure.exists() and grid.exists()
        return both and files.mtime(figure) >= files.mtime(grid)

    @property
    def figure(self) -> epath.Path:
        """Where the figure is."""
        return self._directory.figures / "training.png"

    def grid(self, step: int) -> epath.Path:
        """Where the grid of a step is."""
        return self._directory.samples / f"step_{step:08d}.png"

    def _chain_length(self) -> int:
        return self._job.config.sample.steps or self._job.config.diffusion.num_steps

    def _path_indices(self) -> list[int]:
        """The indices of the chain at which the figure shows x̂_0, from its length down."""
        length = self._chain_length()
        return spaced(length, min(PATH_TIMES, length))[::-1].tolist()
